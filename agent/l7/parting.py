"""What needs the waypoint no more but is still called through it: applications that have kept connections to it, which are answered until they end.

A service that has lost its last route, or a workload its last L7 policy, is dialled without the waypoint from then on. Who has a connection through it goes
on to ask there, so what was dialled keeps its place (`agent.l7.view`), with a plain route to its endpoints and the authorization that holds now. The answers
ask callers to connect anew: `Connection: close`, or GOAWAY for HTTP/2. That is a line of Lua, which Envoy has had since 1.37
(https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/http/http_filters/lua_filter#drainconnectionuponcompletion): a header that a route adds would be
removed again. Pure, used by `agent.l7.snapshot`; the connections are `agent.parting`'s to find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.http.lua.v3 import lua_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2

from agent.l7 import names
from agent.l7.resources import packed

MOST_ASKED = 64
"""RouteConfigurations whose answers ask callers to connect anew at one time: each has a Lua machine in each thread of Envoy, 260 KB with two workers."""
_CONNECT_ANEW = "function envoy_on_request(request) request:streamInfo():drainConnectionUponCompletion() end"


class Dialled(NamedTuple):
    """What connections through the waypoint were dialled to."""

    services: frozenset[tuple[str, int]] = frozenset()
    """Services and their ports."""
    workloads: frozenset[str] = frozenset()
    """Whose own addresses were dialled."""

    def both(self, other: Dialled) -> Dialled:
        """What is in each of the two."""
        return Dialled(self.services & other.services, self.workloads & other.workloads)

    def either(self, other: Dialled) -> Dialled:
        """What is in one of the two."""
        return Dialled(self.services | other.services, self.workloads | other.workloads)

    def without(self, other: Dialled) -> Dialled:
        """What is not in the other."""
        return Dialled(self.services - other.services, self.workloads - other.workloads)

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.services) + len(self.workloads)

    def first(self, most: int) -> Dialled:
        """So many of them, by name."""
        services = sorted(self.services)[:most]
        return Dialled(frozenset(services), frozenset(sorted(self.workloads)[: most - len(services)]))


NOTHING = Dialled()


class Partings:
    """Remembers from one look at living connections to the next what has been seen to need the waypoint no more."""

    def __init__(self) -> None:
        """Nothing has."""
        self.anew = NOTHING
        """Whose callers are asked to connect anew."""
        self._seen = NOTHING
        self._unsaid = NOTHING

    def over(self, parting: Dialled, called: Dialled) -> Dialled:
        """What of `parting` nobody calls any more. Only what was seen before: of what is new a connection may be on its way."""
        return parting.both(self._seen).without(called)

    def look(self, parting: Dialled, called: Dialled) -> bool:
        """Say what is parting after a look and what is called; True if callers of something else are asked now."""
        before, self._seen, wanted = self.anew, parting, parting.both(called)
        self.anew = wanted.without(before).first(MOST_ASKED)  # whoever was asked and stays is silent: others go first
        self.anew = self.anew.either(wanted.both(before).first(MOST_ASKED - self.anew.size))
        others = self.anew.either(before).without(self.anew.both(before))
        self._unsaid = self._unsaid.either(others)
        return others != NOTHING

    def say(self, parting: Dialled) -> Dialled:
        """For whom `anew` says something else than it did when this was asked last. What is not `parting` by now has not been seen if it does so again."""
        unsaid, self._unsaid, self._seen = self._unsaid, NOTHING, self._seen.both(parting)
        return unsaid


def http_filter() -> hcm_pb2.HttpFilter:
    """The filter that routes switch on; before all others, so that whatever is answered asks."""
    return hcm_pb2.HttpFilter(name=names.PARTING_FILTER, typed_config=packed(lua_pb2.Lua()), disabled=True)


def routes(asks: bool, make: Callable[..., route_pb2.RouteConfiguration], *inputs: Any) -> route_pb2.RouteConfiguration:
    """What `make` builds; where it `asks`, every answer has callers connect anew."""
    result = make(*inputs)
    if asks:
        script = lua_pb2.LuaPerRoute(source_code=base_pb2.DataSource(inline_string=_CONNECT_ANEW))
        result.typed_per_filter_config[names.PARTING_FILTER].CopyFrom(packed(script))
    return result
