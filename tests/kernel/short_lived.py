"""A certificate authority whose certificates are over soon: what `mesh-controller run --ca-command` runs in tests.

Usage: short_lived.py DIRECTORY SECONDS. The request comes on stdin and the certificate goes to stdout (controller/identity/command.py).
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "short-lived")])
_BACKDATE_S = 300


def root(directory: Path) -> Path:
    """Make the authority; returns its root, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_NAME, key.public_key(), 3600).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    (directory / "root.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    found = directory / "root.pem"
    found.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return found


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey, seconds: float) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.timezone.utc)
    return (
        x509.CertificateBuilder(_NAME, subject, key, x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(seconds=_BACKDATE_S))
        .not_valid_after(now + dt.timedelta(seconds=seconds))
    )


def main(directory: Path, seconds: float) -> None:
    """Sign what was asked for on stdin."""
    request = x509.load_pem_x509_csr(sys.stdin.buffer.read())
    key = serialization.load_pem_private_key((directory / "root.key").read_bytes(), None)
    public = request.public_key()
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(public, ec.EllipticCurvePublicKey):
        raise SystemExit("P-256 only")
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(os.environ["MESHAGENT_SPIFFE_ID"])]
    names += [x509.DNSName(name) for name in os.environ["MESHAGENT_DNS_NAMES"].split(",") if name]
    names += [x509.IPAddress(ipaddress.ip_address(one)) for one in os.environ["MESHAGENT_ADDRESSES"].split(",") if one]
    certificate = (
        _builder(x509.Name([]), public, seconds)
        .add_extension(x509.SubjectAlternativeName(names), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(True, *[False] * 8), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    sys.stdout.buffer.write(certificate.public_bytes(serialization.Encoding.PEM))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
