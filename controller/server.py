"""The controller as one running thing: lock, sockets, services, tasks. Started by `controller.main`; tests start it in their own process.

The unix socket is trusted and has mode 0600; TCP always means mutual TLS.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from prometheus_client import start_http_server

from controller import metrics
from controller.admin import AdminService
from controller.discovery import DiscoveryService
from controller.errors import ControllerError
from controller.mesh import Mesh
from controller.source import Source
from meshapi import admin_pb2_grpc

_log = logging.getLogger(__name__)

STOP_GRACE_S: Final = 1.0  # for calls in flight at SIGTERM; discovery streams never end by themselves
MAX_SOCKET_PATH: Final = 107  # struct sockaddr_un, include/uapi/linux/un.h, without the final zero
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
    """PEM files of the TCP listener: what the controller shows, and who signs its clients."""

    certificate: Path
    key: Path
    client_ca: Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that `mesh-controller run` can be told."""

    directory: Path
    """Directory of YAML files: the source."""
    socket: Path
    """Unix socket for local agents and the command line."""
    listen: str = ""
    """HOST:PORT for agents on other nodes; empty = unix socket only."""
    tls: ServerTls | None = None
    """Required with `listen`."""
    trust_domain: str = "mesh.local"
    """SPIFFE trust domain: what client certificates must belong to."""
    metrics_address: str = "127.0.0.1"
    """Address of /metrics."""
    metrics_port: int = 0
    """Port of /metrics; 0 = no metrics endpoint."""


class Controller:
    """One controller. `start` returns when it serves, `run` keeps it going, `stop` ends it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.mesh = Mesh(Source(settings.directory))
        self.discovery = DiscoveryService(self.mesh.publication, settings.trust_domain)
        self.port = 0
        """TCP port that is listened on; 0 without `listen`."""
        self._server: grpc.aio.Server | None = None
        self._lock: IO[str] | None = None
        self._stop_metrics: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Take the lock, read the source, bind. Raises ControllerError for everything that an operator can put right."""
        settings = self.settings
        if not settings.directory.is_dir():
            raise ControllerError(f"{settings.directory} is not a directory: make it, or give another --directory")
        self._lock = _lock(settings.socket)
        credentials = _credentials(settings.tls) if settings.tls else None
        if settings.listen and credentials is None:
            raise ControllerError("--listen needs --tls-cert, --tls-key and --tls-client-ca: TCP is served with mutual TLS only")
        await self.mesh.start()
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers((self.discovery.handler(),))
        admin_pb2_grpc.add_AdminServicer_to_server(AdminService(self.mesh, settings.trust_domain), server)
        _bind_unix(server, settings.socket)
        if settings.listen and credentials is not None:
            try:
                self.port = server.add_secure_port(settings.listen, credentials)
            except RuntimeError as error:
                raise ControllerError(
                    f"cannot listen on {settings.listen}: is the port taken? see `ss -ltnp`; or give another --listen"
                ) from error
        if settings.metrics_port:
            self._start_metrics()
        await server.start()
        self._server = server
        _log.info("controller serving", extra={"socket": str(settings.socket), "listen": settings.listen or "off"})

    async def run(self, stopping: asyncio.Event) -> None:
        """Serve until `stopping` is set. A task that ends by itself is an error."""

        async def forever(name: str, work: Coroutine[Any, Any, None]) -> None:
            await work
            raise ControllerError(f"task {name} ended by itself: this is a bug, please report it")

        watch = asyncio.create_task(forever("watch", self.mesh.watch()), name="watch")
        stop = asyncio.create_task(stopping.wait(), name="stop")
        try:
            done, _ = await asyncio.wait({watch, stop}, return_when=asyncio.FIRST_COMPLETED)
            if watch in done:
                watch.result()
        finally:
            watch.cancel()
            stop.cancel()
            await asyncio.gather(watch, stop, return_exceptions=True)

    async def stop(self) -> None:
        """Stop accepting, give calls in flight a moment, remove the socket, give up the lock. May be called after a failed start."""
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
            self.settings.socket.unlink(missing_ok=True)
            self._server = None
        self._stop_metrics()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _start_metrics(self) -> None:
        address, port = self.settings.metrics_address, self.settings.metrics_port
        try:
            http, thread = start_http_server(port, addr=address, registry=metrics.REGISTRY)
        except OSError as error:
            raise ControllerError(
                f"cannot listen on {address}:{port} for metrics: {error.strerror}; give another --metrics-port"
            ) from error

        def stop() -> None:
            http.shutdown()
            http.server_close()
            thread.join()

        self._stop_metrics = stop


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


def _credentials(tls: ServerTls) -> grpc.ServerCredentials:
    content = {}
    for option, path in (("--tls-cert", tls.certificate), ("--tls-key", tls.key), ("--tls-client-ca", tls.client_ca)):
        try:
            content[option] = path.read_bytes()
        except OSError as error:
            raise ControllerError(f"cannot read {option} {path}: {error.strerror}") from error
    try:
        certificate = x509.load_pem_x509_certificate(content["--tls-cert"])
    except ValueError as error:
        raise ControllerError(f"--tls-cert {tls.certificate} is no PEM certificate: {error}") from error
    try:
        key = load_pem_private_key(content["--tls-key"], None)
    except (ValueError, TypeError) as error:
        raise ControllerError(f"--tls-key {tls.key} is no unencrypted PEM key: {error}") from error
    try:
        x509.load_pem_x509_certificates(content["--tls-client-ca"])
    except ValueError as error:
        raise ControllerError(f"--tls-client-ca {tls.client_ca} holds no PEM certificate: {error}") from error
    if key.public_key() != certificate.public_key():
        raise ControllerError(f"--tls-key {tls.key} does not belong to --tls-cert {tls.certificate}")
    return grpc.ssl_server_credentials(
        [(content["--tls-key"], content["--tls-cert"])], root_certificates=content["--tls-client-ca"], require_client_auth=True
    )
