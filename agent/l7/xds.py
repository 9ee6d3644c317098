"""The agent's xDS server: one Envoy, one unix socket, the delta protocol. Also receives Envoy's access log.

Owned by the supervisor: it calls `set` with what `agent.l7.snapshot` built and reads `state`. Must not know what a resource means,
except in which order the types may change.

Protocol: https://www.envoyproxy.io/docs/envoy/v1.37.0/api-docs/xds_protocol#incremental-xds. What this server adds to it:
- make before break: changes go out as clusters, endpoints, listeners, scopes, routes; what may name a cluster waits until Envoy has acknowledged some
  version of every one, and scopes and routes also until it had the endpoints. A cluster that Envoy has, and that changes, holds up nobody: it is in use until
  the new one is complete, and may change more often than Envoy answers. Removals follow in the opposite direction;
- a cluster that no route names any more stays for LINGER_S: a request keeps the route that it was given, and looks for the cluster only when the filters are
  done with it, which for HTTP/2 may be many turns later (`max_requests_per_io_cycle`), and once more for each retry. Without its cluster it would fail;
- so do scopes and routes when the last workload of the node leaves the mesh: its listener goes, and has connections until it is drained. The time of
  clusters begins when Envoy has let go of these;
- a cluster that changes gets its endpoints once more: Envoy 1.40 makes it anew and waits for them, but does not ask for what it has subscribed to already
  (15 s, https://www.envoyproxy.io/docs/envoy/v1.40.0/intro/arch_overview/upstream/cluster_manager#cluster-warming). So it does when they are under way
  already, and when nobody wants the cluster any more: until Envoy has them it takes no other cluster, and then goes on without any;
- a refused response of several resources is repeated in halves, so that one bad resource neither hides nor blocks the good ones, also among thousands;
- a resource that Envoy refused alone is not sent again until its content changes: the last good one stays in force;
- a change costs what it changes: what Envoy may lack is noted by name when it changes or is asked for, nothing looks through all resources;
- secrets go out as soon as somebody names them, whatever else is under way, because clusters and listeners wait for theirs. They are set apart from
  everything else, and are never taken back: Envoy keeps a secret as long as something names it (source/common/secret/sds_api.cc ignores removals).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import grpc
import grpc.aio
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from google.protobuf.any_pb2 import Any as AnyMessage

from agent.errors import EnvironmentUnfit
from agent.l7 import call_log, names, peer_log, tunnel_log
from agent.l7.access_log import RequestRecord, records
from agent.l7.resources import Resource, Resources
from agent.patience import until_one_ends

log = logging.getLogger(__name__)

ORDER = (names.CLUSTER, names.ENDPOINTS, names.LISTENER, names.SCOPE, names.ROUTES)
"""Make before break: what is referred to goes first."""
NAMING = frozenset({names.LISTENER, names.SCOPE, names.ROUTES})
"""What leads to clusters. A listener does not wait for scopes and routes: it is not active before it has them."""
ON_DEMAND = (names.SECRET, names.BUCKET)
"""Asked for by name, by what needs them; perhaps nothing does."""
REMOVAL_ORDER = (names.SCOPE, names.LISTENER, names.ROUTES, names.CLUSTER, names.ENDPOINTS)
WARM_PATIENCE_S = 2.0
"""How long routes wait for the endpoints of new clusters before they go out anyway."""
_T = TypeVar("_T")
LINGER_S = 5.0
"""How long a cluster outlives the routes that named it, and routes the last listener."""
STOP_GRACE_S = 0.2
HELD = frozenset({names.ROUTES, names.CLUSTER, names.ENDPOINTS})
"""Stays while Envoy goes on with an older version of what may name it."""
LOST = "(lost)"
"""In place of the version of what is under way but does not count."""
UNSURE, NEW = "(unsure)", "(new)"
"""What Envoy has of a resource that was refused together with others: this version or the one before; this version (which follows) or none."""


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
    sent: Mapping[str, int] = field(default_factory=dict)
    """Resources that went out since this server started, by the short name of their type."""
    pushes: int = 0
    """How often Envoy had everything after a change, or had refused it."""
    pushed_s: float = 0.0
    """Seconds from such changes to the last acknowledgement, all together."""
    last_push_s: float = 0.0


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
    portions: list[frozenset[str]] = field(default_factory=list)
    """What goes out apart from all else, because it was refused together with others."""
    dirty: set[str] = field(default_factory=set)
    """Names that Envoy may lack or have too many; of all others it has what it should."""
    greeted: bool = False

    def wants(self, name: str) -> bool:
        return self.wildcard or name in self.names

    def has_some(self, name: str) -> bool:
        """Has Envoy certainly some version of this, which it is not about to remove?"""
        return name not in self.removed and not self.known.get(name, NEW).startswith(NEW)

    def lose(self, name: str) -> bool:
        """Envoy is to get this again, also if it is on its way: what comes before its reason does not count. True if Envoy had it, or was about to."""
        under_way = name in self.sent
        if under_way:
            self.sent[name] = LOST
        return self.known.pop(name, None) is not None or under_way

    def take(self, sent: Mapping[str, str], removed: Iterable[str]) -> None:
        """Envoy has taken a response."""
        self.known.update((name, version) for name, version in sent.items() if self.wants(name) and version != LOST)
        for name in removed:
            self.known.pop(name, None)

    def split(self, sent: Mapping[str, str], removed: Iterable[str]) -> None:
        """Envoy has refused a response of several resources, and may have taken the good ones: say them again in halves."""
        every = sorted(sent)
        half = len(every) // 2
        self.portions[:0] = [frozenset(every[:half]), frozenset(every[half:])]
        for name, version in sent.items():
            if self.wants(name) and version != LOST:
                self.known[name] = NEW + version if self.known.get(name, NEW).startswith(NEW) else UNSURE
        self.missing.update(name for name in removed if self.wants(name))


class XdsServer:
    """Serves resources to Envoy until stopped; single-threaded: every method belongs to the event loop that started it."""

    def __init__(
        self,
        socket: Path,
        on_record: Callable[[RequestRecord], None] | None = None,
        on_audited: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        """`on_record` gets the requests of workloads that are traced, `on_audited` those that an AUDIT rule matched."""
        self._socket = socket
        self._on_record = on_record
        self.on_shown: Callable[[peer_log.Shown], None] | None = None
        """Called with what the far end of an open tunnel has shown, while somebody asks (`names.PEERS_KEY`)."""
        self.on_tunnel: Callable[[tunnel_log.TunnelRecord], None] | None = None
        """Called with what became of tunnels, while somebody traces."""
        self._on_audited = on_audited
        self.on_asked: Callable[[call_log.Asked], None] | None = None
        """Called with requests that are to be remembered (`agent.l7.call_log`)."""
        self.services: list[Callable[[grpc.aio.Server], None]] = []
        """Add what else Envoy asks the agent for to a server that has not started."""
        self._resources: Resources = MappingProxyType({})
        self._secrets: Mapping[str, Resource] = MappingProxyType({})
        self._refused: dict[tuple[str, str], str] = {}
        self._nacks = 0
        self._last_nack = ""
        self._stream: _Stream | None = None
        self._open: list[_Stream] = []
        """All that there are, in the order in which they came; the last one counts."""
        self._server: grpc.aio.Server | None = None
        self._watchers: set[asyncio.Event] = set()
        self._sent: Counter[str] = Counter()
        self._changed_at: float | None = None
        """Since when Envoy has not had everything; None: it has."""
        self._pushes, self._pushed_s, self._last_push_s = 0, 0.0, 0.0
        self.stopping = asyncio.Event()
        """Set when every stream should end by itself: gRPC cancels what is left, and says so with a traceback."""

    @property
    def state(self) -> XdsState:
        """The state right now."""
        return XdsState(
            self._stream is not None,
            self._nacks,
            len(self._refused),
            self._last_nack,
            dict(self._sent),
            self._pushes,
            self._pushed_s,
            self._last_push_s,
        )

    async def start(self) -> None:
        """Listen on the socket (0600; a stale one is replaced). Call `set` before: an Envoy that reconnects gets differences to it."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(_Discovery(self), server)
        als_pb2_grpc.add_AccessLogServiceServicer_to_server(_AccessLog(self), server)
        for add in self.services:
            add(server)
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
        """Make `resources` the wanted state; the differences go to Envoy at once. A type that is the same object as before is not looked at."""
        before, self._resources = self._resources, MappingProxyType({**resources, names.SECRET: self._secrets})
        differs = False
        for kind in before.keys() | self._resources.keys():
            old, new = before.get(kind, {}), self._resources.get(kind, {})
            if old is new:
                continue
            touched = {name for name, resource in new.items() if old.get(name) is not resource}
            touched.update(name for name in old if name not in new)
            if self._stream is not None and kind == names.ENDPOINTS:
                gone = (name for name in touched if name not in new and self._refused.get((kind, name)) != old[name].version)
                self._stream.keep({name: old[name] for name in gone})
            for name in touched:
                if self._refused.get((kind, name), "") != self._version(kind, name):
                    self._refused.pop((kind, name), None)
            differs = differs or bool(touched)
            if self._stream is not None and touched:
                self._stream.touch(kind, touched)
        if differs and self._changed_at is None:
            self._changed_at = time.monotonic()
        if self._stream is not None:
            self._stream.wake()

    def set_secrets(self, secrets: Mapping[str, Resource]) -> None:
        """Make `secrets` the certificates and keys by the names that listeners and clusters give them; who subscribed gets the differences at once."""
        self._secrets = secrets
        self.set(self._resources)

    async def wait_acked(self, timeout: float, *, lingering: bool = False) -> bool:
        """Wait until Envoy acknowledged or refused everything; False if that takes longer than `timeout` seconds.

        `lingering`: and until it has let go of clusters that stay for requests which are under way.
        """
        try:
            await asyncio.wait_for(self._settled(lingering), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    async def _settled(self, lingering: bool) -> None:
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while self._stream is None or next(self._lacking(lingering=lingering), None) is not None:
                changed.clear()
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    def of(self, kind: str) -> dict[str, Resource]:
        """Return the resources of a type that are not refused."""
        wanted = self._resources.get(kind, {})
        return {name: resource for name, resource in wanted.items() if self._refused.get((kind, name)) != resource.version}

    def offered(self, kind: str, name: str) -> Resource | None:
        """Return a resource if it is wanted and not refused."""
        resource = self._resources.get(kind, {}).get(name)
        return None if resource is None or self._refused.get((kind, name)) == resource.version else resource

    def all_names(self, kind: str) -> Iterable[str]:
        """Return the names of all resources of a type."""
        return self._resources.get(kind, {}).keys()

    def count(self, kind: str, number: int) -> None:
        """Note that resources of a type went out."""
        self._sent[kind.rpartition(".")[2]] += number

    def behind(self) -> bool:
        """Does Envoy run on an older version of something that names routes or clusters?"""
        types = self._stream.types if self._stream is not None else {}
        return any(kind in REMOVAL_ORDER[:3] and kind in types and name in types[kind].known for kind, name in self._refused)

    def exists(self, kind: str, name: str) -> bool:
        """Return True if this resource is wanted, refused or not."""
        return name in self._resources.get(kind, {})

    def leads_anything(self) -> bool:
        """Is there a listener for connections that workloads open?"""
        return any(name.startswith(names.OUTBOUND) for name in self.all_names(names.LISTENER))

    def has(self, kind: str, name: str) -> bool:
        """Has Envoy acknowledged this resource as it is now?"""
        state = self._stream.types.get(kind) if self._stream else None
        return state is not None and name in state.known and state.known[name] == self._version(kind, name)

    def refuse(self, kind: str, name: str, version: str, reason: str) -> None:
        """Note that Envoy refused this version of a resource."""
        if "PRIVATE KEY" in reason:  # Envoy quotes what it refuses
            reason = "not shown, because it quotes a private key"
        self._nacks += 1
        if self._version(kind, name) == version:
            self._refused[kind, name] = version
        self._last_nack = f"{kind.rpartition('.')[2]} {name}: {reason}"
        log.error("envoy refused a resource; the last good one stays in force", extra={"resource": name, "type": kind, "reason": reason})

    def record(self, message: als_pb2.StreamAccessLogsMessage, log_name: str) -> None:
        """Hand the requests of an access log message, or what it says of tunnels, to the callback."""
        audit = f"{names.AUDIT}/"
        if log_name == peer_log.LOG_NAME:
            _hand_on(peer_log.shown(message), self.on_shown)
        elif tunnel_log.is_one(log_name):
            _hand_on(tunnel_log.records(message, log_name), self.on_tunnel)
        elif log_name.startswith(f"{names.CALLS}/"):
            _hand_on(call_log.asked(message, log_name), self.on_asked)
        elif log_name.startswith(audit):
            _hand_on(records(message, log_name.removeprefix(audit)), self._on_audited)
        else:
            _hand_on(records(message, log_name), self._on_record)

    def connected(self, stream: _Stream) -> None:
        """Make `stream` the one that counts: the newest. It may be another Envoy's, or the reason why it refused something has gone: that is offered anew."""
        self._refused.clear()
        self._open.append(stream)
        self._stream = stream
        self.changed()

    def disconnected(self, stream: _Stream) -> None:
        """Forget `stream`. If it was the one that counts, it is the one before again, which has not heard of anything meanwhile."""
        self._open.remove(stream)
        if self._stream is stream:
            self._refused.clear()
            self._stream = self._open[-1] if self._open else None
            if self._stream is not None:
                self._stream.look_again()
        self.changed()

    def changed(self) -> None:
        """Wake those who wait for an acknowledgement. No lock: reading from Envoy must never wait for who only looks on."""
        for watcher in self._watchers:
            watcher.set()
        if self._changed_at is not None and self._stream is not None and next(self._lacking(), None) is None:
            self._last_push_s, self._changed_at = time.monotonic() - self._changed_at, None
            self._pushed_s += self._last_push_s
            self._pushes += 1

    def _version(self, kind: str, name: str) -> str:
        resource = self._resources.get(kind, {}).get(name)
        return resource.version if resource else ""

    def _pending(self) -> list[tuple[str, str]]:
        return list(self._lacking())

    def _lacking(self, *, lingering: bool = False) -> Iterator[tuple[str, str]]:
        """Everything that Envoy should still hear about; with `lingering` also what it hears about later.

        What depends on a refused resource is not waited for: Envoy does not subscribe to it.
        """
        outbound = any(name.startswith(names.OUTBOUND) and self.offered(names.LISTENER, name) for name in self.all_names(names.LISTENER))
        for kind in (*ORDER, names.RUNTIME, *ON_DEMAND):
            state = self._stream.types.get(kind) if self._stream else None
            if state is None and kind in ON_DEMAND:
                continue  # nobody has named one
            if state is None and kind in {names.CLUSTER, names.LISTENER}:
                yield kind, "(not asked for yet)"  # Envoy always does, and says what it has
            if state is not None and state.nonce:
                yield kind, "(unanswered)"
            known = state.known if state is not None else {}
            for name in state.dirty if state is not None else self.all_names(kind):
                resource = self.offered(kind, name)
                if resource is not None:
                    # Who has not named a resource that it will need does so in a moment; but nobody may need a secret.
                    wanted = kind not in ON_DEMAND or (state is not None and state.wants(name))
                    if wanted and known.get(name) != resource.version and self._reachable(kind, name, outbound=outbound):
                        yield kind, name
                elif state is not None and state.wants(name) and name in known and self._leaves(kind, name, lingering=lingering):
                    yield kind, name

    def _leaves(self, kind: str, name: str, *, lingering: bool) -> bool:
        """Is Envoy to let go of this as soon as it can? With `lingering`: or at all."""
        lingers = not lingering and self._stream is not None and self._stream.lingers(kind, name)
        held = not lingering and kind in HELD and self.behind()
        return kind in REMOVAL_ORDER and not lingers and not held and not self.exists(kind, name)

    def _reachable(self, kind: str, name: str, *, outbound: bool) -> bool:
        if kind == names.ENDPOINTS:
            return self.offered(names.CLUSTER, name) is not None
        if kind == names.SCOPE:
            return outbound
        if kind == names.ROUTES and name.startswith(f"{names.GATEWAY}/"):
            return self.offered(names.LISTENER, "/".join(name.split("/")[:4])) is not None
        if kind == names.ROUTES:
            return self.offered(names.LISTENER, name) is not None if name.startswith(names.RECEIVING) else outbound
        return True


class _Stream:
    """One ADS stream: what Envoy subscribed to, has, and was sent."""

    def __init__(self, server: XdsServer) -> None:
        self.types: dict[str, _Type] = {}
        self._server = server
        self._wakened = asyncio.Event()
        self._nonces = 0
        self._cold: dict[str, float | None] = {}
        """Clusters that Envoy may have taken, without having their endpoints: since when it was seen to lack them (seconds, the loop's time)."""
        self._served: set[str] = set()
        """Clusters that Envoy has had with their endpoints: it goes on with these while it has none for a version that is new."""
        self._unnamed: dict[str, dict[str, float]] = {names.CLUSTER: {}, names.SCOPE: {}, names.ROUTES: {}}
        """What is to go, by type and name, and when that is: seconds, the loop's time; infinity while Envoy has something that may name it."""
        self._leaving: dict[str, Resource] = {}
        """Endpoints of clusters that are to go: Envoy may still wait for them."""
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def wake(self) -> None:
        self._wakened.set()

    def keep(self, endpoints: Mapping[str, Resource]) -> None:
        """Nobody wants these any more, but as long as Envoy has their clusters it needs them."""
        state = self.types.get(names.CLUSTER)
        self._leaving.update((name, one) for name, one in endpoints.items() if state and (name in state.known or name in state.sent))

    def touch(self, kind: str, touched: Iterable[str]) -> None:
        """Look at these resources again: what is wanted, or what Envoy has, is not what it was."""
        if (state := self.types.get(kind)) is not None:
            state.dirty.update(touched)
        if kind in {names.CLUSTER, names.ENDPOINTS}:
            for name in touched:
                self._cold.setdefault(name, None)
        if (unnamed := self._unnamed.get(kind)) is not None:
            for name in [name for name in unnamed if self._server.exists(kind, name)]:
                del unnamed[name]
        if kind == names.ENDPOINTS:
            for name in [name for name in self._leaving if self._server.exists(kind, name)]:
                del self._leaving[name]

    def look_again(self) -> None:
        """Look at everything again."""
        for kind, state in self.types.items():
            self.touch(kind, [*self._server.all_names(kind), *state.known, *state.names])
        self.wake()

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
            for timer in self._timers.values():
                timer.cancel()

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
            wildcard = (
                not request.resource_names_subscribe and request.type_url not in ON_DEMAND
            ) or "*" in request.resource_names_subscribe
            has = dict(request.initial_resource_versions)
            if request.type_url == names.ENDPOINTS:  # it may have them, and wait for them: the cluster may have changed since
                has = {}
            state = self.types[request.type_url] = _Type(wildcard, has)
            self._subscribe(request.type_url, state, request.resource_names_subscribe)
            self.touch(request.type_url, [*self._server.all_names(request.type_url), *state.known, *state.names])
            return
        if request.response_nonce and request.response_nonce == state.nonce:
            self._answer(request, state)
        for name in request.resource_names_unsubscribe:
            if name == "*":
                state.wildcard = False
            state.names.discard(name)
            state.missing.discard(name)
            if request.type_url == names.ENDPOINTS:
                self._leaving.pop(name, None)
            if not state.wildcard:
                state.known.pop(name, None)
        for name in request.resource_names_subscribe:
            state.known.pop(name, None)  # subscribing again asks for the resource again
            state.wildcard = state.wildcard or name == "*"
        self._subscribe(request.type_url, state, request.resource_names_subscribe)
        self.touch(request.type_url, [*request.resource_names_subscribe, *request.resource_names_unsubscribe])

    def _subscribe(self, kind: str, state: _Type, wanted: list[str]) -> None:
        named = set(wanted) - {"*"}
        state.names |= named
        state.missing |= {name for name in named if self._offered(kind, name) is None}

    def _offered(self, kind: str, name: str) -> Resource | None:
        return self._leaving.get(name) if kind == names.ENDPOINTS and name in self._leaving else self._server.offered(kind, name)

    def _answer(self, request: discovery_pb2.DeltaDiscoveryRequest, state: _Type) -> None:
        sent, removed = state.sent, state.removed
        state.nonce, state.sent, state.removed = "", {}, ()
        self.touch(request.type_url, [*sent, *removed])
        if not request.HasField("error_detail"):
            state.take(sent, removed)
        elif len(sent) > 1:
            state.split(sent, removed)
        else:
            self._refused_alone(request.type_url, state, sent, request.error_detail.message)
            for name in removed:  # Envoy would not let go: asking again would not help
                state.known.pop(name, None)

    def _refused_alone(self, kind: str, state: _Type, sent: Mapping[str, str], reason: str) -> None:
        for name, version in sent.items():
            if version == LOST:
                continue
            if state.known.get(name) == NEW + version:
                del state.known[name]
            self._server.refuse(kind, name, version, reason)
            if kind == names.ENDPOINTS:
                self._leaving.pop(name, None)

    def _next(self) -> discovery_pb2.DeltaDiscoveryResponse | None:
        """Return the next response that may go out now, or None to wait for an answer or a change."""
        for kind in (names.RUNTIME, *ON_DEMAND):
            state = self.types.get(kind)
            if state is not None and not state.nonce and (response := self._update(kind, state)) is not None:
                return response
        warm, complete = self._warm(), self._complete()
        unanswered = {kind for kind in ORDER if (state := self.types.get(kind)) is not None and state.nonce}
        for kind in ORDER:
            state = self.types.get(kind)
            if state is None or kind in unanswered or (kind in NAMING and not complete):
                continue
            if kind in {names.SCOPE, names.ROUTES} and not warm:
                continue
            if (response := self._update(kind, state)) is not None:
                return response
        return None if unanswered or not warm else self._removals()

    def _complete(self) -> bool:
        """Return True if Envoy has acknowledged some version of every cluster."""
        state = self.types.get(names.CLUSTER)
        if state is None:
            return True
        return all(state.has_some(name) or not state.wants(name) or self._offered(names.CLUSTER, name) is None for name in state.dirty)

    def _removals(self) -> discovery_pb2.DeltaDiscoveryResponse | None:
        named = False
        for kind in REMOVAL_ORDER:
            state = self.types.get(kind)
            if state is None or (kind in HELD and self._server.behind()):
                continue
            gone = {name for name in state.dirty if name in state.known and state.wants(name) and not self._server.exists(kind, name)}
            named = named or (kind in NAMING and bool(gone))
            if kind == names.CLUSTER or (kind in self._unnamed and not self._server.leads_anything()):
                gone = self._lingered(kind, gone, named=kind == names.CLUSTER and named)
            elif kind == names.ENDPOINTS:
                gone -= self._unnamed[names.CLUSTER].keys()
            if gone:
                return self._respond(kind, state, {}, tuple(sorted(gone)))
        return None

    def _warm(self) -> bool:
        """Return True if Envoy has had the endpoints of every cluster it took, but for those that have lacked them for WARM_PATIENCE_S."""
        taken, has = (state.known if (state := self.types.get(kind)) else {} for kind in (names.CLUSTER, names.ENDPOINTS))
        now = asyncio.get_running_loop().time()
        cold = [name for name in self._cold if name in taken]
        self._served.update(name for name in cold if name in has)
        lacking = (name for name in cold if name not in self._served and self._offered(names.ENDPOINTS, name))
        refused = {
            name for name in self._cold if self._server.exists(names.CLUSTER, name) and self._server.offered(names.CLUSTER, name) is None
        }
        self._cold = {name: self._cold[name] or now for name in lacking if name not in refused}
        patient = [since for since in self._cold.values() if since is not None and now - since < WARM_PATIENCE_S]
        if patient:
            self._wake_in("warm", min(patient) + WARM_PATIENCE_S - now)
        return not patient

    def _wake_in(self, what_for: str, seconds: float) -> None:
        """Look again later; of what is asked for one purpose the last counts."""
        if (timer := self._timers.get(what_for)) is not None:
            timer.cancel()
        self._timers[what_for] = asyncio.get_running_loop().call_later(seconds, self.wake)

    def _update(self, kind: str, state: _Type) -> discovery_pb2.DeltaDiscoveryResponse | None:
        changed = self._changed(kind, state)
        first = state.wildcard and not state.greeted and not state.known  # Envoy waits for an answer, also for "there are none"
        while state.portions:
            portion = {name: resource for name, resource in changed.items() if name in state.portions[0]}
            del state.portions[0]
            if portion:
                changed = portion
                break
        missing = tuple(sorted(name for name in state.missing if self._offered(kind, name) is None and kind != names.SECRET))
        state.missing.clear()
        if not changed and not missing and not first:
            return None
        return self._respond(kind, state, changed, missing)

    def _lingered(self, kind: str, gone: set[str], *, named: bool) -> set[str]:
        """Which of those that nothing names any more may go now; the others get a time for it, when nothing may be `named` by what Envoy still has."""
        now = asyncio.get_running_loop().time()
        before, at_last = self._unnamed[kind], math.inf if named else now + LINGER_S
        unnamed = self._unnamed[kind] = {name: min(before.get(name, at_last), at_last) for name in gone}
        later = [at for at in unnamed.values() if now < at < math.inf]
        if later:
            self._wake_in(f"linger {kind}", min(later) - now)
        return {name for name, at in unnamed.items() if at <= now}

    def lingers(self, kind: str, name: str) -> bool:
        """Does this stay for requests that are under way? Endpoints do so with their cluster."""
        return name in self._unnamed.get(names.CLUSTER if kind == names.ENDPOINTS else kind, ())

    def _changed(self, kind: str, state: _Type) -> dict[str, Resource]:
        """What Envoy wants and lacks, by name; what is as it should be is not `dirty` any more."""
        found: dict[str, Resource] = {}
        settled = []
        for name in state.dirty:
            resource = self._offered(kind, name)
            if resource is None:
                if name not in state.known or self._server.exists(kind, name):
                    settled.append(name)
            elif state.known.get(name) == resource.version:
                if self._server.exists(kind, name):  # else it is to go, some time
                    settled.append(name)
            elif state.wants(name):
                found[name] = resource
        state.dirty.difference_update(settled)
        return dict(sorted(found.items()))

    def _respond(
        self, kind: str, state: _Type, changed: dict[str, Resource], removed: tuple[str, ...]
    ) -> discovery_pb2.DeltaDiscoveryResponse:
        self._nonces += 1
        state.nonce = str(self._nonces)
        state.greeted = True
        state.sent = {name: resource.version for name, resource in changed.items()}
        state.removed = removed
        if kind == names.ENDPOINTS:
            for name in removed:
                self._leaving.pop(name, None)
        if kind == names.CLUSTER:
            self._served.difference_update(removed)
        self._server.count(kind, len(changed))
        if kind == names.CLUSTER and (endpoints := self.types.get(names.ENDPOINTS)) is not None:
            again = [name for name in changed if endpoints.lose(name)]
            endpoints.missing.update(name for name in again if self._offered(names.ENDPOINTS, name) is None)
            self.touch(names.ENDPOINTS, again)
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
            await until_one_ends(stream.read(request_iterator), _write(stream, context), self._server.stopping.wait())
        finally:
            self._server.disconnected(stream)


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
        await until_one_ends(self._read(request_iterator), self._server.stopping.wait())
        return als_pb2.StreamAccessLogsResponse()

    async def _read(self, messages: AsyncIterator[als_pb2.StreamAccessLogsMessage]) -> None:
        log_name = ""
        async for message in messages:
            if message.HasField("identifier"):  # the first message of a stream only
                log_name = message.identifier.log_name
            self._server.record(message, log_name)


def _hand_on(found: Iterable[_T], receive: Callable[[_T], None] | None) -> None:
    if receive is not None:
        for one in found:
            receive(one)
