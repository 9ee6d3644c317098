"""The agent's end of the discovery stream, and the last good snapshot on disk. Run as a task by the supervisor.

It owns the connection to the controller and `STATE_DIR/snapshot.pb`; what a snapshot means is the business of the `apply` that it is given.
Nothing that arrives replaces what is in force before all of it is decoded and `apply` took it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, cast

import grpc

from agent import files
from agent.errors import EnvironmentUnfit, MeshError
from agent.model import Entity, Policy, Route, Service, Snapshot, Workload, decode
from meshapi import discovery_pb2 as pb
from meshapi import discovery_pb2_grpc

if TYPE_CHECKING:
    from agent.config import Config

_log = logging.getLogger(__name__)

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 10.0
_OPTIONS: Final = (
    # A controller whose machine vanished is noticed within 15 s (https://grpc.io/docs/guides/keepalive/).
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Each attempt is a new channel and the pauses are ours: no shared connection may keep a pause of its own.
    ("grpc.use_local_subchannel_pool", 1),
)
_KINDS: Final = {"workload": Workload, "service": Service, "route": Route, "policy": Policy}


@dataclass(frozen=True, slots=True)
class DiscoveryState:
    """How the connection to the controller is doing. `lag_s`: seconds from the change at the controller to its application here."""

    connected: bool = False
    version: str = ""
    lag_s: float | None = None
    nacks: int = 0
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class _Held:
    """One version of the model, as it came and decoded; both mappings have the same names."""

    version: str
    resources: Mapping[str, pb.Resource]
    entities: Mapping[str, Entity]

    def snapshot(self) -> Snapshot:
        parts: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
        for name, entity in self.entities.items():
            parts[name.partition("/")[0]][entity.name] = entity
        return Snapshot(
            version=self.version,
            workloads=MappingProxyType(parts["workload"]),
            services=MappingProxyType(parts["service"]),
            routes=MappingProxyType(parts["route"]),
            policies=MappingProxyType(parts["policy"]),
        )

    def after(self, response: pb.DiscoveryResponse) -> _Held:
        """Return what is held after `response`. Raises ValueError if anything in it cannot be decoded."""
        resources, entities = dict(self.resources), dict(self.entities)
        for name in response.removed:
            resources.pop(name, None)
            entities.pop(name, None)
        for resource in response.resources:
            try:
                entity = decode(resource.entity)
            except ValueError as error:
                raise ValueError(f"{resource.name}: {error}") from error
            kind, _, name = resource.name.partition("/")
            if not isinstance(entity, _KINDS.get(kind, ())) or entity.name != name:
                raise ValueError(f"{resource.name}: holds {type(entity).__name__} {entity.name}")
            resources[resource.name] = resource
            entities[resource.name] = entity
        return _Held(response.version, resources, entities)


class Discovery:
    """Keeps this node's copy of the model current."""

    def __init__(self, config: Config, apply: Callable[[Snapshot], Awaitable[None]]) -> None:
        if config.tls is None and not config.controller.startswith("unix:"):
            raise EnvironmentUnfit(
                f"controller {config.controller} is reached over TCP, which needs credentials: give the CA, certificate and key, or a unix: target"
            )
        self._config = config
        self._apply = apply
        self._held = _Held("", {}, {})
        self._applied: str | None = None
        self._state = DiscoveryState()
        self._path = config.state_dir / "snapshot.pb"

    @property
    def state(self) -> DiscoveryState:
        """How the connection is doing now."""
        return self._state

    def load_last_good(self) -> Snapshot | None:
        """Return the snapshot that was last applied on this node, or None if there is none that can be trusted.

        The caller applies it; the stream then starts from it and transfers only differences. A damaged file is logged and ignored.
        """
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.error("last good snapshot unreadable, starting without it", extra={"path": str(self._path), "error": str(error)})
            return None
        try:
            self._held = _decode_file(content)
        except ValueError as error:
            _log.error("last good snapshot damaged, starting without it", extra={"path": str(self._path), "error": str(error)})
            return None
        self._state = replace(self._state, version=self._held.version)
        return self._held.snapshot()

    async def run(self) -> None:
        """Connect, follow, reconnect, for ever. Ends only by cancellation, or by an error in `apply` that is no MeshError."""
        backoff = FIRST_BACKOFF_S
        while True:
            try:
                await self._follow()
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, OSError) as error:
                reason = _reason(error)
            else:
                reason = "the controller ended the stream"
            if self._state.connected:
                backoff = FIRST_BACKOFF_S
            if self._state.connected or reason != self._state.last_error:
                _log.warning("controller not reachable, the last good snapshot stays in force", extra={"error": reason})
            self._state = replace(self._state, connected=False, last_error=reason)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects, hides nothing
            backoff = min(backoff * 2, MAX_BACKOFF_S)

    async def _follow(self) -> None:
        """One connection, from its first request to its end."""
        async with await self._channel() as channel:
            stub = discovery_pb2_grpc.DiscoveryStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
            call = cast("Any", stub).Stream()
            try:
                known = {name: resource.version for name, resource in self._held.resources.items()}
                await call.write(pb.DiscoveryRequest(node=self._config.node, known=known))
                first = True
                while isinstance(response := await call.read(), pb.DiscoveryResponse):
                    error = await self._take(response, first=first)
                    await call.write(pb.DiscoveryRequest(nonce=response.nonce, error=error))
                    first = False
            finally:
                call.cancel()

    async def _channel(self) -> grpc.aio.Channel:
        tls = self._config.tls
        if tls is None:
            return grpc.aio.insecure_channel(self._config.controller, options=_OPTIONS)

        def read() -> tuple[bytes, bytes, bytes]:
            return tls.ca.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes()

        ca, key, certificate = await asyncio.to_thread(read)  # at every attempt: the files may have been renewed
        return grpc.aio.secure_channel(self._config.controller, grpc.ssl_channel_credentials(ca, key, certificate), options=_OPTIONS)

    async def _take(self, response: pb.DiscoveryResponse, *, first: bool) -> str:
        """Bring `response` into force; return why it was refused, or nothing."""
        if not self._state.connected:
            _log.info("controller connected", extra={"version": response.version, "changed": len(response.resources)})
        try:
            held = self._held.after(response)
            if held.version != self._applied or response.resources or response.removed:
                await self._apply(held.snapshot())
        except (MeshError, ValueError) as error:
            reason = f"{error}"
            _log.error("snapshot refused, the last good one stays in force", extra={"version": response.version, "error": reason})
            self._state = replace(self._state, connected=True, nacks=self._state.nacks + 1, last_error=reason)
            return reason or type(error).__name__
        self._held, self._applied = held, held.version
        # The first response of a connection catches up with changes of any age: it says nothing about how fast changes travel.
        lag = self._state.lag_s if first else max(0.0, (time.time_ns() - response.changed_at_ns) / 1e9)
        self._state = replace(self._state, connected=True, version=held.version, lag_s=lag, last_error="")
        try:
            await asyncio.to_thread(_store, self._path, held)
        except OSError as error:
            _log.error(
                "last good snapshot not stored, a restart without the controller would use an older one", extra={"error": str(error)}
            )
        return ""


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower().replace('_', ' ')}: {error.details() or 'no details'}"
    return " ".join(str(error).split()) or type(error).__name__


def _digest(message: pb.DiscoveryResponse) -> str:
    copy = pb.DiscoveryResponse()
    copy.CopyFrom(message)
    copy.nonce = ""
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()


def _store(path: Path, held: _Held) -> None:
    """Write a DiscoveryResponse that holds everything, its nonce being a digest over the rest; old or new, never half."""
    message = pb.DiscoveryResponse(version=held.version, resources=held.resources.values())
    message.nonce = _digest(message)
    files.write(path, message.SerializeToString(), durable=True)


def _decode_file(content: bytes) -> _Held:
    """Raises ValueError for anything but what `_store` wrote."""
    message = pb.DiscoveryResponse()
    try:
        message.ParseFromString(content)
    except Exception as error:
        raise ValueError(f"not a stored snapshot: {error}") from error
    if message.nonce != _digest(message):
        raise ValueError("its digest does not match")
    return _Held("", {}, {}).after(message)
