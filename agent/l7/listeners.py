"""One outbound and, where a policy needs it, one inbound listener per local workload, inside that workload's network namespace.

Pure functions, called by `agent.l7.snapshot`. Which listener accepted says who the workload is: a `set_filter_state` network filter notes
it on the connection, from where authorization, upstream binding and pool separation read it; a client can not influence it.
Everything that changes often (routes, authorization, tracing) is elsewhere, because a changed listener drains its connections.

Routing goes by the original destination, not by Host: an early header mutation writes the connection's local address, which the
`original_dst` listener filter restored, into `names.DESTINATION_HEADER`, and scoped routes choose the RouteConfiguration by it. Early
mutation runs before the route is first looked up, and overwriting leaves nothing of what a client sent
(https://www.envoyproxy.io/docs/envoy/v1.37.0/configuration/http/http_conn_man/headers#early-header-mutation).
"""

from __future__ import annotations

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.common.mutation_rules.v3 import mutation_rules_pb2
from envoy.config.core.v3 import base_pb2, extension_pb2, grpc_service_pb2, substitution_format_string_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.extensions.access_loggers.grpc.v3 import als_pb2
from envoy.extensions.filters.common.set_filter_state.v3.value_pb2 import FilterStateValue
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.listener.original_dst.v3 import original_dst_pb2
from envoy.extensions.filters.network.direct_response.v3 import config_pb2 as direct_response_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.filters.network.set_filter_state.v3 import set_filter_state_pb2
from envoy.extensions.http.early_header_mutation.header_mutation.v3 import header_mutation_pb2
from google.protobuf.duration_pb2 import Duration

from agent.config import INBOUND_PORT, OUTBOUND_PORT
from agent.l7 import (
    access_log,
    call_log,
    claims,
    fairness,
    filters,
    hygiene,
    jwt,
    limits,
    metrics,
    names,
    parting,
    request_log,
    sessions,
    spans,
)
from agent.l7.clusters import ads, socket_address
from agent.l7.resources import packed
from agent.l7.telling import NOTHING, Telling
from agent.model import LocalWorkload

_REASONS = (  # local replies by response flag or code (https://www.envoyproxy.io/docs/envoy/v1.37.0/configuration/observability/access_log)
    ("NR", 0, "no-route"),
    ("UH", 0, "no-ready-backend"),
    ("NC", 0, "invalid-backend"),
    ("UF", 0, "backend-connection-failed"),
    ("UC", 0, "backend-connection-ended"),
    ("UO", 0, "overload"),
    ("UT", 0, "timeout"),
    ("FI", 0, "fault-injection"),
    ("", 401, "request-authentication"),
    ("", 403, "authorization-policy"),
    ("", 429, "rate-limit"),  # Envoy's local rate limit sets no flag
)


def outbound(local: LocalWorkload, trust_domain: str, secured: bool = False, told: Telling = NOTHING) -> listener_pb2.Listener:
    """Build the listener that the connect hook redirects this workload's L7 connections to; `secured` if it has a certificate for other nodes.

    [::1] is added only for a workload that has an IPv6 address: in a namespace with IPv6 switched off it could not be bound, and
    Envoy would refuse the whole listener.
    """
    workload = local.workload
    name = names.listener(names.OUTBOUND, workload.name)
    connections = manager(workload.name, name, names.OUTBOUND, told)
    connections.scoped_routes.name = "destinations"
    connections.scoped_routes.rds_config_source.CopyFrom(ads())
    connections.scoped_routes.scoped_rds.scoped_rds_config_source.CopyFrom(ads())
    extractor = hcm_pb2.ScopedRoutes.ScopeKeyBuilder.FragmentBuilder.HeaderValueExtractor(name=names.DESTINATION_HEADER, index=0)
    connections.scoped_routes.scope_key_builder.fragments.add().header_value_extractor.CopyFrom(extractor)
    connections.early_header_mutation_extensions.append(destination_header("%DOWNSTREAM_LOCAL_ADDRESS%"))
    state = caller(local, trust_domain, secured)
    listener = bound(name, local, ("127.0.0.1", "::1"), OUTBOUND_PORT)
    listener.filter_chains.add(name="http", filters=[set_state(*state), http(connections)])
    fairness.guard(listener, names.OUTBOUND)
    listener.traffic_direction = base_pb2.OUTBOUND
    listener.listener_filters.append(original_destination())
    return listener


