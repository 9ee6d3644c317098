"""TrafficPolicies through a real Envoy with generated configuration, on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from agent.l7 import latency, names, traffic
from agent.l7.clusters import Target
from agent.l7.resources import Resources
from agent.l7.snapshot import Builder, build
from agent.model import Action, Backend, Policy, PolicyRule, Retry, Snapshot, Source
from agent.requests import RATE_LIMITED
from agent.traffic import (
    Balancing,
    CheckKind,
    Fault,
    FaultCaller,
    HashOn,
    HealthCheck,
    Limits,
    LoadBalancing,
    Outliers,
    Per,
    RateLimit,
    TrafficPolicy,
)
from tests.ports import free_ports
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7.harness import Answer

CALLER = harness.workload("caller", "10.0.0.1")
OUTLIERS = Outliers(5, 3, 2, 1000, 2000, 10000, 50)
HTTP_CHECK = HealthCheck(CheckKind.HTTP, "/healthz", "", (200, 204), "", 1000, 500, 2, 1)
CALLERS = (FaultCaller(("a", "b"), ("a/x",)), FaultCaller((), tuple(f"a/{n}" for n in range(64))))
FAULTS = (
    Fault(CALLERS, (("x-a", "1", False), ("x-b", "v[0-9]", True)), 10, 500_000),
    Fault((), (("x-a", "1", False),), http_status=418, abort_ppm=1_000_000),
    Fault((), (), 0, 0, 0, 14, 100),
)
HASH_ON = (HashOn("header", "x"), HashOn("query", "q"), HashOn("cookie", "c", 5), HashOn("workload"))
RATES = (RateLimit(Per.SERVICE, 100, 1000, 100), *(RateLimit(per, 5, 60_000, 7) for per in Per))


def policy(**what: Any) -> TrafficPolicy:
    return TrafficPolicy("default/tp", (("default/web", 80),), **what)


def shop(*policies: TrafficPolicy, protocol: str = "http", count: int = 3, distribution: str = "") -> Snapshot:
    places = [("node-1", "z1"), ("node-2", "z1"), ("node-3", "z2")]
    pods = [
        dataclasses.replace(harness.workload(f"web-{n}", f"10.0.1.{n}", backing={"default/web": {80: 8080}}), node=node, zone=zone)
        for n, (node, zone) in enumerate(places[:count])
    ]
    service = dataclasses.replace(harness.service("web", "10.96.0.1", 80, protocol=protocol), traffic_distribution=distribution)
    model = harness.snapshot([dataclasses.replace(CALLER, zone="z1"), *pods], [service])
    return dataclasses.replace(model, traffic={one.name: one for one in policies})


def built(snapshot: Snapshot) -> Resources:
    return build(snapshot, [harness.local(snapshot.workloads[CALLER.name])], trust_domain=harness.TRUST_DOMAIN)


def priorities(snapshot: Snapshot) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for group in harness.decoded(built(snapshot), names.ENDPOINTS, "service/default/web/80").endpoints:
        found.setdefault(group.priority, []).extend(host.endpoint.address.socket_address.address for host in group.lb_endpoints)
    return [found[priority] for priority in sorted(found)]


@pytest.mark.parametrize(
    "what",
    [
        *(pytest.param({"balancing": LoadBalancing(kind, slow_start_ms=5000, choices=3)}, id=kind.name.lower()) for kind in list(Balancing)[:3]),
        *(
            pytest.param(
                {"balancing": LoadBalancing(kind, hash_on=HASH_ON, table_size=67, load_bound_percent=150)},
                id=kind.name.lower(),
            )
            for kind in list(Balancing)[3:]
        ),
        pytest.param({"balancing": LoadBalancing(panic_percent=0, slow_start_ms=1, slow_start_min_percent=5)}, id="panic"),
        pytest.param({"limits": Limits(1, 2, 3, 0, 5, None, None, 100, 200, 0)}, id="limits"),
        pytest.param({"limits": Limits(retry_percent=20, retry_min=0, grpc_deadline_ms=500)}, id="retry-budget"),
        pytest.param({"outliers": OUTLIERS}, id="outliers"),
        pytest.param({"faults": FAULTS}, id="faults"),
        pytest.param({"rate_limits": RATES}, id="rate-limits"),
        pytest.param({"request_kib": 100, "response_kib": 200}, id="bandwidth"),
    ],
)  # fmt: skip
def test_envoy_accepts_each_part_of_a_policy(tmp_path: Path, what: dict[str, Any]) -> None:
    harness.validate(built(shop(policy(**what))), tmp_path)


@pytest.mark.parametrize(
    ("check", "protocol"),
    [
        pytest.param(HTTP_CHECK, "http", id="http"),
        pytest.param(HTTP_CHECK, "h2c", id="http2"),
        pytest.param(dataclasses.replace(HTTP_CHECK, kind=CheckKind.GRPC, grpc_service="x"), "grpc", id="grpc"),
        pytest.param(dataclasses.replace(HTTP_CHECK, kind=CheckKind.GRPC), "http", id="grpc-without-http2"),
        pytest.param(dataclasses.replace(HTTP_CHECK, kind=CheckKind.TCP), "http", id="tcp"),
    ],
)
def test_envoy_accepts_health_checks(tmp_path: Path, check: HealthCheck, protocol: str) -> None:
    harness.validate(built(shop(policy(health_check=check), protocol=protocol)), tmp_path)


def test_a_policy_governs_its_own_ports_only() -> None:
    plain, governed = built(shop()), built(shop(policy(outliers=OUTLIERS, faults=FAULTS)))
    changed = {name for kind in plain for name in governed[kind] if plain[kind].get(name) != governed[kind][name]}
    assert changed == {"service/default/web/80"}
    elsewhere = TrafficPolicy("default/tp", (("default/other", 80), ("default/web", 81)), outliers=OUTLIERS)
    assert built(shop(elsewhere)) == plain


def test_a_change_of_policy_alone_is_seen() -> None:
    one, other = shop(policy(response_kib=100)), shop(policy(response_kib=200))
    builder = Builder("node-1", harness.TRUST_DOMAIN)
    local = [harness.local(one.workloads[CALLER.name])]
    builder.build(one, local, "z1")
    assert builder.build(other, local, "z1") == Builder("node-1", harness.TRUST_DOMAIN).build(other, local, "z1")


@pytest.mark.parametrize(
    ("prefer", "expected"),
    [
        pytest.param("PreferSameNode", [["10.0.1.0"], ["10.0.1.1"], ["10.0.1.2"]], id="node"),
        pytest.param("PreferSameZone", [["10.0.1.0", "10.0.1.1"], ["10.0.1.2"]], id="zone"),
        pytest.param("", [["10.0.1.0", "10.0.1.1", "10.0.1.2"]], id="none"),
    ],
)
def test_endpoints_are_ordered_by_what_is_preferred(prefer: str, expected: list[list[str]]) -> None:
    assert priorities(shop(policy(balancing=LoadBalancing(prefer=prefer)))) == expected


def test_a_traffic_distribution_is_priorities_only_where_health_is_known() -> None:
    assert priorities(shop(policy(limits=Limits(1)), distribution="PreferSameNode")) == [["10.0.1.0"]]
    assert priorities(shop(policy(outliers=OUTLIERS), distribution="PreferSameNode")) == [["10.0.1.0"], ["10.0.1.1"], ["10.0.1.2"]]


def test_who_is_asked_stays_with_its_endpoint_where_some_nodes_read_requests() -> None:
    level = tuple((Target(f"10.0.0.{i}", 80, read=i % 2 == 0), i > 1) for i in range(4))
    groups = traffic.endpoints("default/web", 80, [level]).endpoints
    assert [(group.locality.sub_zone, len(group.lb_endpoints)) for group in groups] == [("", 2), ("read", 2)]
    asked = {
        host.endpoint.address.socket_address.address: not host.endpoint.health_check_config.disable_active_health_check
        for group in groups
        for host in group.lb_endpoints
    }
    assert asked == {"10.0.0.0": False, "10.0.0.1": False, "10.0.0.2": True, "10.0.0.3": True}


def test_endpoints_are_asked_from_the_namespace_of_a_caller_that_policy_lets_in() -> None:
    def asked(snapshot: Snapshot) -> tuple[str, list[bool]]:
        resources = built(snapshot)
        bind = harness.decoded(resources, names.CLUSTER, "service/default/web/80").upstream_bind_config
        [group] = harness.decoded(resources, names.ENDPOINTS, "service/default/web/80").endpoints
        answers = [not host.endpoint.health_check_config.disable_active_health_check for host in group.lb_endpoints]
        return bind.source_address.network_namespace_filepath, answers

    snapshot = shop(policy(health_check=HTTP_CHECK))
    assert asked(snapshot) == (harness.OWN_NETNS, [True] * 3)
    deny = Policy("default/deny", Action.DENY, (PolicyRule((Source(namespaces=("default",)),)),))
    one = {**snapshot.workloads, "default/web-1": dataclasses.replace(snapshot.workloads["default/web-1"], policies=("default/deny",))}
    assert asked(dataclasses.replace(snapshot, workloads=one, policies={deny.name: deny})) == (harness.OWN_NETNS, [True, False, True])
    every = {name: dataclasses.replace(workload, policies=("default/deny",)) for name, workload in snapshot.workloads.items()}
    assert asked(dataclasses.replace(snapshot, workloads=every, policies={deny.name: deny})) == ("", [False] * 3)


@contextmanager
def servers(**behaviours: harness.Behaviour) -> Iterator[dict[str, int]]:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(harness.http_server(name, "127.0.0.1", behaviour=behaviour)).server_address[1]
            for name, behaviour in behaviours.items()
        }


def plain(_: BaseHTTPRequestHandler) -> int:
    return 200


def through_envoy(
    directory: Path, what: TrafficPolicy, targets: dict[str, int], work: Callable[[int], Any], retry: Retry | None = None
) -> tuple[Any, dict[str, int]]:
    """What `work(port)` returns while a real Envoy serves the port, and Envoy's counters afterwards. A server is an endpoint of `web`."""
    [entry] = free_ports(1)
    what = dataclasses.replace(what, targets=(("default/web", entry), ("default/backend", 80)))
    pods = [
        harness.workload(name, "127.0.0.1", backing={"default/web": {entry: port}, "default/backend": {80: port}})
        for name, port in targets.items()
    ]
    services = [harness.service("web", "127.0.0.1", entry), harness.service("backend", "10.96.0.9", 80, waypoint=False)]
    routes = []
    if retry is not None:
        routes = [harness.route("r", harness.rule(Backend("default/backend", 80, 1), retry=retry), parent="web")]
    snapshot = dataclasses.replace(harness.snapshot([CALLER, *pods], services, routes), traffic={what.name: what})
    resources = built(snapshot)

    async def scenario() -> tuple[Any, dict[str, int]]:
        async with harness.waypoint(harness.config(directory)) as (server, envoy):
            await harness.applied(server, harness.on_loopback(resources, entry))
            found = await asyncio.to_thread(work, entry)
            return found, await envoy.stats()

    return asyncio.run(scenario())


