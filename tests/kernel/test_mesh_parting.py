"""A service, or a workload, that needs the waypoint no more while applications have kept connections through it: every request is answered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.lab import Lab
from tests.kernel import shop
from tests.kernel.test_mesh_kept import HEALTH_ONLY, keeping, outcomes

pytestmark = pytest.mark.kernel

ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: frontend}
spec:
  parentRefs: [{group: "", kind: Service, name: frontend, port: 80}]
  rules: [{backendRefs: [{name: frontend, port: 80}]}]
"""
SERVICE, ADDRESS = "http://frontend/healthz", "http://10.77.1.10:8080/healthz"
NODE = "node-1"
BOUND_S = 15.0
"""What it takes from `delete` on until nobody who asks does so through the waypoint: two looks (agent.supervisor.PARTING_S) and two requests."""


def through_waypoint(lab: Lab) -> int:
    """Connections of applications to the waypoint's outbound listener, in the namespace of a caller."""
    return len(lab.exec("other", ["ss", "-Htn", "state", "established", "dport = :15001"], check=True).stdout.splitlines())


@contextmanager
def routed(lab: Lab, document: str) -> Iterator[None]:
    """What makes the waypoint needed, until the block deletes it."""
    with shop.changed(lab):
        lab.apply(document)
    shop.takes(lambda: shop.codes(lab, "other", SERVICE) == {"200": 1})
    time.sleep(3)  # then Envoy has let go of what nobody read
    assert _known(lab)
    yield


def deleted(lab: Lab, document: str) -> float:
    """Delete it; when that was done (CLOCK_MONOTONIC)."""
    with shop.changed(lab):
        shop.delete(lab, document)
    return time.monotonic()


@pytest.mark.parametrize(
    ("document", "url"),
    [
        pytest.param(ROUTE, SERVICE, id="last-route"),
        pytest.param(HEALTH_ONLY, SERVICE, id="last-policy"),
        pytest.param(HEALTH_ONLY, ADDRESS, id="last-policy-of-who-is-dialled-by-address"),
    ],
)
def test_who_keeps_connections_through_the_waypoint_is_answered_and_leaves_it(lab: Lab, document: str, url: str) -> None:
    with routed(lab, document), keeping(lab, "other", "get", "10", "200", url) as calls:
        time.sleep(1)
        assert through_waypoint(lab) == 10
        at = deleted(lab, document)
        took = shop.takes(lambda: through_waypoint(lab) == 0, BOUND_S, pause=0.2)
        time.sleep(2)
    print(f"{len(calls)} requests; nobody is connected through the waypoint {took:.1f} s after the deletion")
    assert outcomes(calls).keys() == {"200"}, outcomes(calls)
    assert len([call for call in calls if call.at > at]) > 300
    assert sum(call.connection >= 10 for call in calls) > 100  # over connections that lead past it
    shop.takes(lambda: not _known(lab))


def test_an_agent_that_starts_meanwhile_knows_who_is_still_connected(lab: Lab) -> None:
    with routed(lab, ROUTE), keeping(lab, "other", "get", "10", "2", SERVICE) as calls:
        shop.takes(lambda: through_waypoint(lab) == 10)
        deleted(lab, ROUTE)
        lab.kill_agent(NODE)
        lab.start_agent(NODE)
        assert through_waypoint(lab) > 5  # most have not asked since
        shop.takes(lambda: through_waypoint(lab) == 0, 2 * BOUND_S, pause=0.2)
    assert outcomes(calls).keys() == {"200"}, outcomes(calls)


def _known(lab: Lab) -> list[str]:
    """Resources of the service or the workload that Envoy still has."""
    return [line for line in lab.envoy_stats(NODE) if "frontend" in line and line.startswith("cluster.")]