def caller(local: LocalWorkload, trust_domain: str, secured: bool) -> list[FilterStateValue]:
    """Who causes what a connection to a listener of this workload causes: the workload, from its namespace, with its certificate if it is `secured`."""
    workload = local.workload
    state = [
        netns(local),
        value(names.PRINCIPAL_KEY, workload.identity(trust_domain).removeprefix("spiffe://")),
        value(names.NAMESPACE_KEY, workload.namespace),
        value(names.SERVICE_ACCOUNT_KEY, f"{workload.namespace}/{workload.service_account}"),
        value(names.WORKLOAD_KEY, workload.name),
    ]
    if secured:
        state.append(certificate(local, trust_domain))
    return state


def inbound(local: LocalWorkload, told: Telling = NOTHING) -> listener_pb2.Listener:
    """Build the listener that plain connections to this workload are steered to when its policies need the request.

    It is bound to the wildcard: an accepted socket then has the address that the caller dialled, which filter state hands to the
    original-destination cluster. Authorization is in its RouteConfiguration of the same name.
    """
    name = names.listener(names.INBOUND, local.workload.name)
    connections = manager(local.workload.name, name, names.INBOUND, told)
    connections.rds.route_config_name = name
    connections.rds.config_source.CopyFrom(ads())
    listener = bound(name, local, ("0.0.0.0", "::"), INBOUND_PORT)
    state = set_state(
        netns(local), value(names.ORIGINAL_DESTINATION_KEY, "%DOWNSTREAM_LOCAL_ADDRESS%", factory=names.ORIGINAL_DESTINATION_KEY)
    )
    listener.filter_chains.add(name="http", filters=[state, http(connections)])
    fairness.guard(listener, names.INBOUND)
    listener.traffic_direction = base_pb2.INBOUND
    # Who dials the listener's own port was not steered here: forwarding that to where it was sent would never end. Close it.
    refuse = listener_components_pb2.Filter(name="envoy.filters.network.direct_response", typed_config=packed(direct_response_pb2.Config()))
    match = listener_components_pb2.FilterChainMatch(destination_port={"value": INBOUND_PORT})
    listener.filter_chains.add(name="direct", filter_chain_match=match, filters=[refuse])
    return listener


def bound(name: str, local: LocalWorkload, hosts: tuple[str, ...], port: int) -> listener_pb2.Listener:
    """Begin a listener in a workload's namespace, on the first host and, if the workload has an IPv6 address, on the second.

    It is not under the limit of connections for all of Envoy, which strangers at a gateway could use up: workloads have limits of their own
    (`agent.l7.fairness`), and when memory runs short those who hold the most lose first (`agent.l7.bootstrap`).
    """
    listener = listener_pb2.Listener(name=name, stat_prefix=name.partition("/")[0], ignore_global_conn_limit=True)
    listener.address.CopyFrom(socket_address(hosts[0], port, local.netns_path))
    if any(":" in address for address in local.workload.addresses):
        for host in hosts[1:]:
            listener.additional_addresses.add().address.CopyFrom(socket_address(host, port, local.netns_path))
    return listener


def set_state(*values: FilterStateValue) -> listener_components_pb2.Filter:
    """The network filter that writes these on each new connection."""
    config = set_filter_state_pb2.Config(on_new_connection=values)
    return listener_components_pb2.Filter(name="envoy.filters.network.set_filter_state", typed_config=packed(config))


def http(manager: hcm_pb2.HttpConnectionManager) -> listener_components_pb2.Filter:
    """The network filter that speaks HTTP."""
    return listener_components_pb2.Filter(name="envoy.filters.network.http_connection_manager", typed_config=packed(manager))


