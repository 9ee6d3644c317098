"""Join tokens: made by `mesh-controller token`, used once by a node that joins. The only owner of tokens.json.

What is kept is the SHA-256 of the secret, neither salted nor slow: salt and work factors protect secrets that people choose and that can therefore be
guessed; of 256 random bits no two are alike and none is guessed (NIST SP 800-63B, 5.1.2.2, asks for salt below 112 bits only). The list is what is
allowed: an entry that is lost lets nobody in.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from controller.errors import ControllerError
from controller.identity import fields
from controller.identity.directory import TOKENS
from controller.identity.fields import BadState
from controller.identity.lapse import Clock
from controller.identity.names import SHOWN
from controller.identity.refusals import Refused
from controller.store import Documents, Store
from meshapi.join import Token, parse

SECRET_BYTES: Final = 32
DEFAULT_LIFETIME_S: Final = 3600
MAX_LIFETIME_S: Final = 7 * 86_400  # a token that lies about for longer is better made when it is needed
KEPT_S: Final = 7 * 86_400  # used and expired tokens stay in the list, so that people see what became of them
MAX_TOKENS: Final = 10_000
MOST_SHARED: Final = 256 << 10  # bytes of the list where several controllers share it, with much else
MAX_TEXT: Final = 1024
JOINING_S: Final = 60
_FIELDS: Final = ("hash", "node", "root", "created", "expires", "used", "used_by", "lapsed")


@dataclass(frozen=True, slots=True)
class Record:
    """One token without its secret. Times are Unix seconds; `node` "" allows any node; `root` is the hash that the token's text carries.

    `lapsed`: was seen to have expired. It stays so even if the clock is set back.
    """

    hash: str
    node: str
    root: str
    created: int
    expires: int
    used: int = 0
    used_by: str = ""
    lapsed: bool = False

    @property
    def id(self) -> str:
        """How people name the token: the first 12 digits of its hash; proves nothing."""
        return self.hash[:12]

    def state(self, now: float) -> str:
        """Return "used", "expired" or "valid"."""
        if self.used:
            return "used"
        return "expired" if self.lapsed or self.expires <= now else "valid"


class TokenStore:
    """The tokens of one authority; every change is read, made and written while nobody else makes one. All methods block."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._read: tuple[Hashable, list[Record]] | None = None

    def create(self, node: str, lifetime_s: int, root: str) -> tuple[Token, Record]:
        """Make a token for one node, or for any ("")."""
        token = Token(secrets.token_bytes(SECRET_BYTES), root)
        now = int(self._clock())
        record = Record(_hash(token), node, root, now, now + lifetime_s)

        def work(documents: Documents) -> None:
            records = [item for item in self._parsed(documents.read(TOKENS)) if item.expires + KEPT_S > now]
            if len(records) >= MAX_TOKENS:
                raise ControllerError(
                    f"there are {len(records)} tokens: revoke some (mesh-controller token list), or wait until they expire"
                )
            _write(documents, [*self._trimmed(records, now), record])

        self._store.change(work)
        return token, record

    def _trimmed(self, records: list[Record], now: float) -> list[Record]:
        """Leave out what is there for people to look at, the oldest first, where the list would be too long to share. Raises ControllerError."""
        size, left = len(_text(records)) if not self._store.alone else 0, set()
        spent = [item for item in records if item.state(now) != "valid" and now - item.used >= JOINING_S]
        for item in sorted(spent, key=lambda item: item.expires):
            if size <= MOST_SHARED:
                break
            size -= len(_text([item])) - len(_text([]))
            left.add(item.hash)
        if size > MOST_SHARED:
            raise ControllerError(
                f"there are {len(records) - len(left)} tokens that may still be used, and no room for more than {MOST_SHARED >> 10} KiB of them: revoke some "
                "(mesh-controller token list), or wait until they expire"
            )
        return [item for item in records if item.hash not in left]

    def all(self) -> list[Record]:
        """Return every token. Raises ControllerError if the file cannot be believed."""
        signature, read = self._store.signature(TOKENS), self._read
        if signature is not None and read is not None and read[0] == signature:
            return list(read[1])  # every version of the file is another file
        records = self._parsed(self._store.read(TOKENS))
        self._read = (signature, records) if signature is not None and signature == self._store.signature(TOKENS) else None
        return list(records)

    def revoke(self, identifier: str) -> Record:
        """Remove a token by its id, or a longer beginning of its hash."""

        def work(documents: Documents) -> Record:
            records = self._parsed(documents.read(TOKENS))
            found = [record for record in records if len(identifier) >= 4 and record.hash.startswith(identifier.lower())]
            if len(found) != 1:
                raise ControllerError(
                    f"{len(found) or 'no'} token{'s' if len(found) != 1 else ''} with the id {identifier[:SHOWN]!r}: "
                    "`mesh-controller token list` shows them; give the id, not the token"
                )
            _write(documents, [record for record in records if record is not found[0]])
            return found[0]

        return self._store.change(work)

    def reserve(self, text: str, node: str) -> Record:
        """Use a token up for a node, durably, before anything is given for it; of many concurrent uses one gets through. Raises Refused."""
        if len(text) > MAX_TEXT:
            raise Refused("token", f"the join token has more than {MAX_TEXT} characters: it was damaged on its way")
        try:
            wanted = _hash(parse(text))
        except ValueError as error:
            raise Refused("token", str(error)) from error
        if not any(record.hash == wanted for record in self.all()):  # strangers who guess get no further
            raise _unknown()
        found = self._store.change(lambda documents: self._reserved(documents, wanted, node))
        if isinstance(found, Refused):
            raise found
        return found

    def _reserved(self, documents: Documents, wanted: str, node: str) -> Record | Refused:
        records, now = self._parsed(documents.read(TOKENS)), self._clock()
        record = next((item for item in records if item.hash == wanted), None)
        if record is None:
            return _unknown()
        if record.used:
            return Refused(
                "token-used",
                f"join token {record.id} was used {_ago(now - record.used)} by node {record.used_by}, and a token is good for one join: make a new one; "
                "if that was not you, revoke that node's certificate (mesh-controller ca revoke)",
            )
        if record.state(now) != "valid":
            _write(documents, _lapsed(records, now))
            return Refused(
                "token-expired", f"join token {record.id} expired {_ago(now - record.expires)}: make a new one (token create --ttl)"
            )
        if record.node not in {"", node}:
            return Refused(
                "token-node", f"join token {record.id} is for node {record.node}, not for {node}: check --node, or make another token"
            )
        if not record.node and not self._store.alone and any(_joining(item, node, now) for item in records):
            return Refused(
                "join-concurrent",
                f"node {node} has joined within the last {JOINING_S} s, or is joining, with another token: wait for that one",
            )
        reserved = replace(record, used=max(1, int(now)), used_by=node)
        _write(documents, [reserved if item is record else item for item in records])
        return reserved

    def release(self, reserved: Record) -> None:
        """Give a token back for which nothing was given."""
        fresh = replace(reserved, used=0, used_by="")

        def work(documents: Documents) -> None:
            _write(documents, [fresh if item == reserved else item for item in self._parsed(documents.read(TOKENS))])

        self._store.change(work)

    def lapse(self) -> None:
        """Remember which tokens have expired by now."""
        now = self._clock()
        if any(not record.lapsed and record.expires <= now for record in self.all()):
            self._store.change(lambda documents: _write(documents, _lapsed(self._parsed(documents.read(TOKENS)), now)))

    def _parsed(self, content: bytes | None) -> list[Record]:
        if content is None:
            return []
        try:
            return parse_records(content)
        except BadState as error:
            loss = (
                "or delete it: tokens that were not used yet are then void, nothing else is lost (a backup would make used ones good again)"
            )
            raise fields.refuse(self._store.where(TOKENS), error, loss) from error


