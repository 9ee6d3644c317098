"""jwt.json: the public keys of JWT-SVIDs of controllers that share a state. Each has keys of its own, which it never shows; agents believe all of them.

A controller signs with keys that stand here and with no others, so that nobody is given a token that some agents do not know the key of. One that finds its
keys gone, because somebody emptied the document, makes new ones.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from controller.identity import fields
from controller.identity.fields import BadState
from controller.identity.lapse import Clock
from controller.store import Documents, Store

FILE: Final = "jwt.json"
EMPTY: Final = '{"keys": []}\n'
MOST: Final = 256
"""Keys; of more the oldest go, which belong to controllers that are long gone."""
_FIELDS: Final = ("owner", "key", "until")
PublicKey = ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class Told:
    """One key, base64 of its SubjectPublicKeyInfo. `owner` is one run of a controller; `until` (Unix seconds): when it is forgotten unless told again."""

    owner: str
    key: str
    until: int


class SharedKeys:
    """The keys as one controller sees them. `tell` blocks."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._owner = uuid.uuid4().hex
        self._own: tuple[str, ...] = ()
        self._signature: object = None
        self._told: tuple[Told, ...] = ()
        self.others: tuple[PublicKey, ...] = ()
        """Keys of other controllers; the same object while they do not change."""

    @property
    def withdrawn(self) -> bool:
        """Were this controller's keys told, and are gone?"""
        if not self._own:
            return False
        self._read()
        return not any(told.owner == self._owner for told in self._told)

    def knows(self, key: PublicKey) -> bool:
        """True if agents of all controllers are told of this key of ours."""
        encoded = _encoded(key)
        return any((told.owner, told.key) == (self._owner, encoded) for told in self._told)

    def tell(self, keys: Sequence[PublicKey], keep_s: int) -> None:
        """Have all believe these keys of ours, for as long as this controller lives and `keep_s` more. Raises ControllerError."""
        self._read()
        now, own = int(self._clock()), tuple(_encoded(key) for key in keys)
        held = {told.key: told.until for told in self._told if told.owner == self._owner}
        if held.keys() != set(own) or min(held.values()) - now < keep_s:
            self._store.change(lambda documents: self._write(documents, [Told(self._owner, key, now + 2 * keep_s) for key in own], now))
            self._own = own
            self._read()

    def _write(self, documents: Documents, own: Sequence[Told], now: int) -> None:
        others = [told for told in self._parsed(documents.read(FILE)) if told.owner != self._owner and told.until > now]
        others.sort(key=lambda told: told.until)
        content = {"keys": [asdict(told) for told in [*others, *own][-MOST:]]}
        documents.write(FILE, json.dumps(content, indent=1) + "\n")

    def _read(self) -> None:
        signature = self._store.signature(FILE)
        if signature == self._signature and signature is not None:
            return
        self._told = tuple(self._parsed(self._store.read(FILE)))
        self._signature = signature
        keys = tuple(_decoded(text) for text in sorted({told.key for told in self._told if told.owner != self._owner}))
        if keys != self.others:
            self.others = keys

    def _parsed(self, content: bytes | None) -> list[Told]:
        if content is None:
            return []
        try:
            return parse(content)
        except BadState as error:
            raise fields.refuse(self._store.where(FILE), error, f"or write {EMPTY.strip()!r} there: controllers make new keys") from error


def parse(content: bytes) -> list[Told]:
    """Return what a jwt.json holds. Raises BadState."""
    return [_record(item) for item in fields.listed(fields.only(fields.parse(content), ("keys",)), "keys")]


def _record(item: Any) -> Told:
    record = fields.only(item, _FIELDS)
    told = Told(fields.field(record, "owner", str), fields.field(record, "key", str), fields.field(record, "until", int))
    _decoded(told.key)
    return told


def _encoded(key: PublicKey) -> str:
    return base64.b64encode(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()


def _decoded(text: str) -> PublicKey:
    try:
        key = load_der_public_key(base64.b64decode(text, validate=True))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadState("a public key cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadState("a public key is not ECDSA P-256")
    return key
