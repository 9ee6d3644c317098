"""Live part of `meshagent trace`: turns kernel events and Envoy's records of one pair into connections, hop by hop.

The kernel and Envoy report only pairs that somebody traces; this module decides which those are and joins what comes on the caller's node. What the receiver's
node saw is put in later (`agent.joining`). Owned by the supervisor, on the event loop; one `Watch` per running trace.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from agent import causes
from agent.bpf.events import Event
from agent.bpf.manifest import Close, Direction, EventKind, Reason, Verdict
from agent.l7.access_log import RequestRecord
from agent.l7.tunnel_log import TunnelRecord
from agent.observation import Observation
from agent.report import Connection, Hop, Notice

_log = logging.getLogger(__name__)

_REMEMBERED = 4096  # connections of one trace; older ones lose their first hops
_OUTCOMES = {
    Close.NORMAL: "closed",
    Close.RESET: "reset",
    Close.FAILED: "given up",
    Close.REFUSED: "failed",
    Close.TIMED_OUT: "timed out",
}
_WELL = {"closed", "sent"}


@dataclass(frozen=True, slots=True)
class Pair:
    """What one trace watches."""

    source: str
    service: str
    targets: frozenset[str]
    allowing: str = ""
    """The ALLOW policies of the targets, for people: what to name when none of their rules matched."""
    tokens: bool = False
    """A policy of the targets demands a token."""
    receiving: bool = False
    """Only what the targets, which are of this node, see of the source, which may be of another."""

    def covers(self, event: Event) -> bool:
        """True if an event belongs to this pair. A receiver may know a stranger only by address: such events never do.

        A call of the source that was not let out of the mesh does: nobody knows what its address stands for, it may be what was meant.
        """
        found = (bool(self.service) and event.service == self.service) or event.target in self.targets or _not_let_out(event)
        return event.source == self.source and found


@dataclass(frozen=True, slots=True)
class Filter:
    """What of a pair somebody wants to see; as nothing was said, everything."""

    method: str = ""
    path: str = ""
    """Without the query; one that ends in * is the beginning of a path."""
    statuses: frozenset[str] = frozenset()
    """Codes (503) or classes of them (5xx)."""
    errors_only: bool = False
    slow_ns: int = 0

    @property
    def _of_requests(self) -> bool:
        return bool(self.method or self.path or self.statuses)

    def takes(self, record: RequestRecord) -> bool:
        """Is this request wanted?"""
        code = str(record.response_code)
        path = record.path.partition("?")[0]
        return (
            self.method in {"", record.method}
            and (path.startswith(self.path[:-1]) if self.path.endswith("*") else self.path in {"", path, record.path})
            and (not self.statuses or code in self.statuses or f"{code[:1]}xx" in self.statuses)
            and record.duration_ns >= self.slow_ns
            and not (self.errors_only and 0 < record.response_code < 400)
        )

    def shows(self, seen: Seen, connection: Connection) -> bool:
        """Is a finished connection wanted? Requests are asked about before."""
        if seen.request:
            return True
        return not (self._of_requests or (self.errors_only and connection.outcome in _WELL) or seen.ended_ns - seen.began_ns < self.slow_ns)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the caller's node knows of a connection or request, and by what the receiver's node knows it. Times: Unix, nanoseconds."""

    connection: Connection
    began_ns: int = 0
    ended_ns: int = 0
    workload: str = ""
    """To whom it went; "" of a request, and if nobody knows."""
    caller: str = ""
    target: str = ""
    tunnelled: bool = False
    record: RequestRecord | None = None

    @property
    def request(self) -> bool:
        """A request, or a connection?"""
        return self.record is not None


Found = Seen | Observation | Notice


def unix_ns(monotonic_ns: int) -> int:
    """A time of the kernel's events as Unix time."""
    return time.time_ns() - time.monotonic_ns() + monotonic_ns