def value(key: str, text: str, *, factory: str = "envoy.string", shared: bool = False) -> FilterStateValue:
    """Build one filter state entry; a `shared` one is known to connections that this one causes, also behind an internal listener.

    Only a *hashable* shared object becomes part of the pool key (Envoy, TransportSocketOptionsUtility::commonHashKey), hence
    `envoy.hashable_string` where callers must not share connections.
    """
    source = substitution_format_string_pb2.SubstitutionFormatString(text_format_source=base_pb2.DataSource(inline_string=text))
    sharing = FilterStateValue.TRANSITIVE if shared else FilterStateValue.NONE
    return FilterStateValue(object_key=key, factory_key=factory, format_string=source, shared_with_upstream=sharing)


def original_destination() -> listener_components_pb2.ListenerFilter:
    """The listener filter that asks the kernel where a redirected connection was going to (bpf_src/mesh_sockopt.c)."""
    config = packed(original_dst_pb2.OriginalDst())
    return listener_components_pb2.ListenerFilter(name="envoy.filters.listener.original_dst", typed_config=config)


def netns(local: LocalWorkload) -> FilterStateValue:
    """Have everything that this connection causes happen in the workload's namespace, on connections of its own."""
    return value(names.NETNS_KEY, local.netns_path, factory="envoy.hashable_string", shared=True)


def certificate(local: LocalWorkload, trust_domain: str) -> FilterStateValue:
    """Have tunnels show the workload's certificate (`agent.l7.tls`)."""
    name = names.caller_certificate(local.workload.identity(trust_domain))
    return value(names.CERTIFICATE_KEY, name, factory="envoy.hashable_string", shared=True)


def destination_header(text: str) -> extension_pb2.TypedExtensionConfig:
    """Overwrite `names.DESTINATION_HEADER` with a format before anything looks at the request."""
    header = base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=names.DESTINATION_HEADER, value=text),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    mutation = header_mutation_pb2.HeaderMutation(mutations=[mutation_rules_pb2.HeaderMutation(append=header)])
    return extension_pb2.TypedExtensionConfig(name="envoy.http.early_header_mutation.header_mutation", typed_config=packed(mutation))


def manager(workload: str, log_name: str, side: str, told: Telling = NOTHING) -> hcm_pb2.HttpConnectionManager:
    """Build the HTTP connection manager: transparent to the application, strict where a path could mean two things.

    Paths are normalized, repeated slashes merged and escaped slashes answered by a redirect to the plain path, so that what
    authorization matched is what the application sees (https://www.envoyproxy.io/docs/envoy/v1.37.0/configuration/best_practices/edge).
    """
    result = hcm_pb2.HttpConnectionManager(
        stat_prefix=side,
        codec_type=hcm_pb2.HttpConnectionManager.AUTO,
        http_filters=http_filters(),
        access_log=[
            _access_log(workload, log_name),
            _audit_log(log_name),
            *metrics.access_logs(workload, log_name),
            *call_log.access_logs(log_name, _to_agent(log_name)),
        ],
        upgrade_configs=[
            hcm_pb2.HttpConnectionManager.UpgradeConfig(upgrade_type="websocket"),
            hcm_pb2.HttpConnectionManager.UpgradeConfig(upgrade_type="CONNECT", enabled={"value": False}),  # some routes allow it
        ],
        proxy_100_continue=True,  # the application says whether it wants the body
        normalize_path={"value": True},
        merge_slashes=True,
        path_with_escaped_slashes_action=hcm_pb2.HttpConnectionManager.UNESCAPE_AND_REDIRECT,
        server_header_transformation=hcm_pb2.HttpConnectionManager.PASS_THROUGH,
        stream_idle_timeout=Duration(seconds=0),  # Envoy's 5 minutes would cut quiet streams that work without a mesh
        generate_request_id={"value": False},
        skip_xff_append=True,
        local_reply_config=local_replies(),
        early_header_mutation_extensions=[hygiene.clean()],
        request_headers_timeout=Duration(seconds=hygiene.HEADERS_S),
    )
    if told.log:
        result.access_log.append(request_log.access_log(workload, log_name, told.log))
    if told.collector:
        spans.trace(result, workload, log_name, told)
    fairness.turn_taking(result)
    result.http2_protocol_options.allow_connect = True  # WebSocket over HTTP/2 (RFC 8441)
    result.http_protocol_options.enable_trailers = True
    result.http_protocol_options.accept_http_10 = True
    result.http_protocol_options.default_host_for_http_10 = "unknown"  # Envoy demands one; routing does not go by it
    return result


