"""Who talks to whom on this node, now: `meshagent graph`. The difference of two readings of what the kernel and Envoy count anyway.

Nothing is read unless somebody asks, and nothing is added to the way of a connection or request. Readings are kept for as long as the next question may need
them, so that who asks again and again has a sliding window and waits for nothing. Only what this node can know is told: what its own workloads call, who from
outside the mesh calls them, and what it denied.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import math
import socket
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import add, sub
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from agent import flows, requests
from agent.bpf.manifest import BUCKET_SHIFT, BUCKETS, Close, Direction, Reason, Verdict
from agent.bpf.sockets import Sockets
from agent.flows import Flow, Flows, Pair
from agent.l7 import names
from agent.l7.metrics import BOUNDS_US, SEPARATOR, Key
from agent.requests import Dialled, Read
from meshapi.graph.answer import MOST_BACKENDS, MOST_EDGES, MOST_RULES, Answer, Backend, Edge, Kind, Mtls, Protocol, Side, finite, line

if TYPE_CHECKING:
    from agent.bpf.maps import Map
    from agent.enrolment import Enrolled
    from agent.ids import Ids
    from agent.model import Service

_log = logging.getLogger(__name__)

DEFAULT_S: Final = 5.0
SHORTEST_S: Final = 1.0
LONGEST_S: Final = 30.0
"""Of windows. Envoy merges its histograms every 5 s: shorter ones may have no latencies."""
FRESH_S: Final = 0.5
"""A reading that is no older is taken for now."""
KEPT_S: Final = 45.0
"""How long a reading is kept."""
_PROTOCOLS: Final[Mapping[int, Protocol]] = {int(socket.IPPROTO_TCP): "tcp", int(socket.IPPROTO_UDP): "udp"}
_DENIALS: Final = frozenset(
    {Reason.POLICY, Reason.NO_ENTRY, Reason.SPOOFED, Reason.UNKNOWN_ADDRESS, Reason.PLAINTEXT, Reason.NO_TUNNEL, Reason.EGRESS}
)
"""Somebody is not allowed to; of the other reasons nobody is there to answer."""
_FAILURES: Final = frozenset({Reason.NO_BACKEND, Reason.NO_LISTENER})
_FAILED: Final = tuple(flows.counter(flows.CLOSED + how) for how in (Close.FAILED, Close.REFUSED, Close.TIMED_OUT))
_OPENED, _SENT, _RECEIVED = flows.counter(flows.OPENED), flows.counter(flows.SENT), flows.counter(flows.RECEIVED)
_CONNECT: Final = flows.buckets(flows.CONNECT_BUCKET)
_CONNECT_BOUNDS: Final = tuple((1 << (slot + BUCKET_SHIFT)) * 1e-9 for slot in range(BUCKETS - 1))
_REQUEST_BOUNDS: Final = tuple(bound * 1e-6 for bound in BOUNDS_US)
_GRPC_ERRORS: Final = frozenset({"2", "4", "12", "13", "14", "15"})
"""A server's fault: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/."""
_REFUSALS: Final = frozenset({"401", "403"})
_SILENT: Final = "the waypoint does not say what it has counted: requests are missing, connections are not"


class Reading(NamedTuple):
    """What was counted until a moment (time.monotonic). `requests`: None if Envoy did not answer."""

    at: float
    flows: dict[bytes, Flow]
    verdicts: dict[bytes, int]
    requests: Read | None


@dataclass(slots=True)
class _Sum:
    """An edge while it is added up; counts, not rates."""

    rate: float = 0
    errors: float = 0
    denied: float = 0
    bytes: float = 0
    active: int = 0
    slots: list[float] = field(default_factory=list)
    backends: Counter[tuple[str, bool]] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)

    def measure(self, slots: Iterable[float]) -> None:
        self.slots = list(map(add, self.slots, slots)) if self.slots else list(slots)

    def absorb(self, other: _Sum) -> None:
        """Add what the kernel knows of the connections that requests came by; latencies and backends are the requests' own."""
        self.rate += other.errors
        self.errors += other.errors
        self.denied += other.denied
        self.bytes += other.bytes
        self.active += other.active
        self.rules += other.rules


class _End(NamedTuple):
    """What tells edges of one protocol apart."""

    source: str
    destination: str
    kind: Kind
    port: int
    side: Side


