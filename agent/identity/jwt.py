"""JWT-SVIDs: whether one is to be believed. Pure functions.

https://github.com/spiffe/spiffe/blob/main/standards/JWT-SVID.md; JWS compact serialization (RFC 7515, 3.1), algorithms and keys (RFC 7518, 3 and 6).
The algorithm is taken from the key, and the token's has to be the same: a token does not choose how it is checked.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

MAX_TOKEN: Final = 1 << 15
SKEW_S: Final = 60.0
"""How far clocks may differ: a token is believed so much longer, and so much earlier."""
_FORM: Final = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)", re.ASCII)
_HASHES: Final[Mapping[str, hashes.HashAlgorithm]] = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
_CURVES: Final[Mapping[str, tuple[str, ec.EllipticCurve, int]]] = {
    "P-256": ("ES256", ec.SECP256R1(), 32),
    "P-384": ("ES384", ec.SECP384R1(), 48),
    "P-521": ("ES512", ec.SECP521R1(), 66),
}


class UnknownKey(ValueError):
    """None of the keys that are known signed a token; others may be on their way."""


@dataclass(frozen=True, slots=True)
class Claims:
    """A token that was found good. `expires_at`: Unix seconds."""

    spiffe_id: str
    expires_at: float
    all: Mapping[str, Any]


def validate(token: str, audience: Sequence[str], keys: Sequence[Mapping[str, Any]], trust_domain: str, now: float) -> Claims:
    """Return what a token says to somebody in `audience`. Raises ValueError, without the token, if it is not to be believed."""
    if len(token) > MAX_TOKEN or (parts := _FORM.fullmatch(token)) is None:
        raise ValueError("not a JWT in compact serialization")
    header, claims = _object(parts[1]), _object(parts[2])
    if header.get("typ") not in {None, "JWT", "JOSE"} or "crit" in header:
        raise ValueError("not a JWT-SVID: its header has a type or an extension that none has")
    algorithm, signature = header.get("alg"), _decoded(parts[3])
    signed = f"{parts[1]}.{parts[2]}".encode()
    kid = header.get("kid")
    if not any(_signed_by(key, algorithm, signed, signature) for key in keys if kid is None or key.get("kid") == kid):
        raise UnknownKey("no key of the trust domain has signed it")
    return _claims(claims, audience, trust_domain, now)


def _claims(claims: Mapping[str, Any], audience: Sequence[str], trust_domain: str, now: float) -> Claims:
    subject, meant, end = claims.get("sub"), claims.get("aud"), claims.get("exp")
    prefix = f"spiffe://{trust_domain}/"
    if not isinstance(subject, str) or not subject.startswith(prefix) or subject == prefix:
        raise ValueError("its subject is no SPIFFE ID of this trust domain")
    listed = [meant] if isinstance(meant, str) else meant
    if not isinstance(listed, list) or not any(one in listed for one in audience):
        raise ValueError("it is meant for somebody else")
    if not isinstance(end, (int, float)) or not _number(end) or now >= end + SKEW_S:
        raise ValueError("it has expired, or never does")
    for early in ("nbf", "iat"):
        if early in claims and not (_number(claims[early]) and claims[early] - SKEW_S <= now):
            raise ValueError("it is not valid yet: does this node's clock agree with the controller's?")
    return Claims(subject, float(end), claims)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -(2**53) < value < 2**53


def _signed_by(key: Mapping[str, Any], algorithm: Any, signed: bytes, signature: bytes) -> bool:
    if key.get("alg") not in {None, algorithm} or key.get("use") not in {None, "sig", "jwt-svid"}:
        return False
    try:
        if key.get("kty") == "EC":
            return _signed_by_curve(key, algorithm, signed, signature)
        if key.get("kty") == "RSA":
            return _signed_by_rsa(key, algorithm, signed, signature)
    except (ValueError, TypeError, KeyError, InvalidSignature):
        return False
    return False


def _signed_by_curve(key: Mapping[str, Any], algorithm: Any, signed: bytes, signature: bytes) -> bool:
    """RFC 7518, 3.4 and 6.2: numbers of the curve's size, one after the other."""
    name, curve, size = _CURVES[key["crv"]]
    x, y = (int.from_bytes(_decoded(key[part]), "big") for part in "xy")
    if algorithm != name or len(signature) != 2 * size:
        return False
    pair = encode_dss_signature(int.from_bytes(signature[:size], "big"), int.from_bytes(signature[size:], "big"))
    ec.EllipticCurvePublicNumbers(x, y, curve).public_key().verify(pair, signed, ec.ECDSA(_HASHES[name[2:]]))
    return True


def _signed_by_rsa(key: Mapping[str, Any], algorithm: Any, signed: bytes, signature: bytes) -> bool:
    """RFC 7518, 3.3, 3.5 and 6.3."""
    if not isinstance(algorithm, str) or algorithm[:2] not in {"RS", "PS"}:
        return False
    digest = _HASHES[algorithm[2:]]
    public = rsa.RSAPublicNumbers(*(int.from_bytes(_decoded(key[part]), "big") for part in "en")).public_key()
    if public.key_size < 2048:
        return False
    padded = padding.PKCS1v15() if algorithm[0] == "R" else padding.PSS(padding.MGF1(digest), digest.digest_size)
    public.verify(signature, signed, padded, digest)
    return True


def _object(part: str) -> dict[str, Any]:
    try:
        found = json.loads(_decoded(part), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ValueError("not a JWT: a part of it is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError("not a JWT: a part of it is no object")  # noqa: TRY004  a parser's one error
    return found


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _decoded(part: Any) -> bytes:
    """base64url without padding (RFC 7515, 2)."""
    if not isinstance(part, str):
        raise ValueError("not base64url")  # noqa: TRY004  a parser's one error
    try:
        return base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise ValueError("not base64url") from None
