"""RouteConfigurations: what happens to a request that was sent to one service port, or to one workload's own address.

Pure functions, called by `agent.l7.snapshot`. One RouteConfiguration per destination, found through a scope, so that a change of one route
is one small resource. HTTPRoute semantics: https://gateway-api.sigs.k8s.io/reference/spec/#httproute; Envoy's fields:
https://www.envoyproxy.io/docs/envoy/v1.37.0/api-v3/config/route/v3/route_components.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2, scoped_route_pb2
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2
from envoy.type.matcher.v3 import regex_pb2, string_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration

from agent.l7 import callers, claims, filters, mirrors, names, sessions
from agent.l7.precedence import covers, match_key
from agent.l7.rbac import Authorization, LocalCallers
from agent.l7.resources import packed
from agent.model import Authentication, Backend, GrpcMethod, HeaderEdit, MatchKind, Retry, Route, RouteMatch, RouteRule, StringMatch

RETRY_ON = "connect-failure,refused-stream,reset,retriable-status-codes"
"""HTTPRoute's retry stanza names the codes; connection errors (refused, reset, timeout) are retried as well (GEP-1731)."""
OTHER_HOST_ATTEMPTS = 30
"""How often a retry asks the load balancer again while it proposes a host that was already tried: of two equally busy hosts it proposes
each half of the time, so the usual 5 would send one retry in 64 to the host that just failed."""

Backends = Mapping[tuple[str, int], Authorization]
"""What the caller's side enforces for each service port that has a cluster."""
NOTHING = Authorization()
Consumers = tuple[tuple[str, tuple[Route, ...]], ...]
"""Consumer routes by the namespace of callers, sorted: in that namespace they are instead of the others (GEP-1294)."""


def scope(name: str, routes: str) -> scoped_route_pb2.ScopedRouteConfiguration:
    """Say which RouteConfiguration serves a destination (`names.destination`). The scope's name is its key: an address that moves is an update."""
    key = scoped_route_pb2.ScopedRouteConfiguration.Key(fragments=[scoped_route_pb2.ScopedRouteConfiguration.Key.Fragment(string_key=name)])
    return scoped_route_pb2.ScopedRouteConfiguration(name=name, route_configuration_name=routes, key=key)


def direct(name: str, cluster: str, route_name: str, authorization: Authorization) -> route_pb2.RouteConfiguration:
    """Send everything to one cluster under one authorization: services without a route, pod addresses and inbound listeners."""
    return _configuration(name, [_virtual_host("*", _forwards(cluster, route_name, authorization))])


def _for_connect_too(route: route_components_pb2.Route) -> list[route_components_pb2.Route]:
    """A route for every path, and the same for CONNECT, which has no path that a match could compare.

    Only such routes allow CONNECT (`agent.l7.listeners`): after it nobody looks at what is said, so it goes nowhere where the request decides.
    """
    result = route_components_pb2.Route()
    result.CopyFrom(route)
    result.match.connect_matcher.SetInParent()
    if result.HasField("route"):
        result.route.upgrade_configs.add(upgrade_type="CONNECT", enabled={"value": True})
    return [route, result]


def _forwards(cluster: str, route_name: str, authorization: Authorization) -> list[route_components_pb2.Route]:
    route = _forward(cluster, route_name, authorization)
    return [route] if authorization.asks else _for_connect_too(route)


def _forward(cluster: str, route_name: str, authorization: Authorization) -> route_components_pb2.Route:
    route = route_components_pb2.Route(name=route_name, match=route_components_pb2.RouteMatch(prefix="/"))
    route.route.cluster = cluster
    route.route.timeout.CopyFrom(Duration())
    authorization.apply(route.typed_per_filter_config)
    return route


