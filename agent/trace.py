"""Live part of `meshagent trace`: turns kernel events and Envoy's records of one pair into connections, hop by hop.

The kernel and Envoy report only pairs that somebody traces; this module decides which those are and joins what comes. Owned by the supervisor, on the
event loop; one `Watch` per running trace.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent.bpf.events import Event
from agent.bpf.manifest import Close, Direction, EventKind, Reason, Verdict
from agent.l7.access_log import RequestRecord
from agent.report import Connection, Hop

_log = logging.getLogger(__name__)

_REMEMBERED = 4096  # connections of one trace; older ones lose their first hops
_RBAC = re.compile(r"rbac_access_denied_matched_policy\[(.*)\]$")
_NEXT_STEPS = {
    Reason.POLICY: "allow the caller in this AuthorizationPolicy, or call as another service account",
    Reason.NO_ENTRY: "the agent has not compiled this policy: see 'meshagent status'",
    Reason.NO_BACKEND: "no endpoint is ready: see the Workloads that the service selects",
    Reason.SPOOFED: "a process uses the address of a local workload from outside its namespace",
    Reason.NO_LISTENER: "the waypoint is not ready: see 'meshagent status'",
    Reason.WAYPOINT_PORT: "ports 15001, 15002, 15003 and 15006 belong to the waypoint: dial the service's own port",
    Reason.NO_PORT: "the service has no such port: see its spec.ports",
    Reason.AUDIT: "nothing was refused; with action DENY this AuthorizationPolicy would refuse it",
    Reason.PLAINTEXT: "STRICT: plaintext from outside this node was refused; enrol the caller, or make the port PERMISSIVE in its PeerAuthentication",
    Reason.NO_TUNNEL: "STRICT: this node's waypoint cannot prove yet who the workload is, and plaintext was not tried: see 'meshagent status'",
    Reason.EGRESS: "declare an ExternalService for the destination, or allow egress in the caller's namespace (annotation meshagent.io/egress: allow)",
    Reason.UNKNOWN_ADDRESS: "declare this address in the Workload's spec.addresses",
}
_OUTCOMES = {
    Close.NORMAL: "closed",
    Close.RESET: "reset",
    Close.FAILED: "given up",
    Close.REFUSED: "failed",
    Close.TIMED_OUT: "timed out",
}
_CLOSE_STEPS = {
    Close.FAILED: "the application gave up before an answer came: is the backend slow to accept, or the application's time-out short?",
    Close.REFUSED: "the backend did not accept: is it listening, and does the policy at its node allow the caller?",
    Close.TIMED_OUT: "nothing answered: is the backend's node up, and does a firewall or route between the nodes drop its packets?",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """What one trace watches."""

    source: str
    service: str
    targets: frozenset[str]
    allowing: str = ""
    """The ALLOW policies of the targets, for people: what to name when none of their rules matched."""

    def covers(self, event: Event) -> bool:
        """True if an event belongs to this pair. A receiver may know a stranger only by address: such events never do.

        A call of the source that was not let out of the mesh does: nobody knows what its address stands for, it may be what was meant.
        """
        found = (bool(self.service) and event.service == self.service) or event.target in self.targets or _not_let_out(event)
        return event.source == self.source and found


@dataclass(slots=True)
class Watch:
    """One running trace: finished connections arrive in `found`; those that come faster than they are taken out are only counted."""

    pair: Pair
    node: str
    found: asyncio.Queue[Connection] = field(default_factory=lambda: asyncio.Queue(_REMEMBERED))
    missed: int = 0
    _open: OrderedDict[int, list[Event]] = field(default_factory=OrderedDict)
    _inbound: OrderedDict[str, Event] = field(default_factory=OrderedDict)
    _by_port: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def on_event(self, event: Event) -> None:
        """Take one kernel event."""
        if not self.pair.covers(event):
            return
        if event.kind in {EventKind.DENIED, EventKind.AUDITED}:
            self._report(self._denied(event))
        elif event.protocol == "UDP":  # has no handshake and no end: the first datagram is all that there is to tell
            if event.direction is Direction.OUTBOUND:
                self._report(self._connection(self._destination(event), self._first_hops([event]), "sent", event.rule or None, None))
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
        if not event.redirected or event.reason in _CLOSE_STEPS:
            del self._open[event.socket_cookie]
            self._report(self._closed(steps))

    def on_record(self, record: RequestRecord) -> None:
        """Take one request that the waypoint handled."""
        if record.side != "outbound" or record.workload != self.pair.source:
            return
        steps = self._open.get(self._by_port.get(int(record.downstream_remote_address.rpartition(":")[2] or 0), 0), [])
        if not steps:
            return  # of another destination: the kernel reported nothing of it for this pair
        self._report(self._request(record, steps))

    def _report(self, connection: Connection) -> None:
        if self.found.full():
            self.missed += 1
        else:
            self.found.put_nowait(connection)

    def _request(self, record: RequestRecord, steps: list[Event]) -> Connection:
        rule = match[1] if (match := _RBAC.search(record.response_code_details)) else None
        if rule == "none":
            rule = f"{self.pair.allowing}: no rule matches"
        request = _known(
            method=record.method,
            path=record.path,
            protocol=record.protocol,
            route=record.route_name,
            attempts=record.attempts,
            status=record.response_code,
            flags=list(record.response_flags),
            details=record.response_code_details if record.response_code >= 400 else "",
        )
        hops = [*self._first_hops(steps), Hop("waypoint", self.node, record.duration_ns, request)]
        if record.upstream_address:
            waited = max(0, record.first_upstream_byte_ns - record.upstream_connected_ns)
            backend = _known(address=record.upstream_address, cluster=record.upstream_cluster, via="tunnel" if record.tunnelled else "")
            hops.append(Hop("backend", self.node, waited, backend))
        hops.append(
            Hop("response", self.node, record.duration_ns, {"sentBytes": record.bytes_received, "receivedBytes": record.bytes_sent})
        )
        next_step = "allow the request in this AuthorizationPolicy" if rule else None
        outcome = str(record.response_code or "no response")
        return self._connection(self._destination(), hops, outcome, rule, next_step)

    def _closed(self, steps: list[Event]) -> Connection:
        last = steps[-1]
        reason = Close(last.reason)
        hops = self._first_hops(steps)
        if inbound := self._inbound.pop(last.local, None):
            hops.append(Hop("inbound", self.node, 0, _known(workload=inbound.target, verdict=_verdict(inbound), rule=inbound.rule)))
        detail: dict[str, Any] = {
            "sentBytes": last.sent_bytes,
            "receivedBytes": last.received_bytes,
            "rttUs": last.rtt_us,
            "retransmits": last.retransmits,
        }
        hops.append(Hop("close", self.node, last.duration_ns, detail))
        next_step = _CLOSE_STEPS.get(reason)
        if next_step and (last.redirected or last.tunnelled):
            next_step = "the waypoint does not listen: see 'meshagent status'"
        outcome = _OUTCOMES[reason]
        return self._connection(self._destination(last), hops, outcome, last.rule or None, next_step)

    def _first_hops(self, steps: list[Event]) -> list[Hop]:
        hops = []
        for event in steps:
            if event.kind is EventKind.CONNECT:
                detail = _known(
                    verdict=_verdict(event),
                    rule=event.rule,
                    dialled=event.dialled,
                    to="waypoint" if event.redirected else event.target or event.remote,
                    past="waypoint, which is away" if event.reason == Reason.FAIL_OPEN else "",
                    via="tunnel" if event.tunnelled else "",
                    remote=event.remote,
                    pid=event.pid,
                    command=event.command,
                )
                hops.append(Hop("connect", self.node, event.duration_ns, detail))
            elif event.kind is EventKind.ESTABLISHED:
                hops.append(Hop("handshake", self.node, event.duration_ns, _known(local=event.local, rttUs=event.rtt_us)))
        return hops

    def _denied(self, event: Event) -> Connection:
        reason = Reason(event.reason)
        at = "inbound" if event.direction is Direction.INBOUND else "connect"
        detail = _known(
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
        return self._connection(destination, [hop], outcome, event.rule or None, _NEXT_STEPS.get(reason))

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


def _verdict(event: Event) -> str:
    """An unprotected destination is allowed as well; the rule tells the difference."""
    return {Verdict.NONE: "allow", Verdict.WAYPOINT: "waypoint"}.get(event.verdict, event.verdict.name.lower())


def _known(**detail: object) -> dict[str, Any]:
    return {key: value for key, value in detail.items() if value not in ("", 0, [], None)}


class Tracer:
    """All running traces, and what the kernel and Envoy are asked to report for them."""

    def __init__(self, node: str, changed: Callable[[frozenset[Pair]], None]) -> None:
        """`changed` is called with all watched pairs whenever a trace begins or ends."""
        self._node = node
        self._changed = changed
        self._watches: list[Watch] = []

    @property
    def pairs(self) -> frozenset[Pair]:
        """Everything that is watched now."""
        return frozenset(w.pair for w in self._watches)

    def begin(self, pair: Pair) -> Watch:
        """Start watching; end it with `end`."""
        watch = Watch(pair, self._node)
        self._watches.append(watch)
        try:
            self._changed(self.pairs)
        except BaseException:
            self._watches.remove(watch)
            raise
        return watch

    def end(self, watch: Watch) -> None:
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
