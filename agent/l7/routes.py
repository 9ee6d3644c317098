"""RouteConfigurations: what happens to a request that was sent to one service port, or to one workload's own address.

Pure functions, called by `agent.l7.snapshot`. One RouteConfiguration per destination, found through a scope, so that a change of one route
is one small resource. HTTPRoute semantics: https://gateway-api.sigs.k8s.io/reference/spec/#httproute; Envoy's fields:
https://www.envoyproxy.io/docs/envoy/v1.37.0/api-v3/config/route/v3/route_components.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2, scoped_route_pb2
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2
from envoy.type.matcher.v3 import regex_pb2, string_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration

from agent.l7 import names
from agent.l7.precedence import covers, match_key
from agent.l7.rbac import Authorization
from agent.l7.resources import packed
from agent.model import Backend, HeaderEdit, MatchKind, Retry, Route, RouteMatch, RouteRule, StringMatch

RETRY_ON = "connect-failure,refused-stream,reset,retriable-status-codes"
"""HTTPRoute's retry stanza names the codes; connection errors (refused, reset, timeout) are retried as well (GEP-1731)."""
OTHER_HOST_ATTEMPTS = 30
"""How often a retry asks the load balancer again while it proposes a host that was already tried: of two equally busy hosts it proposes
each half of the time, so the usual 5 would send one retry in 64 to the host that just failed."""

Backends = Mapping[tuple[str, int], Authorization]
"""What the caller's side enforces for each service port that has a cluster."""


def scope(name: str, routes: str) -> scoped_route_pb2.ScopedRouteConfiguration:
    """Say which RouteConfiguration serves a destination (`names.destination`). The scope's name is its key: an address that moves is an update."""
    key = scoped_route_pb2.ScopedRouteConfiguration.Key(fragments=[scoped_route_pb2.ScopedRouteConfiguration.Key.Fragment(string_key=name)])
    return scoped_route_pb2.ScopedRouteConfiguration(name=name, route_configuration_name=routes, key=key)


def direct(name: str, cluster: str, route_name: str, authorization: Authorization) -> route_pb2.RouteConfiguration:
    """Send everything to one cluster under one authorization: services without a route, pod addresses and inbound listeners."""
    route = route_components_pb2.Route(name=route_name, match=route_components_pb2.RouteMatch(prefix="/"))
    route.route.cluster = cluster
    route.route.timeout.CopyFrom(Duration())
    authorization.apply(route.typed_per_filter_config)
    return _configuration(name, [_virtual_host("*", [route])])


def service(name: str, routes: Sequence[Route], backends: Backends) -> route_pb2.RouteConfiguration:
    """Build the routes of a service port from the HTTPRoutes attached to it (at least one).

    A virtual host per hostname, each with every rule that applies to it in order of precedence; `*` exists only if a route has no
    hostnames. What matches nothing gets 404.
    """
    domains = sorted({hostname.lower() for route in routes for hostname in route.hostnames} | ({"*"} if _any_open(routes) else set()))
    hosts = []
    for domain in domains:
        applying = [route for route in routes if not route.hostnames or any(covers(h, domain) for h in route.hostnames)]
        hosts.append(_virtual_host(domain, [_route(route, r, match, backends) for route, r, match in _ordered(applying, domain)]))
    return _configuration(name, hosts)


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


def _route(route: Route, index: int, match: RouteMatch, known: Backends) -> route_components_pb2.Route:
    rule = route.rules[index]
    result = route_components_pb2.Route(name=f"{route.name} {rule.name or f'rule {index}'}", match=_match(match))
    _edit(result, rule.request_headers, rule.response_headers)
    backends = [backend for backend in rule.backends if backend.weight > 0]
    if not backends:  # "if all weights are 0, or there are no backendRefs, the response is 500" (spec of HTTPRouteRule)
        result.direct_response.status = 500
        _set_header(result.response_headers_to_add, names.REASON_HEADER, "no-backend")
        return result
    action = result.route
    action.cluster_not_found_response_code = route_components_pb2.RouteAction.INTERNAL_SERVER_ERROR
    if len(backends) == 1:
        # The cheap form of weight 1: the backend's own edits come after the rule's, as in the weighted form below.
        _target_single(result, backends[0], known)
    else:
        for backend in backends:
            weighted = action.weighted_clusters.clusters.add(name=_cluster(backend, known), weight={"value": backend.weight})
            _edit(weighted, backend.request_headers, backend.response_headers)
            if (host := _host(backend.request_headers)) is not None:
                weighted.host_rewrite_literal = host
            _authorize(weighted.typed_per_filter_config, backend, known)
    if not action.HasField("host_rewrite_literal") and (host := _host(rule.request_headers)) is not None:
        action.host_rewrite_literal = host
    _time_and_retry(action, rule)
    return result


def _target_single(result: route_components_pb2.Route, backend: Backend, known: Backends) -> None:
    result.route.cluster = _cluster(backend, known)
    _edit(result, backend.request_headers, backend.response_headers)
    if (host := _host(backend.request_headers)) is not None:
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
    _match_path(result, match.path)
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
        result.safe_regex.regex = path.value if path.kind is MatchKind.REGEX else ".*" + _quote(path.value)


def _quote(text: str) -> str:
    r"""Quote for RE2 with \Q..\E, which needs no list of special characters."""
    return r"\Q" + text.replace(r"\E", r"\E\\E\Q") + r"\E"


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
