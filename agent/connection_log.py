"""Connection logs: one line of JSON for each connection that ends, or is denied, in namespaces that want it. From the kernel's events; owned by the supervisor.

The kernel reports the ends of such workloads' connections alone (MESH_WORKLOAD_LOGGED), so many a second and CPU; what is more it counts (`event_unlogged`), as
this does with what cannot be written. Lines are written every FLUSH_S in a thread. Fields have the names of the request log (`agent.l7.request_log`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from agent.bpf.events import Event
from agent.bpf.manifest import Close, Direction, EventKind, Reason
from agent.logfiles import LogFile

_log = logging.getLogger(__name__)

FLUSH_S = 0.5
MOST_WAITING = 10_000
"""Lines that wait to be written, some 4 MB."""


class ConnectionLog:
    """Takes events on the event loop."""

    def __init__(self, file: LogFile, wanted: Callable[[str], bool]) -> None:
        """`wanted` says of a workload whether its connections are logged."""
        self._file = file
        self._wanted = wanted
        self._waiting: list[Event] = []
        self.dropped = 0
        """Connections without a line since the agent started."""

    def on_event(self, event: Event) -> None:
        """Take one event of the kernel."""
        if event.kind not in {EventKind.CLOSED, EventKind.DENIED} or event.direction is Direction.FROM_WAYPOINT:
            return
        if not self._wanted(event.source if event.direction is Direction.OUTBOUND else event.target):
            return
        if len(self._waiting) >= MOST_WAITING:
            self.dropped += 1
        else:
            self._waiting.append(event)

    async def run(self) -> None:
        """Write what has come, for ever; when cancelled, what is left."""
        problem = ""
        try:
            while True:
                await asyncio.sleep(FLUSH_S)
                events, self._waiting = self._waiting, []
                try:
                    await asyncio.to_thread(self._write, events)
                    problem = ""
                except OSError as error:
                    self.dropped += len(events)
                    if str(error) != problem:
                        _log.warning("connections are not logged", extra={"file": str(self._file.path), "reason": str(error)})
                    problem = str(error)
        finally:
            self._write(self._waiting)

    def _write(self, events: list[Event]) -> None:
        if not events:
            return
        self._file.rotate()
        since_boot = time.time_ns() - time.monotonic_ns()
        with self._file.path.open("a") as out:
            out.writelines(json.dumps(line(event, since_boot)) + "\n" for event in events)


def line(event: Event, boot_ns: int) -> dict[str, Any]:
    """What is said about the end of a connection, or its refusal; `boot_ns` is when CLOCK_MONOTONIC was 0, Unix time."""
    outbound, denied = event.direction is Direction.OUTBOUND, event.kind is EventKind.DENIED
    seconds, rest = divmod(boot_ns + event.time_ns, 1_000_000_000)
    found: dict[str, Any] = {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1_000_000:03d}Z",
        "kind": "connection",
        "direction": event.direction.name.lower(),
        "source": event.source,
        "sourceAddress": event.local if outbound else event.remote,
        "dialled": event.dialled,
        "service": event.service,
        "destination": event.target,
        "destinationAddress": event.remote if outbound else event.local,
        "via": "waypoint" if event.redirected else "tunnel" if event.tunnelled else "",
        "protocol": event.protocol,
        "outcome": "denied" if denied else "closed",
        "reason": (Reason if denied else Close)(event.reason).name.lower(),
        "rule": event.rule,
    }
    found = {key: value for key, value in found.items() if value}
    if not denied:
        found |= {"durationMs": event.duration_ns // 1_000_000, "sentBytes": event.sent_bytes, "receivedBytes": event.received_bytes}
        found |= {"rttUs": event.rtt_us, "retransmits": event.retransmits}
    return found
