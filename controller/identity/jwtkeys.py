"""jwt.json: the public keys of JWT-SVIDs of controllers that share a state. Each has keys of its own, which it never shows; agents believe all of them.

A controller signs with keys that stand here and with no others, so that nobody is given a token that some agents do not know the key of. One that finds its
keys gone, because somebody emptied the document, makes new ones. `ca rotate --now` also says so in withdrawn.json, by a name that each such command makes
anew: a controller remembers in its own directory which one its keys are younger than, so that one that was away meanwhile makes new ones when it comes back.
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
from controller.identity.directory import Directory
from controller.identity.fields import BadState
from controller.identity.lapse import Clock
from controller.store import Documents, Store

FILE: Final = "jwt.json"
WITHDRAWN: Final = "withdrawn.json"
EMPTY: Final = '{"keys": []}\n'
MOST: Final = 256
"""Keys; of more those go whose controllers have lived for the shortest time."""
FIRST_S: Final = 600
"""For how long keys are believed, beyond the tokens that they sign, of a controller that has just begun. One that begins again and again leaves few behind."""
_FIELDS: Final = ("owner", "key", "until")
PublicKey = ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class Told:
    """One key, base64 of its SubjectPublicKeyInfo. `owner` is one run of a controller; `until` (Unix seconds): when it is forgotten unless told again."""

    owner: str
    key: str
    until: int


class SharedKeys:
    """The keys as one controller sees them. What takes or gives documents blocks, and raises ControllerError."""

    def __init__(self, store: Store, own: Directory, clock: Clock, monotonic: Clock) -> None:
        """`own`: where this controller has its keys."""
        self._store, self._directory, self._clock, self._monotonic = store, own, clock, monotonic
        self._owner = uuid.uuid4().hex
        self._own: tuple[str, ...] = ()
        self._began = monotonic()
        self._signature: object = None
        self._told: tuple[Told, ...] = ()
        self._answered: str | None = None
        """The withdrawal that our keys are younger than; None: it was not read yet."""
        self.others: tuple[PublicKey, ...] = ()
        """Keys of other controllers; the same object while they do not change."""

    def withdrawn(self) -> str | None:
        """Must this controller make new keys? Returns what `renewed` is to be told then, "" too."""
        self._read()
        if self._answered is None:
            self._answered = self._noted()
        current = _withdrawal(self._store, self._store)
        if current not in {"", self._answered}:
            return current
        return current if self._own and not any(told.owner == self._owner for told in self._told) else None

    def _noted(self) -> str:
        """Return what `renewed` has noted; what cannot be read is nothing, and then new keys are made."""
        try:
            return parse_withdrawal(self._directory.read(WITHDRAWN) or b"")
        except BadState:
            return ""

    def renewed(self, withdrawal: str) -> None:
        """Note, over restarts, that this controller's keys are younger than that withdrawal."""
        self._directory.change(lambda documents: documents.write(WITHDRAWN, _said(withdrawal)))
        self._answered, self._own = withdrawal, ()

    def knows(self, key: PublicKey) -> bool:
        """True if agents of all controllers are told of this key of ours."""
        encoded = _encoded(key)
        return any((told.owner, told.key) == (self._owner, encoded) for told in self._told)

    def tell(self, keys: Sequence[PublicKey], tokens_s: int, longest_s: int) -> None:
        """Have all believe these keys of ours: for as long as this controller lives, and afterwards for `longest_s`, or less if it has not lived that long.

        `tokens_s`: how long tokens are good, for which they are believed in any case.
        """
        self._read()
        keep_s = min(longest_s, max(tokens_s + FIRST_S, int(self._monotonic() - self._began)))
        now, own = int(self._clock()), tuple(_encoded(key) for key in keys)
        held = {told.key: told.until for told in self._told if told.owner == self._owner}
        if held.keys() != set(own) or min(held.values()) - now < keep_s:
            if self._store.change(lambda documents: self._write(documents, [Told(self._owner, key, now + 2 * keep_s) for key in own], now)):
                self._own = own
            self._read()

    def _write(self, documents: Documents, own: Sequence[Told], now: int) -> bool:
        """Returns False if our keys have been withdrawn meanwhile."""
        if _withdrawal(documents, self._store) not in {"", self._answered}:
            return False
        mine = {told.key for told in own}  # of an earlier run, too
        others = [
            told for told in self._parsed(documents.read(FILE)) if told.owner != self._owner and told.key not in mine and told.until > now
        ]
        others.sort(key=lambda told: told.until)
        content = {"keys": [asdict(told) for told in [*others, *own][-MOST:]]}
        documents.write(FILE, json.dumps(content, indent=1) + "\n")
        return True

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


def withdraw(store: Store) -> None:
    """Let nobody believe any key that there is; every controller makes new ones, also one that is not running. Raises ControllerError."""

    def work(documents: Documents) -> None:
        documents.write(FILE, EMPTY)
        documents.write(WITHDRAWN, _said(uuid.uuid4().hex))

    store.change(work)


def _said(withdrawal: str) -> str:
    return json.dumps({"withdrawal": withdrawal}) + "\n"


def _withdrawal(documents: Documents | Store, store: Store) -> str:
    """Return the name of the last withdrawal; "" if there was none."""
    content = documents.read(WITHDRAWN)
    if content is None:
        return ""
    try:
        return parse_withdrawal(content)
    except BadState as error:
        raise fields.refuse(store.where(WITHDRAWN), error, "or `mesh-controller ca rotate --now`, which writes it anew") from error


def parse_withdrawal(content: bytes) -> str:
    """Return the name that a withdrawn.json holds. Raises BadState."""
    return fields.field(fields.only(fields.parse(content), ("withdrawal",)), "withdrawal", str)


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
