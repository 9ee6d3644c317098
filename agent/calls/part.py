"""The part of the agent that remembers what was called lately (`meshagent run --record-flows`), and answers `meshagent policy try` from it.

Connections are read from the kernel's counters every `LOOK_S` seconds and when somebody asks; requests come from Envoy, a bounded number a second
(`agent.l7.call_log`). Nothing of it is stored: a new agent begins anew.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from agent.bpf.maps import Map
from agent.calls import paths
from agent.calls.kernel import Kernel
from agent.calls.ring import Outcome, Recorded, Ring, Seen
from agent.ids import Ids
from agent.l7 import names
from agent.l7.call_log import FLUSH_MS, Asked
from agent.model import Service, Snapshot, Workload
from agent.policy import TCP

_log = logging.getLogger(__name__)

LOOK_S = 30.0
FLUSH_S = FLUSH_MS / 1000 + 0.1
"""Until Envoy has sent what has just happened."""
_CLUSTER = re.compile(r"(?P<kind>service|workload)/(?P<name>[^/]+/[^/@]+)/(?P<port>[0-9]{1,5})(?:@.*)?")


class Calls:
    """See the module. Belongs to the event loop."""

    def __init__(
        self, maps: Mapping[str, Map], ids: Ids, namespaces: Callable[[], Iterable[Path]], snapshot: Callable[[], Snapshot], *, on: bool
    ) -> None:
        """`namespaces` are those of local workloads, `snapshot` what is in force; `on` False: nothing is recorded."""
        self._kernel = Kernel(maps, ids, lambda name: (found := snapshot().workloads.get(name)) is not None and found.enrolled)
        self._namespaces = namespaces
        self._snapshot = snapshot
        self._addresses = Addresses()
        self._looking = asyncio.Lock()
        self._alive: frozenset[Seen] = frozenset()
        self.on = on
        self.ring = Ring()
        self.since = time.time()
        """Unix time: what came before is not known."""

    async def run(self) -> None:
        """Look at the kernel's counters for ever."""
        while self.on:
            try:
                await self.look()
            except OSError as error:
                _log.error("connections are not recorded for 'meshagent policy try'; trying again", extra={"reason": str(error)})
            await asyncio.sleep(LOOK_S)
        await asyncio.Event().wait()

    async def look(self) -> None:
        """Add what the kernel has counted since the last time."""
        async with self._looking:
            found = await asyncio.to_thread(self._kernel.look, list(self._namespaces()))
        for seen, (count, alive) in found.items():
            self.ring.add(seen, count, alive)
        alive_now = frozenset(seen for seen, (_, alive) in found.items() if alive)
        for seen in self._alive - alive_now:
            self.ring.still(seen)
        self._alive = alive_now

    def on_asked(self, asked: Asked) -> None:
        """Add a request of which Envoy tells."""
        if self.on and (seen := self._addresses.seen(asked, self._snapshot())) is not None:
            self.ring.add(seen)

    async def read(self, since_s: float) -> list[Recorded]:
        """What was called in the last `since_s` seconds."""
        if not self.on:
            return []
        await asyncio.sleep(FLUSH_S)
        await self.look()
        return list(self.ring.read(since_s))


class Addresses:
    """What Envoy's addresses stand for, by the model of the moment."""

    def __init__(self) -> None:
        self._services: tuple[Mapping[str, Service] | None, dict[str, str]] = (None, {})
        self._workloads: tuple[Mapping[str, Workload] | None, frozenset[str]] = (None, frozenset())

    def seen(self, asked: Asked, snapshot: Snapshot) -> Seen | None:
        """A request as it is remembered; None if it is not: somebody else tells of it, or it led nowhere."""
        outcome = _outcome(asked)
        path = paths.template(asked.path)
        if asked.side == names.INBOUND:
            if asked.caller_address in self._enrolled(snapshot.workloads):
                return None
            return Seen(True, "", asked.owner, "", _port(asked.dialled.rpartition(":")[2]), TCP, outcome, asked.method, path)
        dialled = self._dialled(snapshot.services).get(asked.dialled, "")
        match = _CLUSTER.fullmatch(asked.cluster)
        if match is None:
            service, _, number = dialled.rpartition(":")
            target = asked.target
        else:
            service = match["name"] if match["kind"] == "service" else ""
            number, target = match["port"], asked.target if service else match["name"]
        if not (service or target):
            return None
        return Seen(False, asked.owner, target, service, _port(number), TCP, outcome, asked.method, path, dialled)

    def _dialled(self, services: Mapping[str, Service]) -> dict[str, str]:
        if self._services[0] is not services:
            found = {names.destination(a, p.port): f"{s.name}:{p.port}" for s in services.values() for a in s.addresses for p in s.ports}
            self._services = (services, found)
        return self._services[1]

    def _enrolled(self, workloads: Mapping[str, Workload]) -> frozenset[str]:
        if self._workloads[0] is not workloads:
            self._workloads = (workloads, frozenset(a for w in workloads.values() if w.enrolled for a in w.addresses))
        return self._workloads[1]


def _port(text: str) -> int:
    return int(text) if text.isdigit() else 0


_REFUSED = {"7", "16"}
"""PERMISSION_DENIED and UNAUTHENTICATED, which HTTP calls 200 (https://grpc.io/docs/guides/status-codes/)."""


def _outcome(asked: Asked) -> Outcome:
    if asked.details.startswith("rbac_access_denied"):
        return Outcome.DENIED
    if asked.code in {401, 403} or asked.grpc in _REFUSED:
        return Outcome.UNAUTHORIZED
    return Outcome.SERVED if asked.details == "via_upstream" else Outcome.UNANSWERED
