"""The agent's end of the discovery stream, and the last good snapshot on disk. Run as a task by the supervisor.

It owns the connection to the controller and `STATE_DIR/snapshot.journal`; what a snapshot means is the business of the `apply` that it is
given. Nothing that arrives replaces what is in force before all of it is decoded and `apply` took it; nothing else reaches the disk, which
nobody waits for. What a change costs before `apply` depends on the change, not on the size of the model; nothing is held in encoded form.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import grpc

from agent import memory
from agent.compact import Table
from agent.dialling import dial
from agent.errors import EnvironmentUnfit, MeshError
from agent.journal import DROP, PUT, Journal
from agent.model import Authentication, Delta, Gateway, Node, Policy, Route, Service, Snapshot, Workload, decode
from agent.observability import Telemetry
from agent.patience import Backoff, until_one_ends
from agent.traffic import TrafficPolicy
from meshapi import discovery_pb2 as pb

if TYPE_CHECKING:
    from agent.config import Config

_log = logging.getLogger(__name__)

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 3.0
"""Policies that changed meanwhile should not wait longer for a controller that is back; 1,000 nodes then ask it 440 times a second."""
STORE_RETRY_S: Final = 10.0
REPORT_S: Final = 10.0
BULK: Final = 1000
"""So many resources in one response are decoded in a thread of their own: they would hold up everything else."""
UNSETTLED: Final = 10_000
_REPORT: Final = f"/{pb.DESCRIPTOR.services_by_name['Discovery'].full_name}/ReportTunnels"
_STREAM: Final = f"/{pb.DESCRIPTOR.services_by_name['Discovery'].full_name}/Stream"
_KINDS: Final = {
    "workload": Workload,
    "service": Service,
    "route": Route,
    "policy": Policy,
    "traffic": TrafficPolicy,
    "authentication": Authentication,
    "node": Node,
    "gateway": Gateway,
    "telemetry": Telemetry,
}


@dataclass(frozen=True, slots=True)
class DiscoveryState:
    """How the connection to the controller is doing. `lag_s`: seconds from the change at the controller to its application here."""

    connected: bool = False
    version: str = ""
    lag_s: float | None = None
    nacks: int = 0
    last_error: str = ""


class _Changes:
    """What is about to happen to the model, decoded. By kind and name; None: it goes."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._entities: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
        self._versions: dict[str, dict[str, str | bytes | None]] = {kind: {} for kind in _KINDS}

    def remove(self, name: str) -> None:
        """Take a resource away, if there is one."""
        kind, _, name = name.partition("/")
        if kind in _KINDS:
            self._entities[kind][name] = None
            self._versions[kind][name] = None

    def put(self, resource: pb.Resource) -> None:
        """Add or replace a resource. Raises ValueError if it is none."""
        try:
            entity = decode(resource.entity, self._node)
        except ValueError as error:
            raise ValueError(f"{resource.name}: {error}") from error
        kind, _, name = resource.name.partition("/")
        if not isinstance(entity, _KINDS.get(kind, ())) or entity.name != name:
            raise ValueError(f"{resource.name}: holds {type(entity).__name__} {entity.name}")
        # One string for the key and the name, here and in the tables: 100,000 names are 10 MB.
        self._entities[kind].pop(entity.name, None)
        self._entities[kind][entity.name] = entity
        self._versions[kind].pop(entity.name, None)
        self._versions[kind][entity.name] = _packed(resource.version)

    def made_to(self, before: _Model, version: str) -> _Model:
        """Return the model after the changes; `before` stays as it is, and what did not change is shared."""
        tables = {k: table.changed(self._entities[k]) for k, table in before.tables.items()}
        versions = {k: table.changed(self._versions[k]) for k, table in before.versions.items()}
        delta = None
        if before.snapshot.version:
            names = {kind: frozenset(changes) for kind, changes in self._entities.items()}
            delta = Delta(
                before.snapshot.version,
                names["workload"],
                names["service"],
                names["route"],
                names["policy"],
                names["traffic"],
                names["authentication"],
                names["node"],
                names["gateway"],
                names["telemetry"],
            )
        snapshot = Snapshot(
            version=version,
            workloads=tables["workload"],
            services=tables["service"],
            routes=tables["route"],
            policies=tables["policy"],
            delta=delta,
            traffic=tables["traffic"],
            authentications=tables["authentication"],
            nodes=tables["node"],
            gateways=tables["gateway"],
            telemetry=tables["telemetry"],
        )
        return _Model(snapshot, tables, versions)