@dataclass(frozen=True, slots=True)
class Around:
    """What the routes of a service port depend on beside the routes: its number, who is here, and what its own endpoints demand."""

    port: int
    backends: Backends
    own: Authorization = NOTHING
    """What is enforced where no route applies."""
    consumers: Consumers = ()
    local: LocalCallers | None = None
    """Those of this node; None if no rule asks."""
    authentications: tuple[Authentication, ...] = ()
    """Whose tokens have the claims that rules ask for."""
    scheme: str = "http"
    """How requests come in."""


def service(name: str, routes: Sequence[Route], around: Around) -> route_pb2.RouteConfiguration:
    """Build the routes of a service port from those attached to it (at least one, for all callers or for those of a namespace).

    A virtual host per hostname, each with every rule that applies to it in order of precedence; `*` exists only if a route has no
    hostnames. What matches nothing gets 404. Consumer routes come first, each for callers of its namespace alone, whose other requests end there.
    """
    every = [*routes, *(route for _, group in around.consumers for route in group)]
    is_open = not routes or _any_open(every)
    domains = sorted({hostname.lower() for route in every for hostname in route.hostnames} | ({"*"} if is_open else set()))
    hosts = []
    for domain in domains:
        found: list[route_components_pb2.Route] = []
        for namespace, group in around.consumers:
            consumed = _applying(group, domain, around)
            consumed += _for_connect_too(_no_route(f"{namespace} no route"))
            for entry in consumed:
                callers.in_namespace(entry.match, namespace)
            found += consumed
        found += _applying(routes, domain, around) if routes else _forwards(name, f"{name} default", around.own)
        hosts.append(_virtual_host(domain, found))
    result = _configuration(name, hosts)
    if claims.asked(every):
        for host in result.virtual_hosts:  # whatever comes has a first route: `agent.l7.claims`
            host.routes.extend(_for_connect_too(_no_route(f"{name} no route")))
        claims.verify_first(result, around.authentications)
    return result


def host(name: str, routes: Iterable[Route], domain: str, around: Around) -> route_components_pb2.VirtualHost:
    """Build a virtual host of a gateway's listener from those of its routes that apply to a domain; what matches nothing gets 404."""
    built = _applying(routes, domain, around)
    # No CONNECT: a stranger would get a tunnel.
    return route_components_pb2.VirtualHost(
        name=name, domains=[domain], routes=[one for one in built if not one.match.HasField("connect_matcher")]
    )


def _applying(routes: Iterable[Route], domain: str, around: Around) -> list[route_components_pb2.Route]:
    applying = [route for route in routes if not route.hostnames or any(covers(h, domain) for h in route.hostnames)]
    built = []
    for route, r, match in _ordered(applying, domain):
        for conditions in callers.alternatives(route.rules[r].callers, around.local or LocalCallers({})):
            for one in _routes(route, r, match, around):
                one.match.filter_state.extend(conditions)
                claims.narrow(one.match, route.rules[r].claims)
                built += _for_connect_too(one) if _takes_connect(route.rules[r], match, around.backends) else [one]
    return built


def _takes_connect(rule: RouteRule, match: RouteMatch, known: Backends) -> bool:
    """May a rule be for CONNECT? Not if it asks for a path, or changes it, or if a backend's policies need the request."""
    if any((one.service, one.port) in known and known[one.service, one.port].asks for one in rule.backends):
        return False
    every_path = match.path is None or (match.path.kind is MatchKind.PREFIX and match.path.value in {"", "/"})
    return every_path and match.grpc is None and match.method in {"", "CONNECT"} and not rule.redirect and not rule.rewrite


def _no_route(name: str) -> route_components_pb2.Route:
    """Answer as Envoy does where nothing matches."""
    result = route_components_pb2.Route(name=name, match=route_components_pb2.RouteMatch(prefix="/"))
    result.direct_response.status = 404
    _set_header(result.response_headers_to_add, names.REASON_HEADER, "no-route")
    return result


def _any_open(routes: Iterable[Route]) -> bool:
    return any(not route.hostnames for route in routes)