def http_filters() -> list[hcm_pb2.HttpFilter]:
    """Parting, CORS, tokens, authorization, limits and faults, session persistence, then the router."""
    router = router_pb2.Router(suppress_envoy_headers=True)
    return [
        # Disabled = not even made, until a route, virtual host or weighted cluster carries a configuration for it.
        parting.http_filter(),
        claims.http_filter(),
        *filters.http_filters(),
        jwt.http_filter(),
        disabled_rbac(names.DENY_FILTER),
        disabled_rbac(names.ALLOW_FILTER),
        *limits.http_filters(),
        *sessions.http_filters(),
        hcm_pb2.HttpFilter(name="envoy.filters.http.router", typed_config=packed(router)),
    ]


def disabled_rbac(name: str) -> hcm_pb2.HttpFilter:
    """A filter that is not even made until a route, virtual host or weighted cluster carries a configuration for it."""
    return hcm_pb2.HttpFilter(name=name, typed_config=packed(rbac_pb2.RBAC()), disabled=True)


def local_replies() -> hcm_pb2.LocalReplyConfig:
    """Have answers that the waypoint makes itself say why."""
    return hcm_pb2.LocalReplyConfig(mappers=[_reason(*reason) for reason in _REASONS])


def _reason(flag: str, code: int, reason: str) -> hcm_pb2.ResponseMapper:
    condition = accesslog_pb2.AccessLogFilter()
    if flag:
        condition.response_flag_filter.flags.append(flag)
    else:
        condition.status_code_filter.comparison.op = accesslog_pb2.ComparisonFilter.EQ
        condition.status_code_filter.comparison.value.default_value = code
        condition.status_code_filter.comparison.value.runtime_key = "meshagent.unused"
    header = base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=names.REASON_HEADER, value=reason),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    return hcm_pb2.ResponseMapper(filter=condition, headers_to_add=[header])


def _access_log(workload: str, log_name: str) -> accesslog_pb2.AccessLog:
    """Build the record stream to the agent, off (0 %) until the runtime layer says otherwise for this workload."""
    config = _to_agent(log_name)
    key = names.received_key if log_name.startswith(names.RECEIVING) else names.trace_key
    runtime = accesslog_pb2.RuntimeFilter(runtime_key=key(workload), use_independent_randomness=True)
    return accesslog_pb2.AccessLog(
        name="envoy.access_loggers.http_grpc",
        filter=accesslog_pb2.AccessLogFilter(runtime_filter=runtime),
        typed_config=packed(config),
    )


def _audit_log(log_name: str) -> accesslog_pb2.AccessLog:
    """Build the record stream of requests that an AUDIT rule would deny (`agent.l7.audit`); no other request leaves Envoy."""
    wanted = accesslog_pb2.MetadataFilter(match_if_key_not_found={"value": False})
    wanted.matcher.filter = names.RBAC_METADATA
    wanted.matcher.path.add(key=f"{names.AUDIT_PREFIX}shadow_engine_result")
    wanted.matcher.value.string_match.exact = "denied"
    return accesslog_pb2.AccessLog(
        name="envoy.access_loggers.http_grpc",
        filter=accesslog_pb2.AccessLogFilter(metadata_filter=wanted),
        typed_config=packed(_to_agent(f"{names.AUDIT}/{log_name}")),
    )


def _to_agent(log_name: str) -> als_pb2.HttpGrpcAccessLogConfig:
    config = als_pb2.HttpGrpcAccessLogConfig()
    config.common_config.CopyFrom(
        als_pb2.CommonGrpcAccessLogConfig(
            log_name=log_name,
            transport_api_version="V3",
            grpc_service=grpc_service_pb2.GrpcService(
                envoy_grpc=grpc_service_pb2.GrpcService.EnvoyGrpc(cluster_name=names.XDS_CLUSTER), timeout=Duration(seconds=1)
            ),
            buffer_flush_interval=Duration(nanos=50_000_000),
            filter_state_objects_to_log=[names.WORKLOAD_KEY],
        )
    )
    for tag, text in access_log.TAGS.items():
        config.common_config.custom_tags.add(tag=tag, value=text)
    return config
