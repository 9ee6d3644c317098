"""Everything about identity that a controller runs: the certificate authority, its two services, and what the ports show. Started by `controller.server`."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Final

import grpc

from controller.errors import ControllerError
from controller.identity.attest import TokenAttestor
from controller.identity.ca import CaSettings, CertificateAuthority
from controller.identity.certificates import pem
from controller.identity.gate import Gate
from controller.identity.kubernetes import ApiServer, KubernetesAttestor
from controller.identity.lapse import Clock
from controller.identity.refusals import SigningFailed
from controller.identity.service import FindWorkload, IdentityService, JoinService
from controller.identity.serving import OwnCertificate, Port, Shown, split_names
from controller.store import SharedStore
from meshapi import identity_pb2_grpc, limits

_log = logging.getLogger(__name__)

MAX_JOIN_BYTES: Final = 64 << 10  # of a message from somebody who has proven nothing
MAX_JOINS: Final = 256  # at once
MAX_JOIN_S: Final = round(limits.CALL_S)  # as long as an agent waits
_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_JOIN_BYTES),
    ("grpc.max_connection_idle_ms", 30_000),
    # Who opens calls and sends nothing holds their places no longer than this: gRPC counts a call before its request has arrived.
    ("grpc.max_connection_age_ms", MAX_JOIN_S * 1000),
    ("grpc.max_connection_age_grace_ms", MAX_JOIN_S * 1000),
    ("grpc.max_concurrent_streams", 4),
)


@dataclass(frozen=True, slots=True)
class IdentitySettings:
    """What `mesh-controller run` can be told about identity."""

    ca: CaSettings
    join_listen: str = ""
    """HOST:PORT where nodes join; empty = nobody can."""
    server_names: tuple[str, ...] = ()
    """DNS names and IP addresses in the controller's certificate, besides mesh-controller."""
    kubernetes: ApiServer | None = None
    """Checks service-account tokens; None = join tokens only."""


@dataclass(frozen=True, slots=True)
class Files:
    """What `--tls-cert`, `--tls-key` and `--tls-client-ca` hold, PEM, instead of or beside what the authority gives; empty without."""

    certificate: bytes = b""
    key: bytes = field(default=b"", repr=False)
    client_ca: bytes = b""


class IdentityPlane:
    """Identity in one controller. `start` before the ports are bound, `serve_joins` after, `maintain` for ever, `stop`."""

    def __init__(
        self,
        settings: IdentitySettings,
        trust_domain: str,
        workload: FindWorkload,
        files: Files,
        listen: str,
        clock: Clock = time.time,
        shared: SharedStore | None = None,
    ) -> None:
        """`shared`: what several controllers remember together."""
        self.settings = settings
        self.ca = CertificateAuthority(settings.ca, trust_domain, clock, shared=shared)
        self.service = IdentityService(self.ca, workload, time.monotonic)
        self.gate = Gate(self.ca)
        self.join_port = 0
        """TCP port on which nodes join; 0 if they cannot."""
        self._files = files
        hosts = (_host(listen), _host(settings.join_listen), "localhost", "127.0.0.1", "::1")
        names, addresses = split_names([name for name in (*settings.server_names, *hosts) if name])
        self._own = OwnCertificate(self.ca, names, addresses)
        self._mutual: Port | None = None
        self._joining: Port | None = None
        self._kubernetes: KubernetesAttestor | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> grpc.ServerCredentials:
        """Read or make the authority; return the credentials of the port that everything but Join is served on. Raises ControllerError."""
        if self.settings.kubernetes is not None:
            await asyncio.to_thread(self.settings.kubernetes.check)
        await asyncio.to_thread(self.ca.start)
        try:
            mutual, joining = await asyncio.to_thread(self._shown)
        except SigningFailed as error:
            raise ControllerError(f"the controller cannot get a certificate for itself: {error}") from error
        self._mutual, self._joining = Port(mutual, mutual=True), Port(joining, mutual=False)
        await self.tick()  # tokens name the root at which the certificate just made ends
        return self._mutual.credentials

    async def serve_joins(self) -> None:
        """Listen where nodes join. Raises ControllerError."""
        address = self.settings.join_listen
        if not address or self._joining is None:
            return
        kubernetes = KubernetesAttestor(self.settings.kubernetes, self.ca.barred) if self.settings.kubernetes else None
        self._kubernetes = kubernetes
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=MAX_JOINS)
        identity_pb2_grpc.add_JoinServicer_to_server(JoinService(self.ca, TokenAttestor(self.ca), kubernetes, time.monotonic), server)
        try:
            self.join_port = server.add_secure_port(address, self._joining.credentials)
        except RuntimeError as error:
            raise ControllerError(
                f"cannot listen on {address}: is the port taken? see `ss -ltnp`; or give another --join-listen"
            ) from error
        await server.start()
        self._server = server
        _log.info("nodes can join", extra={"listen": address, "kubernetes": self.settings.kubernetes is not None})

    async def maintain(self) -> None:
        """Keep certificates, trust and state current, for ever."""
        await self.ca.maintain(self._refresh)

    async def tick(self) -> None:
        """Do once what `maintain` does every second."""
        await self.ca.tick(self._refresh)

    async def stop(self, grace_s: float) -> None:
        """End calls and let go of the CA directory."""
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None
        if self._kubernetes is not None:
            self._kubernetes.close()
        self.ca.stop()

    def _refresh(self) -> None:
        if self._mutual is not None and self._joining is not None:
            mutual, joining = self._shown()
            self._mutual.show(mutual)
            self._joining.show(joining)

    def _shown(self) -> tuple[Shown, Shown]:
        clients = pem(self.ca.roots) + self._files.client_ca
        if self._files.certificate:
            key, chain = self._files.key, self._files.certificate
            return Shown(key, chain, clients), Shown(key, chain)
        key, chain, whole = self._own.current(self.ca.generation)
        return Shown(key, chain, clients), Shown(key, whole)


def _host(address: str) -> str:
    """Return the host of HOST:PORT if a client could dial it."""
    host = address.rpartition(":")[0].strip("[]")
    return "" if host in {"", "0.0.0.0", "::", "*"} else host