def _ordered(routes: Iterable[Route], domain: str) -> list[tuple[Route, int, RouteMatch]]:
    found = [
        (match_key(route, r, m, domain), (route, r, match))
        for route in routes
        for r, rule in enumerate(route.rules)
        for m, match in enumerate(rule.matches or (RouteMatch(),))
    ]
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def _configuration(name: str, hosts: list[route_components_pb2.VirtualHost]) -> route_pb2.RouteConfiguration:
    return route_pb2.RouteConfiguration(
        name=name, virtual_hosts=hosts, request_headers_to_remove=[names.DESTINATION_HEADER], ignore_port_in_host_matching=True
    )


def _virtual_host(domain: str, routes: list[route_components_pb2.Route]) -> route_components_pb2.VirtualHost:
    return route_components_pb2.VirtualHost(name=domain, domains=[domain], routes=routes)


def _routes(route: Route, index: int, match: RouteMatch, around: Around) -> list[route_components_pb2.Route]:
    """Build one match of a rule: where sessions are kept, in front a route for those of each backend, at the end one for paths that never bring a cookie."""
    rule = route.rules[index]
    drawn = _route(route, index, rule, match, around)
    if rule.session is None or rule.invalid or rule.redirect:
        return [drawn]
    result, marks = [], []
    for backend, mark in sessions.marked(rule.backends):
        if backend.weight > 0:
            marks.append(mark)
        if _cluster(backend, around.backends) != names.INVALID_CLUSTER:
            one = _route(route, index, replace(rule, backends=(replace(backend, weight=1),)), match, around)
            sessions.covers(one.match, rule.session)
            sessions.resume(one, rule.session, mark)
            result.append(one)
    if not drawn.HasField("route"):
        return [*result, drawn]
    first = route_components_pb2.Route()
    first.CopyFrom(drawn)
    some = sessions.covers(first.match, rule.session)
    sessions.begin(first, rule.session, marks)
    return [*result, first, drawn] if some else [*result, first]


def _route(route: Route, index: int, rule: RouteRule, match: RouteMatch, around: Around) -> route_components_pb2.Route:
    """Build one match of a rule, or of one that differs from the rule at `index`, without its session."""
    known = around.backends
    result = route_components_pb2.Route(name=f"{route.name} {rule.name or f'rule {index}'}", match=_match(match))
    if route.grpc:
        result.match.grpc.SetInParent()
    if rule.invalid:
        return _refuse(result, 500, "invalid-filter")
    _edit(result, rule.request_headers, rule.response_headers)
    filters.cors(result.typed_per_filter_config, rule.cors)
    if rule.redirect:
        filters.redirect(result.redirect, rule.redirect, match, around.port, around.scheme)
        return result
    # GRPCRoute's spec demands UNAVAILABLE instead of 500; Envoy makes that of 503 (https://grpc.github.io/grpc/core/md_doc_http-grpc-status-mapping.html).
    failure = 503 if route.grpc else 500
    if all(backend.weight == 0 for backend in rule.backends):  # "if all weights are 0, or there are no backendRefs, the response is 500"
        return _refuse(result, failure, "no-backend")
    unavailable, internal = route_components_pb2.RouteAction.SERVICE_UNAVAILABLE, route_components_pb2.RouteAction.INTERNAL_SERVER_ERROR
    result.route.cluster_not_found_response_code = unavailable if route.grpc else internal
    _to_backends(result, rule, known)
    if rule.rewrite:
        filters.rewrite(result.route, rule.rewrite, match)
    _mirror(result.route, rule, known)
    _time_and_retry(result.route, rule)
    return result


def _mirror(action: route_components_pb2.RouteAction, rule: RouteRule, known: Backends) -> None:
    for mirror in rule.mirrors:
        if (mirror.service, mirror.port) in known:
            mirrors.copy(action, mirror)


