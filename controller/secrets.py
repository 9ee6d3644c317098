"""Certificates of gateways out of Secrets of type kubernetes.io/tls. Used by `controller.gateways`; nothing it says quotes what a Secret holds.

https://kubernetes.io/docs/concepts/configuration/secret/#tls-secrets; `stringData` wins over `data`, as in the API server.
"""

from __future__ import annotations

import base64
import datetime as dt
import functools
import itertools
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from controller.objects import Object

CERTIFICATE: Final = "tls.crt"
KEY: Final = "tls.key"
MOST_CERTIFICATES: Final = 10
LEAST_RSA_BITS: Final = 2048  # Envoy refuses less: https://www.envoyproxy.io/docs/envoy/v1.40.0/intro/arch_overview/security/ssl
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)  # the same


@dataclass(frozen=True, slots=True)
class Pair:
    """A chain, the leaf first, and its key: PEM, written anew, so that it holds nothing else."""

    chain: bytes
    key: bytes = field(repr=False)
    begins: dt.datetime
    ends: dt.datetime


class Unfit(Exception):
    """A Secret that is no certificate to serve; the text says why, without its content. `until`: it will be one then."""

    def __init__(self, text: str, until: dt.datetime | None = None) -> None:
        super().__init__(text)
        self.until = until


def pair(secret: Object, now: dt.datetime) -> Pair:
    """Return what a Secret holds. Raises Unfit, also if it does not hold at `now`."""
    found = _pair(_entry(secret, CERTIFICATE), _entry(secret, KEY))
    if isinstance(found, str):
        raise Unfit(found)
    if now > found.ends:
        raise Unfit(f"its certificate ran out at {found.ends:%Y-%m-%d %H:%M:%S} UTC")
    if now < found.begins:
        raise Unfit(f"its certificate does not hold before {found.begins:%Y-%m-%d %H:%M:%S} UTC: compare the clocks", found.begins)
    return found


def _entry(secret: Object, name: str) -> bytes:
    plain = (secret.data.get("stringData") or {}).get(name)
    if plain is not None:
        return str(plain).encode()
    encoded = (secret.data.get("data") or {}).get(name)
    if encoded is None:
        raise Unfit(f"it has no {name}")
    try:
        return base64.b64decode("".join(str(encoded).split()), validate=True)
    except ValueError:
        raise Unfit(f"its {name} is not base64: write PEM under stringData") from None


@functools.lru_cache(maxsize=256)
def _pair(certificate: bytes, key: bytes) -> Pair | str:  # noqa: PLR0911 - one for each thing that may be wrong
    """Return what the two are, or what is wrong. What libraries say may quote what they read: it is dropped."""
    try:
        chain = x509.load_pem_x509_certificates(certificate)
        held = [(one.not_valid_before_utc, one.not_valid_after_utc) for one in chain]
    except Exception:  # noqa: BLE001
        return f"its {CERTIFICATE} is no PEM certificate"
    if len(chain) > MOST_CERTIFICATES:
        return f"its {CERTIFICATE} has {len(chain)} certificates; at most {MOST_CERTIFICATES} are allowed"
    try:
        private = load_pem_private_key(key, None)
    except Exception:  # noqa: BLE001
        return f"its {KEY} is no unencrypted PEM key"
    public = private.public_key()
    known = (isinstance(public, rsa.RSAPublicKey) and public.key_size >= LEAST_RSA_BITS) or (
        isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, _CURVES)
    )
    if not known:
        return f"its {KEY} is neither RSA of at least {LEAST_RSA_BITS} bits nor ECDSA over P-256, P-384 or P-521"
    try:
        if chain[0].public_key() != public:
            return f"its {KEY} is not that of the first certificate in {CERTIFICATE}"
        for one, above in itertools.pairwise(chain):
            one.verify_directly_issued_by(above)
    except Exception:  # noqa: BLE001
        return f"the certificates in {CERTIFICATE} are no chain: each must be signed by the next, the server's first"
    return Pair(
        b"".join(one.public_bytes(Encoding.PEM) for one in chain),
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        max(begins for begins, _ in held),
        min(ends for _, ends in held),
    )
