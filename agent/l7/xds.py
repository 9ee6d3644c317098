"""The agent's xDS server: one Envoy, one unix socket, the delta protocol. Also receives Envoy's access log.

Owned by the supervisor: it calls `set` with what `agent.l7.snapshot` built and reads `state`. Must not know what a resource means,
except in which order the types may change.

Protocol: https://www.envoyproxy.io/docs/envoy/v1.37.0/api-docs/xds_protocol#incremental-xds. What this server adds to it:
- make before break: changes go out as clusters, endpoints, listeners, scopes, routes, each after Envoy acknowledged the one before, and
  routes only when Envoy has the endpoints of every cluster; removals follow in the opposite direction;
- a refused response of several resources is repeated one by one, so that one bad resource neither hides nor blocks the good ones;
- a resource that Envoy refused alone is not sent again until its content changes: the last good one stays in force.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import grpc.aio
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from google.protobuf.any_pb2 import Any as AnyMessage

from agent.errors import EnvironmentUnfit
from agent.l7 import names
from agent.l7.access_log import RequestRecord, records
from agent.l7.resources import Resource, Resources

log = logging.getLogger(__name__)

ORDER = (names.CLUSTER, names.ENDPOINTS, names.LISTENER, names.SCOPE, names.ROUTES)
"""Make before break: what is referred to goes first."""
WAITS_FOR = {
    names.CLUSTER: frozenset[str](),
    names.ENDPOINTS: frozenset[str](),  # Envoy answers for clusters only when it has their endpoints (seen with 1.40)
    names.LISTENER: frozenset({names.CLUSTER, names.ENDPOINTS}),
    names.SCOPE: frozenset({names.CLUSTER, names.ENDPOINTS}),  # a listener is not active before it has its routes
    names.ROUTES: frozenset({names.CLUSTER, names.ENDPOINTS}),
}
"""What must be answered before a type goes out."""
REMOVAL_ORDER = (names.SCOPE, names.LISTENER, names.ROUTES, names.CLUSTER, names.ENDPOINTS)
WARM_PATIENCE_S = 2.0
"""How long routes wait for the endpoints of new clusters before they go out anyway."""
STOP_GRACE_S = 0.2


@dataclass(frozen=True, slots=True)
class XdsState:
    """What `status` and `/metrics` show."""

    connected: bool
    nacks: int
    """Resources that Envoy refused since this server started."""
    rejected: int
    """Resources whose present version is refused: Envoy runs on the version before."""
    last_nack: str
    """Resource and reason of the latest refusal, or ""."""


@dataclass(slots=True)
class _Type:
    """One resource type on one stream."""

    wildcard: bool
    known: dict[str, str]
    names: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    nonce: str = ""
    sent: dict[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    alone: set[str] = field(default_factory=set)
    greeted: bool = False

    def wants(self, name: str) -> bool:
        return self.wildcard or name in self.names


class XdsServer:
    """Serves resources to Envoy until stopped; single-threaded: every method belongs to the event loop that started it."""

    def __init__(self, socket: Path, on_record: Callable[[RequestRecord], None] | None = None) -> None:
        self._socket = socket
        self._on_record = on_record
        self._resources: Resources = MappingProxyType({})
        self._refused: dict[tuple[str, str], str] = {}
        self._nacks = 0
        self._last_nack = ""
        self._stream: _Stream | None = None
        self._server: grpc.aio.Server | None = None
        self._watchers: set[asyncio.Event] = set()
        self.stopping = asyncio.Event()
        """Set when every stream should end by itself: gRPC cancels what is left, and says so with a traceback."""

    @property
    def state(self) -> XdsState:
        """The state right now."""
        return XdsState(self._stream is not None, self._nacks, len(self._refused), self._last_nack)

    async def start(self) -> None:
        """Listen on the socket (0600; a stale one is replaced). Call `set` before: an Envoy that reconnects gets differences to it."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(_Discovery(self), server)
        als_pb2_grpc.add_AccessLogServiceServicer_to_server(_AccessLog(self), server)
        try:
            server.add_insecure_port(f"unix:{self._socket}")
        except RuntimeError as error:
            raise EnvironmentUnfit(f"cannot listen on {self._socket}: {error}; check that its directory exists and is writable") from error
        self._socket.chmod(0o600)
        await server.start()
        self._server = server
        self.stopping.clear()

    async def stop(self) -> None:
        """Close the streams; Envoy keeps its configuration and tries to reconnect."""
        if self._server is not None:
            self.stopping.set()
            await self._server.stop(STOP_GRACE_S)
            self._server = None

    async def run(self) -> None:
        """Start, serve until cancelled, stop."""
        await self.start()
        try:
            await asyncio.Event().wait()
        finally:
            await self.stop()

    def set(self, resources: Resources) -> None:
        """Make `resources` the wanted state; the differences go to Envoy at once."""
        self._resources = resources
        self._refused = {key: version for key, version in self._refused.items() if self._version(*key) == version}
        if self._stream is not None:
            self._stream.wake()

    async def wait_acked(self, timeout: float) -> bool:
        """Wait until Envoy acknowledged or refused everything; False if that takes longer than `timeout` seconds."""
        try:
            await asyncio.wait_for(self._settled(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    async def _settled(self) -> None:
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while self._stream is None or self._pending():
                changed.clear()
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    def of(self, kind: str) -> dict[str, Resource]:
        """Return the resources of a type that are not refused."""
        wanted = self._resources.get(kind, {})
        return {name: resource for name, resource in wanted.items() if self._refused.get((kind, name)) != resource.version}

    def _offered(self, kind: str, name: str) -> bool:
        """Return True if `of` has this resource."""
        return self.exists(kind, name) and self._refused.get((kind, name)) != self._version(kind, name)

    def exists(self, kind: str, name: str) -> bool:
        """Return True if this resource is wanted, refused or not."""
        return name in self._resources.get(kind, {})

    def refuse(self, kind: str, name: str, version: str, reason: str) -> None:
        """Note that Envoy refused this version of a resource."""
        self._nacks += 1
        self._refused[kind, name] = version
        self._last_nack = f"{kind.rpartition('.')[2]} {name}: {reason}"
        log.error("envoy refused a resource; the last good one stays in force", extra={"resource": name, "type": kind, "reason": reason})

    def record(self, message: als_pb2.StreamAccessLogsMessage, log_name: str) -> None:
        """Hand the requests of an access log message to the callback."""
        if self._on_record is not None:
            for record in records(message, log_name):
                self._on_record(record)

    def connected(self, stream: _Stream) -> None:
        """Make `stream` the one that counts: the newest."""
        self._stream = stream
        self.changed()

    def disconnected(self, stream: _Stream) -> None:
        """Forget `stream` unless a newer one has replaced it."""
        if self._stream is stream:
            self._stream = None
        self.changed()

    def changed(self) -> None:
        """Wake those who wait for an acknowledgement. No lock: reading from Envoy must never wait for who only looks on."""
        for watcher in self._watchers:
            watcher.set()

    def _version(self, kind: str, name: str) -> str:
        resource = self._resources.get(kind, {}).get(name)
        return resource.version if resource else ""

    def _pending(self) -> list[tuple[str, str]]:
        """Everything that Envoy should still hear about.

        What depends on a refused resource is not waited for: Envoy does not subscribe to it.
        """
        outbound = any(name.startswith(names.OUTBOUND) for name in self.of(names.LISTENER))
        found = []
        for kind in (*ORDER, names.RUNTIME):
            state = self._stream.types.get(kind) if self._stream else None
            known = state.known if state else {}
            for name, resource in self.of(kind).items():
                if known.get(name) != resource.version and self._reachable(kind, name, outbound=outbound):
                    found.append((kind, name))
            if state is not None and state.nonce:
                found.append((kind, "(unanswered)"))
            found += [(kind, name) for name in known if not self.exists(kind, name) and state is not None and state.wants(name)]
        return found

    def _reachable(self, kind: str, name: str, *, outbound: bool) -> bool:
        if kind == names.ENDPOINTS:
            return self._offered(names.CLUSTER, name)
        if kind == names.SCOPE:
            return outbound
        if kind == names.ROUTES:
            return self._offered(names.LISTENER, name) if name.startswith(names.INBOUND) else outbound
        return True


class _Stream:
    """One ADS stream: what Envoy subscribed to, has, and was sent."""

    def __init__(self, server: XdsServer) -> None:
        self.types: dict[str, _Type] = {}
        self._server = server
        self._wakened = asyncio.Event()
        self._nonces = 0
        self._unwarmed_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        self._wakened.set()

    async def read(self, requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest]) -> None:
        """Take requests until Envoy closes the stream."""
        async for request in requests:
            self._take(request)
            self.wake()
            self._server.changed()

    async def responses(self) -> AsyncIterator[discovery_pb2.DeltaDiscoveryResponse]:
        """Yield what can be sent, as soon as it can be sent, for ever."""
        try:
            while True:
                await self._wakened.wait()
                self._wakened.clear()
                while (response := self._next()) is not None:
                    yield response
                self._server.changed()
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _take(self, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        log.debug(
            "envoy asks",
            extra={
                "type": request.type_url.rpartition(".")[2],
                "subscribe": list(request.resource_names_subscribe),
                "unsubscribe": list(request.resource_names_unsubscribe),
                "nonce": request.response_nonce,
                "error": request.error_detail.message,
            },
        )
        state = self.types.get(request.type_url)
        if state is None:
            # The first request of a type on this stream: it says what Envoy kept from before. No names at all = the wildcard.
            wildcard = not request.resource_names_subscribe or "*" in request.resource_names_subscribe
            state = self.types[request.type_url] = _Type(wildcard, dict(request.initial_resource_versions))
            self._subscribe(request.type_url, state, request.resource_names_subscribe)
            return
        if request.response_nonce and request.response_nonce == state.nonce:
            self._answer(request, state)
        for name in request.resource_names_unsubscribe:
            if name == "*":
                state.wildcard = False
            state.names.discard(name)
            state.missing.discard(name)
            if not state.wildcard:
                state.known.pop(name, None)
        for name in request.resource_names_subscribe:
            state.known.pop(name, None)  # subscribing again asks for the resource again
            state.wildcard = state.wildcard or name == "*"
        self._subscribe(request.type_url, state, request.resource_names_subscribe)

    def _subscribe(self, kind: str, state: _Type, wanted: list[str]) -> None:
        state.names |= set(wanted) - {"*"}
        state.missing |= {name for name in state.names if name in wanted and not self._server.exists(kind, name)}

    def _answer(self, request: discovery_pb2.DeltaDiscoveryRequest, state: _Type) -> None:
        sent, removed = state.sent, state.removed
        state.nonce, state.sent, state.removed = "", {}, ()
        if not request.HasField("error_detail"):
            for name, version in sent.items():
                if state.wants(name):
                    state.known[name] = version
            for name in removed:
                state.known.pop(name, None)
        elif len(sent) > 1:
            state.alone |= sent.keys()
        else:
            for name, version in sent.items():
                self._server.refuse(request.type_url, name, version, request.error_detail.message)
            for name in removed:  # Envoy would not let go: asking again would not help
                state.known.pop(name, None)

    def _next(self) -> discovery_pb2.DeltaDiscoveryResponse | None:
        """Return the next response that may go out now, or None to wait for an answer or a change."""
        runtime = self.types.get(names.RUNTIME)
        if runtime is not None and not runtime.nonce and (response := self._update(names.RUNTIME, runtime)) is not None:
            return response
        unanswered = {kind for kind in ORDER if (state := self.types.get(kind)) is not None and state.nonce}
        for kind in ORDER:
            state = self.types.get(kind)
            if state is None or kind in unanswered or unanswered & WAITS_FOR[kind]:
                continue
            if kind in {names.SCOPE, names.ROUTES} and not self._warm():
                continue
            if (response := self._update(kind, state)) is not None:
                return response
        if unanswered:
            return None
        for kind in REMOVAL_ORDER:
            state = self.types.get(kind)
            if state is not None and (response := self._removal(kind, state)) is not None:
                return response
        return None

    def _warm(self) -> bool:
        """Return True if Envoy has the endpoints of every cluster it took, or after WARM_PATIENCE_S without them."""
        taken, has = self.types.get(names.CLUSTER), self.types.get(names.ENDPOINTS)
        wanted = self._server.of(names.ENDPOINTS).keys() & (taken.known.keys() if taken else set())
        if wanted <= (has.known.keys() if has else set()):
            self._unwarmed_since = 0.0
            return True
        loop = asyncio.get_running_loop()
        if not self._unwarmed_since:
            self._unwarmed_since = loop.time()
            self._timer = loop.call_later(WARM_PATIENCE_S, self.wake)
        return loop.time() - self._unwarmed_since >= WARM_PATIENCE_S

    def _update(self, kind: str, state: _Type) -> discovery_pb2.DeltaDiscoveryResponse | None:
        wanted = self._server.of(kind)
        changed = {name: r for name, r in wanted.items() if state.wants(name) and state.known.get(name) != r.version}
        first = state.wildcard and not state.greeted and not state.known  # Envoy waits for an answer, also for "there are none"
        if single := changed.keys() & state.alone:
            name = min(single)
            changed = {name: changed[name]}
            state.alone.discard(name)
        missing = tuple(sorted(name for name in state.missing if not self._server.exists(kind, name)))
        state.missing.clear()
        if not changed and not missing and not first:
            return None
        return self._respond(kind, state, changed, missing)

    def _removal(self, kind: str, state: _Type) -> discovery_pb2.DeltaDiscoveryResponse | None:
        gone = tuple(sorted(name for name in state.known if state.wants(name) and not self._server.exists(kind, name)))
        return self._respond(kind, state, {}, gone) if gone else None

    def _respond(
        self, kind: str, state: _Type, changed: dict[str, Resource], removed: tuple[str, ...]
    ) -> discovery_pb2.DeltaDiscoveryResponse:
        self._nonces += 1
        state.nonce = str(self._nonces)
        state.greeted = True
        state.sent = {name: resource.version for name, resource in changed.items()}
        state.removed = removed
        log.debug(
            "to envoy", extra={"type": kind.rpartition(".")[2], "nonce": state.nonce, "resources": list(changed), "removed": list(removed)}
        )
        return discovery_pb2.DeltaDiscoveryResponse(
            type_url=kind,
            nonce=state.nonce,
            removed_resources=removed,
            resources=[
                discovery_pb2.Resource(name=name, version=resource.version, resource=AnyMessage(type_url=kind, value=resource.body))
                for name, resource in changed.items()
            ],
        )


class _Discovery(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):  # type: ignore[misc]  # xds-protos has no types
    """The gRPC face of the server."""

    def __init__(self, server: XdsServer) -> None:
        self._server = server

    async def DeltaAggregatedResources(  # noqa: N802  # the name is the protocol's
        self,
        request_iterator: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest],
        context: grpc.aio.ServicerContext[discovery_pb2.DeltaDiscoveryRequest, discovery_pb2.DeltaDiscoveryResponse],
    ) -> None:
        stream = _Stream(self._server)
        self._server.connected(stream)
        try:
            await _first(stream.read(request_iterator), _write(stream, context), self._server.stopping.wait())
        finally:
            self._server.disconnected(stream)


async def _first(*work: Coroutine[Any, Any, object]) -> None:
    """Run all until one ends, then cancel the others; what the first one raised is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        if not task.cancelled():
            task.result()


async def _write(
    stream: _Stream, context: grpc.aio.ServicerContext[discovery_pb2.DeltaDiscoveryRequest, discovery_pb2.DeltaDiscoveryResponse]
) -> None:
    async for response in stream.responses():
        await context.write(response)


class _AccessLog(als_pb2_grpc.AccessLogServiceServicer):  # type: ignore[misc]  # xds-protos has no types
    """Receives what Envoy logs about traced workloads."""

    def __init__(self, server: XdsServer) -> None:
        self._server = server

    async def StreamAccessLogs(  # noqa: N802  # the name is the protocol's
        self,
        request_iterator: AsyncIterator[als_pb2.StreamAccessLogsMessage],
        context: grpc.aio.ServicerContext[als_pb2.StreamAccessLogsMessage, als_pb2.StreamAccessLogsResponse],  # noqa: ARG002
    ) -> als_pb2.StreamAccessLogsResponse:
        await _first(self._read(request_iterator), self._server.stopping.wait())
        return als_pb2.StreamAccessLogsResponse()

    async def _read(self, messages: AsyncIterator[als_pb2.StreamAccessLogsMessage]) -> None:
        log_name = ""
        async for message in messages:
            if message.HasField("identifier"):  # the first message of a stream only
                log_name = message.identifier.log_name
            self._server.record(message, log_name)
