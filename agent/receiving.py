"""The receiver's side of a trace whose caller is elsewhere: turns this node's kernel events and Envoy's records into observations for the caller's node.

It tells of the pair that was asked for and of nothing else: of connections whose other end has an address of the caller, and of tunnels and requests whose
certificate proves the caller's identity besides. Owned by the supervisor's tracer, on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent import causes
from agent.bpf.events import Event
from agent.bpf.manifest import Direction, EventKind, Reason
from agent.config import HBONE_PORT, INBOUND_PORT
from agent.l7 import names
from agent.l7.access_log import RequestRecord
from agent.l7.tunnel_log import TunnelRecord
from agent.observation import Observation
from agent.report import Hop
from agent.trace import Pair, known, unix_ns, verdict_of

_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: its SPIFFE ID, and the addresses that it has."""

    identity: str
    addresses: frozenset[str]

    def is_at(self, endpoint: str) -> bool:
        """Is this ADDRESS:PORT one of its own?"""
        return endpoint.rpartition(":")[0].strip("[]") in self.addresses


@dataclass(slots=True)
class Reception:
    """One running question; what comes faster than it is taken out of `found` is only counted."""

    pair: Pair
    node: str
    caller: Caller
    certified: Callable[[str], bool] = lambda _: True
    """Does a workload of this node have a certificate that is valid?"""
    found: asyncio.Queue[Any] = field(default_factory=lambda: asyncio.Queue(_REMEMBERED))
    missed: int = 0

    def on_event(self, event: Event) -> None:
        """Take one kernel event."""
        if event.direction is not Direction.INBOUND or not self.pair.covers(event) or not self.caller.is_at(event.remote):
            return
        if event.kind is EventKind.DENIED:
            self._denied(event)
        elif event.local_port == HBONE_PORT:
            return  # a tunnel: the waypoint knows more of it
        elif event.kind is EventKind.ESTABLISHED:
            detail = known(workload=event.target, port=event.local_port, verdict=verdict_of(event), rule=event.rule, rttUs=event.rtt_us)
            self._of_kernel("accept", event, Hop("inbound", self.node, 0, detail))
        elif event.kind is EventKind.CLOSED:
            detail = known(
                sentBytes=event.sent_bytes, receivedBytes=event.received_bytes, rttUs=event.rtt_us, retransmits=event.retransmits
            )
            self._of_kernel("close", event, Hop("end", self.node, event.duration_ns, detail))

    def _denied(self, event: Event) -> None:
        reason = Reason(event.reason)
        detail = known(
            workload=event.target,
            port=event.local_port,
            verdict=verdict_of(event),
            rule=event.rule,
            reason=reason.name.lower(),
            protocol=event.protocol,
        )
        hop = Hop("inbound", self.node, event.duration_ns, detail)
        self._of_kernel("denied", event, hop, outcome="denied", rule=event.rule or None, next_step=causes.of_denial(reason, event.rule))

    def _of_kernel(
        self, of: str, event: Event, hop: Hop, *, outcome: str = "", rule: str | None = None, next_step: str | None = None
    ) -> None:
        self._put(
            Observation(
                of=of,
                node=self.node,
                workload=event.target,
                caller=event.remote,
                target=event.local,
                began_ns=unix_ns(event.time_ns) - event.duration_ns,
                duration_ns=event.duration_ns,
                outcome=outcome,
                rule=rule,
                next_step=next_step,
                hops=(hop,),
            )
        )

    def on_record(self, record: RequestRecord) -> None:
        """Take one request that this node's waypoint handled."""
        if record.workload not in self.pair.targets:
            return
        if record.side == names.INBOUND and self.caller.is_at(record.downstream_remote_address):
            caller, port = record.downstream_remote_address, INBOUND_PORT
        elif record.side == names.INNER and record.peer == self.caller.identity and record.peer_address in self.caller.addresses:
            caller, port = "", HBONE_PORT
        else:
            return
        rule = causes.rule_of(record.response_code_details, self.pair.allowing)
        refused = not 0 < record.response_code < 400
        detail = known(
            workload=record.workload,
            port=port,
            verdict="deny" if rule else "allow",
            rule=rule,
            audited=record.audited,
            status=record.response_code,
            flags=list(record.response_flags),
            details=record.response_code_details if refused else "",
        )
        hops = [Hop("inbound", self.node, record.duration_ns, detail)]
        target = record.upstream_address or record.original_destination
        if record.upstream_address:
            waited = max(0, record.first_upstream_byte_ns - record.upstream_connected_ns)
            hops.append(Hop("app", self.node, waited, known(address=record.upstream_address)))
        self._put(
            Observation(
                of="request",
                node=self.node,
                workload=record.workload,
                caller=caller,
                target=target,
                began_ns=record.start_ns,
                duration_ns=record.duration_ns,
                method=record.method,
                path=record.path,
                status=record.response_code,
                request_id=record.request_id,
                rule=rule,
                next_step=causes.of_response(record, None, rule) if refused else None,
                hops=tuple(hops),
            )
        )

    def on_tunnel(self, record: TunnelRecord) -> None:
        """Take what this node's end of a tunnel says."""
        if not record.receiver or record.workload not in self.pair.targets:
            return
        if not self.caller.is_at(record.remote):
            return
        if record.failure and not record.code:
            self._refused_handshake(record)
        elif record.peer == self.caller.identity:
            self._tunnelled(record)

    def _refused_handshake(self, record: TunnelRecord) -> None:
        """Somebody at the caller's address has proved nothing."""
        detail = known(workload=record.workload, port=HBONE_PORT, remote=record.remote, failure=record.failure)
        self._put(
            Observation(
                of="handshake",
                node=self.node,
                workload=record.workload,
                caller="",
                target=record.target,
                began_ns=record.start_ns,
                duration_ns=record.duration_ns,
                ended=True,
                outcome="failed",
                next_step=causes.of_failure(record.failure, at_receiver=True, certified=lambda: self.certified(record.workload)),
                hops=(Hop("inbound", self.node, record.duration_ns, detail),),
            )
        )

    def _tunnelled(self, record: TunnelRecord) -> None:
        rule = causes.rule_of(record.details, self.pair.allowing)
        refused = record.code >= 400
        detail = known(
            workload=record.workload,
            port=HBONE_PORT,
            verdict="deny" if rule else "allow",
            rule=rule,
            peer=record.peer,
            tls=record.tls,
            remote=record.remote,
            status=record.code,
            flags=list(record.flags),
            details=record.details if refused else "",
            failure=record.failure,
            sentBytes=record.sent_bytes,
            receivedBytes=record.received_bytes,
        )
        self._put(
            Observation(
                of="tunnel",
                node=self.node,
                workload=record.workload,
                caller=record.caller,
                target=record.target,
                began_ns=record.start_ns,
                duration_ns=record.duration_ns,
                status=record.code,
                ended=record.ended,
                outcome=("denied" if rule else "failed") if refused else "",
                rule=rule,
                next_step=_of_tunnel(record, rule),
                hops=(Hop("inbound", self.node, record.duration_ns, detail),),
            )
        )

    def _put(self, observation: Observation) -> None:
        if self.found.full():
            self.missed += 1
        else:
            self.found.put_nowait(observation)


def _of_tunnel(record: TunnelRecord, rule: str | None) -> str | None:
    if rule:
        return causes.of_policy(rule)
    if record.code == 400:
        return "the tunnel's end does not serve this address and port: is the Workload's spec.addresses the same on both nodes?"
    return causes.NOT_LISTENING if record.code >= 500 else None
