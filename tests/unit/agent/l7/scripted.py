"""Half an Envoy: a client of the xDS server that says what a test says. For tests of what Envoy does rarely."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

from agent.l7 import names
from agent.l7.resources import Resource, Resources
from agent.l7.xds import XdsServer


class Client:
    """Half an Envoy: sends what the test says and returns what the server answers."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._call = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources()

    def anew(self) -> Client:
        """Another stream."""
        return Client(self._channel)

    def end(self) -> None:
        """Give up the stream."""
        self._call.cancel()

    async def send(
        self,
        kind: str,
        *,
        subscribe: Sequence[str] = (),
        unsubscribe: Sequence[str] = (),
        has: Mapping[str, str] | None = None,
        nonce: str = "",
        error: str = "",
    ) -> None:
        request = discovery_pb2.DeltaDiscoveryRequest(
            type_url=kind,
            resource_names_subscribe=subscribe,
            resource_names_unsubscribe=unsubscribe,
            initial_resource_versions=has or {},
            response_nonce=nonce,
        )
        if error:
            request.error_detail.message = error
        await self._call.write(request)

    async def take(self, error: str = "") -> tuple[str, dict[str, str], list[str]]:
        """Receive a response and say yes, or no; what it was."""
        response = await self.receive()
        await self.send(response.type_url, nonce=response.nonce, error=error)
        return got(response)

    async def greet(self, *kinds: str) -> None:
        """Ask for everything of these, of which there is nothing."""
        for kind in kinds:
            await self.send(kind)
            assert (await self.take())[1:] == ({}, [])

    async def receive(self) -> Any:
        return await asyncio.wait_for(self._call.read(), 5)

    async def silent(self, seconds: float = 0.1) -> bool:
        """True if nothing comes. The read is not lost: it is the next `receive` that matters, so use this last."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._call.read(), seconds)
            return False
        return True


@contextlib.asynccontextmanager
async def serving(directory: Path, resources: Resources) -> AsyncIterator[tuple[XdsServer, Client]]:
    server = XdsServer(directory / "xds.sock")
    server.set(resources)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{directory / 'xds.sock'}") as channel:
            yield server, Client(channel)
    finally:
        await server.stop()


def some(**kinds: str) -> Resources:
    """Resources of empty content: cluster="a:1 b:2" makes two of them with versions 1 and 2."""
    types = {
        "cluster": names.CLUSTER,
        "endpoints": names.ENDPOINTS,
        "listener": names.LISTENER,
        "scope": names.SCOPE,
        "routes": names.ROUTES,
    }
    return {types[kind]: {n: Resource(v, b"") for n, v in (entry.split(":") for entry in text.split())} for kind, text in kinds.items()}


def got(response: Any) -> tuple[str, dict[str, str], list[str]]:
    """Type, versions by name, what is removed."""
    kind = response.type_url.rpartition(".")[2]
    return kind, {r.name: r.version for r in response.resources}, list(response.removed_resources)
