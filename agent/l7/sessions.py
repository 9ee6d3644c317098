"""Session persistence: a client that brings back what an answer told it goes on with the same backend and the same endpoint. Pure, used by `agent.l7.routes`.

Envoy's stateful session filter knows endpoints only, and looks for one in the cluster that was drawn before (envoyproxy/envoy issue 24741). So a client is told
"MARK.ENDPOINT", and in front of what draws by weight a rule has one route for each backend, for requests with its mark: a session goes before weights, also
before a weight of 0 (https://gateway-api.sigs.k8s.io/geps/gep-1619/#traffic-splitting), and before those that become several.

Between the client and the stateful session filter, which has a header of its own for that, two filters translate. On the way in one finds the value
(header_to_metadata knows cookies) and the other writes the header; on the way out the other tells the client, if there is anything new to tell. What a
client brings is not signed, as with Envoy's own cookies: it may choose an endpoint of the rule's backends, and each backend's policies hold for it.
https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/http/http_filters/stateful_session_filter
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from envoy.config.common.mutation_rules.v3 import mutation_rules_pb2
from envoy.config.core.v3 import base_pb2, extension_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.http.header_mutation.v3 import header_mutation_pb2
from envoy.extensions.filters.http.header_to_metadata.v3 import header_to_metadata_pb2
from envoy.extensions.filters.http.stateful_session.v3 import stateful_session_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.http.stateful_session.header.v3 import header_pb2
from google.protobuf.any_pb2 import Any as AnyMessage

from agent.l7 import names
from agent.l7.filters import quote
from agent.l7.resources import packed
from agent.model import Backend
from agent.routing import Session

_HEADER = "x-meshagent-session"
"""The endpoint, between the filters: no client's ever passes (`agent.l7.hygiene`), and no backend sees it."""
_ENDPOINT = "endpoint"
"""Key in the dynamic metadata of `names.SESSION_READER`."""
_OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def http_filters() -> list[hcm_pb2.HttpFilter]:
    """Session persistence, the last before the router; see `agent.l7.listeners.http_filters`."""
    return [
        hcm_pb2.HttpFilter(name=name, typed_config=packed(config), disabled=True)
        for name, config in (
            (names.SESSION_READER, header_to_metadata_pb2.Config()),
            (names.SESSION_WRITER, header_mutation_pb2.HeaderMutation()),
            (names.SESSION_FILTER, stateful_session_pb2.StatefulSession()),
        )
    ]


def nothing(target: Mapping[str, AnyMessage]) -> None:
    """Have every filter made, and do nothing (`agent.l7.claims`)."""
    idle = header_to_metadata_pb2.Config()  # Envoy wants a rule
    idle.request_rules.add(header=_HEADER).on_header_present.key = _ENDPOINT
    target[names.SESSION_READER].CopyFrom(packed(idle))
    target[names.SESSION_WRITER].CopyFrom(packed(header_mutation_pb2.HeaderMutationPerRoute()))
    session = stateful_session_pb2.StatefulSessionPerRoute(stateful_session=stateful_session_pb2.StatefulSession())
    target[names.SESSION_FILTER].CopyFrom(packed(session))


def marked(backends: Iterable[Backend]) -> Iterator[tuple[Backend, str]]:
    """The backends with their marks, which depend on nothing but the service port, so that they outlive changes of the route."""
    times: Counter[str] = Counter()
    for backend in backends:
        name = f"{backend.service}:{backend.port}"
        yield backend, hashlib.blake2b(f"{name}#{times[name]}".encode(), digest_size=4).hexdigest()
        times[name] += 1


def covers(match: route_components_pb2.RouteMatch, session: Session) -> bool:
    """Narrow a match to requests that bring the cookie back (RFC 6265, 5.1.4); False if that is all of them."""
    if not session.cookie or session.path == "/":
        return False
    rest = ".*" if session.path.endswith("/") else "([/?].*)?"
    match.headers.add(name=":path").string_match.safe_regex.regex = quote(session.path) + rest
    return True


