"""The encoded workload model: each entity encoded once, each difference between two versions encoded once for all agents.

Published by `controller.mesh`, streamed by `controller.discovery`; knows no gRPC.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
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
    digest = hashlib.sha256()
    for name in sorted(versions):
        digest.update(f"{name}\0{versions[name]}\0".encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The model at one version. `serial` grows with every publication; `resources` are encoded Resource messages by name."""

    serial: int = 0
    version: str = ""
    changed_at_ns: int = 0
    versions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    resources: Mapping[str, pb.Resource] = field(default_factory=lambda: MappingProxyType({}))


def encode(entities: Mapping[str, pb.Entity], previous: Snapshot, changed_at_ns: int) -> Snapshot:
    """Encode the entities; those whose bytes did not change share their Resource with `previous`."""
    resources: dict[str, pb.Resource] = {}
    for name, entity in sorted(entities.items()):
        content = entity.SerializeToString(deterministic=True)
        old = previous.resources.get(name)
        resources[name] = (
            old if old is not None and old.entity == content else pb.Resource(name=name, version=content_version(content), entity=content)
        )
    versions = {name: resource.version for name, resource in resources.items()}
    return Snapshot(previous.serial + 1, model_version(versions), changed_at_ns, MappingProxyType(versions), MappingProxyType(resources))


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
                resources=[resource for name, resource in snapshot.resources.items() if held.get(name) != resource.version],
                removed=sorted(name for name in held if name not in snapshot.versions),
                changed_at_ns=snapshot.changed_at_ns,
            )
            cached = self._differences[held_version] = message.SerializeToString()
            self.encodings += 1
            if len(self._differences) > MAX_CACHED_DIFFERENCES:
                self._differences.popitem(last=False)
        return cached
