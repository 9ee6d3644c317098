"""The controller as one running thing: lock, sockets, services, tasks. Started by `controller.main`; tests start it in their own process.

The unix socket is trusted and has mode 0600; TCP always means mutual TLS, except where nodes join (`controller.identity.plane`).
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from controller.admin import AdminService
from controller.discovery import DiscoveryService
from controller.errors import ControllerError
from controller.gatewayservice import GatewayService
from controller.health import HealthServer
from controller.identity.directory import Directory
from controller.identity.plane import Files, IdentityPlane, IdentitySettings
from controller.jwks import REFRESH_S, Keys
from controller.mesh import Mesh
from controller.objects import ROOT_NAMESPACE
from controller.page.page import Page
from controller.page.settings import PageSettings
from controller.proposals import Proposals
from controller.quota.part import QuotaPart
from controller.readiness import FileMemory, Memory, Readiness, ReportService, SharedMemory
from controller.relay import Relay
from controller.source import Source
from controller.wireguard import NodeKeys
from meshapi import admin_pb2_grpc, discovery_pb2, gateway_pb2_grpc, identity_pb2_grpc, proposal_pb2_grpc, relay_pb2_grpc
from meshapi.notify import BEAT_S, Notifier

if TYPE_CHECKING:
    from controller.kubernetes.part import KubernetesPart
    from controller.kubernetes.store import ClusterStore

_log = logging.getLogger(__name__)

STOP_GRACE_S: Final = 1.0  # for calls in flight at SIGTERM; discovery streams never end by themselves
MAX_SOCKET_PATH: Final = 107  # struct sockaddr_un, include/uapi/linux/un.h, without the final zero
KEYS: Final = "jwks.json"
"""Beside the socket: keys of token issuers, over a restart."""
_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # a taken port must be an error, not a shared port
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", -1),
    # An agent whose machine vanished is noticed within 20 s; agents ping every 10 s themselves.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files of the TCP listener: what the controller shows, and who signs its clients. None: what the certificate authority gives."""

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """How an API server is found; by default as pods find it."""

    kubeconfig: Path | None = None
    context: str = ""
    namespace: str = ROOT_NAMESPACE
    """The controller's own: the Lease by which one of several writes status is there, and what their authorities remember together."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that `mesh-controller run` can be told."""

    directory: Path | None
    """Directory of YAML files: the source. None: it is the API server that `kubernetes` describes."""
    socket: Path
    """Unix socket for local agents and the command line."""
    listen: str = ""
    """HOST:PORT for agents on other nodes; empty = unix socket only."""
    tls: ServerTls | None = None
    """Required with `listen`."""
    trust_domain: str = "mesh.local"
    """SPIFFE trust domain: what client certificates must belong to."""
    metrics_address: str = "127.0.0.1"
    """Address of /metrics, /healthz and /readyz."""
    metrics_port: int = 0
    """Their port; 0 = they are not served."""
    identity: IdentitySettings | None = None
    """The certificate authority; None = certificates come from elsewhere, as files."""
    jwks_ca: Path | None = None
    """Who else may vouch for servers of token issuers, PEM."""
    jwks_refresh_s: float = REFRESH_S
    """How often the keys of token issuers are fetched, seconds."""
    wireguard: bool = False
    """Encrypt between nodes with WireGuard where both have it; needs `identity`, for what HBONE goes on to do."""
    egress: str = "allow"
    """"allow" or "deny": may workloads go where nobody declared anything, if their Namespace does not say?"""
    quota_redis: str = field(default="", repr=False)
    """URL of the Redis that holds the counts of global limits for several controllers; empty = memory. It may hold a password."""
    kubernetes: Kubernetes | None = None
    """The API server that is the source, in place of `directory`."""
    page: PageSettings | None = None
    """Where the page with the graph is served, and to whom; None = nowhere."""