@dataclass(frozen=True, slots=True)
class _Model:
    """One version of everything, immutable: the snapshot, its tables by kind, and the version of each resource."""

    snapshot: Snapshot = field(default_factory=Snapshot)
    tables: Mapping[str, Table[Any]] = field(default_factory=lambda: {kind: Table() for kind in _KINDS})
    versions: Mapping[str, Table[str | bytes]] = field(default_factory=lambda: {kind: Table() for kind in _KINDS})

    def request(self, node: str, wireguard: pb.WireGuard | None = None) -> bytes:
        """Encode the first request of a stream, which says what is held, and how others reach this node over WireGuard.

        In portions, because 100,000 names in one message take 40 MB: messages that are encoded one after the other are one message
        (https://protobuf.dev/programming-guides/encoding/#last-one-wins).
        """
        parts = [pb.DiscoveryRequest(node=node, wireguard=wireguard).SerializeToString()]
        for kind, table in self.versions.items():
            rows = iter(table.items())
            while portion := list(itertools.islice(rows, BULK)):
                known = {f"{kind}/{name}": version if isinstance(version, str) else version.hex() for name, version in portion}
                parts.append(pb.DiscoveryRequest(known=known).SerializeToString())
        return b"".join(parts)


def _after(before: _Model, response: pb.DiscoveryResponse, node: str) -> _Model:
    """Return the model of an agent of `node` after `response`. Raises ValueError if anything in it cannot be decoded."""
    changes = _Changes(node)
    for name in response.removed:
        changes.remove(name)
    for resource in response.resources:
        changes.put(resource)
    return changes.made_to(before, response.version)


def _after_bulk(before: _Model, response: pb.DiscoveryResponse, node: str) -> _Model:
    with memory.long_lived():
        return _after(before, response, node)


