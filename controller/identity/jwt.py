"""JWT-SVIDs (https://github.com/spiffe/spiffe/blob/main/standards/JWT-SVID.md): ES256 tokens and the JWK set that verifies them. Pure.

Made with `cryptography` alone: one algorithm, one header, and nothing is parsed here, which is where JOSE libraries go wrong.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from controller.identity.refusals import Refused

MAX_AUDIENCES: Final = 16
MAX_AUDIENCE_CHARS: Final = 2048


def check_audience(audience: Sequence[str]) -> None:
    """Raise Refused unless there is at least one audience and none is empty or overlong (JWT-SVID, 3.2)."""
    if not audience:
        raise Refused("audience", "a JWT-SVID needs an audience: say who is to believe it")
    if len(audience) > MAX_AUDIENCES or not all(0 < len(name) <= MAX_AUDIENCE_CHARS for name in audience):
        raise Refused("audience", f"at most {MAX_AUDIENCES} audiences of 1 to {MAX_AUDIENCE_CHARS} characters")


def sign(key: ec.EllipticCurvePrivateKey, spiffe_id: str, audience: Sequence[str], issued_at: int, expires_at: int) -> str:
    """Return a JWT-SVID in compact serialization (RFC 7515, 3.1). Times are Unix seconds."""
    header = {"alg": "ES256", "kid": key_id(key.public_key()), "typ": "JWT"}
    claims = {"sub": spiffe_id, "aud": list(audience), "iat": issued_at, "exp": expires_at}
    signed = f"{_encode(json.dumps(header).encode())}.{_encode(json.dumps(claims).encode())}"
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{_encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"  # RFC 7518, 3.4: r and s side by side, not DER


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """Return the thumbprint of a key (RFC 7638): SHA-256 over its required members in lexicographic order."""
    members = json.dumps(_members(key), sort_keys=True, separators=(",", ":"))
    return _encode(hashlib.sha256(members.encode()).digest())


def key_set(keys: Iterable[ec.EllipticCurvePublicKey]) -> bytes:
    """Return a JWK set (RFC 7517) as JWT-SVID, 6.1, wants it: `use` is jwt-svid and every key has a `kid`."""
    found = [{**_members(key), "kid": key_id(key), "use": "jwt-svid"} for key in keys]
    return json.dumps({"keys": sorted(found, key=lambda item: item["kid"])}, sort_keys=True).encode()


def _members(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    point = key.public_numbers()
    return {"kty": "EC", "crv": "P-256", "x": _encode(point.x.to_bytes(32, "big")), "y": _encode(point.y.to_bytes(32, "big"))}


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