@dataclass(slots=True)
class Watch:
    """One running trace. Finished connections, and what this node's ends of tunnels say, arrive in `found`; what comes faster than it is taken is counted."""

    pair: Pair
    node: str
    filter: Filter = Filter()
    netns_path: str = ""
    endpoints: Callable[[str], int | None] = lambda _: None
    """How many ready endpoints stand behind a cluster; None: not known."""
    certified: Callable[[], bool] = lambda: True
    """Does the source have a certificate that is valid?"""
    found: asyncio.Queue[Found] = field(default_factory=lambda: asyncio.Queue(_REMEMBERED))
    missed: int = 0
    _open: OrderedDict[int, list[Event]] = field(default_factory=OrderedDict)
    _inbound: OrderedDict[str, Event] = field(default_factory=OrderedDict)
    _by_port: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def on_event(self, event: Event) -> None:
        """Take one kernel event."""
        if not self.pair.covers(event):
            return
        if event.kind in {EventKind.DENIED, EventKind.AUDITED}:
            self._report(self._denied(event), event, settled=True)
        elif event.protocol == "UDP":  # has no handshake and no end: the first datagram is all that there is to tell
            if event.direction is Direction.OUTBOUND:
                sent = self._connection(self._destination(event), self._first_hops([event]), "sent", event.rule or None, None)
                self._report(sent, event)
        elif event.direction is Direction.INBOUND:
            if event.kind is EventKind.ESTABLISHED:
                _remember(self._inbound, event.remote, event)
        elif event.direction is Direction.OUTBOUND:
            self._outbound(event)

    def _outbound(self, event: Event) -> None:
        steps = self._open.get(event.socket_cookie)
        if steps is None:
            if event.kind is EventKind.CLOSED:
                return  # from before this trace: its end is reported for a log
            steps = []
            _remember(self._open, event.socket_cookie, steps)
        steps.append(event)
        if event.kind is EventKind.ESTABLISHED and event.redirected:
            _remember(self._by_port, event.local_port, event.socket_cookie)
        if event.kind is not EventKind.CLOSED:
            return
        # A connection to the waypoint is remembered: Envoy's records of its requests come later than its end. Each of them is reported by
        # itself; the connection is only if it failed.
        if not event.redirected or event.reason in causes.CLOSED:
            del self._open[event.socket_cookie]
            self._report(self._closed(steps), event, settled=event.redirected)

    def on_record(self, record: RequestRecord) -> None:
        """Take one request that the waypoint handled."""
        if record.side != "outbound" or record.workload != self.pair.source or not self.filter.takes(record):
            return
        steps = self._open.get(self._by_port.get(int(record.downstream_remote_address.rpartition(":")[2] or 0), 0), [])
        if not steps:
            return  # of another destination: the kernel reported nothing of it for this pair
        ended_ns = record.start_ns + record.duration_ns
        caller = "" if record.tunnelled else record.upstream_local_address
        self._put(
            Seen(
                self._request(record, steps),
                record.start_ns,
                ended_ns,
                caller=caller,
                target=record.upstream_address,
                tunnelled=record.tunnelled,
                record=record,
            )
        )

    def on_tunnel(self, record: TunnelRecord) -> None:
        """Take what this node's end of one of the caller's tunnels says. Those of requests are told of only if they failed."""
        own = record.workload == self.pair.source or (not record.workload and record.netns_path == self.netns_path)
        failed = bool(record.failure or record.flags)
        if record.receiver or not own or not (record.caller or failed):
            return
        detail = known(
            peer=record.peer, tls=record.tls, remote=record.remote, flags=list(record.flags), failure=record.failure, details=record.details
        )
        self._put(
            Observation(
                of="tunnel",
                node=self.node,
                workload=self.pair.source,
                caller=record.caller,
                target=record.target,
                began_ns=record.start_ns,
                duration_ns=record.duration_ns,
                ended=True,
                outcome="failed" if failed else "",
                next_step=causes.of_failure(record.failure, certified=self.certified),
                hops=(Hop("tunnel", self.node, record.duration_ns, detail),),
            )
        )

    def _report(self, connection: Connection, event: Event, *, settled: bool = False) -> None:
        """Tell of a connection whose last event this is; of a `settled` one nobody else knows more."""
        ended_ns = unix_ns(event.time_ns)
        if settled:
            self._put(Seen(connection, ended_ns - event.duration_ns, ended_ns))
            return
        self._put(
            Seen(
                connection,
                ended_ns - event.duration_ns,
                ended_ns,
                workload=event.target,
                caller=event.local,
                target="" if event.tunnelled else event.remote,
                tunnelled=event.tunnelled,
            )
        )

    def _put(self, found: Found) -> None:
        if self.found.full():
            self.missed += 1
        else:
            self.found.put_nowait(found)

    def _request(self, record: RequestRecord, steps: list[Event]) -> Connection:
        rule = causes.rule_of(record.response_code_details, self.pair.allowing)
        request = known(
            method=record.method,
            path=record.path,
            protocol=record.protocol,
            route=record.route_name,
            attempts=record.attempts,
            status=record.response_code,
            rule=rule,
            flags=list(record.response_flags),
            details=record.response_code_details if record.response_code >= 400 else "",
            failure=record.failure,
        )
        hops = [*self._first_hops(steps), Hop("waypoint", self.node, record.duration_ns, request)]
        if record.upstream_address:
            waited = max(0, record.first_upstream_byte_ns - record.upstream_connected_ns)
            backend = known(address=record.upstream_address, cluster=record.upstream_cluster, via="tunnel" if record.tunnelled else "")
            hops.append(Hop("backend", self.node, waited, backend))
        hops.append(
            Hop("response", self.node, record.duration_ns, {"sentBytes": record.bytes_received, "receivedBytes": record.bytes_sent})
        )
        next_step = None
        if not 0 < record.response_code < 400:
            next_step = causes.of_response(
                record, self.endpoints(record.upstream_cluster), rule, tokens=self.pair.tokens, certified=self.certified
            )
        outcome = str(record.response_code or "no response")
        return self._connection(self._destination(), hops, outcome, rule, next_step)

    def _closed(self, steps: list[Event]) -> Connection:
        last = steps[-1]
        reason = Close(last.reason)
        hops = self._first_hops(steps)
        if inbound := self._inbound.pop(last.local, None):
            hops.append(Hop("inbound", self.node, 0, known(workload=inbound.target, verdict=verdict_of(inbound), rule=inbound.rule)))
        detail: dict[str, Any] = {
            "sentBytes": last.sent_bytes,
            "receivedBytes": last.received_bytes,
            "rttUs": last.rtt_us,
            "retransmits": last.retransmits,
        }
        hops.append(Hop("close", self.node, last.duration_ns, detail))
        next_step = causes.CLOSED.get(reason)
        if next_step and (last.redirected or last.tunnelled):
            next_step = causes.WAYPOINT_AWAY
        outcome = _OUTCOMES[reason]
        return self._connection(self._destination(last), hops, outcome, last.rule or None, next_step)

    def _first_hops(self, steps: list[Event]) -> list[Hop]:
        hops = []
        for event in steps:
            if event.kind is EventKind.CONNECT:
                detail = known(
                    verdict=verdict_of(event),
                    rule=event.rule,
                    dialled=event.dialled,
                    to="waypoint" if event.redirected else event.target or event.remote,
                    past="waypoint, which is away" if event.reason == Reason.FAIL_OPEN else "",
                    probe="of the kubelet" if event.reason == Reason.PROBE else "",
                    via="tunnel" if event.tunnelled else "",
                    remote=event.remote,
                    pid=event.pid,
                    command=event.command,
                )
                hops.append(Hop("connect", self.node, event.duration_ns, detail))
            elif event.kind is EventKind.ESTABLISHED:
                hops.append(Hop("handshake", self.node, event.duration_ns, known(local=event.local, rttUs=event.rtt_us)))
        return hops

    def _denied(self, event: Event) -> Connection:
        reason = Reason(event.reason)
        at = "inbound" if event.direction is Direction.INBOUND else "connect"
        detail = known(
            verdict=event.verdict.name.lower(),
            rule=event.rule,
            reason=reason.name.lower(),
            dialled=event.dialled,
            pid=event.pid,
            command=event.command,
        )
        hop = Hop(at, self.node, event.duration_ns, detail)
        outcome = "denied"
        if reason in {Reason.NO_BACKEND, Reason.NO_PORT, Reason.NO_TUNNEL}:
            outcome = "refused"
        elif event.kind is EventKind.AUDITED:
            outcome = "would be denied"
        destination = event.dialled if _not_let_out(event) else self._destination(event)
        return self._connection(destination, [hop], outcome, event.rule or None, causes.of_denial(reason, event.rule))

    def _connection(self, destination: str, hops: list[Hop], outcome: str, rule: str | None, next_step: str | None) -> Connection:
        return Connection(
            source=self.pair.source, destination=destination, hops=tuple(hops), outcome=outcome, rule=rule, next_step=next_step
        )

    def _destination(self, event: Event | None = None) -> str:
        return self.pair.service or (event.target if event else "") or ", ".join(sorted(self.pair.targets))


