"""HBONE, the tunnel between nodes: mTLS, HTTP/2, CONNECT to the destination's address, port 15008. Pure functions, called by `agent.l7.snapshot`.

What goes over the wire is Istio's (https://istio.io/latest/docs/ambient/architecture/hbone/): the tunnel ends at the address of the destination's pod, each
connection is one CONNECT whose :authority is the ADDRESS:PORT in that pod, and the certificates are those of the two workloads. The path of

- an L4 connection: the connect hook sends it to 127.x.y.z, where x.y.z stands for the identity that the far end must prove, and `caller` takes it;
- a request: its endpoint is the internal listener `relay`, which is told target and identity by the endpoint's metadata;
- both, on the other node: `receiver` ends the tunnel inside the pod's namespace and connects to the target, or hands it to `inner` where a policy of the
  workload needs the request.

Pools are those of one caller: the namespace and the certificate are part of their key. Envoy's fields:
https://www.envoyproxy.io/docs/envoy/v1.40.0/intro/arch_overview/http/upgrades#connect-support.
"""

from __future__ import annotations

from collections.abc import Sequence

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import base_pb2, protocol_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.common.set_filter_state.v3.value_pb2 import FilterStateValue
from envoy.extensions.filters.http.set_filter_state.v3 import set_filter_state_pb2
from envoy.extensions.filters.network.connection_limit.v3 import connection_limit_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from envoy.type.matcher.v3 import regex_pb2, string_pb2
from google.protobuf.duration_pb2 import Duration

from agent.config import EGRESS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, TUNNEL_PORT
from agent.l7 import clusters, fairness, listeners, names, peer_log, tls, tunnel_log
from agent.l7.clusters import ads
from agent.l7.rbac import Authorization
from agent.l7.resources import packed
from agent.l7.telling import NOTHING, Telling
from agent.model import LocalWorkload

HANDSHAKE_S = 10
"""A peer that has not finished its handshake by then is closed; also the time for the headers of a CONNECT."""
CONNECT_ATTEMPTS = 3
"""A tunnel that breaks before the target is reached is tried again: the far end may just have started, or closed an idle tunnel."""
MOST_TUNNELS = 8192
"""To one workload at a time. More are closed before anything is read: a flood of handshakes is a matter of this workload, not of Envoy's memory."""
TUNNEL_LIFE_S = 600
"""After that new connections get a new tunnel, and with it each end a new look at the other's certificate; those in the old one go on."""
RECEIVER_WINDOW = 4 << 20
"""Bytes that a caller may have under way in one stream to an application that does not read; ztunnel's."""
CALLER_WINDOW = 64 << 20
"""The other way. Larger, because Envoy 1.40 loses what is beyond it when the application at the far end closes first (README, Honest limits)."""
CONNECTION_WINDOW = 1 << 30
"""All streams of a tunnel together. With Envoy's own 24 MiB two readers that stall would stop all others."""
PING_S = 10
_CONNECT = "CONNECT"
_AUTHORITY = r"(\[[^\]]*\]|[^:]*):[1-9][0-9]{0,4}"


def cluster(loopback: str, spiffe_id: str, trust_domain: str, revision: str = "") -> cluster_pb2.Cluster:
    """Build the cluster of tunnels to workloads with one identity: to wherever the connection goes, but to HBONE's port there.

    With another `revision` it is another cluster to Envoy: tunnels that are open end with their last stream, new streams get tunnels with a handshake.
    """
    options = http_protocol_options_pb2.HttpProtocolOptions()
    _share(options.explicit_http_config.http2_protocol_options, CALLER_WINDOW)
    options.common_http_protocol_options.max_connection_duration.seconds = TUNNEL_LIFE_S
    result = clusters.base(names.tunnel(loopback), options=options)
    result.type = cluster_pb2.Cluster.ORIGINAL_DST
    result.lb_policy = cluster_pb2.Cluster.CLUSTER_PROVIDED
    result.original_dst_lb_config.upstream_port_override.value = HBONE_PORT
    result.cleanup_interval.CopyFrom(Duration(seconds=60))
    result.transport_socket.CopyFrom(tls.upstream(spiffe_id, trust_domain))
    if revision:
        result.metadata.filter_metadata[names.TUNNEL_METADATA].update({"trust": revision})
    return result