class Controller:
    """One controller. `start` returns when it serves, `run` keeps it going, `stop` ends it."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self._clock = clock
        authority = settings.identity.ca.directory if settings.identity is not None else None
        self._kubernetes: KubernetesPart | None = None
        if settings.directory is None:
            self._kubernetes = _kubernetes(settings.kubernetes or Kubernetes())
        self._shared: ClusterStore | None = None
        """What the authorities of several controllers remember together: only where somebody else's certificate signs, which all of them can have."""
        if self._kubernetes is not None and settings.identity is not None and settings.identity.ca.foreign:
            self._shared = self._kubernetes.store()
        store = self._shared or (Directory(authority) if authority is not None else None)
        self._keys: NodeKeys | None = None
        if settings.wireguard and store is not None:
            groups = self._shared.groups if self._shared is not None else None
            self._keys = NodeKeys(store, self._barred, self._known_barred, groups)
        self.mesh = Mesh(
            self._kubernetes.source if self._kubernetes is not None else Source(settings.directory or Path()),
            authority=authority is not None,
            readiness=Readiness(self._memory(authority)),
            keys=Keys(settings.socket.with_name(KEYS), settings.jwks_ca, settings.jwks_refresh_s),
            node_keys=self._keys,
            egress=settings.egress,
        )
        if self._kubernetes is not None:
            self.mesh.looked = self._kubernetes.looked
        reports = ReportService(self.mesh.readiness, self.mesh.places, settings.trust_domain)
        self.discovery = DiscoveryService(self.mesh.publication, settings.trust_domain, reports, self._keys)
        self.quotas = QuotaPart(self.mesh, authority or settings.socket.parent, settings.quota_redis, settings.trust_domain, self._clock)
        self.relay = Relay(settings.trust_domain, self.mesh.node_of)
        self.port = 0
        """TCP port that is listened on; 0 without `listen`."""
        self.identity: IdentityPlane | None = None
        self.page = Page(settings.page, self.relay, lambda: self.mesh.compiled.entities) if settings.page is not None else None
        self._server: grpc.aio.Server | None = None
        self._lock: IO[str] | None = None
        self._health: HealthServer | None = None
        self._notifier = Notifier()

    async def start(self) -> None:
        """Take the lock, read the source, bind. Raises ControllerError for everything that an operator can put right."""
        settings = self.settings
        if settings.directory is not None and not settings.directory.is_dir():
            raise ControllerError(f"{settings.directory} is not a directory: make it, or give another --directory")
        self._lock = _lock(settings.socket)
        files = _files(settings.tls or ServerTls())
        credentials = _credentials(files) if settings.tls and settings.identity is None else None
        if settings.listen and credentials is None and settings.identity is None:
            raise ControllerError(
                "--listen needs --tls-cert, --tls-key and --tls-client-ca, or --ca-directory: TCP is served with mutual TLS only"
            )
        if settings.wireguard and settings.identity is None:
            raise ControllerError(
                "--encryption wireguard needs --ca-directory: between nodes that have no WireGuard it is HBONE that encrypts, with certificates"
            )
        if settings.metrics_port:
            self._start_metrics()
        if self._shared is not None:
            await self._read_shared(self._shared)
        await asyncio.to_thread(self.mesh.readiness.load)
        if settings.identity is not None:
            self.identity = IdentityPlane(
                settings.identity, settings.trust_domain, self._workload, files, settings.listen, self._clock, self._shared
            )
            credentials = await self.identity.start()
        if self._keys is not None:
            await asyncio.to_thread(self._keys.start)
        await self.mesh.start()
        self.quotas.load()
        server = self._make_server()
        _bind_unix(server, settings.socket)
        if settings.listen and credentials is not None:
            try:
                self.port = server.add_secure_port(settings.listen, credentials)
            except RuntimeError as error:
                raise ControllerError(
                    f"cannot listen on {settings.listen}: is the port taken? see `ss -ltnp`; or give another --listen"
                ) from error
        await server.start()
        self._server = server
        await self._serve_others()
        _log.info("controller serving", extra={"socket": str(settings.socket), "listen": settings.listen or "off"})

    def _barred(self) -> Mapping[str, int]:
        return self.identity.ca.barred() if self.identity else {}

    def _known_barred(self) -> Mapping[str, int]:
        return self.identity.ca.known_barred if self.identity else {}

    def _memory(self, authority: Path | None) -> Memory | None:
        """What remembers who has tunnels; None without an authority."""
        if self._shared is not None:
            return SharedMemory(self._shared)
        if authority is None:
            return None
        return FileMemory(Directory(authority), used=authority.is_dir() and any(authority.iterdir()))

    async def _read_shared(self, shared: ClusterStore) -> None:
        """Wait until everything is known that other controllers have stored: without it this one would make revoked certificates good again."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def told() -> None:
            loop.call_soon_threadsafe(news.set)
            loop.call_soon_threadsafe(self._look)

        shared.listen(told)
        await asyncio.to_thread(shared.start)
        while not shared.synced:
            await news.wait()
            news.clear()

    def _look(self) -> None:
        """Other controllers may have changed something."""
        self.mesh.readiness.look()
        if self._keys is not None:
            self._keys.look()

    async def _serve_others(self) -> None:
        """What is not on the server of agents."""
        if self.identity is not None:
            await self.identity.serve_joins()
        if self.page is not None:
            await self.page.start()

    async def run(self, stopping: asyncio.Event) -> None:
        """Serve until `stopping` is set. A task that ends by itself is an error."""

        async def forever(name: str, work: Coroutine[Any, Any, None]) -> None:
            await work
            raise ControllerError(f"task {name} ended by itself: this is a bug, please report it")

        tasks = [asyncio.create_task(forever("watch", self.mesh.watch()), name="watch")]
        if self.identity is not None:
            tasks.append(asyncio.create_task(forever("identity", self.identity.maintain()), name="identity"))
        tasks.append(asyncio.create_task(forever("quotas", self.quotas.run()), name="quotas"))
        tasks.append(asyncio.create_task(forever("heartbeat", self._heartbeat()), name="heartbeat"))
        if self._keys is not None:
            tasks.append(asyncio.create_task(forever("keys", self.mesh.follow_keys(self._keys)), name="keys"))
        if self._shared is not None:
            tasks.append(asyncio.create_task(forever("state", self._shared.ended()), name="state"))
        if self._kubernetes is not None:
            tasks.append(asyncio.create_task(forever("kubernetes", self._kubernetes.run()), name="kubernetes"))
        stop = asyncio.create_task(stopping.wait(), name="stop")
        try:
            done, _ = await asyncio.wait({*tasks, stop}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                task.result()
        finally:
            for task in (*tasks, stop):
                task.cancel()
            await asyncio.gather(*tasks, stop, return_exceptions=True)

    async def _heartbeat(self) -> None:
        while True:
            self._notifier.beat(self._waiting() or "serving")
            await asyncio.sleep(BEAT_S)

    async def stop(self) -> None:
        """Stop accepting, give calls in flight a moment, remove the socket, give up the lock. May be called after a failed start."""
        self._notifier.stopping()
        if self.page is not None:
            await self.page.stop()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
            self.settings.socket.unlink(missing_ok=True)
            self._server = None
            await self.quotas.close()
        if self.identity is not None:
            await self.identity.stop(STOP_GRACE_S)
            self.identity = None
        if self._health is not None:
            await asyncio.to_thread(self._health.stop)
            self._health = None
        if self._kubernetes is not None:
            await self._kubernetes.stop()
        await self.mesh.source.close()
        if self._shared is not None:
            await asyncio.to_thread(self._shared.close)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _make_server(self) -> grpc.aio.Server:
        interceptors = [self.identity.gate] if self.identity is not None else []
        server = grpc.aio.server(options=_OPTIONS, interceptors=interceptors)
        server.add_generic_rpc_handlers((self.discovery.handler(),))
        admin_pb2_grpc.add_AdminServicer_to_server(AdminService(self.mesh, self.settings.trust_domain), server)
        relay_pb2_grpc.add_RelayServicer_to_server(self.relay, server)
        proposal_pb2_grpc.add_ProposalsServicer_to_server(Proposals(self.mesh, self.settings.trust_domain), server)
        self.quotas.serve(server)
        gateways = GatewayService(self.mesh.certificates, self.settings.trust_domain)
        gateway_pb2_grpc.add_GatewaysServicer_to_server(gateways, server)  # type: ignore[no-untyped-call,unused-ignore]
        if self.identity is not None:
            identity_pb2_grpc.add_IdentityServicer_to_server(self.identity.service, server)
        return server

    def _workload(self, name: str) -> discovery_pb2.Workload | None:
        """Return a workload of the model in force by "NAMESPACE/NAME"."""
        entity = self.mesh.compiled.entities.get(f"workload/{name}")
        return entity.workload if entity is not None else None

    def _start_metrics(self) -> None:
        address, port = self.settings.metrics_address, self.settings.metrics_port
        try:
            self._health = HealthServer(address, port, self._waiting)
        except OSError as error:
            raise ControllerError(
                f"cannot listen on {address}:{port} for metrics: {error.strerror}; give another --metrics-port"
            ) from error

    def _waiting(self) -> str:
        """Why there is nothing to serve yet; "" if there is. Called by any thread."""
        if self._shared is not None and (why := self._shared.waiting()):
            return why
        if self._server is None:
            return "starting"
        if self.mesh.publication.current.serial:
            return ""
        problems = self.mesh.state.problems
        return f"nothing has been published yet: {problems[0] if problems else 'the source is being read'}"


def _kubernetes(found: Kubernetes) -> KubernetesPart:
    from controller.kubernetes.part import KubernetesPart  # noqa: PLC0415  the module says why

    return KubernetesPart(found.kubeconfig, found.context, found.namespace)


def _lock(socket: Path) -> IO[str]:
    """Make sure that no other controller serves this socket; the lock ends with the process."""
    if len(str(socket).encode()) > MAX_SOCKET_PATH:
        raise ControllerError(
            f"the socket path {socket} is longer than {MAX_SOCKET_PATH} bytes, which Linux does not allow: give a shorter --socket"
        )
    path = socket.with_name(socket.name + ".lock")
    try:
        socket.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ControllerError(f"cannot make {path}: {error.strerror}; run as root, or give another --socket") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ControllerError(f"another controller (pid {holder}) serves {socket}: stop it, or give another --socket") from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _bind_unix(server: grpc.aio.Server, socket: Path) -> None:
    """Bind the socket so that at no moment anybody but its owner can open it."""
    socket.unlink(missing_ok=True)  # the lock is ours: nobody serves it
    previous = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{socket.absolute()}")
    except RuntimeError as error:
        raise ControllerError(f"cannot listen on {socket}: check the directory and its rights, or give another --socket") from error
    finally:
        os.umask(previous)


def _files(tls: ServerTls) -> Files:
    """Read and check what was given of --tls-cert, --tls-key and --tls-client-ca."""
    content = {}
    for option, path in (("--tls-cert", tls.certificate), ("--tls-key", tls.key), ("--tls-client-ca", tls.client_ca)):
        try:
            content[option] = path.read_bytes() if path else b""
        except OSError as error:
            raise ControllerError(f"cannot read {option} {path}: {error.strerror}") from error
    files = Files(content["--tls-cert"], content["--tls-key"], content["--tls-client-ca"])
    if tls.client_ca:
        try:
            x509.load_pem_x509_certificates(files.client_ca)
        except ValueError as error:
            raise ControllerError(f"--tls-client-ca {tls.client_ca} holds no PEM certificate: {error}") from error
    if not tls.certificate:
        return files
    try:
        certificate = x509.load_pem_x509_certificate(files.certificate)
    except ValueError as error:
        raise ControllerError(f"--tls-cert {tls.certificate} is no PEM certificate: {error}") from error
    try:
        key = load_pem_private_key(files.key, None)
    except (ValueError, TypeError) as error:
        raise ControllerError(f"--tls-key {tls.key} is no unencrypted PEM key: {error}") from error
    if key.public_key() != certificate.public_key():
        raise ControllerError(f"--tls-key {tls.key} does not belong to --tls-cert {tls.certificate}")
    return files


def _credentials(files: Files) -> grpc.ServerCredentials:
    if not (files.key and files.certificate and files.client_ca):
        raise ControllerError("--tls-cert, --tls-key and --tls-client-ca belong together: give all three, or --ca-directory")
    return grpc.ssl_server_credentials([(files.key, files.certificate)], root_certificates=files.client_ca, require_client_auth=True)
