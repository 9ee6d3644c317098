"""Clusters and their endpoints: where requests can go. Pure functions, called by `agent.l7.snapshot`.

Every cluster opens its connections inside the network namespace that the accepting listener put into filter state
(extensions.local_address_selectors.filter_state_override.v3.Config, https://www.envoyproxy.io/docs/envoy/v1.37.0/api-v3/extensions/
local_address_selectors/filter_state_override/v3/config.proto), so clusters are shared by all workloads while connections are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2
from envoy.config.core.v3 import address_pb2, base_pb2, config_source_pb2, extension_pb2, socket_option_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.extensions.local_address_selectors.filter_state_override.v3 import config_pb2 as filter_state_override_pb2
from envoy.extensions.transport_sockets.internal_upstream.v3 import internal_upstream_pb2
from envoy.extensions.transport_sockets.raw_buffer.v3 import raw_buffer_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf.duration_pb2 import Duration

from agent.config import UNREAD_MARK
from agent.l7 import fairness, metrics, names
from agent.l7.resources import packed
from agent.model import ServicePort

HTTP2_PROTOCOLS = frozenset({"h2c", "http2", "kubernetes.io/h2c", "grpc"})
"""appProtocol values that mean HTTP/2 without TLS (https://kubernetes.io/docs/concepts/services-networking/service/#application-protocol)."""
CONNECT_TIMEOUT_S = 2
MOST_CONNECTIONS = 1 << 30  # all callers of the node share a cluster's count, so one could use it up; what one may hold: agent.l7.fairness
_SOL_SOCKET, _SO_MARK = 1, 36  # include/uapi/asm-generic/socket.h
MOST_RETRIES = 1024  # at one time, per cluster; Envoy's default of 3 makes retries fail under load


class Target(NamedTuple):
    """An endpoint; `tunnel` is the loopback address that stands for its identity (`agent.tunnels`) if it is reached through one."""

    address: str
    port: int
    weight: int = 1
    tunnel: str = ""
    workload: str = ""
    """Whose endpoint it is; for metrics alone."""
    read: int = 0
    """Does its own node read requests, whoever else has? 0: no. Endpoints with different numbers are different ones to Envoy: see `assignment`."""


def ads() -> config_source_pb2.ConfigSource:
    """Return the source of everything dynamic: the one ADS stream."""
    return config_source_pb2.ConfigSource(ads={}, resource_api_version="V3")


def socket_address(address: str, port: int, network_namespace: str = "") -> address_pb2.Address:
    """Build a TCP address, optionally inside the namespace that is mounted at a path."""
    socket = address_pb2.SocketAddress(address=address, port_value=port, network_namespace_filepath=network_namespace)
    return address_pb2.Address(socket_address=socket)


def service_cluster(name: str, port: ServicePort, secured: bool = False) -> cluster_pb2.Cluster:
    """Build the cluster of one service port; its endpoints come over EDS. `secured`: some may be reached through tunnels."""
    cluster = base(names.service(name, port.port), port.app_protocol)
    cluster.type = cluster_pb2.Cluster.EDS
    cluster.lb_policy = cluster_pb2.Cluster.LEAST_REQUEST
    cluster.eds_cluster_config.eds_config.CopyFrom(ads())
    cluster.ignore_health_on_host_removal = True
    if secured:
        _match_tunnels(cluster)
    return cluster


def service_endpoints(name: str, port: int, endpoints: Iterable[Target]) -> endpoint_pb2.ClusterLoadAssignment:
    """Build the endpoints; none is a valid answer: requests then get 503.

    LEAST_REQUEST takes two at random if all weights are the same, and otherwise goes round by weight, less for those that are busy
    (https://www.envoyproxy.io/docs/envoy/v1.37.0/intro/arch_overview/upstream/load_balancing/load_balancers#weighted-least-request).
    """
    return assignment(names.service(name, port), endpoints)


def workload_cluster(name: str, port: int, app_protocol: str, target: Target | None) -> cluster_pb2.Cluster:
    """Build the cluster of one workload alone, for callers who dial its address instead of a service; no target: it cannot be reached."""
    cluster = base(names.workload(name, port), app_protocol)
    cluster.type = cluster_pb2.Cluster.STATIC
    cluster.load_assignment.CopyFrom(assignment(cluster.name, [target] if target else []))
    if target and target.tunnel:
        _match_tunnels(cluster)
    return cluster


def original_destination_cluster() -> cluster_pb2.Cluster:
    """Build the one cluster of all listeners that hand on requests they have decided: the dialled address, in the protocol that the caller spoke.

    The address comes from filter state (`envoy.network.transport_socket.original_dst_address`): the cluster looks at the connection's own
    local address only if a listener filter restored it, and a steered connection has nothing to restore
    (https://www.envoyproxy.io/docs/envoy/v1.37.0/intro/arch_overview/upstream/load_balancing/original_dst).
    """
    cluster = base(names.ORIGINAL_DESTINATION_CLUSTER)
    cluster.type = cluster_pb2.Cluster.ORIGINAL_DST
    cluster.lb_policy = cluster_pb2.Cluster.CLUSTER_PROVIDED
    cluster.cleanup_interval.CopyFrom(Duration(seconds=60))
    return cluster


def unread_cluster() -> cluster_pb2.Cluster:
    """Build the cluster of what comes out of tunnels unread. Its sockets are marked: they are to end when a policy comes that needs the request."""
    cluster = original_destination_cluster()
    cluster.name = names.UNREAD_CLUSTER
    cluster.upstream_bind_config.socket_options.append(marked(UNREAD_MARK, "unread"))
    return cluster


def marked(mark: int, description: str) -> socket_option_pb2.SocketOption:
    """Have a cluster's sockets carry a mark from before they are connected."""
    state = socket_option_pb2.SocketOption.STATE_PREBIND
    return socket_option_pb2.SocketOption(description=description, level=_SOL_SOCKET, name=_SO_MARK, int_value=mark, state=state)


def internal_cluster(name: str, listener: str) -> cluster_pb2.Cluster:
    """Build the cluster of an internal listener: what a connection knows about its caller goes with it."""
    cluster = cluster_pb2.Cluster(name=name, type=cluster_pb2.Cluster.STATIC, transport_socket=_handing_on())
    address = address_pb2.Address(envoy_internal_address={"server_listener_name": listener})
    host = endpoint_components_pb2.LbEndpoint(endpoint=endpoint_components_pb2.Endpoint(address=address))
    cluster.load_assignment.cluster_name = name
    cluster.load_assignment.endpoints.add().lb_endpoints.append(host)
    return cluster


def base(name: str, app_protocol: str = "", *, options: http_protocol_options_pb2.HttpProtocolOptions | None = None) -> cluster_pb2.Cluster:
    """Begin a cluster with what all have: limits, and connections in the caller's namespace.

    Where nothing is declared the backend hears the version of HTTP that its caller spoke.
    """
    tunnel = options is not None
    if options is None:
        options = http_protocol_options_pb2.HttpProtocolOptions()
        if app_protocol.lower() in HTTP2_PROTOCOLS:
            options.explicit_http_config.http2_protocol_options.SetInParent()
        elif app_protocol:
            options.explicit_http_config.http_protocol_options.enable_trailers = True
        else:
            options.use_downstream_protocol_config.http_protocol_options.enable_trailers = True
            options.use_downstream_protocol_config.http2_protocol_options.SetInParent()
        for http2 in (options.explicit_http_config, options.use_downstream_protocol_config):
            if http2.HasField("http2_protocol_options"):
                fairness.windows(http2.http2_protocol_options)
    options.common_http_protocol_options.idle_timeout.seconds = 60
    limits = circuit_breaker_pb2.CircuitBreakers.Thresholds(
        max_connections={"value": MOST_CONNECTIONS},
        max_pending_requests={"value": MOST_CONNECTIONS},
        max_requests={"value": MOST_CONNECTIONS},
        max_retries={"value": MOST_RETRIES},
    )
    selector = extension_pb2.TypedExtensionConfig(
        name="envoy.upstream.local_address_selector.filter_state_override", typed_config=packed(filter_state_override_pb2.Config())
    )
    cluster = cluster_pb2.Cluster(
        name=name,
        connect_timeout=Duration(seconds=CONNECT_TIMEOUT_S),
        circuit_breakers=circuit_breaker_pb2.CircuitBreakers(thresholds=[limits]),
        # A source address is what the override adds the namespace to: the wildcard of either family, port chosen by the kernel.
        upstream_bind_config=address_pb2.BindConfig(
            source_address=address_pb2.SocketAddress(address="0.0.0.0", port_value=0),
            extra_source_addresses=[address_pb2.ExtraSourceAddress(address=address_pb2.SocketAddress(address="::", port_value=0))],
            local_address_selector=selector,
        ),
    )
    if not tunnel:
        cluster.per_connection_buffer_limit_bytes.value = fairness.BUFFER
    cluster.typed_extension_protocol_options["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"].CopyFrom(packed(options))
    return cluster


def assignment(name: str, endpoints: Iterable[Target]) -> endpoint_pb2.ClusterLoadAssignment:
    """Endpoints whose own node reads requests are in localities of their own, which mean nothing but this: an endpoint that changes its locality is removed
    and added (Envoy's BaseDynamicClusterImpl::updateDynamicHostList), and pools of a removed one take no new requests and end with those that they have. So
    connections that were made past the receiver's inspection are let go of when it begins, without a failed request.
    """
    result = endpoint_pb2.ClusterLoadAssignment(cluster_name=name)
    groups: dict[int, endpoint_components_pb2.LocalityLbEndpoints] = {}
    for target in endpoints:
        if target.read not in groups:
            groups[target.read] = result.endpoints.add(locality=base_pb2.Locality(sub_zone=names.READ[target.read]))
        groups[target.read].lb_endpoints.append(_host(target))
    return result


def _host(target: Target) -> endpoint_components_pb2.LbEndpoint:
    host = endpoint_components_pb2.LbEndpoint(load_balancing_weight={"value": target.weight})
    if target.workload:
        metrics.endpoint(host.metadata, target.workload, tunnelled=bool(target.tunnel))
    if not target.tunnel:
        host.endpoint.address.CopyFrom(socket_address(target.address, target.port))
        return host
    through = names.destination(target.address, target.port)
    internal = host.endpoint.address.envoy_internal_address
    internal.server_listener_name, internal.endpoint_id = names.TUNNEL, through
    host.metadata.filter_metadata[names.TUNNEL_METADATA].update(
        {"target": through, "cluster": names.tunnel(target.tunnel), "workload": target.workload}
    )
    host.metadata.filter_metadata[_SOCKET_MATCH].update(_TUNNELLED)
    return host


_SOCKET_MATCH = "envoy.transport_socket_match"  # https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/config/cluster/v3/cluster.proto
_TUNNELLED = {"tunnel": True}


def _match_tunnels(cluster: cluster_pb2.Cluster) -> None:
    """Have endpoints with a tunnel handed to the internal listener that opens it, with all that is known; others get the default: plain."""
    match = cluster.transport_socket_matches.add(name=names.TUNNEL, transport_socket=_handing_on(names.TUNNEL_METADATA))
    match.match.update(_TUNNELLED)


def _handing_on(*metadata: str) -> base_pb2.TransportSocket:
    """To an internal listener: shared filter state, and metadata of the endpoint."""
    config = internal_upstream_pb2.InternalUpstreamTransport(
        transport_socket=base_pb2.TransportSocket(
            name="envoy.transport_sockets.raw_buffer", typed_config=packed(raw_buffer_pb2.RawBuffer())
        )
    )
    for name in metadata:
        config.passthrough_metadata.add(name=name).kind.host.SetInParent()
    return base_pb2.TransportSocket(name="envoy.transport_sockets.internal_upstream", typed_config=packed(config))
