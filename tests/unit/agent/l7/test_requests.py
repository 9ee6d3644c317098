"""Requests through a real Envoy with generated configuration, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from agent.l7 import names
from agent.l7.snapshot import build
from agent.model import (
    Action,
    Backend,
    HeaderEdit,
    MatchKind,
    Operation,
    Policy,
    PolicyRule,
    Retry,
    Route,
    RouteMatch,
    Service,
    Snapshot,
    Source,
    StringMatch,
    Workload,
)
from tests.ports import free_ports
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7.harness import Answer

CALLER = harness.workload("caller", "10.0.0.1")


@contextlib.contextmanager
def backends(**behaviours: harness.Behaviour) -> Iterator[dict[str, int]]:
    """A server for each name; the port of each."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(harness.http_server(name, "127.0.0.1", behaviour=behaviour)).server_address[1]
            for name, behaviour in behaviours.items()
        }


def plain(_: BaseHTTPRequestHandler) -> int:
    return 200


def through_envoy(directory: Path, snapshot: Snapshot, ports: Sequence[int], work: Callable[[], list[Answer]]) -> list[Answer]:
    """Run `work` while a real Envoy serves the caller's listener on `ports`."""
    resources = build(snapshot, [harness.local(snapshot.workloads[CALLER.name])], trust_domain=harness.TRUST_DOMAIN)

    async def scenario() -> list[Answer]:
        async with harness.waypoint(harness.config(directory)) as (server, _):
            await harness.applied(server, harness.on_loopback(resources, *ports))
            return await asyncio.to_thread(work)

    return asyncio.run(scenario())


def pod(name: str, service: str, port: int, target: int, **more: tuple[str, ...]) -> Workload:
    return harness.workload(name, "127.0.0.1", backing={f"default/{service}": {port: target}}, **more)  # type: ignore[arg-type]


def to(service: str, port: int, weight: int = 1, **more: HeaderEdit) -> Backend:
    return Backend(f"default/{service}", port, weight, **more)  # type: ignore[arg-type]


def scene(workloads: Sequence[Workload], services: Sequence[Service], *routes: Route, policies: Sequence[Policy] = ()) -> Snapshot:
    return harness.snapshot([CALLER, *workloads], services, routes, policies)


def path(kind: MatchKind, value: str) -> RouteMatch:
    return RouteMatch(path=StringMatch(kind, value))


