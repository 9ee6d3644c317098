"""What is trusted: the roots, what they have revoked, and the keys of JWT-SVIDs, as the controller says. Immutable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent.identity import certificates
from meshapi import identity_pb2 as pb

MAX_ROOTS: Final = 32
_END: Final = b"-----END X509 CRL-----"


@dataclass(frozen=True, slots=True)
class Trust:
    """A trust bundle. `sequence` rises with each change."""

    trust_domain: str
    sequence: int
    roots: tuple[bytes, ...] = field(repr=False)
    """DER."""
    revoked: frozenset[int]
    """Serial numbers."""
    jwt_keys: bytes = field(repr=False)
    """JWK set (RFC 7517), JSON; never empty."""
    crl: bytes = field(repr=False)
    """PEM, one for each issuer, or nothing."""
    crls_der: tuple[bytes, ...] = field(repr=False)
    certificates: tuple[x509.Certificate, ...] = field(repr=False, compare=False)
    """The roots, decoded."""

    @property
    def pem(self) -> bytes:
        """The roots."""
        return b"".join(root.public_bytes(Encoding.PEM) for root in self.certificates)

    def message(self) -> pb.TrustBundle:
        """What `decode` takes."""
        return pb.TrustBundle(
            trust_domain=self.trust_domain,
            sequence=self.sequence,
            roots=self.roots,
            revoked=[serial.to_bytes((serial.bit_length() + 7) // 8, "big") for serial in sorted(self.revoked)],
            jwt_keys=self.jwt_keys,
            crl=self.crl,
        )


def decode(message: pb.TrustBundle, trust_domain: str) -> Trust:
    """A bundle as it arrives. Raises ValueError if anything about it is wrong: then the one before stays."""
    if message.trust_domain != trust_domain:
        raise ValueError(
            f"the controller's trust domain is {message.trust_domain!r:.80}, this agent's is {trust_domain!r}: start it with --trust-domain"
        )
    if not 1 <= len(message.roots) <= MAX_ROOTS:
        raise ValueError(f"a trust bundle with {len(message.roots)} roots")
    roots = tuple(message.roots)
    if any(len(serial) > 20 for serial in message.revoked):  # RFC 5280, 4.1.2.2
        raise ValueError("a trust bundle that revokes a serial number of more than 20 bytes")
    crls = crl_list(message.crl)
    return Trust(
        trust_domain=trust_domain,
        sequence=message.sequence,
        roots=roots,
        revoked=frozenset(int.from_bytes(serial, "big") for serial in message.revoked),
        jwt_keys=_jwk_set(message.jwt_keys),
        crl=message.crl,
        crls_der=tuple(crl.public_bytes(Encoding.DER) for crl in crls),
        certificates=tuple(certificates.authority(root) for root in roots),
    )


def crl_list(pem: bytes) -> list[x509.CertificateRevocationList]:
    """The CRLs in PEM text. Raises ValueError."""
    *parts, rest = pem.split(_END)
    if rest.strip():
        raise ValueError("a CRL that is cut off, or something that is none")
    try:
        return [x509.load_pem_x509_crl(part.lstrip() + _END + b"\n") for part in parts]
    except Exception as error:
        raise ValueError(f"not a CRL: {type(error).__name__}") from error


def _jwk_set(text: bytes) -> bytes:
    if not text:
        return b'{"keys":[]}'
    jwks(text)
    return text


def jwks(text: bytes) -> list[Mapping[str, Any]]:
    """The keys in a JWK set (RFC 7517, 5). Raises ValueError."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JWT keys that are not JSON: {type(error).__name__}") from error
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, dict) for key in keys):
        raise ValueError("JWT keys that are no JWK set")
    if any("d" in key or "k" in key for key in keys):
        raise ValueError("JWT keys with a secret one among them")
    return keys
