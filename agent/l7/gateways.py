"""Ingress: the listeners of a Gateway in the namespace of the workload that lends it its place, and where their requests go. Pure; used by the builder.

What comes in is a stranger's and nothing that it says of itself is believed; what goes out is the workload's, from its namespace and with its certificate, as
if the workload had called (`agent.l7.listeners.caller`): so policies, tunnels and limits are those of any caller. Settings for strangers:
https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/best_practices/edge. Which listener and which route a request belongs to:
https://gateway-api.sigs.k8s.io/reference/spec/#listener and https://gateway-api.sigs.k8s.io/geps/gep-3567/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from envoy.config.core.v3 import base_pb2, protocol_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.listener.tls_inspector.v3 import tls_inspector_pb2
from envoy.extensions.filters.network.connection_limit.v3 import connection_limit_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, secret_pb2, tls_pb2
from google.protobuf.duration_pb2 import Duration

from agent.l7 import hygiene, listeners, names, routes, spans
from agent.l7.clusters import ads
from agent.l7.precedence import covers
from agent.l7.resources import Resource, pack, packed
from agent.l7.secrets import reference
from agent.l7.telling import NOTHING, Telling
from agent.model import Gateway, GatewayListener, LocalWorkload, Route, RouteRule, Snapshot, Workload

LABEL = "gateway.networking.k8s.io/gateway-name"
"""Of a workload: the gateway of its namespace that it lends its place to (https://gateway-api.sigs.k8s.io/geps/gep-1762/)."""
MOST_CONNECTIONS = 16384  # of one listener in one workload: what is more is closed
HEADERS_S = 10  # until a request's headers are complete: slow clients hold nothing up for longer
HANDSHAKE_S = 10
IDLE_S = 900  # a connection without requests
STREAM_IDLE_S = 300  # a request, or an upgraded connection, on which neither side says anything
HEADERS_KIB = 60
MOST_HEADERS = 100
MOST_STREAMS = 100  # at one time on one connection of HTTP/2
BUFFER_BYTES = 32 << 10  # of a connection; the edge guide's
STREAM_WINDOW = 64 << 10
CONNECTION_WINDOW = 1 << 20
_FORWARDED = ("x-forwarded-", "forwarded", "x-real-ip")
"""What proxies say of clients: nobody in front of a gateway is believed, so what reaches a backend is Envoy's own alone."""
_OWN = ("x-envoy-external-address", "x-envoy-internal")


def of(workload: Workload, snapshot: Snapshot) -> Gateway | None:
    """Return the gateway that runs in a workload's place."""
    if not snapshot.gateways:
        return None
    name = workload.labels.get(LABEL)
    return snapshot.gateways.get(f"{workload.namespace}/{name}") if name else None


def rules(snapshot: Snapshot) -> list[RouteRule]:
    """All rules that hold for gateways, as those see them."""
    return [rule for route in snapshot.routes.values() if route.gateways for rule in _seen(route).rules]


def attached(gateway: Gateway, snapshot: Snapshot) -> dict[str, tuple[Route, ...]]:
    """Return the routes of each of a gateway's listeners; their hostnames are those that they have in common."""
    found: dict[str, list[Route]] = {listener.name: [] for listener in gateway.listeners}
    for _, route in sorted(snapshot.routes.items()):
        for at in route.gateways:
            if at.gateway == gateway.name and at.listener in found:
                found[at.listener].append(replace(_seen(route), hostnames=tuple(host.lower() for host in at.hostnames)))
    return {name: tuple(some) for name, some in found.items()}


def _seen(route: Route) -> Route:
    """A route without what gateways may not send to (its share answers 500), and without rules for some callers: a stranger is none of them."""
    rules = [
        _ruled(replace(rule, name=rule.name or f"rule {i}"), route)
        for i, rule in enumerate(route.rules)
        if not (rule.callers or rule.claims)
    ]
    return replace(route, rules=tuple(rules))


def _ruled(rule: RouteRule, route: Route) -> RouteRule:
    denied = route.not_from_gateways
    if not denied:
        return rule
    return replace(
        rule,
        backends=tuple(replace(one, invalid="no ReferenceGrant") if one.service in denied else one for one in rule.backends),
        mirrors=tuple(one for one in rule.mirrors if one.service not in denied),
    )


def ports(gateway: Gateway) -> dict[int, tuple[GatewayListener, ...]]:
    """Return the listeners of each port."""
    found: dict[int, list[GatewayListener]] = {}
    for listener in gateway.listeners:
        found.setdefault(listener.port, []).append(listener)
    return {port: tuple(group) for port, group in sorted(found.items())}


def configurations(name: str, group: Sequence[GatewayListener]) -> list[tuple[str, tuple[GatewayListener, ...]]]:
    """Return the RouteConfigurations of a port: with TLS one for each listener, because SNI has chosen it; else one for all, by Host."""
    if group[0].certificates:
        return [(f"{name}/{one.name}", (one,)) for one in group]
    return [(name, tuple(group))]


def listener(
    local: LocalWorkload, trust_domain: str, secured: bool, group: Sequence[GatewayListener], told: Telling = NOTHING
) -> listener_pb2.Listener:
    """Build Envoy's listener for one port of a gateway; `secured` if the workload has a certificate for other nodes.

    Its filter chains do not depend on routes, and those of one hostname not on other hostnames: a change drains the connections of nobody else.
    """
    name = names.gateway(local.workload.name, group[0].port)
    result = listeners.bound(name, local, ("0.0.0.0", "::"), group[0].port)
    result.traffic_direction = base_pb2.INBOUND
    result.per_connection_buffer_limit_bytes.value = BUFFER_BYTES
    if group[0].certificates:
        inspector = packed(tls_inspector_pb2.TlsInspector())
        result.listener_filters.add(name="envoy.filters.listener.tls_inspector", typed_config=inspector)
    state = listeners.set_state(*listeners.caller(local, trust_domain, secured))
    for config, some in configurations(name, group):
        chain = result.filter_chains.add(name=config, filters=[state, _limit(), listeners.http(_manager(local, config, told))])
        if some[0].certificates:
            if some[0].hostname:
                chain.filter_chain_match.server_names.append(some[0].hostname)
            chain.transport_socket.CopyFrom(_tls(some[0]))
            chain.transport_socket_connect_timeout.seconds = HANDSHAKE_S
    return result


def _manager(local: LocalWorkload, config: str, told: Telling) -> hcm_pb2.HttpConnectionManager:
    result = listeners.manager(local.workload.name, names.listener(names.GATEWAY, local.workload.name), names.GATEWAY, told)
    result.rds.route_config_name = config
    result.rds.config_source.CopyFrom(ads())
    result.use_remote_address.value = True
    result.skip_xff_append = False
    result.early_header_mutation_extensions.append(hygiene.without(_FORWARDED))
    if not told.accept_from_outside:
        result.early_header_mutation_extensions.append(spans.strip())
    result.request_headers_timeout.CopyFrom(Duration(seconds=HEADERS_S))
    result.stream_idle_timeout.CopyFrom(Duration(seconds=STREAM_IDLE_S))
    result.max_request_headers_kb.value = HEADERS_KIB
    common = result.common_http_protocol_options
    common.idle_timeout.seconds = IDLE_S
    common.max_headers_count.value = MOST_HEADERS
    # A header with "_" may be another one to what runs behind (https://www.rfc-editor.org/rfc/rfc3875#section-4.1.18).
    common.headers_with_underscores_action = protocol_pb2.HttpProtocolOptions.REJECT_REQUEST
    h2 = result.http2_protocol_options
    h2.max_concurrent_streams.value = MOST_STREAMS
    h2.initial_stream_window_size.value = STREAM_WINDOW
    h2.initial_connection_window_size.value = CONNECTION_WINDOW
    return result


def _limit() -> listener_components_pb2.Filter:
    config = connection_limit_pb2.ConnectionLimit(stat_prefix=names.GATEWAY, max_connections={"value": MOST_CONNECTIONS})
    return listener_components_pb2.Filter(name="envoy.filters.network.connection_limit", typed_config=packed(config))


def _tls(listener: GatewayListener) -> base_pb2.TransportSocket:
    context = tls_pb2.DownstreamTlsContext()
    common = context.common_tls_context
    common.alpn_protocols.extend(["h2", "http/1.1"])
    common.tls_params.tls_minimum_protocol_version = common_pb2.TlsParameters.TLSv1_2
    common.tls_certificate_sds_secret_configs.extend(reference(names.gateway_certificate(one)) for one in listener.certificates)
    return base_pb2.TransportSocket(name="envoy.transport_sockets.tls", typed_config=packed(context))


def configuration(
    name: str, group: Sequence[GatewayListener], routed: Sequence[tuple[GatewayListener, Sequence[Route]]], backends: routes.Backends
) -> route_pb2.RouteConfiguration:
    """Build the routes of some listeners of a port, `group` being all of them.

    A host belongs to the listener that names it best, whether that has a route for it or not. Where TLS has chosen a listener, a host of another one is
    answered with 421 (RFC 9110, 15.5.20); what no route knows with 404.
    """
    hosts = []
    for listener, some in routed:
        around = routes.Around(listener.port, backends, scheme="https" if listener.certificates else "http")
        rivals = [one for one in group if _specific(one) > _specific(listener)]
        own = listener.hostname or "*"
        domains = sorted({own} | {hostname for route in some for hostname in route.hostnames})
        domains = [domain for domain in domains if not any(_within(domain, one) for one in rivals)]
        hosts += [routes.host(f"{listener.name} {domain}", some, domain, around) for domain in domains]
        if listener.certificates:
            hosts += [_misdirected(one.hostname) for one in rivals if _within(one.hostname, listener)]
    return route_pb2.RouteConfiguration(
        name=name, virtual_hosts=hosts, request_headers_to_remove=[names.DESTINATION_HEADER, *_OWN], ignore_port_in_host_matching=True
    )


def _specific(listener: GatewayListener) -> tuple[bool, int]:
    """How well a listener names its hosts: a name before a wildcard, more characters first."""
    return (bool(listener.hostname) and not listener.hostname.startswith("*"), len(listener.hostname))


def _within(domain: str, listener: GatewayListener) -> bool:
    return not listener.hostname or covers(listener.hostname, domain)


def _misdirected(hostname: str) -> route_components_pb2.VirtualHost:
    host = route_components_pb2.VirtualHost(name=f"other {hostname}", domains=[hostname])
    refusal = host.routes.add(name="misdirected", match=route_components_pb2.RouteMatch(prefix="/"))
    refusal.direct_response.status = 421
    refusal.response_headers_to_add.add(header=base_pb2.HeaderValue(key=names.REASON_HEADER, value="misdirected"))
    return host


def secrets(certificates: Mapping[str, tuple[bytes, bytes]]) -> dict[str, Resource]:
    """Certificates and keys (PEM), by the name of the Secret, as Envoy's secrets by their names."""
    return dict(_secret(names.gateway_certificate(name), *pair) for name, pair in certificates.items())


def _secret(name: str, chain: bytes, key: bytes) -> tuple[str, Resource]:
    held = common_pb2.TlsCertificate()
    held.certificate_chain.inline_bytes = chain
    held.private_key.inline_bytes = key
    return name, pack(secret_pb2.Secret(name=name, tls_certificate=held))
