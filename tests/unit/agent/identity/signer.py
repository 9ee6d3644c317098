"""A controller for the tests of the node's side: real gRPC over real TLS, certificates that are really signed, and switches to go wrong with."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import ipaddress
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.config import Config, Join, TlsFiles
from agent.model import LocalWorkload, Workload
from meshapi import identity_pb2 as pb
from meshapi import identity_pb2_grpc
from meshapi.join import CONTROLLER_NAME, Token, root_hash

TRUST_DOMAIN = "mesh.test"
NODE = "node-1"
SECRET = b"0123456789abcdef"


def workload(name: str, account: str = "", node: str = NODE) -> Workload:
    """A workload of namespace `default`; its service account is its name unless given."""
    return Workload(f"default/{name}", account or name, node, {}, ("10.0.0.1",), "", enrolled=True, ready=True)


async def _nothing() -> None:
    pass


def local(name: str, cookie: int, netns_path: str = "/proc/self/ns/net", account: str = "") -> LocalWorkload:
    """The same, bound to a namespace."""
    return LocalWorkload(workload(name, account), cookie, netns_path)


def spiffe_id(account: str) -> str:
    return f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{account}"


@dataclass
class Root:
    """A root that signs leaves of any kind."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    name: str = "test root"
    certificate: x509.Certificate = field(init=False)

    def __post_init__(self) -> None:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        now = dt.datetime.now(dt.timezone.utc)
        self.certificate = (
            x509.CertificateBuilder(subject, subject, self.key.public_key(), x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage(signs=True), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def sign(
        self,
        key: Any,
        names: Sequence[x509.GeneralName],
        lifetime_s: float = 3600.0,
        backdate_s: float = 300.0,
        *,
        now: float | None = None,
        ca: bool = False,
        serial: int | None = None,
        subject: x509.Name | None = None,
    ) -> x509.Certificate:
        moment = dt.datetime.fromtimestamp(time.time() if now is None else now, dt.timezone.utc)
        builder = (
            x509.CertificateBuilder(self.certificate.subject, subject or x509.Name([]), key, serial or x509.random_serial_number())
            .not_valid_before(moment - dt.timedelta(seconds=backdate_s))
            .not_valid_after(moment + dt.timedelta(seconds=lifetime_s))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(usage(signs=ca), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        if not ca:
            both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.ExtendedKeyUsage(both), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def crl(self, serials: Sequence[int]) -> bytes:
        now = dt.datetime.now(dt.timezone.utc)
        builder = x509.CertificateRevocationListBuilder(self.certificate.subject, now, now + dt.timedelta(days=1))
        for serial in serials:
            builder = builder.add_revoked_certificate(x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def b64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


@dataclass
class JwtKey:
    """A key that signs JWT-SVIDs."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    kid: str = "one"

    @property
    def jwk(self) -> dict[str, str]:
        numbers = self.key.public_key().public_numbers()
        x, y = (b64(n.to_bytes(32, "big")) for n in (numbers.x, numbers.y))
        return {"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": self.kid, "use": "jwt-svid", "alg": "ES256"}

    def sign(self, claims: dict[str, Any], header: dict[str, Any] | None = None) -> str:
        head = {"alg": "ES256", "kid": self.kid, "typ": "JWT", **(header or {})}
        signed = f"{b64(json.dumps(head).encode())}.{b64(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(self.key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


class Signer(identity_pb2_grpc.JoinServicer, identity_pb2_grpc.IdentityServicer):
    """The services. What a test changes takes effect with the next call."""

    def __init__(self) -> None:
        self.root = Root()
        self.trusted = [self.root]
        self.jwt = JwtKey()
        self.tokens = {str(self.token)}
        self.accounts: dict[str, str] = {}
        """Service account by workload, where it is not the workload's name."""
        self.refuse: dict[str, str] = {}
        """Why a workload gets nothing."""
        self.lifetime_s = 3600.0
        self.backdate_s = 300.0
        self.clock: Callable[[], float] = time.time
        """When workloads' certificates begin; connections are judged by the real clock."""
        self.sequence = 1
        self.revoked: list[int] = []
        self.spoil: Callable[[str, list[bytes]], list[bytes]] = lambda _workload, chain: chain
        """Changes chains before they go out."""
        self.fail: grpc.StatusCode | None = None
        self.batches: list[int] = []
        self.renewals = 0
        self.joins: list[str] = []
        self.jwts = 0
        self.patience: list[float] = []
        """How many seconds callers would have waited for certificates."""
        self.before_jwt: Callable[[], Awaitable[None]] = _nothing
        """Happens after a token was signed and before it is sent."""
        self.peers: set[str] = set()
        self._news = asyncio.Condition()
        self.port = self.join_port = 0

    @property
    def token(self) -> Token:
        return Token(SECRET, root_hash(self.root.certificate))

    def bundle(self) -> pb.TrustBundle:
        return pb.TrustBundle(
            trust_domain=TRUST_DOMAIN,
            sequence=self.sequence,
            roots=[root.der for root in self.trusted],
            revoked=[serial.to_bytes(20, "big") for serial in self.revoked],
            jwt_keys=json.dumps({"keys": [self.jwt.jwk]}).encode(),
            crl=b"".join(root.crl(self.revoked) for root in self.trusted) if self.revoked else b"",
        )

    async def announce(self) -> None:
        """Send the bundle as it is now to everybody."""
        async with self._news:
            self.sequence += 1
            self._news.notify_all()

    def leaf(self, csr: bytes, uri: str, now: float | None = None) -> list[bytes]:
        request = x509.load_der_x509_csr(csr)
        assert request.is_signature_valid
        names = [x509.UniformResourceIdentifier(uri)]
        return [self.root.sign(request.public_key(), names, self.lifetime_s, self.backdate_s, now=now).public_bytes(Encoding.DER)]

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:  # noqa: N802  gRPC's name
        proof = request.token or request.service_account_token
        self.joins.append(proof)
        if proof not in self.tokens:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the token is unknown or used up")
        self.tokens.discard(proof)
        return pb.JoinResponse(chain=self.leaf(request.csr, f"spiffe://{TRUST_DOMAIN}/meshagent/node/{request.node}"), trust=self.bundle())

    async def _checked(self, context: Any) -> None:
        self.peers.update(name.decode() for name in context.auth_context().get("peer_spiffe_id", ()))
        if self.fail is not None:
            await context.abort(self.fail, "the test says so")

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.JoinResponse:  # noqa: N802  gRPC's name
        await self._checked(context)
        self.renewals += 1
        return pb.JoinResponse(chain=self.leaf(request.csr, f"spiffe://{TRUST_DOMAIN}/meshagent/node/{NODE}"), trust=self.bundle())

    async def Sign(self, request: pb.SignRequest, context: Any) -> pb.SignResponse:  # noqa: N802  gRPC's name
        await self._checked(context)
        self.batches.append(len(request.workloads))
        self.patience.append(context.time_remaining())
        return pb.SignResponse(workloads=[self._signed(one) for one in request.workloads])

    def _signed(self, one: pb.WorkloadCsr) -> pb.Signed:
        if one.workload in self.refuse:
            return pb.Signed(error=self.refuse[one.workload])
        account = self.accounts.get(one.workload, one.workload.partition("/")[2])
        return pb.Signed(chain=self.spoil(one.workload, self.leaf(one.csr, spiffe_id(account), self.clock())))

    async def SignJwt(self, request: pb.SignJwtRequest, context: Any) -> pb.SignJwtResponse:  # noqa: N802  gRPC's name
        await self._checked(context)
        self.jwts += 1
        account = self.accounts.get(request.workload, request.workload.partition("/")[2])
        end = int(time.time()) + 300
        token = self.jwt.sign({"sub": spiffe_id(account), "aud": list(request.audience), "exp": end, "iat": int(time.time())})
        await self.before_jwt()
        return pb.SignJwtResponse(token=token, expires_at=end)

    async def Trust(self, request: pb.TrustRequest, context: Any) -> AsyncIterator[pb.TrustBundle]:  # noqa: ARG002, N802  gRPC's names
        await self._checked(context)
        while True:
            sent = self.sequence
            yield self.bundle()
            async with self._news:
                await self._news.wait_for(lambda: self.sequence != sent)  # noqa: B023

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[Signer]:
        """Listen on two ports of 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        own = self.root.sign(key.public_key(), [x509.DNSName(CONTROLLER_NAME), address])
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        chain = own.public_bytes(Encoding.PEM) + self.root.pem
        servers = []
        for clients, add in (
            (True, identity_pb2_grpc.add_IdentityServicer_to_server),
            (False, identity_pb2_grpc.add_JoinServicer_to_server),
        ):
            server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            add(self, server)
            roots = b"".join(root.pem for root in self.trusted) if clients else None
            credentials = grpc.ssl_server_credentials([(pem, chain)], roots, clients)
            wanted = (self.port or port) if clients else self.join_port
            bound = server.add_secure_port(f"127.0.0.1:{wanted}", credentials)
            if clients:
                self.port = bound
            else:
                self.join_port = bound
            await server.start()
            servers.append(server)
        try:
            yield self
        finally:
            for server in servers:
                await server.stop(0)

    def joining(self, run_dir: Path, **changes: Any) -> Config:
        """The configuration of an agent that joins with the token."""
        file = run_dir.parent / f"{run_dir.name}-token"
        file.write_text(f"{self.token}\n")
        given = Join(f"127.0.0.1:{self.join_port}", token_file=file)
        settings: dict[str, Any] = {"join": given, "trust_domain": TRUST_DOMAIN, "keys_on_disk": False, **changes}
        return Config(NODE, f"127.0.0.1:{self.port}", run_dir=run_dir, state_dir=run_dir / "state", **settings)

    def with_files(self, directory: Path, run_dir: Path, **changes: Any) -> Config:
        """The configuration of an agent that has TLS files of an operator's."""
        key = ec.generate_private_key(ec.SECP256R1())
        own = self.root.sign(key.public_key(), [x509.UniformResourceIdentifier(f"spiffe://{TRUST_DOMAIN}/meshagent/node/{NODE}")])
        (directory / "ca.pem").write_bytes(self.root.pem)
        (directory / "own.pem").write_bytes(own.public_bytes(Encoding.PEM))
        (directory / "own.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        files = TlsFiles(directory / "ca.pem", directory / "own.pem", directory / "own.key")
        settings: dict[str, Any] = {"tls": files, "trust_domain": TRUST_DOMAIN, **changes}
        return Config(NODE, f"127.0.0.1:{self.port}", run_dir=run_dir, state_dir=run_dir / "state", **settings)