@pytest.mark.parametrize("kind", [Balancing.RING_HASH, Balancing.MAGLEV])
def test_a_hash_keeps_to_its_endpoint(tmp_path: Path, kind: Balancing) -> None:
    wanted = policy(balancing=LoadBalancing(kind, hash_on=(HashOn("header", "x-user"),)))
    with servers(a=plain, b=plain, c=plain) as targets:
        found, _ = through_envoy(
            tmp_path,
            wanted,
            targets,
            lambda port: {user: {harness.request(port, headers={"x-user": str(user)}).name for _ in range(5)} for user in range(37)},
        )
    assert all(len(seen) == 1 for seen in found.values())
    assert {name for seen in found.values() for name in seen} == {"a", "b", "c"}


def test_a_caller_without_the_cookie_is_given_one(tmp_path: Path) -> None:
    wanted = policy(balancing=LoadBalancing(Balancing.RING_HASH, hash_on=(HashOn("cookie", "session", 60_000),)))

    def work(port: int) -> tuple[Answer, set[str]]:
        first = harness.request(port)
        cookie = first.headers.get("set-cookie", "").partition(";")[0]
        return first, {harness.request(port, headers={"cookie": cookie}).name for _ in range(11)}

    with servers(a=plain, b=plain, c=plain) as targets:
        (first, again), _ = through_envoy(tmp_path, wanted, targets, work)
    assert first.headers["set-cookie"].startswith("session=")
    assert again == {first.name}


