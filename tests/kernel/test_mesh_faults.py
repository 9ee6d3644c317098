"""Parts that die under load: the agents, the controller, Envoy. Clients do not retry; whoever may not get in, never does."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.errors import StartFailed
from lab.lab import Lab
from tests.kernel import shop

pytestmark = pytest.mark.kernel

KILLS = 5
ENVOY_BACK_S = 3.0
START_S = 3.0
NODES = ("node-1", "node-2")
GOOD = (("frontend", "redis://redis:6379"), ("frontend", "http://cart/items"))
EVIL = (
    ("other", "redis://redis:6379"),  # denied by the kernel at the caller
    ("client", "redis://10.77.1.40:6379"),  # denied by the kernel at the receiver
    ("frontend", "http://cart/admin/counters"),  # denied by the waypoint
    ("client", "http://10.77.1.21:8080/items"),
)
DENIED = ({"EPERM"}, {"ECONNREFUSED"}, {"403"}, {"ECONNREFUSED"})
DENY_FRONTEND, DENY_NOBODY = (shop.DENY_FRONTEND.format(app=app) for app in ("redis", "nobody"))

FAILS_OPEN = """
apiVersion: v1
kind: Service
metadata: {name: fails-open, annotations: {meshagent.io/waypoint: "true", meshagent.io/fail-mode: open}}
spec:
  clusterIPs: ["10.96.0.90", "fd96::90"]
  ipFamilyPolicy: RequireDualStack
  selector: {app: frontend}
  ports: [{name: http, port: 80, targetPort: 8080, appProtocol: http}]
"""


@contextmanager
def unharmed(lab: Lab) -> Iterator[None]:
    """No call fails within the block, and no denied caller is let in."""
    with shop.loads(lab, *GOOD, *EVIL) as calls:
        yield
    assert [shop.outcomes(found).keys() for found in calls] == [{"PONG"}, {"200"}, *DENIED]
    assert min(map(len, calls)) > 11


def pids(lab: Lab) -> list[int]:
    return [shop.status(node.name)["waypoint"]["pid"] for node in lab.topology.nodes]


def connected(node: str) -> bool:
    return bool(shop.status(node)["controller"]["connected"])


def test_an_agent_that_is_killed_again_and_again_fails_no_request_and_lets_nobody_in(lab: Lab) -> None:
    programs, envoys = [shop.program_ids(node) for node in NODES], pids(lab)
    with unharmed(lab):
        for _ in range(KILLS):
            for node in NODES:
                lab.kill_agent(node)
            assert max(lab.start_agent(node) for node in NODES) < START_S
    assert [shop.program_ids(node) for node in NODES] == programs, "the pins were taken over"
    assert pids(lab) == envoys, "the running Envoy was adopted"
    assert [shop.samples(lab, node, "mesh_loader_seconds") for node in NODES] == [0, 0]
    assert [shop.status(node)["problems"] for node in NODES] == [[], []]


def test_an_agent_that_is_killed_while_it_starts_does_no_harm(lab: Lab) -> None:
    programs, envoys = shop.program_ids("node-1"), pids(lab)
    with unharmed(lab):
        lab.kill_agent("node-1")
        for delay in (0.1, 0.3, 0.5, 0.7, 0.9):
            with contextlib.suppress(StartFailed):  # not ready yet
                lab.start_agent("node-1", timeout=delay)
            lab.kill_agent("node-1")
        lab.start_agent("node-1")
    assert (shop.program_ids("node-1"), pids(lab)) == (programs, envoys)


def test_an_agent_that_is_killed_while_it_applies_changes_does_no_harm(lab: Lab) -> None:
    with unharmed(lab):
        for delay in (0.0, 0.05, 0.1, 0.2, 0.4):
            lab.apply(DENY_NOBODY)
            time.sleep(delay)  # any moment of the change will do
            lab.kill_agent("node-1")
            shop.delete(lab, DENY_NOBODY)
            lab.start_agent("node-1")
    lab.settle()
    assert shop.status("node-1")["problems"] == []


def test_an_agent_that_is_told_to_stop_leaves_everything_in_force(lab: Lab) -> None:
    programs, envoys = shop.program_ids("node-1"), pids(lab)
    with unharmed(lab):
        assert lab.stop_agent("node-1"), "by itself"
        assert shop.alive(envoys[0])
        for _ in range(3):
            assert "Operation not permitted" in shop.ping(lab, "other")
        lab.start_agent("node-1")
    assert (shop.program_ids("node-1"), pids(lab)) == (programs, envoys)


def test_a_trace_whose_agent_is_killed_ends_and_its_filter_goes_with_the_next_agent(lab: Lab) -> None:
    with shop.tracing("node-1", "frontend", "redis", "--duration", "60") as trace:
        lab.kill_agent("node-1")
        assert trace.wait(10) == 1
        assert trace.stderr is not None
        (line,) = trace.stderr.read().splitlines()
        assert line.startswith("Error: ")
        assert shop.filters("node-1")[1] > 0
    lab.start_agent("node-1")
    assert shop.filters("node-1") == (0, 0)


def test_a_controller_that_is_killed_harms_no_request_and_agents_follow_it_again_when_it_is_back(lab: Lab) -> None:
    with unharmed(lab):
        lab.controller_stop()
        shop.takes(lambda: not any(map(connected, NODES)), 2)
        for node in NODES:
            report = shop.status(node)
            assert report["ready"] is True
            (problem,) = report["problems"]
            assert "is away: the last good configuration" in problem
            assert shop.samples(lab, node, "mesh_controller_connected") == 0
        agents = [lab.agent_pid(node) for node in NODES]
        lab.controller_start()
        shop.takes(lambda: all(map(connected, NODES)), 10)
    with shop.applied(lab, DENY_FRONTEND):
        shop.takes(lambda: "Operation not permitted" in shop.ping(lab, "frontend"), 1)
    shop.takes(lambda: shop.ping(lab, "frontend") == "PONG", 1)
    assert [lab.agent_pid(node) for node in NODES] == agents


def test_an_agent_that_starts_without_the_controller_enforces_the_last_good_snapshot(lab: Lab) -> None:
    version = shop.status("node-1")["controller"]["version"]
    with unharmed(lab):
        lab.controller_stop()
        for node in NODES:
            lab.kill_agent(node)
            lab.start_agent(node)  # /readyz answers 200
        for node in NODES:
            report = shop.status(node)
            assert (report["ready"], report["controller"]["connected"], report["controller"]["version"]) == (True, False, version)
            assert any("is away: the last good configuration" in problem for problem in report["problems"])
        lab.controller_start()
        shop.takes(lambda: all(map(connected, NODES)), 10)
    assert [shop.status(node)["problems"] for node in NODES] == [[], []]
    with shop.applied(lab, DENY_FRONTEND):
        shop.takes(lambda: "Operation not permitted" in shop.ping(lab, "frontend"), 1)


def test_an_envoy_that_is_killed_refuses_l7_lets_nobody_by_and_is_back_soon(lab: Lab) -> None:
    before = pids(lab)[0]
    with shop.loads(lab, *GOOD, *EVIL) as calls:
        os.kill(before, signal.SIGKILL)
        took = shop.takes(lambda: (found := shop.status("node-1")["waypoint"])["ready"] and found["pid"] != before, ENVOY_BACK_S)
        shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items") == {"200": 1}, ENVOY_BACK_S - took)
    l4, l7, *evil = calls
    assert shop.outcomes(l4).keys() == {"PONG"}
    assert shop.outcomes(l7).keys() <= {"200", "ECONNREFUSED", "ECONNRESET", "RemoteDisconnected"}
    assert l7[-1].outcome == "200"
    failed = [call for call in l7 if call.outcome != "200"]
    assert not failed or failed[-1].started + failed[-1].seconds - failed[0].started < ENVOY_BACK_S
    closed = {"ECONNREFUSED", "ECONNRESET", "RemoteDisconnected"}
    for found, denied in zip(evil, DENIED, strict=True):
        assert shop.outcomes(found).keys() <= denied | closed
    assert shop.status("node-1")["problems"] == []


def test_a_service_that_fails_open_is_served_while_envoy_is_away_and_others_are_not(lab: Lab) -> None:
    """Its only endpoint is on the caller's node. Of 20 calls a second the one that Envoy had at that moment may be lost."""
    before = pids(lab)[0]

    def past() -> float:
        return shop.samples(lab, "node-1", "mesh_datapath_events_total", event="fail_open")

    with shop.applied(lab, FAILS_OPEN):
        shop.takes(lambda: shop.codes(lab, "other", "http://fails-open/healthz") == {"200": 1})
        assert past() == 0
        with shop.loads(lab, ("other", "http://fails-open/healthz"), ("frontend", "http://cart/items")) as calls:
            os.kill(before, signal.SIGKILL)
            shop.takes(lambda: (found := shop.status("node-1")["waypoint"])["ready"] and found["pid"] != before, ENVOY_BACK_S)
        opened, closed = (shop.outcomes(found) for found in calls)
        assert sum(opened.values()) - opened["200"] <= 1, opened
        assert closed["ECONNREFUSED"] > 0
        assert past() > 0
        shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items") == {"200": 1}, ENVOY_BACK_S)


