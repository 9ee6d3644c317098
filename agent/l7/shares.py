"""Limits that a TrafficPolicy gives to each calling workload apart (`limits.per: Workload`). Pure functions, called by `agent.l7.snapshot`.

Envoy counts what circuit breakers bound for a whole cluster, whoever calls: one caller with slow requests could use up what others need. So such a service port
has one more cluster for each workload of this node, the same but for its name, and the routes that lead there are there once for each workload, which is
known from filter state (`agent.l7.callers`). Whoever has no cluster yet uses the one that all share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2

from agent.l7 import callers, names


def cluster(workload: str, make: Callable[..., cluster_pb2.Cluster], *inputs: Any) -> cluster_pb2.Cluster:
    """What `make` builds, for one caller. Its statistics are added to those of the shared one."""
    result = make(*inputs)
    result.alt_stat_name = result.name
    result.name = names.share(result.name, workload)
    return result


def endpoints(workload: str, make: Callable[..., endpoint_pb2.ClusterLoadAssignment], *inputs: Any) -> endpoint_pb2.ClusterLoadAssignment:
    """The endpoints of such a cluster. Not the shared resource: Envoy asks for a name once, and who comes later may wait for it (delta xDS)."""
    result = make(*inputs)
    result.cluster_name = names.share(result.cluster_name, workload)
    return result


def routes(
    limited: frozenset[str], workloads: tuple[str, ...], make: Callable[..., route_pb2.RouteConfiguration], *inputs: Any
) -> route_pb2.RouteConfiguration:
    """What `make` builds, with routes of each workload's own in front of each route that leads to one of these clusters."""
    result = make(*inputs)
    for host in result.virtual_hosts if limited and workloads else ():
        found = []
        for route in host.routes:
            if not limited.isdisjoint(_clusters(route)):
                found += [_own(route, limited, workload) for workload in workloads]
            found.append(route)
        del host.routes[:]
        host.routes.extend(found)
    return result


def _clusters(route: route_components_pb2.Route) -> list[str]:
    if not route.HasField("route"):
        return []
    return [route.route.cluster, *(one.name for one in route.route.weighted_clusters.clusters)]


def _own(route: route_components_pb2.Route, limited: frozenset[str], workload: str) -> route_components_pb2.Route:
    result = route_components_pb2.Route()
    result.CopyFrom(route)
    callers.by_workload(result.match, workload)
    if result.route.cluster in limited:
        result.route.cluster = names.share(result.route.cluster, workload)
    for one in result.route.weighted_clusters.clusters:
        if one.name in limited:
            one.name = names.share(one.name, workload)
    return result
