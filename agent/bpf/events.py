"""What the programs report: denials (a bounded number a second) and the steps of traced connections."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from agent import addresses
from agent.bpf import libbpf
from agent.bpf.manifest import Direction, EventKind, Reason, Redirect, Verdict
from agent.bpf.maps import Map
from agent.ids import Ids

_UDP = 17  # IPPROTO_UDP
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """struct mesh_event with names for numbers. Times in nanoseconds (`time_ns`: CLOCK_MONOTONIC), sizes in bytes, ports in host order.

    `reason` is an enum mesh_reason, or an enum mesh_close when `kind` is CLOSED. Addresses are ADDRESS:PORT, "" where not known yet. `service` is
    "NAMESPACE/NAME:PORT"; `source` and `target` are workloads; "" where the kernel does not know.
    """

    kind: EventKind
    time_ns: int
    socket_cookie: int
    duration_ns: int
    sent_bytes: int
    received_bytes: int
    local: str
    dialled: str
    remote: str
    source: str
    target: str
    service: str
    rule: str
    pid: int
    command: str
    rtt_us: int
    retransmits: int
    verdict: Verdict
    direction: Direction
    reason: int
    redirected: bool
    """To the waypoint, which decides by request."""
    protocol: str = "TCP"
    tunnelled: bool = False
    """To another node with mTLS; the waypoint carries it unseen."""

    @property
    def local_port(self) -> int:
        """Source port of an outgoing connection, which is what other observers know it by; 0 before it is bound."""
        return int(self.local.rpartition(":")[2] or 0)


class Events:
    """Reads the ring buffer on the event loop."""

    def __init__(self, ring: Map, ids: Ids, on_event: Callable[[Event], None], expected: str = "") -> None:
        """`ring` is mesh_events; refusals of the workload `expected` are no news."""
        self._codec = ring.layout.value
        self._ids = ids
        self._on_event = on_event
        self._expected = expected
        self._ring = libbpf.RingBuffer(ring.fd, self._record)

    async def run(self) -> None:
        """Deliver events until cancelled."""
        loop = asyncio.get_running_loop()
        descriptor = self._ring.fileno()
        loop.add_reader(descriptor, self._ring.consume)
        try:
            self._ring.consume()
            await asyncio.get_running_loop().create_future()
        finally:
            loop.remove_reader(descriptor)
            self._ring.close()

    def _record(self, record: bytes) -> None:
        m = self._codec.unpack(record)
        event = Event(
            kind=EventKind(m["kind"]),
            time_ns=m["time_ns"],
            socket_cookie=m["socket_cookie"],
            duration_ns=m["duration_ns"],
            sent_bytes=m["sent_bytes"],
            received_bytes=m["received_bytes"],
            local=addresses.endpoint(m["local_address"], m["local_port"]),
            dialled=addresses.endpoint(m["dialled_address"], m["dialled_port"]),
            remote=addresses.endpoint(m["remote_address"], m["remote_port"]),
            source=self._ids.name(m["source"]),
            target=self._ids.name(m["target"]),
            service=self._ids.name(m["service"]),
            rule=self._ids.name(m["rule"]),
            pid=m["pid"],
            command=m["comm"].split(b"\0", 1)[0].decode(errors="replace"),
            rtt_us=m["rtt_us"],
            retransmits=m["retransmits"],
            verdict=Verdict(m["verdict"]),
            direction=Direction(m["direction"]),
            reason=m["reason"],
            redirected=m["redirected"] == Redirect.WAYPOINT,
            protocol="UDP" if m["protocol"] == _UDP else "TCP",
            tunnelled=m["redirected"] == Redirect.TUNNEL,
        )
        if event.kind in {EventKind.DENIED, EventKind.AUDITED} and (not self._expected or event.source != self._expected):
            _log.info(
                "connection refused" if event.kind is EventKind.DENIED else "enforcing would deny",
                extra={
                    "source": event.source or event.remote or "unknown",
                    "destination": event.service or event.target or event.dialled,
                    "dialled": event.dialled,
                    "reason": Reason(event.reason).name.lower(),
                    "rule": event.rule,
                    "direction": event.direction.name.lower(),
                    "protocol": event.protocol,
                },
            )
        self._on_event(event)
