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
SECRET = _PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"
RUNTIME = _PREFIX + "envoy.service.runtime.v3.Runtime"
BUCKET = _PREFIX + "envoy.type.v3.TokenBucket"

XDS_CLUSTER = "meshagent-xds"
"""Static cluster of the bootstrap: the agent's unix socket (ADS and access log)."""
RUNTIME_LAYER = "meshagent-trace"
"""The RTDS resource that switches access logs on, one workload at a time."""
ORIGINAL_DESTINATION_CLUSTER = "original-destination"
"""Where inbound listeners send what they accepted: the address the caller dialled."""
UNREAD_CLUSTER = "unread-destination"
"""Where the ends of tunnels send what no policy needs to read: the same, on sockets that can be told from others."""
INVALID_CLUSTER = "invalid-backend"
"""Never defined: the share of an invalid backend goes here and answers 500."""

DESTINATION_HEADER = "x-meshagent-destination"
"""Set by Envoy from the connection, whatever the client sent; key of the route scope; removed before upstream."""
REASON_HEADER = "x-meshagent-reason"
"""On answers that the waypoint made itself: why."""
DENY_FILTER = "meshagent.deny"
ALLOW_FILTER = "meshagent.allow"
CORS_FILTER = "meshagent.cors"
PARTING_FILTER = "meshagent.parting"
SESSION_FILTER = "meshagent.session"
SESSION_READER = "meshagent.session-reader"
SESSION_WRITER = "meshagent.session-writer"
PEER_FILTER = "meshagent.peer"
RBAC_METADATA = "envoy.filters.http.rbac"
"""Dynamic metadata of a request that a rule was compared with; the name is Envoy's."""
AUDIT_PREFIX = "audit_"
"""What its keys about AUDIT rules begin with."""
CALLS = "calls"
"""Before the name of a listener: the access log of requests that are remembered (`agent.l7.call_log`)."""
CALLS_KEY = "meshagent.calls"
"""Runtime key (percent) that switches it on."""
CALLS_BUCKET = "meshagent-calls"
"""Its bound, a resource of type BUCKET."""
AUDIT = "audit"
"""Before the name of a listener: the access log of requests that an AUDIT rule matched."""
JWT_FILTER = "meshagent.jwt"
JWT_METADATA = "envoy.filters.http.jwt_authn"
"""Dynamic metadata of a request whose token was verified; the name is Envoy's."""
JWT_PAYLOAD = "payload"
"""Key in it: the token's payload as a structure, for policies, and for routes that match on claims."""

NETNS_KEY = "envoy.network.upstream_bind_override.network_namespace"
PRINCIPAL_KEY = "mesh.source.principal"
NAMESPACE_KEY = "mesh.source.namespace"
SERVICE_ACCOUNT_KEY = "mesh.source.service_account"
WORKLOAD_KEY = "mesh.source.workload"

CERTIFICATE_KEY = "envoy.tls.certificate_mappers.on_demand_secret"
"""The secret (`caller_certificate`) that a tunnel shows; the name is Envoy's, as are the next two."""
TCP_CLUSTER_KEY = "envoy.tcp_proxy.cluster"
ORIGINAL_DESTINATION_KEY = "envoy.network.transport_socket.original_dst_address"
PEER_KEY = "mesh.peer"
"""SPIFFE ID that the other end of a tunnel proved."""
PEER_ADDRESS_KEY = "mesh.peer.address"
PEER_SERIAL_KEY = "mesh.peer.serial"
PEERS_KEY = "meshagent.peers"
"""Runtime key (percent): have both ends of tunnels say what the other one has shown (`agent.l7.peer_log`)."""
TUNNEL_METADATA = "mesh.tunnel"
"""Of an endpoint that is reached through a tunnel: `target` (ADDRESS:PORT) and `cluster` (`tunnel()`)."""

OUTBOUND = "outbound"
INBOUND = "inbound"
TUNNEL = "tunnel"
"""Where the connect hook sends L4 connections to other nodes; also the node's internal listener for requests to other nodes."""
HBONE = "hbone"
"""Where tunnels from other nodes end."""
MIRROR = "mirror"
"""The node's internal listener for copies of requests, its routes and its cluster."""
EGRESS = "egress"
"""Where the connect hook sends connections to ExternalServices that are not HTTP, and clusters by what was dialled there."""
EXTERNAL = "external"
"""Internal: one port of an ExternalService that is not HTTP."""
READ = ("", "read", "read-too")
"""Localities of endpoints whose own node reads no requests, and of two kinds that are alike, whose does: see `agent.l7.clusters.assignment`."""
INNER = "inner"
"""Internal: what came out of a tunnel and needs the request to be decided."""
RECEIVING = (f"{INBOUND}/", f"{HBONE}/", f"{INNER}/")
"""What names of listeners begin with that have routes of their own, of the same name."""


GATEWAY = "gateway"
"""What strangers call: listeners of Gateways, in the namespace of the workload that lends it its place."""


def gateway(workload: str, port: int) -> str:
    """Name of the listener of a port of a gateway; the names of its routes begin with it."""
    return f"{GATEWAY}/{workload}/{port}"


def gateway_certificate(secret: str) -> str:
    """Name of the certificate that a Secret holds, among Envoy's secrets; no SPIFFE ID looks like it."""
    return f"{GATEWAY}/{secret}"


def listener(side: str, workload: str) -> str:
    """Name of a workload's listener: SIDE/NS/NAME; also the access log's name, and of all sides but outbound the name of its routes."""
    return f"{side}/{workload}"


def service(name: str, port: int) -> str:
    """Name of the cluster and of the routes of one service port."""
    return f"service/{name}/{port}"


def share(cluster: str, workload: str) -> str:
    """Name of a service port's cluster for one caller alone (`agent.l7.shares`); no name of a service or workload has an @."""
    return f"{cluster}@{workload}"


def workload(name: str, port: int) -> str:
    """Name of the cluster and of the routes of one workload's own address and target port."""
    return f"workload/{name}/{port}"


@functools.lru_cache(maxsize=65536)
def destination(address: str, port: int) -> str:
    """ADDRESS:PORT as Envoy prints it (%DOWNSTREAM_LOCAL_ADDRESS%): IPv6 in brackets, compressed."""
    ip = ipaddress.ip_address(address)
    return f"[{ip.compressed}]:{port}" if ip.version == 6 else f"{ip}:{port}"


def caller_certificate(spiffe_id: str) -> str:
    """Name of the certificate that tunnels of a caller show.

    Not the SPIFFE ID itself, by which listeners know it: Envoy 1.40 waits for ever for a secret on demand that something else has subscribed to already.
    """
    return f"{TUNNEL}/{spiffe_id}"


def tunnel(loopback: str) -> str:
    """Name of the cluster of tunnels to one identity, by the loopback address that the connect hook uses for it (`agent.tunnels`)."""
    return f"{TUNNEL}/{loopback}"


def collector(service: str, port: int) -> str:
    """Name of the cluster of a collector of spans."""
    return f"collector/{service}/{port}"


TRACE_TUNNELS_KEY = "meshagent.trace-tunnels"
"""Runtime key (percent) of the log of the node's internal listener for requests to other nodes."""


def trace_key(workload: str) -> str:
    """Runtime key (percent) that the access log filters of a workload's listeners read: of what it calls."""
    return "meshagent.trace." + workload.replace("/", ".", 1)


def received_key(workload: str) -> str:
    """The same of what is accepted for it."""
    return "meshagent.trace-received." + workload.replace("/", ".", 1)
