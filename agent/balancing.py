"""Which endpoints of a service a node's callers prefer, and in which shares: one definition for kernel, waypoint and the plan of a trace. Pure.

The words are those of Service.spec.trafficDistribution (https://kubernetes.io/docs/reference/networking/virtual-ips/#traffic-distribution). Kubernetes gives
each endpoint of a PreferSameNode service a hint for its node and one for its zone (k8s.io/endpointslice, trafficdist.ReconcileHints), hence the order
node, zone, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agent.model import Workload

SAME_NODE = "PreferSameNode"
SAME_ZONE = "PreferSameZone"


def preferred(endpoints: Sequence[tuple[Workload, int]], distribution: str, node: str, zone: str) -> list[tuple[Workload, int]]:
    """The endpoints, (workload, port) each, that new connections from `node` in `zone` go to, in the given order.

    SAME_NODE: those on the node; if there are none, as SAME_ZONE: those in the zone; if there are none, all. A zone that is not known ("") is no zone: it
    prefers nothing. Any other distribution is all.
    """
    if distribution == SAME_NODE:
        near = [pair for pair in endpoints if pair[0].node == node]
        if near:
            return near
    if distribution in {SAME_NODE, SAME_ZONE} and zone:
        near = [pair for pair in endpoints if pair[0].zone == zone]
        if near:
            return near
    return list(endpoints)


def node_zone(workloads: Iterable[Workload], node: str) -> str:
    """The zone that the workloads of a node say they are in; "" if none says so, or if they differ."""
    found = {workload.zone for workload in workloads if workload.node == node and workload.zone}
    return found.pop() if len(found) == 1 else ""


def shares(endpoints: Sequence[tuple[Workload, int]]) -> list[tuple[Workload, int, float]]:
    """(workload, port, share of new connections by weight); the shares add up to 1."""
    total = sum(workload.weight for workload, _ in endpoints)
    return [(workload, port, workload.weight / total) for workload, port in endpoints]