def _share(options: protocol_pb2.Http2ProtocolOptions, window: int) -> None:
    """Have one connection carry many others: readers that stall hold up their own streams alone, and a peer that has vanished is noticed."""
    options.initial_stream_window_size.value = window
    options.initial_connection_window_size.value = CONNECTION_WINDOW
    options.connection_keepalive.interval.seconds = PING_S
    options.connection_keepalive.timeout.seconds = PING_S


def caller(local: LocalWorkload, trust_domain: str) -> listener_pb2.Listener:
    """Build the listener for L4 connections of a workload to other nodes.

    It is bound to the wildcard, because the loopback address that was dialled names the cluster; the kernel lets nobody in from outside
    (bpf_src/mesh_sk_lookup.c).
    """
    listener = listeners.bound(names.listener(names.TUNNEL, local.workload.name), local, ("0.0.0.0",), TUNNEL_PORT)
    state = listeners.set_state(
        listeners.netns(local),
        listeners.certificate(local, trust_domain),
        _cluster_by(names.tunnel("%DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT%")),
    )
    proxy = _connect_to("%DOWNSTREAM_LOCAL_ADDRESS%", tunnel_log.of_caller(local.workload.name))
    proxy.tunneling_config.headers_to_add.append(tunnel_log.forwarded())
    listener.filter_chains.add(name="tunnel", filters=[state, _tcp_proxy(proxy)])
    fairness.guard(listener, names.TUNNEL, fairness.MOST_TUNNELLED)
    listener.listener_filters.append(listeners.original_destination())
    listener.traffic_direction = base_pb2.OUTBOUND
    return listener


def relay() -> listener_pb2.Listener:
    """Build the node's internal listener for requests to other nodes; who calls comes with the connection."""
    listener = listener_pb2.Listener(name=names.TUNNEL, stat_prefix=names.TUNNEL, traffic_direction=base_pb2.OUTBOUND)
    listener.internal_listener.SetInParent()
    target = f"%DYNAMIC_METADATA({names.TUNNEL_METADATA}:target)%"
    state = listeners.set_state(
        _cluster_by(f"%DYNAMIC_METADATA({names.TUNNEL_METADATA}:cluster)%"),
        listeners.value(names.ORIGINAL_DESTINATION_KEY, target, factory=names.ORIGINAL_DESTINATION_KEY),
    )
    listener.filter_chains.add(name="tunnel", filters=[state, _tcp_proxy(_connect_to(target, tunnel_log.of_relay(target)))])
    return listener


def _cluster_by(text: str) -> FilterStateValue:
    return listeners.value(names.TCP_CLUSTER_KEY, text, factory=names.TCP_CLUSTER_KEY)


def _connect_to(target: str, traced: accesslog_pb2.AccessLog) -> tcp_proxy_pb2.TcpProxy:
    proxy = tcp_proxy_pb2.TcpProxy(
        stat_prefix=names.TUNNEL,
        cluster=names.INVALID_CLUSTER,  # filter state names the one that is used
        max_connect_attempts={"value": CONNECT_ATTEMPTS},
        idle_timeout=Duration(),  # Envoy's hour would cut quiet connections that work without a mesh
    )
    proxy.tunneling_config.hostname = target
    proxy.access_log.extend((peer_log.of_caller(), traced))
    proxy.access_log_options.access_log_flush_interval.seconds = peer_log.EVERY_S
    return proxy


def _tcp_proxy(proxy: tcp_proxy_pb2.TcpProxy) -> listener_components_pb2.Filter:
    return listener_components_pb2.Filter(name="envoy.filters.network.tcp_proxy", typed_config=packed(proxy))


