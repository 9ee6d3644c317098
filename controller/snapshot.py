"""The encoded workload model: each entity encoded once, each difference between two versions encoded once for all agents.

Published by `controller.mesh`, streamed by `controller.discovery`; knows no gRPC.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from meshapi import discovery_pb2 as pb

MAX_CACHED_DIFFERENCES: Final = 16  # agents hold one of very few versions; more are computed again


def content_version(content: bytes) -> str:
    """Version of an entity: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def model_version(versions: Mapping[str, str]) -> str:
    """Version of a whole model: a hash over every (name, version) in the order of names."""
    text = "".join([f"{name}\0{versions[name]}\0" for name in sorted(versions)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The model at one version. `serial` grows with every publication; `resources` are encoded Resource messages by name."""

    serial: int = 0
    version: str = ""
    changed_at_ns: int = 0
    versions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    resources: Mapping[str, pb.Resource] = field(default_factory=lambda: MappingProxyType({}))
    entities: Mapping[str, pb.Entity] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    """What was encoded."""
    awaiting: AbstractSet[str] = frozenset()


def encode(entities: Mapping[str, pb.Entity], previous: Snapshot, changed_at_ns: int, awaiting: AbstractSet[str] = frozenset()) -> Snapshot:
    """Encode the entities; those that are the same in memory, or whose bytes did not change, share their Resource with `previous`.

    `awaiting`: names of workloads that are sent with `awaits_tunnels`, which their entities do not say.
    """
    resources: dict[str, pb.Resource] = {}
    versions: dict[str, str] = {}
    for name in sorted(entities):
        old, entity = previous.resources.get(name), entities[name]
        if old is not None and previous.entities.get(name) is entity and (name in awaiting) == (name in previous.awaiting):
            resources[name], versions[name] = old, previous.versions[name]
            continue
        content = (_awaiting(entity) if name in awaiting else entity).SerializeToString(deterministic=True)
        if old is None or old.entity != content:
            old = pb.Resource(name=name, version=content_version(content), entity=content)
        resources[name], versions[name] = old, old.version
    version = model_version(versions)
    return Snapshot(
        previous.serial + 1, version, changed_at_ns, MappingProxyType(versions), MappingProxyType(resources), entities, awaiting
    )


def _awaiting(entity: pb.Entity) -> pb.Entity:
    marked = pb.Entity()
    marked.CopyFrom(entity)
    marked.workload.awaits_tunnels = True
    return marked


class Publication:
    """The newest snapshot, a way to wait for a newer one, and the cache of encoded differences towards it."""

    def __init__(self) -> None:
        self.current = Snapshot()
        self._changed = asyncio.Event()
        self._differences: OrderedDict[str, bytes] = OrderedDict()
        self.encodings = 0
        """How many responses were encoded: with many agents it stays at one per change."""

    def publish(self, snapshot: Snapshot) -> None:
        """Make `snapshot` the newest and wake everybody who waits; call it from the event loop."""
        self.current = snapshot
        self._differences.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    async def newer_than(self, serial: int) -> Snapshot:
        """Return the newest snapshot as soon as its serial is greater than `serial`; what came between is skipped."""
        while self.current.serial <= serial:
            await self._changed.wait()
        return self.current

    def response(self, held: Mapping[str, str], held_version: str) -> bytes:
        """Return the encoded DiscoveryResponse from what an agent holds to the newest; its nonce is the newest serial."""
        cached = self._differences.get(held_version)
        if cached is None:
            snapshot = self.current
            message = pb.DiscoveryResponse(
                nonce=str(snapshot.serial),
                version=snapshot.version,
                resources=[snapshot.resources[name] for name, version in snapshot.versions.items() if held.get(name) != version],
                removed=sorted(name for name in held if name not in snapshot.versions),
                changed_at_ns=snapshot.changed_at_ns,
            )
            cached = self._differences[held_version] = message.SerializeToString()
            self.encodings += 1
            if len(self._differences) > MAX_CACHED_DIFFERENCES:
                self._differences.popitem(last=False)
        return cached