def begin(route: route_components_pb2.Route, session: Session, marks: list[str]) -> None:
    """Tell a client what was drawn. `marks` are those of the backends that the route has."""
    _keep(route)
    clusters = route.route.weighted_clusters.clusters
    for one, mark in zip(clusters or [route], marks, strict=True):
        mutations = header_mutation_pb2.Mutations(response_mutations=_telling(session, mark))
        _write(one.typed_per_filter_config, mutations)


def resume(route: route_components_pb2.Route, session: Session, mark: str) -> None:
    """Make a route to one backend one for those that bring its mark; whose endpoint has gone gets another one of that backend, and is told."""
    _keep(route)
    reader = header_to_metadata_pb2.Config()
    rule = reader.request_rules.add(header=session.header, cookie=session.cookie)
    found = rule.on_header_present
    found.metadata_namespace, found.key = names.SESSION_READER, _ENDPOINT
    found.regex_value_rewrite.pattern.regex = f"^{mark}[.]"
    route.typed_per_filter_config[names.SESSION_READER].CopyFrom(packed(reader))
    endpoint = _set(_HEADER, f"%DYNAMIC_METADATA({names.SESSION_READER}:{_ENDPOINT})%", _OVERWRITE)
    _write(
        route.typed_per_filter_config,
        header_mutation_pb2.Mutations(request_mutations=[endpoint], response_mutations=_telling(session, mark)),
    )
    if session.cookie:
        route.match.headers.add(name="cookie").string_match.safe_regex.regex = f'(.*;)? *{quote(session.cookie)}="?{mark}[.].*'
    else:
        route.match.headers.add(name=session.header).string_match.prefix = f"{mark}."


def _keep(route: route_components_pb2.Route) -> None:
    """Have the endpoint of `_HEADER` chosen, and another one that was chosen said there: neither end sees it."""
    state = extension_pb2.TypedExtensionConfig(
        name="envoy.http.stateful_session.header", typed_config=packed(header_pb2.HeaderBasedSessionState(name=_HEADER))
    )
    per_route = stateful_session_pb2.StatefulSessionPerRoute(stateful_session=stateful_session_pb2.StatefulSession(session_state=state))
    route.typed_per_filter_config[names.SESSION_FILTER].CopyFrom(packed(per_route))
    route.request_headers_to_remove.append(_HEADER)


def _telling(session: Session, mark: str) -> list[mutation_rules_pb2.HeaderMutation]:
    """Tell the client which endpoint it has, if `_HEADER` says so: a value that is empty is not written."""
    value, name, action = f"{mark}.%RESP({_HEADER})%", session.header, _OVERWRITE
    if session.cookie:
        lifetime = f"; Max-Age={-(-session.lifetime_ms // 1000)}" if session.lifetime_ms else ""
        value = f"{_escaped(session.cookie)}={value}{lifetime}; Path={_escaped(session.path)}; HttpOnly"
        name, action = "set-cookie", base_pb2.HeaderValueOption.APPEND_IF_EXISTS_OR_ADD
    return [
        _set(_HEADER, value, base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS),
        _set(name, f"%RESP({_HEADER})%", action),
        mutation_rules_pb2.HeaderMutation(remove=_HEADER),
    ]


def _set(name: str, value: str, action: base_pb2.HeaderValueOption.HeaderAppendAction.ValueType) -> mutation_rules_pb2.HeaderMutation:
    header = base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key=name, value=value), append_action=action)
    return mutation_rules_pb2.HeaderMutation(append=header)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")  # Envoy expands %COMMANDS%


def _write(target: Mapping[str, AnyMessage], mutations: header_mutation_pb2.Mutations) -> None:
    target[names.SESSION_WRITER].CopyFrom(packed(header_mutation_pb2.HeaderMutationPerRoute(mutations=mutations)))