class Observer:
    """See the module. Belongs to the event loop; reads in threads."""

    def __init__(
        self,
        node: str,
        maps: Mapping[str, Map],
        ids: Ids,
        admin: Path,
        services: Callable[[], Mapping[str, Service]],
        enrolled: Callable[[], Enrolled],
    ) -> None:
        """`admin` is Envoy's admin socket; `services` and `enrolled` are those of now."""
        self._node = node
        self._flows = Flows(maps["mesh_stats"], Sockets(maps))
        self._verdicts = maps["mesh_verdicts"]
        self._members = self._verdicts.layout.key.unpacker(
            "source", "target", "service", "rule", "verdict", "direction", "reason", "protocol"
        )
        self._number = self._verdicts.layout.value.unpacker("")
        self._ids = ids
        self._admin = admin
        self._dialled = Dialled(services)
        self._enrolled = enrolled
        self._readings: list[Reading] = []
        self._reading = asyncio.Lock()
        self._forgetting: asyncio.TimerHandle | None = None

    async def answer(self, window_s: float) -> Answer:
        """What was seen in the last `window_s` seconds, or somewhat more; 0 is the default. Takes that long if nobody has asked before."""
        if not math.isfinite(window_s):
            window_s = 0.0
        window = min(max(window_s or DEFAULT_S, SHORTEST_S), LONGEST_S)
        now = await self._read()
        before = next((one for one in reversed(self._readings) if now.at - one.at >= window), None)
        if before is None:
            before = self._readings[0]
            await asyncio.sleep(window - (now.at - before.at))
            now = await self._read()
        return await asyncio.to_thread(self._compare, before, now)

    async def _read(self) -> Reading:
        async with self._reading:
            if not self._readings or time.monotonic() - self._readings[-1].at > FRESH_S:
                local = [Path(one.netns_path) for one in self._enrolled().local]
                found = await asyncio.to_thread(self._count, local)
                self._readings = [one for one in self._readings if found.at - one.at <= KEPT_S] + [found]
                if self._forgetting is not None:
                    self._forgetting.cancel()
                self._forgetting = asyncio.get_running_loop().call_later(KEPT_S, self._readings.clear)
            return self._readings[-1]

    def _count(self, namespaces: Sequence[Path]) -> Reading:
        at = time.monotonic()
        counted = self._flows.read(namespaces)
        # What did not change is kept once, however many readings there are.
        last = self._readings[-1].flows if self._readings else {}
        for key in counted.keys() & last.keys():
            if counted[key] == last[key]:
                counted[key] = last[key]
        verdicts = {key: sum(self._number(value)[0] for value in values) for key, values in self._verdicts.items()}
        try:
            own = requests.read(self._admin)
        except (OSError, http.client.HTTPException, ValueError) as error:
            _log.debug("the waypoint does not say what it has counted", extra={"reason": str(error)})
            own = None
        return Reading(at, counted, verdicts, own)

    def _compare(self, before: Reading, now: Reading) -> Answer:
        """What came in between two readings. In a thread."""
        seconds = now.at - before.at
        here = frozenset(one.workload.name for one in self._enrolled().local)
        sums: dict[tuple[_End, Protocol], _Sum] = defaultdict(_Sum)
        problems = []
        if not self._add_flows(sums, here, before.flows, now.flows):
            problems.append("the kernel's table of connections is full: some are missing here, see mesh_datapath_events in /metrics")
        self._add_verdicts(sums, here, before.verdicts, now.verdicts)
        if before.requests is None or now.requests is None:
            problems.append(_SILENT)
        else:
            self._add_requests(sums, here, before.requests, now.requests)
        edges = sorted(
            (edge for edge in _edges(sums, seconds) if any(edge.weight) or edge.bytes), key=lambda edge: edge.weight, reverse=True
        )
        return Answer(self._node, seconds, tuple(edges[:MOST_EDGES]), len(edges[MOST_EDGES:]), tuple(problems))

    def _add_flows(
        self, sums: dict[tuple[_End, Protocol], _Sum], here: frozenset[str], before: Mapping[bytes, Flow], now: Mapping[bytes, Flow]
    ) -> bool:
        """Connections; False if some found no room in the kernel's table."""
        good = True
        for key, flow in now.items():
            pair, last = self._flows.pair(key), before.get(key)
            if not any(pair):
                good &= last is None or flow.counts == last.counts
                continue
            if pair.protocol not in _PROTOCOLS or (end := self._end(pair, here)) is None:
                continue
            grown = flow.counts if last is None else flows.grown(last.counts, flow.counts)
            one = sums[end, _PROTOCOLS[pair.protocol]]
            failed = sum(count(grown) for count in _FAILED)
            tried = _OPENED(grown) + failed
            one.rate += tried
            one.errors += failed
            one.bytes += _SENT(grown) + _RECEIVED(grown)
            one.active += flow.active
            one.measure(_CONNECT(grown))
            if (target := self._ids.name(pair.target)) and (tried or flow.active):
                one.backends[target, pair.mutual_tls] += tried
        return good

    def _end(self, pair: Pair, here: frozenset[str]) -> _End | None:
        """What edge a pair belongs to; None if another node tells of it, or the waypoint does."""
        source, target = self._ids.name(pair.source), self._ids.name(pair.target)
        if pair.direction is Direction.OUTBOUND:
            return self._called(source, target, pair.service, pair.port) if source in here else None
        if pair.direction is Direction.INBOUND and not source and target in here:
            return _End("", target, "workload", pair.port, "destination")
        return None

    def _called(self, source: str, target: str, service: int, port: int) -> _End:
        if service and (name := self._ids.name(service)):
            name, _, number = name.rpartition(":")
            return _End(source, name, "service", int(number.partition("/")[0]), "source")
        return _End(source, target, "workload" if target else "outside", port, "source")

    def _add_verdicts(
        self, sums: dict[tuple[_End, Protocol], _Sum], here: frozenset[str], before: Mapping[bytes, int], now: Mapping[bytes, int]
    ) -> None:
        """What L4 policy denied, and calls that nobody was there for."""
        for key, count in now.items():
            last = before.get(key, 0)
            number = count - last if count >= last else count
            source, target, service, rule, verdict, direction, reason, protocol = self._members(key)
            if not number or verdict != Verdict.DENY or protocol not in _PROTOCOLS:
                continue
            caller, called = self._ids.name(source), self._ids.name(target)
            if direction == Direction.OUTBOUND and caller in here:
                end = self._called(caller, called, service, 0)
            elif direction == Direction.INBOUND and called in here:
                end = _End(caller, called, "workload", 0, "destination")
            else:
                continue
            if reason in _DENIALS:
                one = sums[end, _PROTOCOLS[protocol]]
                one.denied += number
                one.rules[self._ids.name(rule) or Reason(reason).name.lower().replace("_", " ")] += number
            elif reason in _FAILURES:
                one = sums[end, _PROTOCOLS[protocol]]
                one.errors += number
                one.rate += number

    def _add_requests(self, sums: dict[tuple[_End, Protocol], _Sum], here: frozenset[str], before: Read, now: Read) -> None:
        """Requests as callers' waypoints saw them. What they refused themselves never had a backend."""
        for key, values in now.requests.items():
            *parts, code, status, _ = key.split(SEPARATOR)
            found = Key._make(parts)
            if (end := self._asked(found, here)) is None:
                continue
            (number,) = _growth(values, before.requests.get(key))
            if not number:
                continue  # Envoy keeps counters long after the last request
            one = sums[end, "http"]
            if code in _REFUSALS and not found.target:
                one.denied += number
                continue
            one.rate += number
            if not code.isdigit() or int(code) == 0 or int(code) >= 500 or status in _GRPC_ERRORS:
                one.errors += number
            if found.target:
                workload, _, security = found.target.partition(" ")
                one.backends[workload, bool(security)] += int(number)
        for key, values in now.durations.items():
            found = Key._make(key.split(SEPARATOR))
            if found.target and (end := self._asked(found, here)) is not None:
                grown = _growth(values, before.durations.get(key))
                if not grown[-1]:
                    continue
                *cumulative, _, _ = grown
                sums[end, "http"].measure(map(sub, cumulative, [0.0, *cumulative]))

    def _asked(self, key: Key, here: frozenset[str]) -> _End | None:
        if key.direction != names.OUTBOUND or key.owner not in here:
            return None
        port = key.address.rpartition(":")[2]
        if not port.isdigit():
            return None
        service, target = self._dialled.service(key.address), key.target.partition(" ")[0]
        if not service and not target:
            return None
        return _End(key.owner, service or target, "service" if service else "workload", int(port), "source")


