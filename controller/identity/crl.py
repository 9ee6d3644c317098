"""The revocation lists that go with a trust bundle: one for each issuer that may have signed what is still in force. Used by the authority.

Envoy believes nobody whose issuer has no list, or one that has run out, as soon as there is any list. So every issuer has one from the first moment, also
while nothing is revoked; it outlives everything that its issuer signs, also if the controller is away for so long; and the list of an issuer that was
replaced (an operator's intermediate) is kept: in memory with the key, so that more can be revoked, and in lists.json as it was signed last. The key of an
operator is written nowhere. If more was revoked since and the key is gone, the list is left out: then Envoy believes nothing of that issuer.

Several controllers come to the same lists: each takes what another has signed if it says as much and holds for longer, so that what one of them can still
sign for a former issuer all of them have.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from controller.identity import fields
from controller.identity.certificates import BACKDATE_S, Issuer, new_crl
from controller.identity.directory import LISTS
from controller.identity.fields import BadState
from controller.identity.lapse import Lapse
from controller.identity.revocations import Revoked
from controller.store import Documents, Store
from meshapi.join import root_hash

_log = logging.getLogger(__name__)

LIFETIME_S: Final = 14 * 86_400  # at least
SPARE_S: Final = 2 * BACKDATE_S  # by which a list outlives certificates: clocks differ, and maintenance may be late
_LOSS: Final = "or delete it: Envoy then believes nothing that a former --ca-cert signed, if anything is revoked"
_FIELDS: Final = ("issuer", "crl")
_Name: TypeAlias = tuple[str, x509.Name]
"""Hash of the key and subject: the same key may sign under another subject, and lists are found by that."""


@dataclass(frozen=True, slots=True)
class SignedList:
    """A list as it was signed. Times are Unix seconds."""

    issuer: str
    crl: str = field(repr=False)
    subject: x509.Name
    serials: frozenset[int]
    since: float
    until: float


class RevocationLists:
    """The lists as they were signed last. Used in one thread."""

    def __init__(self, store: Store, lapse: Lapse) -> None:
        self._store, self._lapse = store, lapse
        self._lists: dict[_Name, SignedList] = {}
        self._issuers: dict[_Name, Issuer] = {}
        self._stored: list[SignedList] = []
        self._left_out: set[_Name] = set()
        self._dropped: set[_Name] = set()
        """Lists that have run out."""
        self._theirs: dict[_Name, SignedList] = {}
        """As other controllers have stored them."""
        self._version: object = None
        self._wanted: dict[_Name, frozenset[int]] = {}
        """What each list must name."""
        self._now = 0.0
        self._pem = b""

    def load(self) -> None:
        """Read the lists that an earlier controller signed. Raises ControllerError."""
        self._stored = self._parsed(self._store.read(LISTS))
        self._lists = {(found.issuer, found.subject): found for found in self._stored}

    def read(self) -> None:
        """Read what other controllers have signed since. Raises ControllerError; then what was known is used."""
        if self._store.alone or (version := self._store.signature(LISTS)) == self._version:
            return
        self._theirs = self._others(self._store.read(LISTS))
        self._version = version

    def _others(self, content: bytes | None) -> dict[_Name, SignedList]:
        """Return the lists in a document that may be of use."""
        found = {(one.issuer, one.subject): one for one in self._parsed(content)}
        return {name: one for name, one in found.items() if name not in self._dropped and self._genuine(name, one)}

    def _genuine(self, name: _Name, found: SignedList) -> bool:
        """Has the issuer signed it? Of one that is not known here, Envoy will say so."""
        issuer = self._issuers.get(name)
        crl = x509.load_pem_x509_crl(found.crl.encode())
        return issuer is None or crl.is_signature_valid(issuer.key.public_key())

    def _rank(self, name: _Name, found: SignedList) -> tuple[object, ...]:
        """The greatest of several lists of an issuer is the one to show: every controller chooses the same."""
        return (self._wanted.get(name, frozenset()) <= found.serials, found.since <= self._now, found.until, found.since, found.crl)

    def save(self) -> None:
        """Keep the lists for the next controller, if they have changed. Raises ControllerError."""
        held = list(self._lists.values())
        if held != self._stored:
            self._store.change(self._write)
            self._stored = held

    def _write(self, documents: Documents) -> None:
        lists = self._lists
        if not self._store.alone:  # others may have signed for issuers that this controller has never known
            theirs = self._others(documents.read(LISTS))
            lists = theirs | {
                name: max(found, theirs.get(name, found), key=lambda one: self._rank(name, one)) for name, found in lists.items()
            }
        content = {"lists": [{name: getattr(found, name) for name in _FIELDS} for found in lists.values()]}
        documents.write(LISTS, json.dumps(content, indent=1) + "\n")

    def _parsed(self, content: bytes | None) -> list[SignedList]:
        try:
            return parse(content) if content is not None else []
        except BadState as error:
            raise fields.refuse(self._store.where(LISTS), error, _LOSS) from error

    def current(self, issuers: Sequence[Issuer], revoked: Mapping[str, Revoked], now: float, longest_s: int) -> bytes:
        """Return the lists, PEM; the same bytes while nothing changes. Nothing if nothing is revoked, or if the keys are elsewhere.

        `longest_s`: how long certificates live at most. A certificate whose issuer is not known is in every list.
        """
        signing = {(root_hash(issuer.certificate), issuer.certificate.subject): issuer for issuer in issuers}
        self._issuers |= signing
        self._dropped -= signing.keys()  # one that signs again
        self._now = now
        for name in self._issuers.keys() | self._lists.keys() | self._theirs.keys():
            self._follow(name, revoked, now, longest_s + SPARE_S if name in signing else 0)
        shown = (found.crl for name, found in sorted(self._lists.items(), key=lambda item: item[0][0]) if name not in self._left_out)
        pem = "".join(shown).encode() if revoked and issuers else b""
        if pem != self._pem:
            self._pem = pem
        return self._pem

    def _follow(self, name: _Name, revoked: Mapping[str, Revoked], now: float, lasts_s: int) -> None:
        """Sign one issuer's list anew if that is needed. `lasts_s`: for how long it must be good; 0 if the issuer signs no more: as long as it was."""
        entries = {int(record.serial, 16): record.at for record in revoked.values() if record.issuer in {"", name[0]}}
        held, issuer, theirs = self._lists.get(name), self._issuers.get(name), self._theirs.get(name)
        self._wanted[name] = frozenset(entries)
        if theirs is not None and (held is None or self._rank(name, theirs) > self._rank(name, held)):
            held = self._lists[name] = theirs
        if held is None or (lasts_s and (held.until - now < lasts_s or now < held.since)):
            until = now + max(LIFETIME_S, 2 * lasts_s)
        elif not lasts_s and self._lapse.passed(("list", name), held.until):
            self._lapse.forget(("list", name))
            del self._lists[name], self._wanted[name]
            self._dropped.add(name)
            self._issuers.pop(name, None)
            self._theirs.pop(name, None)
            self._left_out.discard(name)
            return
        elif held.serials == entries.keys():
            self._left_out.discard(name)
            return
        else:
            until = held.until
        if issuer is not None and until > now:
            self._lists[name] = _read(name[0], new_crl(issuer, entries.items(), int(now), now, until).decode())
            self._left_out.discard(name)
        elif held is not None and entries.keys() <= held.serials:  # more than is needed: what has run out
            self._left_out.discard(name)
        elif name not in self._left_out:
            self._left_out.add(name)
            _log.error(
                "a former signing certificate's revocation list cannot be extended without its key: Envoy believes nothing that it signed, until renewed",
                extra={"issuer": name[0], "subject": name[1].rfc4514_string()},
            )


def parse(content: bytes) -> list[SignedList]:
    """Return what a lists.json holds. Raises BadState."""
    return [_record(item) for item in fields.listed(fields.only(fields.parse(content), ("lists",)), "lists")]


def _record(item: Any) -> SignedList:
    record = fields.only(item, _FIELDS)
    issuer, crl = (fields.field(record, name, str) for name in _FIELDS)
    try:
        return _read(issuer, crl)
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise BadState("a revocation list cannot be read") from error


def _read(issuer: str, pem: str) -> SignedList:
    crl = x509.load_pem_x509_crl(pem.encode())
    if crl.next_update_utc is None:
        raise ValueError("a list without an end")
    serials = frozenset(entry.serial_number for entry in crl)
    return SignedList(issuer, pem, crl.issuer, serials, crl.last_update_utc.timestamp(), crl.next_update_utc.timestamp())