def test_round_robin_takes_turns(tmp_path: Path) -> None:
    with servers(a=plain, b=plain, c=plain) as targets:
        found, _ = through_envoy(
            tmp_path,
            policy(balancing=LoadBalancing(Balancing.ROUND_ROBIN)),
            targets,
            lambda port: Counter(harness.request(port).name for _ in range(30)),
        )
    # Each of Envoy's workers takes its own turns.
    assert all(8 <= count <= 12 for count in found.values()), found


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        # Two draws of two: the busy one is chosen only if both draws are it. Bounds are 5 standard deviations and more from 0.25 and from 0.5.
        pytest.param(Balancing.LEAST_REQUEST, 0.0, 0.375, id="least-request"),
        pytest.param(Balancing.RANDOM, 0.375, 0.625, id="random"),
    ],
)
def test_a_slow_endpoint_is_asked_less_by_who_looks_at_what_is_under_way(
    tmp_path: Path, kind: Balancing, least: float, most: float
) -> None:
    """Least request is what comes nearest to balancing by latency: requests under way are the rate times the time that each takes (Little's law)."""
    go_on = threading.Event()
    held = threading.Semaphore(0)

    def slow(request: BaseHTTPRequestHandler) -> int:
        if "x-slow" in request.headers:
            held.release()
            go_on.wait()
        return 200

    def work(port: int) -> Counter[str]:
        with ThreadPoolExecutor(100) as pool:
            try:
                for _ in range(3):  # requests under way at the slow one, however long it takes to find it
                    while not held.acquire(timeout=0.2):
                        pool.submit(harness.request, port, headers={"x-slow": "yes"})
                return Counter(harness.request(port).name for _ in range(400))
            finally:
                go_on.set()

    with servers(quick=plain, slow=slow) as targets:
        found, _ = through_envoy(tmp_path, policy(balancing=LoadBalancing(kind)), targets, work)
    assert found.total() == 400
    assert least <= found["slow"] / 400 <= most, found