def _remember(table: OrderedDict[Any, Any], key: object, value: object) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > _REMEMBERED:
        table.popitem(last=False)


def _not_let_out(event: Event) -> bool:
    return event.kind is EventKind.DENIED and event.reason == Reason.EGRESS


def verdict_of(event: Event) -> str:
    """An unprotected destination is allowed as well; the rule tells the difference."""
    return {Verdict.NONE: "allow", Verdict.WAYPOINT: "waypoint"}.get(event.verdict, event.verdict.name.lower())


def known(**detail: object) -> dict[str, Any]:
    """What there is to tell, without what is not known."""
    return {key: value for key, value in detail.items() if value not in ("", 0, [], None)}


class Watcher(Protocol):
    """What a running trace takes."""

    @property
    def pair(self) -> Pair:
        """What it watches."""

    @property
    def missed(self) -> int:
        """How much came faster than it was taken."""

    def on_event(self, event: Event) -> None:
        """Take one kernel event."""

    def on_record(self, record: RequestRecord) -> None:
        """Take one request that the waypoint handled."""

    def on_tunnel(self, record: TunnelRecord) -> None:
        """Take what one end of a tunnel says."""


_Watching = TypeVar("_Watching", bound=Watcher)


class Tracer:
    """All running traces, and what the kernel and Envoy are asked to report for them."""

    def __init__(self, node: str, changed: Callable[[frozenset[Pair]], None]) -> None:
        """`changed` is called with all watched pairs whenever a trace begins or ends."""
        self._node = node
        self._changed = changed
        self._watches: list[Watcher] = []

    @property
    def pairs(self) -> frozenset[Pair]:
        """Everything that is watched now."""
        return frozenset(w.pair for w in self._watches)

    def begin(self, pair: Pair) -> Watch:
        """Start watching a pair; end it with `end`."""
        return self.add(Watch(pair, self._node))

    def add(self, watch: _Watching) -> _Watching:
        """Start watching; end it with `end`."""
        self._watches.append(watch)
        try:
            self._changed(self.pairs)
        except BaseException:
            self._watches.remove(watch)
            raise
        return watch

    def end(self, watch: Watcher) -> None:
        """Stop watching."""
        self._watches.remove(watch)
        self._changed(self.pairs)
        if watch.missed:
            _log.warning("a trace was too slow for its connections", extra={"source": watch.pair.source, "missed": watch.missed})

    def on_event(self, event: Event) -> None:
        """Hand a kernel event to every watch."""
        for watch in self._watches:
            watch.on_event(event)

    def on_record(self, record: RequestRecord) -> None:
        """Hand a request to every watch."""
        for watch in self._watches:
            watch.on_record(record)

    def on_tunnel(self, record: TunnelRecord) -> None:
        """Hand what a tunnel's end says to every watch."""
        for watch in self._watches:
            watch.on_tunnel(record)
