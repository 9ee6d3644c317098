"""Routes for some callers only: by their namespace (consumer routes), or by what a CallerMatch asks. Pure functions, called by `agent.l7.routes`.

Who calls is what the listener that accepted the connection put into filter state, which no client can influence (`agent.l7.listeners`); Envoy's routes
match on it (RouteMatch.filter_state, https://www.envoyproxy.io/docs/envoy/v1.37.0/api-v3/config/route/v3/route_components.proto).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from envoy.config.route.v3 import route_components_pb2
from envoy.type.matcher.v3 import filter_state_pb2, regex_pb2, string_pb2

from agent.l7 import names
from agent.l7.filters import quote
from agent.l7.rbac import LocalCallers
from agent.model import Source
from agent.policy import source_matches

_MOST = 8000  # characters in one expression


def in_namespace(match: route_components_pb2.RouteMatch, namespace: str) -> None:
    """Narrow a match to callers of one namespace."""
    match.filter_state.append(_state(names.NAMESPACE_KEY, [namespace]))


def by_workload(match: route_components_pb2.RouteMatch, workload: str) -> None:
    """Narrow a match to one workload."""
    match.filter_state.append(_state(names.WORKLOAD_KEY, [workload]))


def alternatives(callers: Sequence[Sequence[Source]], local: LocalCallers) -> list[list[filter_state_pb2.FilterStateMatcher]]:
    """Turn conditions on the caller, all of which must hold, into conditions on filter state: one list for each route that is needed; none: nobody here.

    Of one condition any Source may match. Exact names of service accounts, or of namespaces, are compared by Envoy. All else becomes the list of the
    workloads of this node that match, so a workload that is not in the list yet is nobody's.
    """
    distinct = list(dict.fromkeys(tuple(sources) for sources in callers))
    found = [_any(sources, local) for sources in distinct]
    if sum(len(one) > 1 for one in found) > 1:  # their product would have no bound: who of this node satisfies all of them?
        every = (
            name for name, caller in local.known.items() if all(any(source_matches(s, caller) for s in sources) for sources in distinct)
        )
        found = [_states(names.WORKLOAD_KEY, every)]
    return [list(chosen) for chosen in itertools.product(*found)]


def _any(sources: Sequence[Source], local: LocalCallers) -> list[filter_state_pb2.FilterStateMatcher]:
    if all(source == Source(service_accounts=source.service_accounts) and _plain(source.service_accounts) for source in sources):
        return _states(names.SERVICE_ACCOUNT_KEY, (name for source in sources for name in source.service_accounts))
    if all(source == Source(namespaces=source.namespaces) and _plain(source.namespaces) for source in sources):
        return _states(names.NAMESPACE_KEY, (name for source in sources for name in source.namespaces))
    return _states(names.WORKLOAD_KEY, (name for name, caller in local.known.items() if any(source_matches(s, caller) for s in sources)))


def _plain(values: tuple[str, ...]) -> bool:
    return bool(values) and not any("*" in value for value in values)


def _states(key: str, values: Iterable[str]) -> list[filter_state_pb2.FilterStateMatcher]:
    """One or more, because Envoy refuses a regular expression that is too large (`agent.l7.bootstrap`)."""
    found: list[list[str]] = []
    room = 0
    for value in sorted(set(values)):
        if len(value) + 2 > room:
            found.append([])
            room = _MOST
        found[-1].append(value)
        room -= len(value) + 2
    return [_state(key, some) for some in found]


def _state(key: str, wanted: Sequence[str]) -> filter_state_pb2.FilterStateMatcher:
    if len(wanted) == 1:
        matcher = string_pb2.StringMatcher(exact=wanted[0])
    else:
        matcher = string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex="|".join(quote(value) for value in wanted)))
    return filter_state_pb2.FilterStateMatcher(key=key, string_match=matcher)
