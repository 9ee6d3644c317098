"""A running controller with a certificate authority, and nodes that talk to it as agents do: gRPC over TLS, certificates from a join."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from controller.identity.ca import CaSettings, CertificateAuthority
from controller.identity.certificates import key_pem, pem
from controller.identity.directory import Directory
from controller.identity.plane import IdentityPlane, IdentitySettings
from controller.identity.tokens import TokenStore
from controller.identity.trust import read
from controller.server import Controller, ServerTls, Settings
from meshapi import identity_pb2 as pb
from meshapi import identity_pb2_grpc

DOMAIN = "mesh.local"
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]

WORKLOADS = """
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: cart, namespace: shop}
spec: {node: n1, addresses: [10.0.1.2], networkNamespace: cart, serviceAccount: cart}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: redis, namespace: shop}
spec: {node: n2, addresses: [10.0.2.2], networkNamespace: redis, serviceAccount: redis}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: outside, namespace: shop}
spec: {node: n1, addresses: [10.0.1.3], serviceAccount: outside}
"""


class Clock:
    """A wall clock that tests set."""

    def __init__(self, now: float | None = None) -> None:
        self.now = time.time() if now is None else now

    def __call__(self) -> float:
        return self.now

    def after_commands(self, seconds: float) -> None:
        """Go to `seconds` after what commands, which have the real time, have done; however long the test has taken to come here."""
        self.now = max(self.now, time.time()) + seconds


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def request(key: ec.EllipticCurvePrivateKey, subject: x509.Name | None = None) -> bytes:
    """Return a CSR, DER."""
    builder = x509.CertificateSigningRequestBuilder(subject or x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def decoded(chain: Iterable[bytes]) -> list[x509.Certificate]:
    return [x509.load_der_x509_certificate(der) for der in chain]


def uris(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


STARTED: list[CertificateAuthority] = []
"""By the test that runs; conftest.py stops them after it."""


def authority(directory: Path, clock: Clock | None = None, **settings: Any) -> CertificateAuthority:
    """Return a started authority whose forgetting waits for nothing but the wall clock."""
    settings.setdefault("hold_s", 0.0)
    found = CertificateAuthority(CaSettings(directory, **settings), DOMAIN, clock or Clock())
    STARTED.append(found)
    found.start()
    return found


@dataclass
class World:
    """A controller that serves, and where."""

    controller: Controller
    clock: Clock
    ca_directory: Path
    tokens: TokenStore = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = TokenStore(Directory(self.ca_directory), self.clock)

    @property
    def plane(self) -> IdentityPlane:
        assert self.controller.identity is not None
        return self.controller.identity

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.controller.port}"

    @property
    def join_address(self) -> str:
        return f"127.0.0.1:{self.plane.join_port}"

    def token(self, node: str = "", lifetime_s: int = 3600) -> str:
        known = read(Directory(self.ca_directory))
        assert known is not None
        return str(self.tokens.create(node, lifetime_s, known.signing)[0])

    @property
    def roots(self) -> bytes:
        return pem(self.plane.ca.roots)


@asynccontextmanager
async def world(
    tmp_path: Path,
    workloads: str = WORKLOADS,
    *,
    tls: ServerTls | None = None,
    ca: CaSettings | None = None,
    behind_s: float = 0,
    **more: Any,
) -> AsyncIterator[World]:
    """Serve `workloads` with identity on ephemeral ports; the controller's clock is `behind_s` behind the real one, which TLS clients use."""
    source = tmp_path / "src"
    source.mkdir(exist_ok=True)
    (source / "workloads.yaml").write_text(workloads)
    clock = Clock(time.time() - behind_s)
    ca = ca or CaSettings(tmp_path / "ca", hold_s=0.0)
    identity = IdentitySettings(ca, "127.0.0.1:0", **more)
    controller = Controller(Settings(source, tmp_path / "c.sock", "127.0.0.1:0", tls, DOMAIN, identity=identity), clock)
    stopping = asyncio.Event()
    try:
        await controller.start()
        task = asyncio.create_task(controller.run(stopping))
        yield World(controller, clock, ca.directory)
        stopping.set()
        await task
    finally:
        await controller.stop()


@dataclass
class Node:
    """An agent: a key, a chain, and what it trusts."""

    name: str
    key: ec.EllipticCurvePrivateKey
    chain: list[x509.Certificate]
    trust: pb.TrustBundle

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(pem(decoded(self.trust.roots)), key_pem(self.key), pem(self.chain))

    @asynccontextmanager
    async def identity(self, served: World) -> AsyncIterator[Any]:
        async with grpc.aio.secure_channel(served.address, self.credentials, OPTIONS) as channel:
            yield identity_pb2_grpc.IdentityStub(channel)  # type: ignore[no-untyped-call,unused-ignore]


async def ask_to_join(served: World, message: pb.JoinRequest, roots: bytes | None = None) -> pb.JoinResponse:
    credentials = grpc.ssl_channel_credentials(roots or served.roots)
    async with grpc.aio.secure_channel(served.join_address, credentials, OPTIONS) as channel:
        stub: Any = identity_pb2_grpc.JoinStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
        answer = await stub.Join(message)
    assert isinstance(answer, pb.JoinResponse)
    return answer


async def join(served: World, name: str, token: str | None = None) -> Node:
    """Join with a token for this node."""
    key = new_key()
    answer = await ask_to_join(served, pb.JoinRequest(node=name, csr=request(key), token=token or served.token(name)))
    return Node(name, key, decoded(answer.chain), answer.trust)


async def sign(stub: Any, workloads: Sequence[tuple[str, bytes]]) -> list[pb.Signed]:
    answer = await stub.Sign(pb.SignRequest(workloads=[pb.WorkloadCsr(workload=name, csr=csr) for name, csr in workloads]))
    return list(answer.workloads)


async def presented(address: str) -> list[x509.Certificate]:
    """Return the chain that a port shows in a handshake, unverified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        inner = writer.get_extra_info("ssl_object")._sslobj
        return [x509.load_der_x509_certificate(item.public_bytes(2)) for item in inner.get_unverified_chain()]
    finally:
        writer.transport.abort()