@pytest.mark.parametrize(
    ("kind", "retry", "most"),
    [
        pytest.param(Balancing.LATENCY, None, 0.25, id="latency"),
        pytest.param(Balancing.LATENCY, Retry(1, (503,), 5), 0.25, id="latency-of-a-backend"),
        pytest.param(Balancing.LEAST_REQUEST, None, 0.75, id="least-request"),
    ],
)
def test_by_latency_a_slow_endpoint_is_asked_less_even_by_one_request_after_the_other(
    tmp_path: Path, kind: Balancing, retry: Retry | None, most: float
) -> None:
    def slow(_: BaseHTTPRequestHandler) -> int:
        time.sleep(0.05)
        return 200

    first: Counter[str] = Counter()

    def work(port: int) -> list[Answer]:
        until = time.monotonic() + 4 * latency.UPDATE_S
        while time.monotonic() < until:
            first[harness.request(port).name] += 1
            time.sleep(0.02)
        return [harness.request(port) for _ in range(115)]

    with servers(quick=plain, slow=slow) as targets:
        found, _ = through_envoy(tmp_path, policy(balancing=LoadBalancing(kind)), targets, work, retry)
    share = sum(answer.name == "slow" for answer in found) / len(found)
    assert most - 0.5 <= share <= most
    assert first.keys() == {"quick", "slow"}
    assert not [name for answer in found for name in answer.headers if "load" in name], "what the waypoint tells itself"


