"""A running controller on a unix socket, and certificates, for every test that needs a real one."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from controller.server import Controller, ServerTls, Settings


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority in a directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._root = self._builder(self._name, self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.ca = directory / f"{name}-ca.pem"
        self.ca.write_bytes(self._root.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(hours=1))
        )

    def issue(self, name: str, *uris: str) -> Pair:
        """Sign a certificate for 127.0.0.1 that names the URIs."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        names += [x509.UniformResourceIdentifier(uri) for uri in uris]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(subject, key.public_key()).add_extension(x509.SubjectAlternativeName(names), critical=False)
        pair = Pair(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        pair.certificate.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        return pair


@asynccontextmanager
async def serve(directory: Path, socket: Path, tls: ServerTls | None = None, address: str = "127.0.0.1:0") -> AsyncIterator[Controller]:
    """Serve `directory` on `socket`, and at a TCP address, by default of an ephemeral port, if there are certificates; the directory is watched."""
    controller = Controller(Settings(directory, socket, address if tls else "", tls))
    stopping = asyncio.Event()
    try:
        await controller.start()
        task = asyncio.create_task(controller.run(stopping))
        yield controller
        stopping.set()
        await task
    finally:
        await controller.stop()


SHOP = """
apiVersion: v1
kind: Service
metadata: {name: cart}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80}]}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: cart-1, labels: {app: cart}}
spec: {node: n1, addresses: [10.0.1.2], networkNamespace: cart-1}
"""


def service(name: str, address: str) -> str:
    """Return a Service as YAML."""
    return f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {address}, ports: [{{port: 80}}]}}\n"
