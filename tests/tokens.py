"""Issuers of tokens (JWT, RFC 7519) for tests: real keys, real signatures, and every way to get them wrong."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature


def encoded(data: bytes) -> str:
    """Base64url without padding (RFC 7515, 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _json(value: object) -> str:
    return encoded(json.dumps(value, separators=(",", ":")).encode())


class Issuer:
    """Signs tokens with one key at a time."""

    def __init__(self, name: str, kid: str = "k1", algorithm: str = "ES256") -> None:
        self.name = name
        self.algorithm = algorithm
        self.rotate(kid)

    def rotate(self, kid: str) -> None:
        """Take a new key."""
        self.kid = kid
        self._key: Any = (
            ec.generate_private_key(ec.SECP256R1())
            if self.algorithm == "ES256"
            else rsa.generate_private_key(public_exponent=65537, key_size=2048)
        )

    @property
    def jwk(self) -> dict[str, str]:
        """The public key."""
        numbers = self._key.public_key().public_numbers()
        common = {"kid": self.kid, "alg": self.algorithm, "use": "sig"}
        if self.algorithm == "ES256":
            return {
                "kty": "EC",
                "crv": "P-256",
                "x": encoded(numbers.x.to_bytes(32, "big")),
                "y": encoded(numbers.y.to_bytes(32, "big")),
                **common,
            }
        return {"kty": "RSA", "n": encoded(numbers.n.to_bytes(256, "big")), "e": "AQAB", **common}

    @property
    def jwks(self) -> str:
        """The set of this key alone."""
        return json.dumps({"keys": [self.jwk]})

    def token(self, subject: str = "tom", *, lifetime_s: float = 300, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """A token; claims that are None are left out."""
        said = {"iss": self.name, "sub": subject, "exp": int(time.time() + lifetime_s), **claims}
        head = {"alg": self.algorithm, "typ": "JWT", "kid": self.kid, **(header or {})}
        signed = f"{_json(head)}.{_json({name: value for name, value in said.items() if value is not None})}"
        return f"{signed}.{encoded(self._sign(signed.encode()))}"

    def _sign(self, data: bytes) -> bytes:
        if self.algorithm == "ES256":
            r, s = decode_dss_signature(self._key.sign(data, ec.ECDSA(hashes.SHA256())))
            return r.to_bytes(32, "big") + s.to_bytes(32, "big")
        signature: bytes = self._key.sign(data, padding.PKCS1v15(), hashes.SHA256())
        return signature


def unsigned(token: str) -> str:
    """The same claims with algorithm "none" (RFC 7519, 6)."""
    return f"{_json({'alg': 'none', 'typ': 'JWT'})}.{token.split('.')[1]}."


def tampered(token: str, **claims: Any) -> str:
    """The same signature under other claims."""
    head, body, signature = token.split(".")
    said = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return f"{head}.{_json({**said, **claims})}.{signature}"
