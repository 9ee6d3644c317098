"""Which workloads tunnels between nodes have reached the ends of: what agents report, kept for ever. Served beside discovery, used by `controller.mesh`.

Callers use plaintext to a PERMISSIVE workload until its own node's agent has said that tunnels end there, and never again after that: neither an agent that
is away, nor a controller that starts anew, nor a lost file takes it back. A workload is forgotten when it leaves the model or its node.

Several controllers remember it together: what an agent has told one of them, all of them publish. None of them knows the newest model for sure, so what is
remembered is of a pod and not of its name (its UID), and is forgotten late, when it does no harm any more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, Final, NamedTuple, Protocol

import grpc

from controller.errors import ControllerError
from controller.peers import NotAllowed, require
from controller.store import Documents, SharedStore, Store, of_node
from controller.waiting import heard
from meshapi import discovery_pb2 as pb

_log = logging.getLogger(__name__)

FILE: Final = "tunnels.json"
SETTLE_S: Final = 0.1
"""Reports that come within this time are one change of the model."""
RETRY_S: Final = 10.0
FORGET_S: Final = 600.0
"""How long a pod must be gone from the model before its report is forgotten, where several controllers remember it: models lag behind each other."""
LOOK_S: Final = 60.0
_TUNNEL_LABEL: Final = "networking.istio.io/tunnel"
_HTTP: Final = "http"
"""Says of a workload whose node has another implementation of HBONE, ztunnel, that it has it (https://istio.io/latest/docs/reference/config/labels/)."""


class Place(NamedTuple):
    """A workload ("NAMESPACE/NAME") on a node; `uid` of its pod, if it is one."""

    name: str
    node: str
    uid: str = ""


Places = Mapping[str, Place]
"""By the workload's name."""


class Memory(Protocol):
    """What is kept over restarts. All methods block, and raise ControllerError."""

    @property
    def alone(self) -> bool:
        """Does no other controller change it?"""

    def load(self) -> frozenset[Place] | None:
        """Return who has tunnels; None if that was lost."""

    def store(self, ready: frozenset[Place], gone: frozenset[Place]) -> frozenset[Place]:
        """Keep `ready`, without `gone`; return what is kept now."""


class FileMemory:
    """tunnels.json of a CA directory. Of a workload only its node is kept: the one controller sees each one come and go."""

    alone: Final = True

    def __init__(self, store: Store, *, used: bool) -> None:
        """`used`: there was an authority before this controller."""
        self._store, self._used = store, used

    def load(self) -> frozenset[Place] | None:
        """Return who has tunnels; None if the file is gone, of an authority older than it, or cannot be read."""
        try:
            content = self._store.read(FILE)
            if content is None:
                return None if self._used else frozenset()
            return frozenset(Place(str(name), str(node)) for name, node in json.loads(content)["ready"].items())
        except (ControllerError, ValueError, KeyError, TypeError, AttributeError) as error:
            _log.error(
                "who has tunnels cannot be read: all workloads are taken to have some",
                extra={"path": self._store.where(FILE), "error": str(error)},
            )
            return None

    def store(self, ready: frozenset[Place], gone: frozenset[Place]) -> frozenset[Place]:
        """Replace the file."""
        kept = ready - gone
        content = {"ready": dict(sorted((place.name, place.node) for place in kept))}
        self._store.change(lambda documents: documents.write(FILE, json.dumps(content, indent=1) + "\n"))
        return kept


class SharedMemory:
    """A document for each node in what controllers share."""

    alone: Final = False

    def __init__(self, store: SharedStore) -> None:
        self._store = store
        self._read: dict[str, tuple[object, frozenset[Place]]] = {}
        self._lock = threading.Lock()

    def load(self) -> frozenset[Place] | None:
        """Return who has tunnels; None if anything of it cannot be read."""
        with self._lock:
            versions = self._store.groups()
            self._read = {group: held for group, held in self._read.items() if group in versions}
            try:
                for group, version in versions.items():
                    if group not in self._read or self._read[group][0] != version:
                        self._read[group] = version, _places(self._store.read(FILE, group))
            except (ValueError, KeyError, TypeError) as error:
                extra = {"where": self._store.where(f"{group}/{FILE}"), "error": str(error)}
                _log.error("who has tunnels cannot be read: all workloads are taken to have some", extra=extra)
                return None
            return frozenset().union(*(places for _, places in self._read.values()))

    def store(self, ready: frozenset[Place], gone: frozenset[Place]) -> frozenset[Place]:
        """Add what is missing, and take away what is gone; what others have added stays."""
        kept = self.load() or frozenset()
        changed = (ready - gone - kept) | (gone & kept)
        for node in sorted({place.node for place in changed}):
            of_it = frozenset(place for place in ready - gone if place.node == node)

            def work(documents: Documents, of_it: frozenset[Place] = of_it) -> None:
                try:
                    held = _places(documents.read(FILE))
                except (ValueError, KeyError, TypeError):
                    held = frozenset()  # damaged: it is made anew of all that is known
                rows = sorted((held - gone) | of_it)
                documents.write(FILE, json.dumps({"ready": [list(place) for place in rows]}) + "\n" if rows else "")

            self._store.change(work, of_node(node))
        found = self.load()
        if found is None:
            raise ControllerError("who has tunnels cannot be read: nobody is taken to have none")
        return found


def _places(content: bytes | None) -> frozenset[Place]:
    rows = [] if content is None else json.loads(content)["ready"]
    if not all(isinstance(row, list) and len(row) == 3 and all(isinstance(text, str) for text in row) for row in rows):
        raise ValueError("an entry is not a workload, its node and its UID")
    return frozenset(Place(*row) for row in rows)


class Readiness:
    """See the module. Belongs to the event loop, but for `awaiting` and `load`."""

    def __init__(self, memory: Memory | None) -> None:
        """None: there is no certificate authority, and so there are no tunnels."""
        self._memory = memory
        self._ready: frozenset[Place] = frozenset()
        self._stored: frozenset[Place] = frozenset()
        """What a restart begins with: nothing else is published."""
        self._everybody = False
        self._model: Places = {}
        self._looked: dict[str, tuple[pb.Entity, Place | None]] = {}
        """What `awaiting` has found in entities."""
        self._missed: dict[Place, float] = {}
        """Since when (monotonic clock) what is remembered has not been in the model."""
        self._news = asyncio.Event()

    def load(self) -> None:
        """Begin with what is kept; blocks. If it is lost, every workload of the model is taken to have tunnels."""
        if self._memory is None:
            return
        found = self._memory.load()
        self._everybody = found is None
        self._ready = self._stored = found or frozenset()
        self._news.set()  # from now on there is something

    def awaiting(self, entities: Mapping[str, pb.Entity]) -> frozenset[str]:
        """Return the names of workloads that are to be published with `awaits_tunnels`."""
        if self._memory is None:
            return frozenset()
        looked: dict[str, tuple[pb.Entity, Place | None]] = {}
        for name, entity in entities.items():
            if name.startswith("workload/"):
                held = self._looked.get(name)
                looked[name] = held if held is not None and held[0] is entity else (entity, self._expected(entity.workload))
        self._looked = looked
        return frozenset(name for name, (_, place) in looked.items() if place is not None and place not in self._stored)

    def _expected(self, workload: pb.Workload) -> Place | None:
        """What a report of a workload's tunnels is kept as; None: it needs none."""
        if not workload.enrolled or _HTTP in workload.labels.get(_TUNNEL_LABEL, "").split(","):
            return None
        return self._kept(Place(f"{workload.namespace}/{workload.name}", workload.node, workload.pod_uid))

    def follow(self, places: Places) -> None:
        """Forget who is not where it was: `places` is of the whole model."""
        if self._memory is None:
            return
        self._model = {name: self._kept(place) for name, place in places.items()}
        present = frozenset(self._model.values())
        if self._everybody:
            self._everybody, self._ready = False, self._ready | present
            self._stored = self._ready
            self._news.set()
        now = time.monotonic()
        self._missed = {place: self._missed.get(place, now) for place in self._ready - present}
        if self._gone():
            self._news.set()

    def report(self, node: str, workloads: Iterable[str], places: Places) -> int:
        """Take what the agent of `node` says, of its own workloads; returns how many are news."""
        said = frozenset(self._kept(places[name]) for name in workloads if name in places and places[name].node == node)
        fresh = said - self._ready
        self._ready |= fresh
        if fresh:
            self._news.set()
        return len(fresh)

    def look(self) -> None:
        """Others may have stored something."""
        self._news.set()

    async def run(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Store what is reported, then have it published by `changed`, for ever."""
        while True:
            if not await heard(self._news, LOOK_S) and not self._gone():
                continue
            await asyncio.sleep(SETTLE_S)
            self._news.clear()
            if self._memory is None:
                continue
            try:
                # What others remember of pods that this controller has not seen yet, or does not see any more, is not its own to keep.
                gone, present = self._gone(), frozenset(self._model.values())
                own = self._ready if self._memory.alone else self._ready & present
                stored = await asyncio.to_thread(self._memory.store, own, gone)
            except ControllerError as error:
                # Not published: after a restart nobody would know, and callers that knew would fall back to plaintext.
                _log.error("who has tunnels cannot be stored; trying again", extra={"error": str(error)})
                await asyncio.sleep(RETRY_S)
                self._news.set()
                continue
            for place in gone:
                self._missed.pop(place, None)
            same = stored == self._stored
            self._stored = stored
            self._ready = stored | (self._ready - gone)
            if not same:
                await changed()

    def _gone(self) -> frozenset[Place]:
        """What is to be forgotten now."""
        if self._memory is None or self._memory.alone:
            return frozenset(self._missed)
        now = time.monotonic()
        return frozenset(place for place, since in self._missed.items() if now - since >= FORGET_S)

    def _kept(self, place: Place) -> Place:
        """A place as it is remembered."""
        return place if not place.uid or (self._memory is not None and not self._memory.alone) else Place(place.name, place.node)


class ReportService:
    """Takes agents' reports."""

    def __init__(self, readiness: Readiness, places: Callable[[Collection[str]], Places], trust_domain: str) -> None:
        """`places` tells where these workloads are, as far as they are in the model."""
        self._readiness = readiness
        self._places = places
        self._trust_domain = trust_domain

    async def report(self, request: pb.TunnelReport, context: grpc.aio.ServicerContext[Any, Any]) -> pb.TunnelReportAnswer:
        """Take one report; refuse one in another node's name."""
        try:
            require(context, f"spiffe://{self._trust_domain}/meshagent/node/{request.node}")
        except NotAllowed as error:
            _log.warning("report refused", extra={"node": request.node, "peer": context.peer(), "error": str(error)})
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"node {request.node} is not yours: {error}")
        self._readiness.report(request.node, request.workloads, self._places(request.workloads))
        return pb.TunnelReportAnswer()
