"""X.509-SVIDs: what one says, and whether it is to be believed. Pure functions.

https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md, sections 2 to 5. Anything wrong is a ValueError, whatever the parser raised.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

MAX_CHAIN: Final = 8
"""More certificates than any authority needs between a leaf and its root."""
MAX_BYTES: Final = 1 << 16
SKEW_S: Final = 60.0
"""How much earlier than the authority's a clock may be: what is not valid yet for so long is taken as valid."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A leaf and what leads to its root, decoded. Times: Unix seconds."""

    der: tuple[bytes, ...] = field(repr=False)
    """Leaf first, without the root."""
    spiffe_id: str
    serial: int
    not_before: float
    not_after: float
    public: bytes = field(repr=False)
    """The leaf's SubjectPublicKeyInfo, DER."""
    certificates: tuple[x509.Certificate, ...] = field(repr=False, compare=False)

    @property
    def pem(self) -> bytes:
        """All of it, leaf first."""
        return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in self.certificates)


def read(der: Iterable[bytes]) -> Chain:
    """Decode a chain, leaf first. Raises ValueError if it is none, or if its leaf is no X.509-SVID."""
    chain = tuple(der)
    if not 1 <= len(chain) <= MAX_CHAIN:
        raise ValueError(f"a chain of {len(chain)} certificates")
    certificates = tuple(certificate(one) for one in chain)
    leaf = certificates[0]
    try:
        return Chain(
            chain,
            _spiffe_id(leaf),
            leaf.serial_number,
            leaf.not_valid_before_utc.timestamp(),
            leaf.not_valid_after_utc.timestamp(),
            leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            certificates,
        )
    except Exception as error:
        raise ValueError(f"not an X.509-SVID: {_words(error)}") from error


def certificate(der: bytes) -> x509.Certificate:
    """Decode one certificate. Raises ValueError."""
    if len(der) > MAX_BYTES:
        raise ValueError(f"a certificate of {len(der)} bytes")
    try:
        return x509.load_der_x509_certificate(der)
    except Exception as error:
        raise ValueError(f"not a certificate: {_words(error)}") from error


def authority(der: bytes) -> x509.Certificate:
    """Decode one certificate that may sign others. Raises ValueError."""
    found = certificate(der)
    if not _signs(found):
        raise ValueError("a root that is no certificate authority")
    return found


def verify(chain: Chain, roots: Sequence[x509.Certificate], now: float) -> None:
    """Raise ValueError unless one of `roots` vouches for the chain at `now` (Unix seconds). Revocation is the caller's business."""
    if not chain.not_before - SKEW_S <= now < chain.not_after:
        when = "has ended" if now >= chain.not_after else "is not valid yet"
        raise ValueError(f"the certificate {when}: does this node's clock agree with the controller's?")
    above = chain.certificates[1:]
    for one in above:
        if not _signs(one) or not one.not_valid_before_utc.timestamp() - SKEW_S <= now < one.not_valid_after_utc.timestamp():
            raise ValueError("an intermediate that may not sign, or not now")
    if not all(issued(below, issuer) for below, issuer in itertools.pairwise(chain.certificates)):
        raise ValueError("a certificate of the chain did not sign the one before it")
    current = [root for root in roots if root.not_valid_after_utc.timestamp() > now]
    if not any(issued(chain.certificates[-1], root) for root in current):
        raise ValueError("no trusted root has signed it")


def ceiling(chain: Chain, roots: Iterable[x509.Certificate]) -> x509.Certificate | None:
    """What ends first of all that stands above the leaf, which no leaf outlives: an intermediate, or the root if that signs leaves; None if it is not known."""
    above = chain.certificates[1:] or [root for root in roots if root.subject == chain.certificates[0].issuer]
    return min(above, key=lambda one: one.not_valid_after_utc, default=None)


def issued(below: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Did the key of `issuer` sign `below`, whose issuer has its name?"""
    try:
        below.verify_directly_issued_by(issuer)
    except Exception:  # noqa: BLE001  another name, another key, a wrong signature, an unknown algorithm: all mean no
        return False
    return True


def _signs(found: x509.Certificate) -> bool:
    try:
        return found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except Exception:  # noqa: BLE001  absent or malformed: no authority
        return False


def _spiffe_id(leaf: x509.Certificate) -> str:
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.UniformResourceIdentifier)
    if len(names) != 1:
        raise ValueError(f"it has {len(names)} URI names and must have one")
    if not names[0].startswith("spiffe://") or not names[0].removeprefix("spiffe://").partition("/")[2]:
        raise ValueError("its URI name is no SPIFFE ID of a workload")
    if leaf.serial_number <= 0:  # RFC 5280, 4.1.2.2
        raise ValueError("its serial number is not positive")
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    if _signs(leaf) or usage.key_cert_sign or usage.crl_sign or not usage.digital_signature:
        raise ValueError("it may sign certificates, or may not sign anything else")
    return names[0]


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