class Discovery:
    """Keeps this node's copy of the model current."""

    def __init__(
        self,
        config: Config,
        apply: Callable[[Snapshot], Awaitable[None]],
        wireguard: Callable[[], pb.WireGuard | None] = lambda: None,
        beside: Collection[Callable[[grpc.aio.Channel], Coroutine[Any, Any, None]]] = (),
    ) -> None:
        """`wireguard` says at the begin of each stream how others reach this node; None: not over WireGuard. `beside` run while there is a connection."""
        if config.tls is None and not config.controller.startswith("unix:"):
            raise EnvironmentUnfit(
                f"controller {config.controller} is reached over TCP, which needs credentials: give the CA, certificate and key, or a unix: target"
            )
        self._config = config
        self._apply = apply
        self._wireguard = wireguard
        self._beside = beside
        self._anew = asyncio.Event()
        self._held = _Model()
        self._applied: str | None = None
        self._state = DiscoveryState()
        self._journal = Journal(config.state_dir / "snapshot.journal")
        self._to_store = asyncio.Event()
        self._channel_now: grpc.aio.Channel | None = None
        self._unsettled = 0
        """Resources that were handled since the memory was last put in order."""

    @property
    def state(self) -> DiscoveryState:
        """How the connection is doing now."""
        return self._state

    def load_last_good(self) -> Snapshot | None:
        """Return the snapshot that was last applied on this node, or None if there is none that can be trusted.

        The caller applies it; the stream then starts from it and transfers only differences. A damaged file is logged and ignored.
        """
        extra = {"path": str(self._journal.path)}
        try:
            with memory.long_lived():
                self._replay()
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            found = self._held.snapshot.version
            outcome = f"its newest part is not used, version {found} is" if found else "starting without it"
            _log.error("last good snapshot damaged or unreadable, %s", outcome, extra={**extra, "error": str(error)})
        if not self._held.snapshot.version:
            return None
        self._unsettled = len(self._held.snapshot.workloads)
        self._state = replace(self._state, version=self._held.snapshot.version)
        return replace(self._held.snapshot, delta=None)

    def _replay(self) -> None:
        """Bring `_held` to the newest state that the journal vouches for. Raises ValueError or OSError, with `_held` at the one before."""
        changes = _Changes(self._config.node)
        for kind, content in self._journal.read():
            if kind == PUT:
                changes.put(_resource(content))
            elif kind == DROP:
                changes.remove(content.decode())
            else:
                self._held, changes = changes.made_to(self._held, content.decode()), _Changes(self._config.node)

    async def run(self) -> None:
        """Connect, follow, reconnect, for ever. Ends only by cancellation, or by an error in `apply` that is no MeshError."""
        try:
            await until_one_ends(self._stay_connected(), self._keep_stored())
        finally:
            await asyncio.to_thread(self._store)  # what was applied last must not be lost by an orderly end

    def reconnect(self) -> None:
        """Begin a new stream, whose first message says anew how this node is reached. What is in force stays."""
        self._anew.set()

    async def _stay_connected(self) -> None:
        backoff = Backoff(FIRST_BACKOFF_S, MAX_BACKOFF_S)
        while True:
            try:
                self._anew.clear()
                await self._follow()
                if self._anew.is_set():
                    continue
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, OSError) as error:
                reason = _reason(error)
            else:
                reason = "the controller ended the stream"
            if self._state.connected:
                backoff.reset()
            if self._state.connected or reason != self._state.last_error:
                _log.warning("controller not reachable, the last good snapshot stays in force", extra={"error": reason})
            self._state = replace(self._state, connected=False, last_error=reason)
            await asyncio.sleep(backoff.pause())

    async def _keep_stored(self) -> None:
        """Write what was applied, in a thread, as fast as the disk allows and together what came meanwhile; then put the memory in order."""
        while True:
            if self._unsettled >= UNSETTLED:
                self._unsettled = 0
                await asyncio.to_thread(memory.settle)
            await self._to_store.wait()
            self._to_store.clear()
            if not await asyncio.to_thread(self._store):
                await asyncio.sleep(STORE_RETRY_S)
                self._to_store.set()

    def _store(self) -> bool:
        """Bring to the disk what was applied; False if it did not work and is to be tried again."""
        extra = {"path": str(self._journal.path)}
        try:
            self._journal.write()
        except OSError as error:
            message = "last good snapshot not stored, a restart without the controller would use an older one; trying again"
            _log.error(message, extra={**extra, "error": str(error)})
            return False
        try:
            self._journal.shrink()
        except OSError as error:
            _log.error("file of the last good snapshot cannot be rewritten and goes on growing", extra={**extra, "error": str(error)})
        return True

    async def _follow(self) -> None:
        """One connection, from its first request to its end."""
        async with await dial(self._config) as channel:
            stream: Any = channel.stream_stream(_STREAM, response_deserializer=pb.DiscoveryResponse.FromString)
            call = stream()
            beside = [asyncio.create_task(work(channel)) for work in self._beside]
            try:
                await call.write(await asyncio.to_thread(lambda: self._held.request(self._config.node, self._wireguard())))
                first, self._channel_now = True, channel
                while isinstance(response := await self._next(call), pb.DiscoveryResponse):
                    answer = pb.DiscoveryRequest(nonce=response.nonce, error=await self._take(response, first=first))
                    del response  # the whole model, if it was the first: it must not stay until the next change
                    await call.write(answer.SerializeToString())
                    first = False
            finally:
                self._channel_now = None
                call.cancel()
                for task in beside:
                    task.cancel()
                await asyncio.gather(*beside, return_exceptions=True)

    async def report_tunnels(self, workloads: Collection[str]) -> str:
        """Tell the controller that callers are served at the ends of tunnels of these workloads of this node; return why it does not know now, or nothing."""
        channel = self._channel_now
        if channel is None:
            return f"controller {self._config.controller} is away"
        report: Any = channel.unary_unary(_REPORT, pb.TunnelReport.SerializeToString, pb.TunnelReportAnswer.FromString)
        try:
            call = report(pb.TunnelReport(node=self._config.node, workloads=sorted(workloads)), timeout=REPORT_S)
            code = await call.code()  # and not the call itself, which looks cancelled from outside when its channel is closed
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            return _reason(error)
        return "" if code is grpc.StatusCode.OK else f"{code.name.lower().replace('_', ' ')}: {await call.details() or 'no details'}"

    async def _next(self, call: Any) -> object:
        """The next response; something else if the stream has ended, or is to be begun anew."""
        read, anew = asyncio.ensure_future(call.read()), asyncio.ensure_future(self._anew.wait())
        try:
            await asyncio.wait({read, anew}, return_when=asyncio.FIRST_COMPLETED)
            return None if self._anew.is_set() else await read
        finally:
            for task in (read, anew):
                task.cancel()
            await asyncio.gather(read, anew, return_exceptions=True)

    async def _take(self, response: pb.DiscoveryResponse, *, first: bool) -> str:
        """Bring `response` into force; return why it was refused, or nothing."""
        if not self._state.connected:
            _log.info("controller connected", extra={"version": response.version, "changed": len(response.resources)})
        try:
            bulk = len(response.resources) >= BULK
            node = self._config.node
            held = await asyncio.to_thread(_after_bulk, self._held, response, node) if bulk else _after(self._held, response, node)
            changed = bool(response.resources or response.removed or response.version != self._held.snapshot.version)
            if changed or response.version != self._applied:
                await self._apply(held.snapshot)
        except (MeshError, ValueError) as error:
            reason = f"{error}"
            _log.error("snapshot refused, the last good one stays in force", extra={"version": response.version, "error": reason})
            self._state = replace(self._state, connected=True, nacks=self._state.nacks + 1, last_error=reason)
            return reason or type(error).__name__
        self._held, self._applied = held, response.version
        # The first response of a connection catches up with changes of any age: it says nothing about how fast changes travel.
        lag = self._state.lag_s if first else max(0.0, (time.time_ns() - response.changed_at_ns) / 1e9)
        self._state = replace(self._state, connected=True, version=response.version, lag_s=lag, last_error="")
        if changed:
            self._journal.add(response)
        self._unsettled += sum(map(len, held.versions.values())) if first else len(response.resources)
        self._to_store.set()
        return ""


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower().replace('_', ' ')}: {error.details() or 'no details'}"
    return " ".join(str(error).split()) or type(error).__name__


def _resource(content: bytes) -> pb.Resource:
    try:
        return pb.Resource.FromString(content)
    except Exception as error:
        raise ValueError(f"not an encoded Resource: {error}") from error


def _packed(version: str) -> str | bytes:
    """16 hexadecimal digits, which is what the controller sends, as 8 bytes: 3 MB less with 100,000 of them."""
    with contextlib.suppress(ValueError):
        packed = bytes.fromhex(version)
        if packed.hex() == version:
            return packed
    return version
