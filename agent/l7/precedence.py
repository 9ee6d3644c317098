"""Which route match wins: the order of the Gateway API. Pure functions, called by `agent.l7.routes`, which lists matches in this order.

https://gateway-api.sigs.k8s.io/reference/spec/#httprouterule: hostname (more characters outside a wildcard first), exact path, longest
prefix, method, number of headers, number of query parameters; ties go to the rule that is for some callers only (ours), to the older route,
then to the name, then to the order of the rules. Where regular expressions stand is left to implementations; here they lose to every prefix
except the catch-all "/", which would otherwise make them unreachable. In a GRPCRoute service and method stand for path and method, more
characters first.
"""

from __future__ import annotations

from agent.model import MatchKind, Route, RouteMatch, StringMatch

_EXACT, _PREFIX, _REGEX, _CATCH_ALL = range(4)

Key = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int, int, bool, int, str, int, int]


def match_key(route: Route, rule: int, match: int, domain: str = "*") -> Key:
    """Sort key of the match with index `match` of rule `rule` for requests to `domain`: the smallest key is tried first.

    A rule without matches has one, that of every request. Two matches never have the same key.
    """
    matches = route.rules[rule].matches
    wanted = matches[match] if matches else RouteMatch()
    return (
        hostname_rank(route, domain),
        path_rank(wanted),
        method_rank(wanted),
        -len(wanted.headers),
        -len(wanted.query),
        not (route.rules[rule].callers or route.rules[rule].claims),
        route.created,
        route.name,
        rule,
        match,
    )


def path_rank(match: RouteMatch) -> tuple[int, int]:
    """(class, -length): exact before prefix before regular expression before every path; for gRPC, of the service."""
    if match.grpc is not None:
        return _grpc_rank(match.grpc.service)
    path = match.path
    if path is None or path.kind is MatchKind.PRESENT or (path.kind is MatchKind.PREFIX and not path.value.strip("/")):
        return (_CATCH_ALL, 0)
    if path.kind is MatchKind.EXACT:
        return (_EXACT, 0)
    if path.kind is MatchKind.PREFIX:
        return (_PREFIX, -len(path.value.rstrip("/")))
    return (_REGEX, -len(path.value))


def method_rank(match: RouteMatch) -> tuple[int, int]:
    """(class, -length): one method before every method; for gRPC, more characters first."""
    return _grpc_rank(match.grpc.method) if match.grpc is not None else (int(not match.method), 0)


def _grpc_rank(part: StringMatch | None) -> tuple[int, int]:
    if part is None:
        return (_CATCH_ALL, 0)
    return (_REGEX if part.kind is MatchKind.REGEX else _EXACT, -len(part.value))


def hostname_rank(route: Route, domain: str) -> tuple[int, int]:
    """(-characters of the best matching plain hostname, -characters of the best matching hostname) for a virtual host's domain."""
    matching = [name for name in route.hostnames if covers(name, domain)]
    plain = max((len(name) for name in matching if not name.startswith("*")), default=0)
    return (-plain, -max((len(name) for name in matching), default=0))


def covers(hostname: str, domain: str) -> bool:
    """Return True if every host of `domain` (a name, or "*.suffix") is one of `hostname`; a wildcard stands for one or more labels."""
    hostname, domain = hostname.lower(), domain.lower()
    if hostname == domain:
        return True
    return hostname.startswith("*.") and domain.endswith(hostname[1:]) and domain != hostname[1:]