def _growth(values: tuple[float, ...], before: tuple[float, ...] | None) -> tuple[float, ...]:
    """What has been added; all of it, if Envoy has begun anew."""
    return values if before is None or values[-1] < before[-1] else tuple(map(sub, values, before))


def _edges(sums: dict[tuple[_End, Protocol], _Sum], seconds: float) -> Iterator[Edge]:
    for end, protocol in [key for key in sums if key[1] == "http"]:
        if connections := sums.pop((end, "tcp"), None):
            sums[end, protocol].absorb(connections)
    for (end, protocol), one in sums.items():
        bounds = _REQUEST_BOUNDS if protocol == "http" else _CONNECT_BOUNDS
        rates = one.backends.most_common(MOST_BACKENDS)
        yield Edge(
            source=end.source,
            destination=end.destination,
            kind=end.kind,
            port=end.port,
            protocol=protocol,
            side=end.side,
            rate=finite(one.rate / seconds),
            errors=finite(one.errors / seconds),
            denied=finite(one.denied / seconds),
            bytes=finite(one.bytes / seconds),
            active=one.active,
            p50=quantile(0.5, one.slots, bounds),
            p99=quantile(0.99, one.slots, bounds),
            mtls=_mtls(mtls for _, mtls in one.backends),
            backends=tuple(Backend(workload, finite(number / seconds), mtls) for (workload, mtls), number in rates),
            rules=tuple(line(rule) for rule, _ in one.rules.most_common(MOST_RULES)),
        )


def _mtls(found: Iterable[bool]) -> Mtls:
    states = set(found)
    return "" if not states else "some" if len(states) > 1 else "all" if states == {True} else "none"


def quantile(share: float, slots: Sequence[float], bounds: Sequence[float]) -> float | None:
    """Where a share of the observations lies, on a straight line within its slot, as Prometheus' histogram_quantile; None without observations.

    `slots` has one more than `bounds`, which are upper ones; what lies in the last slot is taken for the last bound.
    """
    totals = list(accumulate(slots))
    if not totals or totals[-1] <= 0:
        return None
    rank = share * totals[-1]
    slot = bisect_left(totals, rank)
    if slot >= len(bounds):
        return bounds[-1]
    low = bounds[slot - 1] if slot else 0.0
    below = totals[slot - 1] if slot else 0.0
    return low + (bounds[slot] - low) * (rank - below) / slots[slot]