def receiver(local: LocalWorkload, trust_domain: str) -> listener_pb2.Listener:
    """Build the listener where tunnels to a workload end. What it lets through is in its RouteConfiguration of the same name (`routes`)."""
    name = names.listener(names.HBONE, local.workload.name)
    listener = listeners.bound(name, local, ("0.0.0.0", "::"), HBONE_PORT)
    manager = hcm_pb2.HttpConnectionManager(
        stat_prefix=names.HBONE,
        codec_type=hcm_pb2.HttpConnectionManager.HTTP2,
        http_filters=[_who(), listeners.disabled_rbac(names.PEER_FILTER), *listeners.http_filters()],
        access_log=[peer_log.of_receiver(), tunnel_log.of_receiver(local.workload.name)],
        upgrade_configs=[hcm_pb2.HttpConnectionManager.UpgradeConfig(upgrade_type=_CONNECT)],
        stream_idle_timeout=Duration(),
        request_headers_timeout=Duration(seconds=HANDSHAKE_S),
        generate_request_id={"value": False},
        skip_xff_append=True,
        local_reply_config=listeners.local_replies(),
    )
    manager.access_log_options.access_log_flush_interval.seconds = peer_log.EVERY_S
    manager.access_log_options.flush_access_log_on_new_request = True  # tunnels of requests live long: a trace shows them when they begin
    manager.common_http_protocol_options.max_connection_duration.seconds = TUNNEL_LIFE_S
    _share(manager.http2_protocol_options, RECEIVER_WINDOW)
    manager.http2_protocol_options.allow_connect = True
    # Nonsense in one stream ends that stream, not the connections of others.
    manager.http2_protocol_options.override_stream_error_on_invalid_http_message.value = True
    manager.rds.route_config_name = name
    manager.rds.config_source.CopyFrom(ads())
    chain = listener.filter_chains.add(
        name="hbone", filters=[listeners.set_state(listeners.netns(local)), _limit(), listeners.http(manager)]
    )
    chain.transport_socket.CopyFrom(tls.downstream(local.workload.identity(trust_domain), trust_domain))
    chain.transport_socket_connect_timeout.CopyFrom(Duration(seconds=HANDSHAKE_S))
    listener.access_log.append(tunnel_log.of_handshakes(local.workload.name))
    listener.max_connections_to_accept_per_socket_event.value = 1  # a flood of handshakes takes turns with other workloads
    listener.traffic_direction = base_pb2.INBOUND
    return listener


def _limit() -> listener_components_pb2.Filter:
    config = connection_limit_pb2.ConnectionLimit(stat_prefix=names.HBONE, max_connections={"value": MOST_TUNNELS})
    return listener_components_pb2.Filter(name="envoy.filters.network.connection_limit", typed_config=packed(config))


def _who() -> hcm_pb2.HttpFilter:
    """Write down who is at the other end and what it wants to reach, for authorization here and behind an internal listener."""
    config = set_filter_state_pb2.Config(
        on_request_headers=[
            # Hashable: who is behind a connection to an internal listener must be part of its pool's key.
            listeners.value(names.PEER_KEY, "%DOWNSTREAM_PEER_URI_SAN%", factory="envoy.hashable_string", shared=True),
            listeners.value(
                f"{names.PEER_ADDRESS_KEY}.pool",
                "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%",
                factory="envoy.hashable_string",
                shared=True,
            ),
            listeners.value(
                names.PEER_ADDRESS_KEY, "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%", factory="envoy.network.ip", shared=True
            ),
            listeners.value(names.PEER_SERIAL_KEY, "%DOWNSTREAM_PEER_SERIAL%"),
            listeners.value(names.ORIGINAL_DESTINATION_KEY, "%REQ(:AUTHORITY)%", factory=names.ORIGINAL_DESTINATION_KEY, shared=True),
        ]
    )
    return hcm_pb2.HttpFilter(name="envoy.filters.http.set_filter_state", typed_config=packed(config))