def _joining(record: Record, node: str, now: float) -> bool:
    """Is a controller giving this node its first certificate, or has it a moment ago? What it gives others may not have read yet."""
    return not record.node and record.used_by == node and 0 <= now - record.used < JOINING_S


def _lapsed(records: Iterable[Record], now: float) -> list[Record]:
    return [replace(record, lapsed=True) if record.expires <= now else record for record in records]


def _write(documents: Documents, records: Iterable[Record]) -> None:
    documents.write(TOKENS, _text(records))


def _text(records: Iterable[Record]) -> str:
    content = {"tokens": [{name: getattr(record, name) for name in _FIELDS} for record in records]}
    return json.dumps(content, indent=1) + "\n"


def parse_records(content: bytes) -> list[Record]:
    """Return what a tokens.json holds. Raises BadState."""
    return [_record(item) for item in fields.listed(fields.only(fields.parse(content), ("tokens",)), "tokens")]


def _record(item: Any) -> Record:
    record = fields.only(item, _FIELDS)
    hashed, node, root, used_by = (fields.field(record, name, str) for name in ("hash", "node", "root", "used_by"))
    created, expires, used = (fields.field(record, name, int) for name in ("created", "expires", "used"))
    if len(hashed) != 64:
        raise BadState("a token's hash does not have 64 digits")
    return Record(hashed, node, root, created, expires, used, used_by, fields.field(record, "lapsed", bool))


def _unknown() -> Refused:
    return Refused("token-unknown", "this controller does not know the join token: it was revoked, or made for another one; make a new one")


def _hash(token: Token) -> str:
    return hashlib.sha256(token.secret).hexdigest()


def _ago(seconds: float) -> str:
    seconds = max(0, int(seconds))
    if seconds < 120:
        return f"{seconds} s ago"
    return f"{seconds // 60} min ago" if seconds < 7200 else f"{seconds // 3600} h ago"