def _to_backends(result: route_components_pb2.Route, rule: RouteRule, known: Backends) -> None:
    backends = [backend for backend in rule.backends if backend.weight > 0]
    if len(backends) == 1:
        # The cheap form of weight 1: the backend's own edits come after the rule's, as in the weighted form below.
        _target_single(result, backends[0], known)
    else:
        for backend in backends:
            weighted = result.route.weighted_clusters.clusters.add(name=_cluster(backend, known), weight={"value": backend.weight})
            _edit(weighted, backend.request_headers, backend.response_headers)
            if (host := backend.hostname or _host(backend.request_headers)) is not None:
                weighted.host_rewrite_literal = host
            _authorize(weighted.typed_per_filter_config, backend, known)
    if not result.route.HasField("host_rewrite_literal") and (host := _host(rule.request_headers)) is not None:
        result.route.host_rewrite_literal = host


def _refuse(result: route_components_pb2.Route, status: int, reason: str) -> route_components_pb2.Route:
    result.direct_response.status = status
    _set_header(result.response_headers_to_add, names.REASON_HEADER, reason)
    return result


def _target_single(result: route_components_pb2.Route, backend: Backend, known: Backends) -> None:
    result.route.cluster = _cluster(backend, known)
    _edit(result, backend.request_headers, backend.response_headers)
    if (host := backend.hostname or _host(backend.request_headers)) is not None:
        result.route.host_rewrite_literal = host
    _authorize(result.typed_per_filter_config, backend, known)


def _cluster(backend: Backend, known: Backends) -> str:
    usable = not backend.invalid and (backend.service, backend.port) in known
    return names.service(backend.service, backend.port) if usable else names.INVALID_CLUSTER


def _authorize(target: Mapping[str, AnyMessage], backend: Backend, known: Backends) -> None:
    if not backend.invalid and (backend.service, backend.port) in known:
        known[backend.service, backend.port].apply(target)


def _time_and_retry(action: route_components_pb2.RouteAction, rule: RouteRule) -> None:
    """Set timeouts and retries. Without retries the time for one try and for the whole request are one limit: the smaller."""
    whole, each = rule.request_timeout_ms, rule.backend_request_timeout_ms
    if rule.retry is None or rule.retry.attempts == 0:
        whole = min((limit for limit in (whole, each) if limit > 0), default=0)
    else:
        action.retry_policy.CopyFrom(_retry(rule.retry, each))
    action.timeout.CopyFrom(_milliseconds(whole))  # 0 switches Envoy's default of 15 s off


def _retry(retry: Retry, each_ms: int) -> route_components_pb2.RetryPolicy:
    policy = route_components_pb2.RetryPolicy(
        retry_on=RETRY_ON,
        num_retries={"value": retry.attempts},
        retriable_status_codes=retry.codes,
        host_selection_retry_max_attempts=OTHER_HOST_ATTEMPTS,
        retry_host_predicate=[
            route_components_pb2.RetryPolicy.RetryHostPredicate(
                name="envoy.retry_host_predicates.previous_hosts", typed_config=packed(previous_hosts_pb2.PreviousHostsPredicate())
            )
        ],
    )
    if each_ms:
        policy.per_try_timeout.CopyFrom(_milliseconds(each_ms))
    if retry.backoff_ms:
        policy.retry_back_off.base_interval.CopyFrom(_milliseconds(retry.backoff_ms))
        policy.retry_back_off.max_interval.CopyFrom(_milliseconds(retry.backoff_ms * 10))
    return policy


