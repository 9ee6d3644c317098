"""Requests as metrics: through a real Envoy, and the sums that are shown."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.l7.snapshot import build
from agent.model import Action, Backend, MatchKind, Operation, Policy, PolicyRule, Retry, RouteMatch, Service, StringMatch
from agent.requests import ANSWER_LABELS, SILENCE_S, Requests, Sums, parse
from tests.ports import free_ports
from tests.unit.agent.l7 import harness

CALLS = 23
FLUSH_S = 5.0
"""Envoy merges its threads' histograms so often (stats_flush_interval)."""
CALLER = harness.workload("caller", "10.0.0.1")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    return {(s.name, frozenset(s.labels.items())): s.value for family in text_string_to_metric_families(text) for s in family.samples}


def total(found: Samples, name: str, **labels: str) -> float:
    return sum(value for (n, have), value in found.items() if n == name and labels.items() <= have)


def page(requests: Requests) -> str:
    return "".join(requests.text())


def test_a_real_envoy_counts_by_caller_workload_route_and_code(tmp_path: Path) -> None:
    [entry] = free_ports(1)

    def behaviour(request: BaseHTTPRequestHandler) -> int:
        return 503 if request.path.startswith("/fail") else 200

    with harness.http_server("cart", "127.0.0.1", behaviour=behaviour) as server:
        target = server.server_address[1]
        pod = harness.workload("cart-1", "127.0.0.1", backing={"default/cart": {entry: target}}, policies=("default/no-admin",))
        policy = Policy("default/no-admin", Action.DENY, (PolicyRule((), (Operation(paths=("/admin",)),)),))
        retried = harness.rule(Backend("default/cart", entry, 1), retry=Retry(2, (503,), 1), name="retried")
        routed = RouteMatch(path=StringMatch(MatchKind.PREFIX, "/"), method="GET")
        snapshot = harness.snapshot(
            [CALLER, pod],
            [harness.service("cart", "127.0.0.1", entry)],
            [harness.route("r", harness.rule(*retried.backends, matches=(routed,), retry=retried.retry, name="retried"), parent="cart")],
            [policy],
        )
        settings = harness.config(tmp_path)
        requests = Requests(settings.envoy_admin_socket, lambda: snapshot.services)

        def work() -> tuple[str, str]:
            for _ in range(CALLS):
                assert harness.request(entry, "/items").status == 200
            assert harness.request(entry, "/fail").status == 503
            assert harness.request(entry, "/admin").status == 403
            assert harness.request(entry, "/", "DELETE").status == 404
            first = page(requests)
            time.sleep(FLUSH_S + 0.5)
            return first, page(requests)

        async def scenario() -> tuple[str, str]:
            resources = build(snapshot, [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN)
            async with harness.waypoint(settings) as (xds, _):
                await harness.applied(xds, harness.on_loopback(resources, entry))
                return await asyncio.to_thread(work)

        first, text = asyncio.run(scenario())
    assert total(samples(first), "mesh_requests_total") == CALLS + 3
    found = samples(text)
    ends = {"source_workload": "caller", "source_namespace": "default", "destination_service": "default/cart", "direction": "outbound"}
    answered = {
        **ends,
        "destination_workload": "cart-1",
        "destination_namespace": "default",
        "route": "default/r retried",
        "port": str(entry),
    }
    assert total(found, "mesh_requests_total", **answered, response_code="200", security_policy="none") == CALLS
    assert total(found, "mesh_requests_total", **answered, response_code="503", response_flags="URX") == 1
    assert total(found, "mesh_requests_total", **ends, route="default/r retried", destination_workload="", response_code="403") == 1
    assert total(found, "mesh_requests_total", **ends, route="", response_code="404", response_flags="NR") == 1
    assert total(found, "mesh_request_duration_seconds_count", **answered) == CALLS + 1
    assert 0 < total(found, "mesh_request_duration_seconds_sum", **answered) < 5
    assert total(found, "mesh_request_duration_seconds_bucket", **answered, le="+Inf") == CALLS + 1
    assert total(found, "mesh_response_bytes_total", destination_service="default/cart") > CALLS
    assert total(found, "mesh_request_retries_total", destination_service="default/cart") == 2
    assert total(found, "mesh_endpoints_healthy", destination_service="default/cart") == 1
    assert total(found, "mesh_waypoint_stats_up") == 1
    assert total(found, "mesh_waypoint_memory_bytes") > 1 << 20
    assert {name for name, _ in found if "timestamp" in name} == set()
    _check_with_promtool(text)


def _check_with_promtool(text: str) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: scripts/setup dev installs Debian's prometheus"
    run = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def line(kind: str, key: str, value: float) -> str:
    return f'envoy_mesh_{kind}{{k="{key}"}} {value}'


PAIR = "outbound|default/a||10.96.0.1:80|default/b-1 mutual_tls|default/r rule 0"


def test_what_the_waypoint_says_is_read() -> None:
    buckets = [f'envoy_mesh_duration_bucket{{k="{PAIR}",le="{le}"}} {n}' for le, n in (("500", 3), ("+Inf", 23))]
    read = parse(
        [
            "# TYPE envoy_mesh_requests counter",
            line("requests", f"{PAIR}|200||-", 23),
            *buckets,
            line("duration_sum", PAIR, 2612.5),
            line("duration_count", PAIR, 23),
        ]
    )
    assert read.requests == {f"{PAIR}|200||-": (23,)}
    assert read.durations == {PAIR: (3, 23, 2612.5, 23)}


def test_names_are_made_when_somebody_asks(tmp_path: Path) -> None:
    services = {"default/b": Service("default/b", ("10.96.0.1", "fd00::1"), harness.service("b", "", 80).ports)}
    requests = Requests(tmp_path / "none", lambda: services)

    def ends(key: str) -> dict[str, str]:
        (found,) = text_string_to_metric_families(f"x{{{requests._answer(key)}}} 1\n")
        return dict(found.samples[0].labels)

    through = ends(f"{PAIR}|200|0|-")
    assert list(through) == list(ANSWER_LABELS)
    assert through["destination_service"] == "default/b"
    assert (through["destination_workload"], through["security_policy"], through["grpc_status"]) == ("b-1", "mutual_tls", "0")
    assert ends("outbound|default/a||[fd00::1]:80||-|503||UH")["destination_service"] == "default/b"
    direct = ends("outbound|default/a||10.0.0.9:80|default/b-1|-|200||-")
    assert (direct["destination_service"], direct["destination_workload"], direct["port"]) == ("", "b-1", "80")
    peer = ends("inbound|default/b-1|spiffe://mesh.local/ns/shop/sa/x|10.0.0.9:8080||x inbound|403||-")
    assert (peer["source_namespace"], peer["destination_workload"], peer["security_policy"]) == ("shop", "b-1", "mutual_tls")
    assert ends("inbound|default/b-1||10.0.0.9:8080||x|403||-")["source_namespace"] == "unknown"


@pytest.mark.parametrize(
    ("said", "shown"),
    [pytest.param("0", "0", id="ok"), pytest.param("16", "16", id="the-last"), pytest.param("99", "unknown", id="made-up"),
     pytest.param("", "", id="no-grpc"), pytest.param("-", "", id="none")],
)  # fmt: skip
def test_what_applications_choose_is_bounded(tmp_path: Path, said: str, shown: str) -> None:
    assert f'grpc_status="{shown}"' in Requests(tmp_path / "none", dict)._answer(f"{PAIR}|200|{said}|-")


def test_a_counter_never_falls_when_envoy_begins_anew() -> None:
    sums = Sums(str, "other", 10)
    sums.take({"a": (23.0,)})
    sums.take({"a": (5.0,)})
    assert sums.totals == {"a": (28.0,)}
    sums.take({"a": (7.0,)})
    assert sums.totals == {"a": (30.0,)}


def test_two_keys_of_one_name_are_added_and_one_may_go() -> None:
    sums = Sums(lambda key: key[0], "other", 10)
    sums.take({"a4": (23.0,), "a6": (7.0,)})
    sums.take({"a4": (24.0,)})
    assert sums.totals == {"a": (31.0,)}


def test_idle_series_are_removed() -> None:
    sums = Sums(str, "other", 10)
    sums.take({"a": (23.0,), "b": (7.0,)})
    sums.take({"b": (7.0,)})
    assert sums.totals == {"b": (7.0,)}
    sums.take({"b": (7.0,), "a": (1.0,)})
    assert sums.totals == {"a": (1.0,), "b": (7.0,)}


def test_too_many_series_are_counted_as_other_and_places_become_free() -> None:
    sums = Sums(str, "other", 2)
    sums.take({"a": (1.0,), "b": (2.0,), "c": (3.0,), "d": (4.0,)})
    assert (sums.totals, sums.folded) == ({"a": (1.0,), "b": (2.0,), "other": (7.0,)}, 2)
    sums.take({"b": (2.0,), "c": (5.0,), "d": (4.0,)})
    assert sums.totals == {"b": (2.0,), "other": (9.0,)}, "who is counted as other stays there"
    sums.take({"b": (2.0,), "c": (5.0,), "e": (1.0,)})
    assert sums.totals == {"b": (2.0,), "other": (10.0,)}, "other takes a place too"


@contextmanager
def silent(path: Path) -> Iterator[None]:
    """Somebody who accepts and says nothing, as a stopped Envoy does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield


def test_a_waypoint_that_says_nothing_costs_a_scrape_two_seconds_and_what_it_said_stays(tmp_path: Path) -> None:
    admin = tmp_path / "admin.sock"
    requests = Requests(admin, dict)
    requests._answers.take({f"{PAIR}|200||-": (23.0,)})
    with silent(admin):
        started = time.monotonic()
        found = samples(page(requests))
        assert SILENCE_S <= time.monotonic() - started < SILENCE_S + 1
    assert total(found, "mesh_waypoint_stats_up") == 0
    assert total(found, "mesh_requests_total", source_workload="a") == 23


def test_scrapes_at_one_time_count_nothing_twice(tmp_path: Path) -> None:
    requests = Requests(tmp_path / "none", dict)
    found: Callable[[], float] = lambda: total(samples(page(requests)), "mesh_requests_total")  # noqa: E731
    requests._answers.take({f"{PAIR}|200||-": (23.0,)})
    threads = [threading.Thread(target=found) for _ in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found() == 23
