"""Clusters and their endpoints: where requests can go. Pure functions, called by `agent.l7.snapshot`.

Every cluster opens its connections inside the network namespace that the accepting listener put into filter state
(extensions.local_address_selectors.filter_state_override.v3.Config, https://www.envoyproxy.io/docs/envoy/v1.37.0/api-v3/extensions/
local_address_selectors/filter_state_override/v3/config.proto), so clusters are shared by all workloads while connections are not.
"""

from __future__ import annotations

from collections.abc import Iterable

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2
from envoy.config.core.v3 import address_pb2, config_source_pb2, extension_pb2, protocol_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.extensions.local_address_selectors.filter_state_override.v3 import config_pb2 as filter_state_override_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf.duration_pb2 import Duration

from agent.l7 import names
from agent.l7.resources import packed
from agent.model import ServicePort

HTTP2_PROTOCOLS = frozenset({"h2c", "kubernetes.io/h2c", "grpc"})
"""appProtocol values that mean HTTP/2 without TLS (https://kubernetes.io/docs/concepts/services-networking/service/#application-protocol)."""
CONNECT_TIMEOUT_S = 2
MOST_CONNECTIONS = 65536  # Envoy's default of 1024 would be shared by every pod of the node; per-caller limits belong to a TrafficPolicy
MOST_RETRIES = 1024  # at one time, per cluster; Envoy's default of 3 makes retries fail under load


def ads() -> config_source_pb2.ConfigSource:
    """Return the source of everything dynamic: the one ADS stream."""
    return config_source_pb2.ConfigSource(ads={}, resource_api_version="V3")


def socket_address(address: str, port: int, network_namespace: str = "") -> address_pb2.Address:
    """Build a TCP address, optionally inside the namespace that is mounted at a path."""
    socket = address_pb2.SocketAddress(address=address, port_value=port, network_namespace_filepath=network_namespace)
    return address_pb2.Address(socket_address=socket)


def service_cluster(name: str, port: ServicePort) -> cluster_pb2.Cluster:
    """Build the cluster of one service port; its endpoints come over EDS."""
    cluster = _cluster(names.service(name, port.port), http2=port.app_protocol.lower() in HTTP2_PROTOCOLS)
    cluster.type = cluster_pb2.Cluster.EDS
    cluster.lb_policy = cluster_pb2.Cluster.LEAST_REQUEST
    cluster.eds_cluster_config.eds_config.CopyFrom(ads())
    cluster.ignore_health_on_host_removal = True
    return cluster


def service_endpoints(name: str, port: int, endpoints: Iterable[tuple[str, int, int]]) -> endpoint_pb2.ClusterLoadAssignment:
    """Build the endpoints, (address, port, weight) each; none is a valid answer: requests then get 503.

    LEAST_REQUEST takes two at random if all weights are the same, and otherwise goes round by weight, less for those that are busy
    (https://www.envoyproxy.io/docs/envoy/v1.37.0/intro/arch_overview/upstream/load_balancing/load_balancers#weighted-least-request).
    """
    return _assignment(names.service(name, port), endpoints)


def workload_cluster(name: str, port: int, app_protocol: str, address: str) -> cluster_pb2.Cluster:
    """Build the cluster of one workload alone, for callers who dial its address instead of a service."""
    cluster = _cluster(names.workload(name, port), http2=app_protocol.lower() in HTTP2_PROTOCOLS)
    cluster.type = cluster_pb2.Cluster.STATIC
    cluster.load_assignment.CopyFrom(_assignment(names.workload(name, port), [(address, port, 1)]))
    return cluster


def original_destination_cluster() -> cluster_pb2.Cluster:
    """Build the one cluster of all inbound listeners: the dialled address, in the protocol that the caller spoke.

    The address comes from filter state (`envoy.network.transport_socket.original_dst_address`): the cluster looks at the connection's own
    local address only if a listener filter restored it, and a steered connection has nothing to restore
    (https://www.envoyproxy.io/docs/envoy/v1.37.0/intro/arch_overview/upstream/load_balancing/original_dst).
    """
    options = http_protocol_options_pb2.HttpProtocolOptions()
    options.use_downstream_protocol_config.http_protocol_options.SetInParent()
    options.use_downstream_protocol_config.http2_protocol_options.SetInParent()
    cluster = _cluster(names.ORIGINAL_DESTINATION_CLUSTER, options=options)
    cluster.type = cluster_pb2.Cluster.ORIGINAL_DST
    cluster.lb_policy = cluster_pb2.Cluster.CLUSTER_PROVIDED
    cluster.cleanup_interval.CopyFrom(Duration(seconds=60))
    return cluster


def _cluster(
    name: str, *, http2: bool = False, options: http_protocol_options_pb2.HttpProtocolOptions | None = None
) -> cluster_pb2.Cluster:
    if options is None:
        options = http_protocol_options_pb2.HttpProtocolOptions()
        if http2:
            options.explicit_http_config.http2_protocol_options.SetInParent()
        else:
            options.explicit_http_config.http_protocol_options.SetInParent()
    options.common_http_protocol_options.CopyFrom(protocol_pb2.HttpProtocolOptions(idle_timeout=Duration(seconds=60)))
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
    cluster.typed_extension_protocol_options["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"].CopyFrom(packed(options))
    return cluster


def _assignment(name: str, endpoints: Iterable[tuple[str, int, int]]) -> endpoint_pb2.ClusterLoadAssignment:
    hosts = [
        endpoint_components_pb2.LbEndpoint(
            endpoint=endpoint_components_pb2.Endpoint(address=socket_address(address, port)), load_balancing_weight={"value": weight}
        )
        for address, port, weight in endpoints
    ]
    groups = [endpoint_components_pb2.LocalityLbEndpoints(lb_endpoints=hosts)] if hosts else []
    return endpoint_pb2.ClusterLoadAssignment(cluster_name=name, endpoints=groups)