def _milliseconds(value: int) -> Duration:
    return Duration(seconds=value // 1000, nanos=value % 1000 * 1_000_000)


def _match(match: RouteMatch) -> route_components_pb2.RouteMatch:
    result = route_components_pb2.RouteMatch()
    if match.grpc is None:
        _match_path(result, match.path)
    else:
        _match_grpc(result, match.grpc)
    if match.method:
        result.headers.add(name=":method", string_match=string_pb2.StringMatcher(exact=match.method))
    for name, value in match.headers:
        if value.kind is MatchKind.PRESENT:
            result.headers.add(name=name, present_match=True)
        else:
            result.headers.add(name=name, string_match=_string(value))
    for name, value in match.query:
        if value.kind is MatchKind.PRESENT:
            result.query_parameters.add(name=name, present_match=True)
        else:
            result.query_parameters.add(name=name, string_match=_string(value))
    return result


def _match_path(result: route_components_pb2.RouteMatch, path: StringMatch | None) -> None:
    if path is None or path.kind is MatchKind.PRESENT:
        result.prefix = "/"
    elif path.kind is MatchKind.EXACT:
        result.path = path.value
    elif path.kind is MatchKind.PREFIX:
        prefix = path.value.rstrip("/")  # "/shop/" and "/shop" mean the same: whole path elements
        if prefix:
            result.path_separated_prefix = prefix
        else:
            result.prefix = "/"
    else:
        # Without the query: Envoy matches a regular expression against the path alone.
        result.safe_regex.regex = path.value if path.kind is MatchKind.REGEX else ".*" + filters.quote(path.value)


def _match_grpc(result: route_components_pb2.RouteMatch, method: GrpcMethod) -> None:
    """Match the path of a call, /SERVICE/METHOD (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#requests)."""
    parts = (method.service, method.method)
    if all(part is not None and part.kind is MatchKind.EXACT for part in parts):
        result.path = "/" + "/".join(part.value for part in parts if part is not None)
    elif method.method is None and method.service is not None and method.service.kind is MatchKind.EXACT:
        result.prefix = f"/{method.service.value}/"
    elif parts == (None, None):
        result.prefix = "/"
    else:
        result.safe_regex.regex = "/" + "/".join(_part(part) for part in parts)


def _part(part: StringMatch | None) -> str:
    if part is None:
        return "[^/]+"
    return f"(?:{part.value})" if part.kind is MatchKind.REGEX else filters.quote(part.value)


def _string(match: StringMatch) -> string_pb2.StringMatcher:
    if match.kind is MatchKind.PREFIX:
        return string_pb2.StringMatcher(prefix=match.value)
    if match.kind is MatchKind.SUFFIX:
        return string_pb2.StringMatcher(suffix=match.value)
    if match.kind is MatchKind.REGEX:
        return string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=match.value))
    return string_pb2.StringMatcher(exact=match.value)


def _edit(
    target: route_components_pb2.Route | route_components_pb2.WeightedCluster.ClusterWeight, request: HeaderEdit, response: HeaderEdit
) -> None:
    """Append header changes, except those of Host, which Envoy refuses here (see `_host`). It removes first and then adds in order."""
    for edit, added, removed in (
        (request, target.request_headers_to_add, target.request_headers_to_remove),
        (response, target.response_headers_to_add, target.response_headers_to_remove),
    ):
        for name, value in sorted(edit.set.items()):
            if not _is_host(name):
                _set_header(added, name, value)
        for name, value in sorted(edit.add.items()):
            if not _is_host(name):
                _set_header(added, name, value, base_pb2.HeaderValueOption.APPEND_IF_EXISTS_OR_ADD)
        changed = {name.lower() for name in (*edit.set, *edit.add)}
        removed.extend(sorted(name for name in edit.remove if name.lower() not in changed and not _is_host(name)))


def _set_header(
    headers: Sequence[base_pb2.HeaderValueOption],
    name: str,
    value: str,
    action: int = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
) -> None:
    """Append one header; a percent sign is doubled, because Envoy expands %COMMANDS% in values."""
    headers.add(  # type: ignore[attr-defined]  # a repeated protobuf field
        header=base_pb2.HeaderValue(key=name, value=value.replace("%", "%%")), append_action=action, keep_empty_value=True
    )


def _is_host(name: str) -> bool:
    return name.lower() in {"host", ":authority"}


def _host(edit: HeaderEdit) -> str | None:
    """Return the value that an edit sets Host to: Envoy takes that as a rewrite, not as a header."""
    return next((value for name, value in edit.set.items() if _is_host(name)), None)
