"""From source to publication: reload, compile, encode, publish, one at a time. Run by `controller.main`, called by `controller.admin`.

The only owner of the source: whoever changes files in its directory does it within `change`, so that what was staged is what is written.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Final

from controller import metrics
from controller.authentication import uris
from controller.compile import Compiled, compile_model
from controller.errors import ControllerError, Problem
from controller.gateways import Known
from controller.gatewayservice import Certificates
from controller.jwks import Keys
from controller.objects import Key, Object
from controller.readiness import Place, Readiness
from controller.recompile import Compiler
from controller.schema import kinds
from controller.snapshot import Publication, Snapshot, encode
from controller.source import Origin, State
from controller.wireguard import NodeKeys
from meshapi import discovery_pb2 as pb

_log = logging.getLogger(__name__)

SETTLE_S: Final = 0.25  # how soon a file that seems half written is read again
EXPIRY_S: Final = 30.0  # how often certificates of gateways are compared with the clock


class Mesh:
    """Holds the state that is in force, its compiled form and its publication. `authority`: this controller gives workloads certificates.

    `node_keys`: those of nodes, in a mesh that encrypts with WireGuard.
    """

    def __init__(
        self,
        source: Origin,
        *,
        authority: bool,
        readiness: Readiness | None = None,
        keys: Keys | None = None,
        node_keys: NodeKeys | None = None,
        egress: str = "allow",
    ) -> None:
        self.source = source
        self.readiness = readiness or Readiness(None)
        self.keys = keys or Keys(None)
        """Of token issuers, as far as RequestAuthentications name them by URI."""
        self.certificates = Certificates()
        """Of gateways."""
        self._authority = authority
        self._egress = egress
        self._compiler = Compiler(authority=authority, egress=egress)
        self._places: dict[str, tuple[pb.Entity, Place]] = {}
        """Where workloads are, of the entities that say so: of a large model most are what they were."""
        self._node_keys = node_keys
        self.publication = Publication()
        self.compiled = Compiled()
        self._lock = asyncio.Lock()
        self._reported: frozenset[Problem] = frozenset()
        self._unreadable = ""
        self._published = False
        self.looked: Callable[[State, Compiled], None] = lambda _state, _compiled: None
        """Called after the source was looked at, and what has changed there is in force."""
        self._unsettled = asyncio.Event()

    @property
    def state(self) -> State:
        """What is in force."""
        return self.source.state

    async def start(self) -> None:
        """Read and publish the source for the first time. Raises ControllerError if it cannot be read."""
        async with self._lock:
            await asyncio.to_thread(self.source.start)
            if self.source.ready:
                await self._publish(time.time_ns())
        if self.source.unsettled:
            self._unsettled.set()

    async def reload(self) -> None:
        """Bring into force what the source says now. One that cannot be read leaves everything as it is."""
        async with self.change():
            pass

    @asynccontextmanager
    async def change(self) -> AsyncIterator[Origin]:
        """Let the caller change the source; when it leaves, what that says is in force."""
        async with self._lock:
            seen, before = time.time_ns(), self.source.state
            try:
                yield self.source
            finally:
                try:
                    state = await asyncio.to_thread(self.source.load)
                except ControllerError as error:
                    if self._unreadable != str(error):
                        _log.error("source unreadable, the last good state stays in force", extra={"error": str(error)})
                        self._unreadable = str(error)
                else:
                    self._unreadable = ""
                    if self.source.unsettled:
                        self._unsettled.set()
                    if not self.source.ready:
                        self._report(state)
                    elif state.objects != before.objects or _secrets(state) != _secrets(before) or not self._published:
                        await self._publish(seen)
                    elif state.problems != before.problems:
                        self._report(state)
                    if self._published:
                        self.looked(self.source.state, self.compiled)

    async def remark(self) -> None:
        """Publish again who has tunnels, and the keys of nodes; all else is as it was."""
        async with self._lock:
            if not self._published:
                return
            self._publish_if_new(await asyncio.to_thread(self._encoded, time.time_ns()))

    async def watch(self) -> None:
        """Follow the source for ever. Raises ControllerError if it cannot be watched."""
        tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._settle())]
        tasks.append(asyncio.create_task(self.readiness.run(self.remark)))
        tasks.append(asyncio.create_task(self.keys.follow(self._republish)))
        tasks.append(asyncio.create_task(self._retire_certificates()))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _settle(self) -> None:
        """Read again what seemed half written: no event says that a file stays as it is."""
        while True:
            await self._unsettled.wait()
            self._unsettled.clear()
            await asyncio.sleep(SETTLE_S)
            await self.reload()

    async def _follow(self) -> None:
        async with aclosing(self.source.follow()) as news:  # who ends us while we load ends what follows, too, before the source is closed
            async for _ in news:
                await self.reload()

    async def _retire_certificates(self) -> None:
        """Take certificates of gateways into force when they begin to hold, and out of it when they run out: nothing else changes then."""
        while True:
            await asyncio.sleep(EXPIRY_S)
            ends = [pair.ends.timestamp() for held in self.compiled.certificates.values() for pair in held.values()]
            if min([*ends, *self.compiled.awaited], default=math.inf) < time.time():
                await self._republish()

    async def _republish(self) -> None:
        async with self._lock:
            if not self._published:
                return
            await self._publish(time.time_ns())

    async def follow_keys(self, keys: NodeKeys) -> None:
        """Publish keys of nodes as they change, for ever."""
        while True:
            await keys.changed()
            await self.remark()

    async def _publish(self, changed_at_ns: int) -> None:
        started = time.monotonic()
        self._published = True
        state = self.source.state
        self.keys.want(uris(state.objects[key] for key in sorted(key for key in state.objects if key.kind == "RequestAuthentication")))
        self.compiled = await asyncio.to_thread(self._compiler.compile, state.objects, keys=self.keys.found, known=self._known())
        self.readiness.follow(self._all_places())
        snapshot = await asyncio.to_thread(self._encoded, changed_at_ns)
        self._report(state)
        self._publish_if_new(snapshot)
        await self.certificates.set(self.compiled.certificates)
        metrics.RELOAD_SECONDS.set(time.monotonic() - started)

    def compile(self, objects: Mapping[Key, Object]) -> Compiled:
        """Return what the model would be with these objects. Brings nothing into force; takes a while: not for the event loop."""
        return compile_model(objects, authority=self._authority, keys=self.keys.found, egress=self._egress, known=self._known())

    def _known(self) -> Known:
        return Known(_secrets(self.source.state), self.compiled.pairs)

    def _encoded(self, changed_at_ns: int) -> Snapshot:
        entities = self.compiled.entities
        awaiting = self.readiness.awaiting(entities)
        if self._node_keys is not None:
            entities = {**entities, **self._node_keys.entities(entities)}
        return encode(entities, self.publication.current, changed_at_ns, awaiting)

    def _publish_if_new(self, snapshot: Snapshot) -> None:
        previous = self.publication.current
        if snapshot.version != previous.version or not previous.serial:
            self.publication.publish(snapshot)
            _log.info("model published", extra={"version": snapshot.version, "resources": len(snapshot.versions)})

    def places(self, workloads: Collection[str]) -> dict[str, Place]:
        """Return where these workloads are, as far as they are in the model."""
        entities = self.compiled.entities
        return {name: _place(entity) for name in workloads if (entity := entities.get(f"workload/{name}")) is not None}

    def _all_places(self) -> dict[str, Place]:
        found = {}
        for key, entity in self.compiled.entities.items():
            if key.startswith("workload/"):
                held = self._places.get(key)
                found[key] = held if held is not None and held[0] is entity else (entity, _place(entity))
        self._places = found
        return {place.name: place for _, place in found.values()}

    def node_of(self, name: str) -> str:
        """Return the node of a workload, or of a ready one behind a service, by NAMESPACE/NAME or a name in the namespace default; "" if there is none."""
        name = name if "/" in name else f"default/{name}"
        if name in (known := self.places([name])):
            return known[name].node
        workloads = (entity.workload for entity in self.compiled.entities.values() if entity.WhichOneof("kind") == "workload")
        behind = [workload for workload in workloads if any(backing.service == name for backing in workload.backing)]
        return min(behind, key=lambda w: (not w.ready, w.namespace, w.name)).node if behind else ""

    def _report(self, state: State) -> None:
        problems = frozenset(state.problems)
        for problem in sorted(problems - self._reported):
            _log.error("resource refused", extra={"problem": str(problem)})
        for problem in sorted(self._reported - problems):
            _log.info("resource problem solved", extra={"problem": str(problem)})
        self._reported = problems
        metrics.PROBLEMS.set(len(problems))
        counts = Counter(key.kind for key in state.objects)
        for kind in kinds():
            metrics.OBJECTS.labels(kind).set(counts[kind])


def _place(entity: pb.Entity) -> Place:
    workload = entity.workload
    return Place(f"{workload.namespace}/{workload.name}", workload.node, workload.pod_uid)


def _secrets(state: State) -> dict[Key, str]:
    """Why the newest version of a Secret is not in force, where that is so: Gateways say it."""
    return {key: "; ".join(one.message for one in problems) for key, problems in state.refused.items() if key.kind == "Secret"}
