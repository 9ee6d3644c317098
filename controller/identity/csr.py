"""Certificate signing requests (PKCS #10, RFC 2986) from agents: outside bytes, of which only the key is believed. Called by the services."""

from __future__ import annotations

from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from controller.identity.refusals import Refused

MAX_BYTES: Final = 4096  # a P-256 request without extensions has some 200
_HASHES: Final = frozenset({"sha256", "sha384", "sha512"})
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


def public_key(der: bytes) -> ec.EllipticCurvePublicKey:
    """Return the P-256 key of a request that is signed with it and asks for nothing else. Raises Refused, which says what is wrong.

    A subject is not looked at. Attributes (RFC 2986, 4.1: extensions among them, and so every subject alternative name) are refused instead of
    ignored: who sends them expects something that it would not get.
    """
    if len(der) > MAX_BYTES:
        raise Refused("csr-size", f"the CSR has {len(der)} bytes; more than {MAX_BYTES} are not read")
    try:
        request = x509.load_der_x509_csr(der)
        key = request.public_key()
        attributes = len(list(request.attributes))
        algorithm = request.signature_hash_algorithm
    except _UNREADABLE as error:
        raise Refused("csr-garbage", "the CSR cannot be read: it must be PKCS #10 in DER with a P-256 key") from error
    if attributes:
        raise Refused(
            "csr-extensions", "the CSR has attributes or extensions (names, usages): leave them out, the identity follows from the model"
        )
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Refused("csr-key", "the CSR's key must be ECDSA P-256 (secp256r1)")
    if algorithm is None or algorithm.name not in _HASHES:
        raise Refused("csr-signature", "the CSR must be signed with SHA-256, SHA-384 or SHA-512")
    try:
        valid = request.is_signature_valid
    except _UNREADABLE:
        valid = False
    if not valid:
        raise Refused(
            "csr-signature", "the CSR is not signed with its own key: who sent it does not have the key, or it was changed on its way"
        )
    return key
