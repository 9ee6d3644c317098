"""JSON Web Tokens for benchmarks: an issuer with one key. Called by `bench.l7`."""

from __future__ import annotations

import json
import time
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

LIFE_S = 86_400
_BYTES = 32  # of a coordinate, and of half a signature, of P-256 (RFC 7518, 3.4)


@dataclass(frozen=True, slots=True)
class Issuer:
    """`algorithm` is RS256 (2,048 bits) or ES256 (RFC 7518, 3.1)."""

    name: str
    algorithm: str
    _rsa: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048), repr=False)
    _ec: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()), repr=False)

    @property
    def jwks(self) -> str:
        """The public key as a set (RFC 7517, 5)."""
        if self.algorithm == "RS256":
            numbers = self._rsa.public_key().public_numbers()
            key = {"kty": "RSA", "n": _text(_number(numbers.n, 256)), "e": _text(_number(numbers.e, 3))}
        else:
            point = self._ec.public_key().public_numbers()
            key = {"kty": "EC", "crv": "P-256", "x": _text(_number(point.x, _BYTES)), "y": _text(_number(point.y, _BYTES))}
        return json.dumps({"keys": [{**key, "kid": "k", "alg": self.algorithm, "use": "sig"}]})

    def token(self, subject: str) -> str:
        """A token that is good for a day."""
        now = int(time.time())
        claims: dict[str, Any] = {"iss": self.name, "sub": subject, "iat": now, "exp": now + LIFE_S}
        parts = ({"alg": self.algorithm, "kid": "k", "typ": "JWT"}, claims)
        signed = ".".join(_text(json.dumps(part).encode()) for part in parts)
        if self.algorithm == "RS256":
            signature = self._rsa.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        else:
            r, s = decode_dss_signature(self._ec.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
            signature = _number(r, _BYTES) + _number(s, _BYTES)
        return f"{signed}.{_text(signature)}"


def _number(value: int, size: int) -> bytes:
    return value.to_bytes(size, "big")


def _text(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