def inner(local: LocalWorkload, told: Telling = NOTHING) -> listener_pb2.Listener:
    """Build the internal listener for what came out of a workload's tunnels, if its policies need the request. Its routes have its name."""
    name = names.listener(names.INNER, local.workload.name)
    listener = listener_pb2.Listener(name=name, stat_prefix=names.INNER, traffic_direction=base_pb2.INBOUND)
    listener.internal_listener.SetInParent()
    manager = listeners.manager(local.workload.name, name, names.INBOUND, told)
    manager.rds.route_config_name = name
    manager.rds.config_source.CopyFrom(ads())
    manager.early_header_mutation_extensions.append(listeners.destination_header(f"%FILTER_STATE({names.ORIGINAL_DESTINATION_KEY}:PLAIN)%"))
    listener.filter_chains.add(name="http", filters=[listeners.http(manager)])
    return listener


def routes(
    name: str, addresses: Sequence[str], authorization: Authorization, inside: Sequence[int] | None, inner: str, revoked: bytes = b""
) -> route_pb2.RouteConfiguration:
    """Build what a workload's tunnels may reach: its own addresses, at ports that `authorization` allows.

    `inside` are the ports where a policy needs the request (None: all of them): those go to cluster `inner`, which authorizes. Another address, a port
    of the waypoint itself, one that is not spelled as usual, or no CONNECT at all, is answered with 400. `revoked` is of `agent.l7.peer_log.refusal`.
    """
    own = route_components_pb2.VirtualHost(name="own", domains=[names.destination(address, 0)[:-1] + "*" for address in addresses])
    # Envoy takes :09000 and :+9000 for 9000, and the ports of policies and of the routes below are compared as text.
    unusual = _connect_match()
    authority = string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=_AUTHORITY))
    unusual.headers.add(name=":authority", string_match=authority, invert_match=True)
    _refuse(own, unusual)
    for port in (OUTBOUND_PORT, TUNNEL_PORT, EGRESS_PORT, INBOUND_PORT, HBONE_PORT):
        _refuse(own, _connect_match(f":{port}"))
    for port in inside or ():
        own.routes.append(_connect(inner, f":{port}"))
    own.routes.append(_connect(inner) if inside is None else _connect(names.UNREAD_CLUSTER, authorization=authorization))
    other = route_components_pb2.VirtualHost(name="other", domains=["*"])
    for host in (own, other):
        _refuse(host, _connect_match())
        _refuse(host, route_components_pb2.RouteMatch(prefix="/"))
    result = route_pb2.RouteConfiguration(name=name, virtual_hosts=[own, other] if addresses else [other])
    if revoked:
        result.typed_per_filter_config[names.PEER_FILTER].ParseFromString(revoked)
    return result


def _refuse(host: route_components_pb2.VirtualHost, match: route_components_pb2.RouteMatch) -> None:
    refusal = host.routes.add(name="refuse", match=match)
    refusal.direct_response.status = 400
    refusal.response_headers_to_add.add(header=base_pb2.HeaderValue(key=names.REASON_HEADER, value="not-this-workload"))


def _connect(cluster: str, authority: str = "", authorization: Authorization | None = None) -> route_components_pb2.Route:
    route = route_components_pb2.Route(name=names.HBONE, match=_connect_match(authority))
    route.route.cluster = cluster
    route.route.timeout.CopyFrom(Duration())
    route.route.upgrade_configs.add(upgrade_type=_CONNECT).connect_config.SetInParent()
    if authorization is not None:
        authorization.apply(route.typed_per_filter_config)
    return route


def _connect_match(authority: str = "") -> route_components_pb2.RouteMatch:
    """A CONNECT whose :authority ends like this."""
    match = route_components_pb2.RouteMatch(connect_matcher={})
    if authority:
        match.headers.add(name=":authority", string_match=string_pb2.StringMatcher(suffix=authority))
    return match
