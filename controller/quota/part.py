"""Global limits as one part of the controller: chooses the store, serves, runs. Used by `controller.server`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc

from controller.mesh import Mesh
from controller.quota import redis
from controller.quota.service import QuotaService
from controller.quota.store import FILE, Memory, Store
from meshapi import quota_pb2_grpc


class QuotaPart:
    """See the module. `directory` is where counts survive a restart; `url` of Redis, empty: this is the only controller."""

    def __init__(self, mesh: Mesh, directory: Path, url: str, trust_domain: str, clock: Callable[[], float]) -> None:
        self._memory = Memory(directory / FILE, clock)
        store: Store = redis.WithFallback(redis.Shared(redis.client(url)), self._memory) if url else self._memory
        self.service = QuotaService(lambda: mesh.compiled.entities, store, trust_domain, clock)

    def load(self) -> None:
        """Read the counts that were kept."""
        self._memory.load()

    def serve(self, server: grpc.aio.Server) -> None:
        """Add the service to a server that has not started."""
        quota_pb2_grpc.add_QuotasServicer_to_server(self.service, server)  # type: ignore[no-untyped-call,unused-ignore]

    async def run(self) -> None:
        """Share out, for ever."""
        await self.service.run()

    async def close(self) -> None:
        """Keep what is to be kept."""
        await self.service.close()