def test_more_than_the_limit_is_a_503_that_says_overload(tmp_path: Path) -> None:
    release = threading.Event()

    def slow(_: BaseHTTPRequestHandler) -> int:
        release.wait(5)
        return 200

    def work(port: int) -> list[Answer]:
        answers: list[Answer] = []
        threads = [threading.Thread(target=lambda: answers.append(harness.request(port))) for _ in range(7)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 5
        while len(answers) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        release.set()
        for thread in threads:
            thread.join()
        return answers

    with servers(a=slow) as targets:
        answers, _ = through_envoy(tmp_path, policy(limits=Limits(requests=2)), targets, work)
    assert Counter(answer.status for answer in answers) == {503: 5, 200: 2}
    assert {answer.headers[names.REASON_HEADER] for answer in answers if answer.status == 503} == {"overload"}


def test_an_endpoint_that_fails_is_ejected_and_comes_back_and_never_more_than_the_bound(tmp_path: Path) -> None:
    broken = {"a", "b"}

    def behaviour(name: str) -> harness.Behaviour:
        return lambda _: 500 if name in broken else 200

    def work(port: int) -> tuple[Counter[str], Counter[str], Counter[str]]:
        first = Counter(f"{answer.name} {answer.status}" for answer in (harness.request(port) for _ in range(60)))
        time.sleep(5 * traffic.MERGE_MS / 1000)
        ejected = Counter(f"{answer.name} {answer.status}" for answer in (harness.request(port) for _ in range(40)))
        broken.clear()
        deadline = time.monotonic() + 10
        back: Counter[str] = Counter()
        while len(back) < 4 and time.monotonic() < deadline:
            back = Counter(harness.request(port).name for _ in range(20))
        return first, ejected, back

    outliers = Outliers(3, 0, 0, 200, 2000, 10_000, 25)
    with servers(**{name: behaviour(name) for name in "abcd"}) as targets:
        (_, ejected, back), stats = through_envoy(
            tmp_path, policy(outliers=outliers, balancing=LoadBalancing(Balancing.ROUND_ROBIN)), targets, work
        )
    failing = {name for name in "ab" if ejected[f"{name} 500"]}
    assert len(failing) == 1, f"25 % of four endpoints is one: {ejected}"
    assert set(back) == {"a", "b", "c", "d"}
    [total] = [value for name, value in stats.items() if name.endswith("outlier_detection.ejections_enforced_total")]
    assert total >= 1


def test_a_retry_budget_bounds_retries(tmp_path: Path) -> None:
    def retries(port: int) -> list[int]:
        return [harness.request(port).status for _ in range(20)]

    with servers(a=lambda _: 503) as targets:
        _, free = through_envoy(tmp_path, policy(limits=Limits(retries=100)), targets, retries, Retry(3, (503,), 1))
        _, bound = through_envoy(tmp_path, policy(limits=Limits(retry_percent=0, retry_min=0)), targets, retries, Retry(3, (503,), 1))

    def total(stats: dict[str, int]) -> int:
        return sum(value for name, value in stats.items() if name.endswith("backend/80.upstream_rq_retry"))

    assert (total(free), total(bound)) == (60, 0)


def test_faults_go_by_header_and_by_caller(tmp_path: Path) -> None:
    faults = (
        Fault((FaultCaller((), ("other/x",)),), (), http_status=500, abort_ppm=1_000_000),
        Fault((FaultCaller(("default",), ("default/x", "default/caller")),), (("x-fault", "a[bc]", True),), http_status=418, abort_ppm=1_000_000),
        Fault((), (("x-delay", "yes", False),), delay_ms=300, delay_ppm=1_000_000),
        Fault((), (("x-grpc", "yes", False),), grpc_status=14, abort_ppm=1_000_000),
    )  # fmt: skip

    def work(port: int) -> tuple[list[Answer], float]:
        asked = [{}, {"x-fault": "ac"}, {"x-fault": "ad"}, {"x-grpc": "yes", "content-type": "application/grpc", "te": "trailers"}]
        answers = [harness.request(port, headers=headers) for headers in asked]
        started = time.monotonic()
        answers.append(harness.request(port, headers={"x-delay": "yes"}))
        return answers, time.monotonic() - started

    with servers(a=plain) as targets:
        (answers, seconds), _ = through_envoy(tmp_path, policy(faults=faults), targets, work)
    assert [answer.status for answer in answers] == [200, 418, 200, 200, 200]
    assert answers[1].headers[names.REASON_HEADER] == "fault-injection"
    assert answers[3].headers["grpc-status"] == "14"
    assert 0.28 <= seconds < 2


def test_a_share_of_requests_gets_the_fault(tmp_path: Path) -> None:
    count = 400
    with servers(a=plain) as targets:
        found, _ = through_envoy(
            tmp_path,
            policy(faults=(Fault(http_status=503, abort_ppm=250_000),)),
            targets,
            lambda port: Counter(harness.request(port).status for _ in range(count)),
        )
    # Binomial(400, 0.25): mean 100, standard deviation 8.7; six of them.
    assert abs(found[503] - 100) <= 52


def test_a_rate_limit_is_a_429_that_says_when_to_come_back(tmp_path: Path) -> None:
    with servers(a=plain) as targets:
        answers, stats = through_envoy(
            tmp_path,
            policy(rate_limits=(RateLimit(Per.WORKLOAD, 6, 60_000, 5), RateLimit(Per.SERVICE, 1000, 1000, 1000))),
            targets,
            lambda port: [harness.request(port) for _ in range(8)],
        )
    assert [answer.status for answer in answers] == [200] * 5 + [429] * 3
    assert (answers[-1].headers[names.REASON_HEADER], answers[-1].headers["retry-after"]) == ("rate-limit", "10")
    assert {name: value for name, value in stats.items() if name.endswith("rate_limited")} == {RATE_LIMITED: 3}


def test_bandwidth_is_what_was_asked_for(tmp_path: Path) -> None:
    size, rate = 3 << 20, 1024

    def work(port: int) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        started = time.monotonic()
        connection.request("POST", "/", body=b"x" * size)
        assert connection.getresponse().status == 200
        connection.close()
        return time.monotonic() - started

    def read(handler: BaseHTTPRequestHandler) -> int:
        handler.rfile.read(int(handler.headers["content-length"]))
        return 200

    with servers(a=read) as targets:
        seconds, _ = through_envoy(tmp_path, policy(request_kib=rate), targets, work)
    # One second's worth passes at once.
    assert abs((size / 1024 - rate) / seconds - rate) <= 0.15 * rate, seconds


def test_another_node_of_the_zone_takes_over_when_the_near_endpoint_fails(tmp_path: Path) -> None:
    failing = threading.Event()
    wanted = policy(balancing=LoadBalancing(prefer="PreferSameNode"), outliers=Outliers(2, 0, 0, 100, 60_000, 60_000, 100))

    def near(_: BaseHTTPRequestHandler) -> int:
        return 500 if failing.is_set() else 200

    def work(port: int) -> tuple[set[str], list[str]]:
        before = {harness.request(port).name for _ in range(11)}
        failing.set()
        first = [harness.request(port).name for _ in range(2)]
        time.sleep(5 * traffic.MERGE_MS / 1000)
        return before, first + [harness.request(port).name for _ in range(20)]

    [entry] = free_ports(1)
    with servers(near=near, far=plain) as targets:
        pods = [
            dataclasses.replace(harness.workload(name, "127.0.0.1", backing={"default/web": {entry: port}}), node=node)
            for (name, port), node in zip(targets.items(), ("node-1", "node-2"), strict=True)
        ]
        snapshot = harness.snapshot([CALLER, *pods], [harness.service("web", "127.0.0.1", entry)])
        resources = built(
            dataclasses.replace(snapshot, traffic={"default/tp": dataclasses.replace(wanted, targets=(("default/web", entry),))})
        )

        async def scenario() -> Any:
            async with harness.waypoint(harness.config(tmp_path)) as (server, _):
                await harness.applied(server, harness.on_loopback(resources, entry))
                return await asyncio.to_thread(work, entry)

        before, after = asyncio.run(scenario())
    assert before == {"near"}
    assert after[:2] == ["near"] * 2
    assert set(after[2:]) == {"far"}


def test_a_callers_grpc_deadline_is_kept_and_handed_on(tmp_path: Path) -> None:
    told: list[str] = []

    def slow(handler: BaseHTTPRequestHandler) -> int:
        told.append(handler.headers.get("grpc-timeout", ""))
        time.sleep(1)
        return 200

    def work(port: int) -> tuple[list[Answer], float]:
        started = time.monotonic()
        rpc = {"content-type": "application/grpc", "te": "trailers"}
        answers = [harness.request(port, headers={**rpc, "grpc-timeout": wanted}) for wanted in ("200m", "3600S")]
        return answers, time.monotonic() - started

    with servers(a=slow) as targets:
        (answers, seconds), _ = through_envoy(tmp_path, policy(limits=Limits(grpc_deadline_ms=500)), targets, work)
    assert [answer.headers["grpc-status"] for answer in answers] == ["4", "4"]
    assert 0.6 <= seconds < 1.6
    assert told == ["200m", "500m"]


@pytest.mark.parametrize(("percent", "expected"), [pytest.param(0, {503}, id="never"), pytest.param(None, {500}, id="default")])
def test_when_all_fail_the_panic_threshold_decides_whether_they_are_used(tmp_path: Path, percent: int | None, expected: set[int]) -> None:
    wanted = policy(outliers=Outliers(1, 0, 0, 60_000, 60_000, 60_000, 100), balancing=LoadBalancing(panic_percent=percent))

    def work(port: int) -> list[Answer]:
        for _ in range(10):
            harness.request(port)
        time.sleep(5 * traffic.MERGE_MS / 1000)
        return [harness.request(port) for _ in range(7)]

    with servers(a=lambda _: 500, b=lambda _: 500) as targets:
        answers, _ = through_envoy(tmp_path, wanted, targets, work)
    assert {answer.status for answer in answers} == expected
    assert {answer.headers.get(names.REASON_HEADER) for answer in answers} == ({"no-ready-backend"} if percent == 0 else {None})


def test_a_connection_ends_after_so_many_requests(tmp_path: Path) -> None:
    with servers(a=plain) as targets:
        ports, _ = through_envoy(
            tmp_path,
            policy(limits=Limits(requests_per_connection=3)),
            targets,
            lambda port: Counter(harness.request(port).seen["port"] for _ in range(12)),
        )
    assert max(ports.values()) <= 3
