"""A throwaway PKI for one lab: who may speak to the controller. Called by `lab.mesh`; no key of it is ever used for workloads.

Controller and agents authenticate each other with TLS: the controller's certificate names its address and "mesh-controller", each agent's
names its node as `spiffe://TRUST-DOMAIN/meshagent/node/NODE`.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

TRUST_DOMAIN = "mesh.local"
CONTROLLER_NAME = "mesh-controller"
_LIFETIME = dt.timedelta(days=30)
_SKEW = dt.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def node_uri(node: str, trust_domain: str = TRUST_DOMAIN) -> str:
    """Return the SPIFFE ID of a node's agent."""
    return f"spiffe://{trust_domain}/meshagent/node/{node}"


def authority() -> Identity:
    """Make a certificate authority that may sign nothing but leaves."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "meshagent lab CA")])
    builder = _builder(name, name, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs=True), critical=True)
    return Identity(builder.sign(key, hashes.SHA256()), key)


def issue(ca: Identity, common_name: str, names: Iterable[x509.GeneralName], purpose: ObjectIdentifier) -> Identity:
    """Make a leaf certificate for one purpose (ExtendedKeyUsageOID.SERVER_AUTH or CLIENT_AUTH)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    builder = _builder(subject, ca.certificate.subject, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key()), critical=False)
    return Identity(builder.sign(ca.key, hashes.SHA256()), key)


def write(directory: Path, nodes: Iterable[str], controller_addresses: Iterable[str]) -> None:
    """Write ca.crt, controller.{crt,key} and NODE.{crt,key}, each 0600; the authority's key is forgotten."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    ca = authority()
    _write(directory / "ca.crt", _pem(ca.certificate))
    names: list[x509.GeneralName] = [x509.DNSName(CONTROLLER_NAME)]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in controller_addresses]
    identities = {"controller": issue(ca, CONTROLLER_NAME, names, ExtendedKeyUsageOID.SERVER_AUTH)}
    for node in nodes:
        uri = x509.UniformResourceIdentifier(node_uri(node))
        identities[node] = issue(ca, f"meshagent {node}"[:64], [uri], ExtendedKeyUsageOID.CLIENT_AUTH)
    for name, identity in identities.items():
        _write(directory / f"{name}.crt", _pem(identity.certificate))
        key = identity.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        _write(directory / f"{name}.key", key)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.timezone.utc)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key, serial_number=x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
