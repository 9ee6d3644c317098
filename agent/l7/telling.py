"""What is told of which requests: marks on routes, which the tracer (`agent.l7.spans`) and the log (`agent.l7.request_log`) of every listener read. Pure.

A listener that changes drains its connections; routes that change do not. So who is sampled is said by routes: a service of which some requests are told
has its routes once more in front of themselves, for a share of requests (RouteMatch.runtime_fraction, which draws by the number that chooses between weighted
backends, too). Requests that are sampled for one purpose are among those that are sampled for the other.
https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/config/route/v3/route_components.proto; used by `agent.l7.snapshot`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.type.v3 import percent_pb2

from agent.observability import ALL, Marks

MARKS = "mesh.telling"
"""Metadata of a route; what follows is in it."""
SERVICE = "service"
"""NAMESPACE/NAME:PORT that the request was sent to."""
TRACE = "trace"
"""YES: a trace begins here, if the caller has not decided."""
LOG = "log"
"""EACH: a line is written; ERRORS: if the request fails."""
YES, EACH, ERRORS = "yes", "all", "errors"


@dataclass(frozen=True, slots=True)
class Telling:
    """What the listeners of one workload can tell."""

    log: str = ""
    """The file that lines about requests go to, "" = none."""
    collector: str = ""
    """The cluster that spans go to, "" = there is no tracer."""
    account: str = ""
    """NAMESPACE/SERVICE-ACCOUNT: what spans are grouped by."""
    accept_from_outside: bool = False
    """A gateway believes trace context that a stranger sends."""


NOTHING = Telling()


def routes(marks: Marks, make: Callable[..., route_pb2.RouteConfiguration], *inputs: Any) -> route_pb2.RouteConfiguration:
    """What `make` builds, with marks on every route."""
    result = make(*inputs)
    shares = sorted({share for share in (marks.traced, marks.logged) if 0 < share < ALL})
    for host in result.virtual_hosts if marks else ():
        found = [_marked(route, marks, share) for route in host.routes for share in (*shares, ALL)]
        del host.routes[:]
        host.routes.extend(found)
    return result


def _marked(route: route_components_pb2.Route, marks: Marks, share: int) -> route_components_pb2.Route:
    """The route for this share of requests, less those that smaller shares have taken: whoever wants fewer wants none of the rest."""
    result = route_components_pb2.Route()
    result.CopyFrom(route)
    if share < ALL:
        fraction = percent_pb2.FractionalPercent(numerator=share, denominator=percent_pb2.FractionalPercent.MILLION)
        result.match.runtime_fraction.default_value.CopyFrom(fraction)
    told = {SERVICE: marks.service} if marks.service else {}
    if marks.traced >= share:
        told[TRACE] = YES
    if marks.logged >= share:
        told[LOG] = EACH
    elif marks.errors:
        told[LOG] = ERRORS
    result.metadata.filter_metadata[MARKS].update(told)
    return result
