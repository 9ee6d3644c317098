"""Authorities that an operator might have: a root, an intermediate below it, and commands that sign."""

from __future__ import annotations

import datetime as dt
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Held:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

    def write(self, directory: Path, name: str) -> tuple[Path, Path]:
        """Write NAME.pem and NAME.key."""
        certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
        certificate.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        key.write_bytes(self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        key.chmod(0o600)
        return certificate, key


def make(
    name: str,
    above: Held | None = None,
    *,
    ca: bool = True,
    lifetime_s: int = 10**6,
    path_length: int | None = None,
    purposes: tuple[x509.ObjectIdentifier, ...] = (),
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
) -> Held:
    """Make a root, or what `above` signs."""
    own = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer = above.certificate.subject if above else subject
    now = dt.datetime.fromtimestamp(int(time.time()), dt.timezone.utc)
    usage = x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False)
    builder = (
        x509.CertificateBuilder(issuer, subject, own.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(seconds=lifetime_s))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
    )
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    return Held(builder.sign((above or Held(None, own)).key, hashes.SHA256()), own)  # type: ignore[arg-type]


COMMAND = """
import datetime as dt, ipaddress, os, sys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
request = x509.load_pem_x509_csr(sys.stdin.buffer.read())
assert request.is_signature_valid
issuer = x509.load_pem_x509_certificate(open({certificate!r}, "rb").read())
key = serialization.load_pem_private_key(open({key!r}, "rb").read(), None)
names = [x509.UniformResourceIdentifier(os.environ["MESHAGENT_SPIFFE_ID"])]
names += [x509.DNSName(name) for name in os.environ["MESHAGENT_DNS_NAMES"].split(",") if name]
names += [x509.IPAddress(ipaddress.ip_address(name)) for name in os.environ["MESHAGENT_ADDRESSES"].split(",") if name]
{twist}
now = dt.datetime.now(dt.timezone.utc)
usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
purposes = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH])
leaf = (
    x509.CertificateBuilder(issuer.subject, x509.Name([]), request.public_key(), x509.random_serial_number())
    .not_valid_before(now - dt.timedelta(minutes=1))
    .not_valid_after(now + dt.timedelta(seconds=int(os.environ["MESHAGENT_LIFETIME_S"])))
    .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    .add_extension(usage, critical=True)
    .add_extension(purposes, critical=False)
    .add_extension(x509.SubjectAlternativeName(names), critical=True)
    .sign(key, hashes.SHA256())
)
pem = serialization.Encoding.PEM
sys.stdout.buffer.write(leaf.public_bytes(pem) + issuer.public_bytes(pem) + open({root!r}, "rb").read())
"""


def command(directory: Path, root: Held, issuer: Held, twist: str = "") -> str:
    """Write a command that signs as `issuer`; return its command line."""
    certificate, key = issuer.write(directory, "command")
    top, _ = root.write(directory, "command-root")
    script = directory / "sign.py"
    script.write_text(COMMAND.format(certificate=str(certificate), key=str(key), root=str(top), twist=twist))
    return f"{sys.executable} {script}"
