"""The filters of a route's rule as Envoy has them: redirects, rewrites, CORS. Pure functions, called by `agent.l7.routes`.

What they mean: https://gateway-api.sigs.k8s.io/reference/spec/#httproutefilter; Envoy's fields:
https://www.envoyproxy.io/docs/envoy/v1.37.0/api-v3/config/route/v3/route_components.proto.
"""

from __future__ import annotations

from collections.abc import Mapping

from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.http.cors.v3 import cors_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.type.matcher.v3 import regex_pb2, string_pb2
from google.protobuf.any_pb2 import Any as AnyMessage

from agent.l7 import names
from agent.l7.resources import packed
from agent.model import MatchKind, RouteMatch
from agent.routing import Cors, Redirect, Rewrite

_STATUS = {
    301: route_components_pb2.RedirectAction.MOVED_PERMANENTLY,
    302: route_components_pb2.RedirectAction.FOUND,
    303: route_components_pb2.RedirectAction.SEE_OTHER,
    307: route_components_pb2.RedirectAction.TEMPORARY_REDIRECT,
    308: route_components_pb2.RedirectAction.PERMANENT_REDIRECT,
}
_PORTS = {"http": 80, "https": 443}


def http_filters() -> list[hcm_pb2.HttpFilter]:
    """CORS, which answers for the backend before anybody is asked who calls; see `agent.l7.listeners.http_filters`."""
    return [hcm_pb2.HttpFilter(name=names.CORS_FILTER, typed_config=packed(cors_pb2.Cors()), disabled=True)]


def redirect(
    action: route_components_pb2.RedirectAction, wanted: Redirect, match: RouteMatch, service_port: int, scheme: str = "http"
) -> None:
    """Fill a redirect of requests that came over `scheme` to a port of a service or gateway.

    The port is that of the filter, else the scheme's if the filter names one, else the service's; it is left out where it is the scheme's own. Envoy
    keeps the port of a Host header unless told another (RouteEntryImplBase::newUri), so on a service port other than 80 it is always written.
    """
    action.response_code = _STATUS[wanted.status]
    action.scheme_redirect = wanted.scheme
    action.host_redirect = wanted.hostname
    usual = _PORTS[wanted.scheme or scheme]
    port = wanted.port or (usual if wanted.scheme else service_port)
    if port != usual or (not wanted.hostname and service_port != _PORTS[scheme]):
        action.port_redirect = port
    if wanted.full_path is not None:
        action.path_redirect = wanted.full_path
    elif wanted.prefix is not None:
        _replace_prefix(action, wanted.prefix, match)


def rewrite(action: route_components_pb2.RouteAction, wanted: Rewrite, match: RouteMatch) -> None:
    """Fill in another Host and another path; the query stays."""
    if wanted.hostname:
        action.host_rewrite_literal = wanted.hostname
    if wanted.full_path is not None:
        action.regex_rewrite.CopyFrom(_substitution("^.*$", wanted.full_path))
    elif wanted.prefix is not None:
        _replace_prefix(action, wanted.prefix, match)


def _replace_prefix(action: route_components_pb2.RedirectAction | route_components_pb2.RouteAction, new: str, match: RouteMatch) -> None:
    plain, rewritten = _prefix(new, match)
    if rewritten is None:
        action.prefix_rewrite = plain
    else:
        action.regex_rewrite.CopyFrom(rewritten)


def _prefix(new: str, match: RouteMatch) -> tuple[str, regex_pb2.RegexMatchAndSubstitute | None]:
    """Say how the matched prefix is replaced, by the table of HTTPPathModifier.replacePrefixMatch: whole path elements, and one slash between them."""
    path = match.path
    old = path.value.rstrip("/") if path is not None and path.kind is MatchKind.PREFIX else ""
    new = new.rstrip("/")
    if not old:
        return f"{new}/", None  # Envoy's match is the prefix "/" then
    if not new:
        return "", _substitution(f"^{quote(old)}/*", "/")
    return new, None


def _substitution(pattern: str, text: str) -> regex_pb2.RegexMatchAndSubstitute:
    return regex_pb2.RegexMatchAndSubstitute(pattern=regex_pb2.RegexMatcher(regex=pattern), substitution=text.replace("\\", "\\\\"))


def quote(text: str) -> str:
    r"""Quote for RE2 with \Q..\E, which needs no list of special characters."""
    return r"\Q" + text.replace(r"\E", r"\E\\E\Q") + r"\E"


def cors(target: Mapping[str, AnyMessage], wanted: Cors | None) -> None:
    """Switch CORS on for a route, if wanted. A preflight from another origin is answered without permission instead of being forwarded."""
    if wanted is None:
        return
    policy = cors_pb2.CorsPolicy(
        allow_methods=wanted.methods,
        allow_headers=wanted.headers,
        expose_headers=wanted.expose,
        max_age=str(wanted.max_age_s),
        allow_credentials={"value": wanted.credentials},
        forward_not_matching_preflights={"value": False},
    )
    for is_regex, text in wanted.origins:
        matcher = (
            string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=text)) if is_regex else string_pb2.StringMatcher(exact=text)
        )
        policy.allow_origin_string_match.append(matcher)
    target[names.CORS_FILTER].CopyFrom(packed(policy))