def test_the_receivers_check_is_closed_without_envoy_and_works_with_the_next_one(lab: Lab) -> None:
    with shop.applied(lab, shop.ALL_MAY_READ):
        shop.takes(lambda: shop.codes(lab, "client", "http://10.77.1.21:8080/items") == {"200": 1})
        before = pids(lab)[0]
        arrived = shop.answered(lab, "cart-v1-1")["GET /flaky 503"]
        with shop.loads(lab, ("client", "http://10.77.1.21:8080/flaky")) as calls:
            os.kill(before, signal.SIGKILL)
            shop.takes(lambda: pids(lab)[0] not in {before, None} and shop.status("node-1")["waypoint"]["ready"], 2 * ENVOY_BACK_S)
            shop.takes(lambda: shop.codes(lab, "client", "http://10.77.1.21:8080/items") == {"200": 1}, ENVOY_BACK_S)
        assert shop.outcomes(calls[0]).keys() <= {"403", "ECONNREFUSED", "ECONNRESET", "RemoteDisconnected"}
        assert calls[0][-1].outcome == "403"
        assert shop.answered(lab, "cart-v1-1")["GET /flaky 503"] == arrived


def test_nothing_rare_was_counted_in_the_kernel(lab: Lab) -> None:
    for node in NODES:
        for event in (
            "stats_folded",
            "storage_failed",
            "flow_failed",
            "origdst_failed",
            "listener_failed",
            "verdict_folded",
            "event_dropped",
        ):
            assert shop.samples(lab, node, "mesh_datapath_events_total", event=event) == 0, event
