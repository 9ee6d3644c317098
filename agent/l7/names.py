"""The names that listeners, routes, clusters, the access log and the tests must agree on. Constants and one-liners only.

Type URLs are the resource types of the xDS transport protocol (https://www.envoyproxy.io/docs/envoy/v1.37.0/api-docs/xds_protocol).
"""

from __future__ import annotations

import functools
import ipaddress

_PREFIX = "type.googleapis.com/"
CLUSTER = _PREFIX + "envoy.config.cluster.v3.Cluster"
ENDPOINTS = _PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENER = _PREFIX + "envoy.config.listener.v3.Listener"
SCOPE = _PREFIX + "envoy.config.route.v3.ScopedRouteConfiguration"
ROUTES = _PREFIX + "envoy.config.route.v3.RouteConfiguration"
RUNTIME = _PREFIX + "envoy.service.runtime.v3.Runtime"

XDS_CLUSTER = "meshagent-xds"
"""Static cluster of the bootstrap: the agent's unix socket (ADS and access log)."""
RUNTIME_LAYER = "meshagent-trace"
"""The RTDS resource that switches access logs on, one workload at a time."""
ORIGINAL_DESTINATION_CLUSTER = "original-destination"
"""Where inbound listeners send what they accepted: the address the caller dialled."""
INVALID_CLUSTER = "invalid-backend"
"""Never defined: the share of an invalid backend goes here and answers 500."""

DESTINATION_HEADER = "x-meshagent-destination"
"""Set by Envoy from the connection, whatever the client sent; key of the route scope; removed before upstream."""
REASON_HEADER = "x-meshagent-reason"
"""On answers that the waypoint made itself: why."""
DENY_FILTER = "meshagent.deny"
ALLOW_FILTER = "meshagent.allow"

NETNS_KEY = "envoy.network.upstream_bind_override.network_namespace"
PRINCIPAL_KEY = "mesh.source.principal"
NAMESPACE_KEY = "mesh.source.namespace"
SERVICE_ACCOUNT_KEY = "mesh.source.service_account"
WORKLOAD_KEY = "mesh.source.workload"

OUTBOUND = "outbound"
INBOUND = "inbound"


def listener(side: str, workload: str) -> str:
    """Name of a workload's listener: outbound/NS/NAME or inbound/NS/NAME; also the access log's name and inbound's routes."""
    return f"{side}/{workload}"


def service(name: str, port: int) -> str:
    """Name of the cluster and of the routes of one service port."""
    return f"service/{name}/{port}"


def workload(name: str, port: int) -> str:
    """Name of the cluster and of the routes of one workload's own address and target port."""
    return f"workload/{name}/{port}"


@functools.lru_cache(maxsize=65536)
def destination(address: str, port: int) -> str:
    """ADDRESS:PORT as Envoy prints it (%DOWNSTREAM_LOCAL_ADDRESS%): IPv6 in brackets, compressed."""
    ip = ipaddress.ip_address(address)
    return f"[{ip.compressed}]:{port}" if ip.version == 6 else f"{ip}:{port}"


def trace_key(workload: str) -> str:
    """Runtime key (percent) that the access log filters of a workload's listeners read."""
    return "meshagent.trace." + workload.replace("/", ".", 1)