def test_the_most_specific_match_wins_and_no_match_is_404(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    wanted = {
        "exact": path(MatchKind.EXACT, "/shop/cart"),
        "long": path(MatchKind.PREFIX, "/shop/cart/"),
        "method": RouteMatch(path=StringMatch(MatchKind.PREFIX, "/shop"), method="POST"),
        "header": RouteMatch(path=StringMatch(MatchKind.PREFIX, "/shop"), headers=(("x-user", StringMatch(MatchKind.EXACT, "tom")),)),
        "query": RouteMatch(path=StringMatch(MatchKind.PREFIX, "/shop"), query=(("q", StringMatch(MatchKind.PRESENT, "")),)),
        "short": path(MatchKind.PREFIX, "/shop"),
        "regex": path(MatchKind.REGEX, "/v[0-9]+/.*"),
    }
    with backends(**dict.fromkeys(wanted, plain)) as targets:
        services = [harness.service("shop", "127.0.0.1", entry), *(harness.service(n, "10.96.0.9", 80, waypoint=False) for n in wanted)]
        rules = [harness.rule(to(name, 80), matches=(match,)) for name, match in reversed(wanted.items())]
        snapshot = scene(
            [pod(f"p-{name}", name, 80, target) for name, target in targets.items()], services, harness.route("r", *rules, parent="shop")
        )
        answers = through_envoy(
            tmp_path,
            snapshot,
            [entry],
            lambda: [
                harness.request(entry, "/shop/cart"),
                harness.request(entry, "/shop/cart/1"),
                harness.request(entry, "/shop", "POST", {"x-user": "tom"}),
                harness.request(entry, "/shop?q=1", headers={"x-user": "tom"}),
                harness.request(entry, "/shop/x?q=1"),
                harness.request(entry, "/shop/x"),
                harness.request(entry, "/v2/x"),
                harness.request(entry, "/shopping"),
            ],
        )
    assert [answer.name for answer in answers] == ["exact", "long", "method", "header", "query", "short", "regex", ""]
    assert answers[-1].status == 404
    assert answers[-1].headers[names.REASON_HEADER] == "no-route"
    assert names.DESTINATION_HEADER not in answers[0].seen["headers"]


def test_hostnames_choose_rules_before_paths_do(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    with backends(exact=plain, wild=plain, open=plain) as targets:
        services = [harness.service("s", "127.0.0.1", entry), *(harness.service(n, "10.96.0.9", 80, waypoint=False) for n in targets)]
        routes = [
            harness.route("open", harness.rule(to("open", 80), matches=(path(MatchKind.EXACT, "/x"),)), parent="s"),
            harness.route("wild", harness.rule(to("wild", 80)), parent="s", hostnames=("*.test",)),
            harness.route("exact", harness.rule(to("exact", 80)), parent="s", hostnames=("a.test",)),
        ]
        snapshot = scene([pod(f"p-{n}", n, 80, target) for n, target in targets.items()], services, *routes)
        answers = through_envoy(
            tmp_path,
            snapshot,
            [entry],
            lambda: [harness.request(entry, "/x", headers={"host": host}) for host in ("a.test", f"a.test:{entry}", "b.test", "elsewhere")],
        )
    assert [answer.name for answer in answers] == ["exact", "exact", "wild", "open"]


def test_weights_hold_and_zero_gets_nothing(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    count = 601
    with backends(v1=plain, v2=plain, v3=plain) as targets:
        services = [harness.service("s", "127.0.0.1", entry), *(harness.service(n, "10.96.0.9", 80, waypoint=False) for n in targets)]
        rule = harness.rule(to("v1", 80, 80), to("v2", 80, 20), to("v3", 80, 0))
        snapshot = scene([pod(f"p-{n}", n, 80, t) for n, t in targets.items()], services, harness.route("r", rule, parent="s"))
        answers = through_envoy(tmp_path, snapshot, [entry], lambda: [harness.request(entry) for _ in range(count)])
    got = [answer.name for answer in answers]
    assert got.count("v3") == 0
    # Binomial(601, 0.2): mean 120, standard deviation 9.8; six of them make a false alarm a one in 10^8 event.
    assert abs(got.count("v2") - 120.2) < 59
    assert got.count("v1") + got.count("v2") == count


def test_answers_of_the_waypoint_itself_say_why(tmp_path: Path) -> None:
    empty, zero, invalid, gone = free_ports(4)
    services = [harness.service(name, "127.0.0.1", port) for name, port in (("empty", empty), ("zero", zero), ("invalid", invalid))]
    routes = [
        harness.route("zero", harness.rule(to("empty", empty, 0)), parent="zero"),
        harness.route("invalid", harness.rule(Backend("default/nowhere", 80, 1, invalid="no such service")), parent="invalid"),
    ]
    snapshot = scene([harness.workload("late", "127.0.0.1", backing={"default/empty": {empty: 1}}, ready=False)], services, *routes)
    answers = through_envoy(
        tmp_path, snapshot, [empty, zero, invalid, gone], lambda: [harness.request(port) for port in (empty, zero, invalid, gone)]
    )
    assert [(answer.status, answer.headers[names.REASON_HEADER]) for answer in answers] == [
        (503, "no-ready-backend"),
        (500, "no-backend"),
        (500, "invalid-backend"),
        (404, "no-route"),
    ]


def test_a_retry_goes_to_another_backend(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    failures = itertools.count()

    def failing(_: BaseHTTPRequestHandler) -> int:
        next(failures)
        return 503

    with backends(bad=failing, good=plain) as targets:
        retrying = harness.route("r", harness.rule(to("s", entry), retry=Retry(1, (503,), 1)), parent="s")
        snapshot = scene([pod(n, "s", entry, t) for n, t in targets.items()], [harness.service("s", "127.0.0.1", entry)], retrying)
        answers = through_envoy(tmp_path, snapshot, [entry], lambda: [harness.request(entry) for _ in range(53)])
    assert {(answer.status, answer.name) for answer in answers} == {(200, "good")}
    assert next(failures) > 5, "the failing backend was asked first often enough"


def test_timeouts_are_those_of_the_route_and_none_means_none(tmp_path: Path) -> None:
    limited, open_ended = free_ports(2)
    release = threading.Event()

    def slow(_: BaseHTTPRequestHandler) -> int:
        release.wait(1)
        return 200

    with backends(limited=slow, open=slow) as targets:
        services = [harness.service("limited", "127.0.0.1", limited), harness.service("open", "127.0.0.1", open_ended)]
        workloads = [pod("a", "limited", limited, targets["limited"]), pod("b", "open", open_ended, targets["open"])]
        route = harness.route("r", harness.rule(to("limited", limited), timeout_ms=5000, try_ms=101), parent="limited")
        answers = through_envoy(
            tmp_path,
            scene(workloads, services, route),
            [limited, open_ended],
            lambda: [harness.request(limited), harness.request(open_ended)],
        )
        release.set()
    assert [answer.status for answer in answers] == [504, 200]
    assert answers[0].headers[names.REASON_HEADER] == "timeout"


def test_header_edits_of_rule_and_backend_apply_and_percent_signs_are_text(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    with backends(s=plain) as targets:
        edit = HeaderEdit({"x-set": "100%", "host": "other.test"}, {"x-add": "b"}, ("x-gone",))
        backend = to("s", entry, request_headers=HeaderEdit({"x-backend": "1"}), response_headers=HeaderEdit({}, {"x-out": "%REQ(:path)%"}))
        route = harness.route("r", harness.rule(backend, request=edit), parent="s")
        snapshot = scene([pod("p", "s", entry, targets["s"])], [harness.service("s", "127.0.0.1", entry)], route)
        sent = {"x-set": "old", "x-add": "a", "x-gone": "1"}
        [answer] = through_envoy(tmp_path, snapshot, [entry], lambda: [harness.request(entry, headers=sent)])
    seen = answer.seen["headers"]
    assert (seen["x-set"], seen["x-backend"], seen["host"]) == ("100%", "1", "other.test")
    assert "x-gone" not in seen
    assert answer.headers["x-out"] == "%REQ(:path)%"


@pytest.mark.parametrize("weighted", [False, True], ids=["one backend", "weighted backends"])
def test_policies_are_enforced_by_caller_method_path_and_host(tmp_path: Path, weighted: bool) -> None:
    [entry] = free_ports(1)
    allow = Policy(
        "default/allow",
        Action.ALLOW,
        (
            PolicyRule((Source(service_accounts=("default/caller",)),), (Operation(methods=("GET",)),)),
            PolicyRule((Source(principals=("mesh.test/ns/default/sa/somebody",)),)),
        ),
    )
    deny = Policy("default/deny", Action.DENY, (PolicyRule(operations=(Operation(paths=("/admin*",)), Operation(hosts=("secret.test",)))),))
    with backends(s=plain) as targets:
        workload = pod("p", "s", entry, targets["s"], policies=("default/allow", "default/deny"))
        split = harness.route("r", harness.rule(to("s", entry, 1), to("s", entry, 1)), parent="s")
        routes = [split] if weighted else []
        snapshot = scene([workload], [harness.service("s", "127.0.0.1", entry)], *routes, policies=[allow, deny])
        answers = through_envoy(
            tmp_path,
            snapshot,
            [entry],
            lambda: [
                harness.request(entry, "/shop"),
                harness.request(entry, "/shop", "POST"),
                harness.request(entry, "/admin/x"),
                harness.request(entry, "//shop/../admin"),
                harness.request(entry, "/shop%2f..%2fadmin"),
                harness.request(entry, "/shop", headers={"host": "SECRET.test.:80"}),
                harness.request(entry, "/shop", headers={"mesh.source.service_account": "default/somebody"}),
            ],
        )
    assert [answer.status for answer in answers] == [200, 403, 403, 403, 307, 403, 200]
    assert answers[1].headers[names.REASON_HEADER] == "authorization-policy"
    assert answers[4].headers["location"] == "/admin"


def test_an_allow_for_somebody_else_stops_the_caller(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    policy = Policy("default/p", Action.ALLOW, (PolicyRule((Source(namespaces=("elsewhere", "def")),), (Operation(methods=("GET",)),)),))
    with backends(s=plain) as targets:
        workload = pod("p", "s", entry, targets["s"], policies=("default/p",))
        snapshot = scene([workload], [harness.service("s", "127.0.0.1", entry)], policies=[policy])
        [answer] = through_envoy(tmp_path, snapshot, [entry], lambda: [harness.request(entry)])
    assert answer.status == 403


@pytest.mark.parametrize(
    ("action", "source", "status"),
    [
        pytest.param(Action.ALLOW, Source(labels=(("app", "caller"),)), 200, id="allow-own-label"),
        pytest.param(Action.ALLOW, Source(labels=(("app", "other"),)), 403, id="allow-other-label"),
        pytest.param(Action.DENY, Source(labels=(("app", "caller"),)), 403, id="deny-own-label"),
        pytest.param(Action.DENY, Source(labels=(("app", "other"),)), 200, id="deny-other-label"),
        pytest.param(Action.ALLOW, Source(ip_blocks=("10.0.0.0/24",)), 200, id="allow-own-block"),
        pytest.param(Action.DENY, Source(not_ip_blocks=("10.0.0.0/24",)), 200, id="deny-other-blocks"),
        pytest.param(Action.AUDIT, Source(labels=(("app", "caller"),)), 200, id="audit"),
    ],
)
def test_labels_and_addresses_of_the_calling_workload_are_conditions(tmp_path: Path, action: Action, source: Source, status: int) -> None:
    [entry] = free_ports(1)
    policy = Policy("default/p", action, (PolicyRule((source,), (Operation(methods=("GET",)),)),))
    caller = dataclasses.replace(CALLER, labels={"app": "caller"})
    with backends(s=plain) as targets:
        workload = pod("p", "s", entry, targets["s"], policies=("default/p",))
        snapshot = harness.snapshot([caller, workload], [harness.service("s", "127.0.0.1", entry)], policies=[policy])
        [answer] = through_envoy(tmp_path, snapshot, [entry], lambda: [harness.request(entry)])
    assert answer.status == status


def test_requests_are_shared_by_weight(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    with backends(heavy=plain, light=plain) as targets:
        workloads = [
            dataclasses.replace(pod(name, "s", entry, targets[name]), weight=weight) for name, weight in (("heavy", 9), ("light", 1))
        ]
        snapshot = scene(workloads, [harness.service("s", "127.0.0.1", entry)])
        answers = through_envoy(tmp_path, snapshot, [entry], lambda: [harness.request(entry) for _ in range(100)])
    assert 80 <= sum(answer.name == "heavy" for answer in answers) <= 97
