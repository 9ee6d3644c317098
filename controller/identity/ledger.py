"""Which certificates have been issued and have not run out: issued.jsonl. Written before a certificate leaves the controller.

It answers what a revocation by SPIFFE ID means, and which nodes must know a new root before it signs. One line a certificate, appended and synced;
a line that a crash cut off belongs to a certificate that nobody got. What has run out goes now and then, and at the latest when there is no more room:
the file never grows larger than what can be read again, and is full only of certificates in force.

A line has the fields that it has always had, because an earlier release refuses any other. What there is to say more of a certificate that controllers share
stands beside it, in knew.json: an earlier release keeps that as it is.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Protocol

from controller.errors import ControllerError
from controller.identity import fields
from controller.identity.directory import ISSUED, KNEW, MAX_BYTES, Directory
from controller.identity.fields import BadState
from controller.identity.lapse import Lapse
from controller.identity.names import serial_allowed
from controller.store import Documents, SharedStore, of_node

_SPARE: Final = 1000  # lines that may have run out before the file is written anew
_SPARE_OF_NODE: Final = 64  # the same, of one node
_FIELDS: Final = ("serial", "spiffe_id", "node", "issuer", "until")


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate. `serial` is hexadecimal, `issuer` the hash of the signing key, `until` Unix seconds; `node` asked for it.

    `knew`: the newest revocation of the node that who gave it knew of (`revocations.newest`); 0: of none. A controller that is alone writes it nowhere: what
    it has revoked it reads before it gives anything, so after a restart whatever was given before a revocation is older than that.
    """

    serial: str
    spiffe_id: str
    node: str
    issuer: str
    until: int
    knew: int = 0


class Taken(Exception):
    """Nothing was recorded: what must not be on record is."""


Unless = Callable[[Issued], bool]
"""True of a record beside which there must be no other."""


class Ledger(Protocol):
    """The list. Appended to by one thread at a time."""

    def load(self) -> None:
        """Read what was issued before. Raises ControllerError."""

    def append(self, records: Iterable[Issued], unless: Unless | None = None, askers: Mapping[str, str] = MappingProxyType({})) -> None:
        """Add certificates, durably. Raises ControllerError: what cannot be recorded must not be issued, because it could not be revoked.

        Raises Taken, if `unless` is true of what is on record for one of their nodes in the moment of recording, whoever recorded it. `askers`: by serial
        number, with which certificate each was asked for; who gave it knew at least what was known when that was given.
        """

    def live(self, now: float) -> Iterator[Issued]:
        """Return the certificates that have not run out."""

    def compact(self) -> None:
        """Forget what has run out, where that is worth it. Raises ControllerError."""


class FileLedger:
    """The list of a controller that is alone, in memory and on disk."""

    def __init__(self, directory: Directory, lapse: Lapse) -> None:
        self._directory, self._lapse = directory, lapse
        self._records: dict[str, Issued] = {}
        self._lines = 0

    def load(self) -> None:
        """Read the file and put right a line that was cut off. Raises ControllerError."""
        records, whole = read(self._directory)
        self._records = {record.serial: record for record in records}
        self._lines = len(records)
        self._gone()  # from now on it counts as time during which they had run out
        if not whole or any(record.knew for record in records):
            self._rewrite()

    def append(self, records: Iterable[Issued], unless: Unless | None = None, askers: Mapping[str, str] = MappingProxyType({})) -> None:
        """See `Ledger`."""
        added = _knowing(records, askers, self._records)
        if unless is not None and any(map(unless, self._records.values())):
            raise Taken
        path, content = self._directory.path / ISSUED, "".join(_line(record) for record in added).encode()
        if not self._fits(content):
            self.compact(spare=0)
            if not self._fits(content):
                raise ControllerError(
                    f"{path} has no room for more than the {len(self._records)} certificates that it holds ({MAX_BYTES >> 20} MiB): none was "
                    "given out; does somebody ask for certificates again and again (audit log)? give a shorter --svid-lifetime"
                )
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                _write(descriptor, content, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ControllerError(
                f"cannot record certificates in {path}: {error.strerror or error}; is the disk full? none was given out"
            ) from error
        self._records.update((record.serial, record) for record in added)
        self._lines += len(added)

    def live(self, now: float) -> Iterator[Issued]:
        """Return the certificates that have not run out."""
        return (record for record in list(self._records.values()) if record.until > now)

    def compact(self, spare: int | None = None) -> None:
        """Forget what has run out once that is more than `spare` lines, and worth a new file. Raises ControllerError."""
        gone = self._gone()
        if len(gone) + self._lines - len(self._records) <= (_SPARE if spare is None else spare):
            return
        for record in gone:
            del self._records[record.serial]
            self._lapse.forget(("issued", record.serial))
        self._rewrite()

    def _gone(self) -> list[Issued]:
        return [record for record in self._records.values() if self._lapse.passed(("issued", record.serial), record.until)]

    def _fits(self, content: bytes) -> bool:
        signature = self._directory.signature(ISSUED)
        return (signature[1] if signature else 0) + len(content) <= MAX_BYTES

    def _rewrite(self) -> None:
        with self._directory.locked():
            self._directory.write(ISSUED, "".join(_line(record) for record in self._records.values()))
        self._lines = len(self._records)


class SharedLedger:
    """The list of several controllers: a document for each node, which every one of them adds to."""

    def __init__(self, shared: SharedStore, lapse: Lapse) -> None:
        self._shared, self._lapse = shared, lapse
        self._read: dict[str, tuple[object, list[Issued]]] = {}
        """What was read of each group, and of which version."""
        self._lock = threading.Lock()

    def load(self) -> None:
        """Read what was issued before, by whichever controller. Raises ControllerError."""
        for records in self._groups().values():
            self._gone(records)

    def append(self, records: Iterable[Issued], unless: Unless | None = None, askers: Mapping[str, str] = MappingProxyType({})) -> None:
        """See `Ledger`."""
        if problem := self._shared.waiting():  # who was revoked may not be known
            raise ControllerError(f"nothing is signed: {problem}")
        groups: dict[str, list[Issued]] = {}
        for record in records:
            groups.setdefault(of_node(record.node), []).append(record)
        for group, added in groups.items():
            self._shared.change(functools.partial(self._add, group=group, added=added, unless=unless, askers=askers), group, known=True)

    def live(self, now: float) -> Iterator[Issued]:
        """Return the certificates that have not run out, as this controller knows it: of its own none is missing."""
        return (record for records in self._groups().values() for record in records if record.until > now)

    def compact(self) -> None:
        """Forget what has run out once it is much, or all there is of a node. Raises ControllerError."""
        for group, records in self._groups().items():
            gone = {record.serial for record in self._gone(records)}
            bare = not records and self._shared.read(KNEW, group) is not None  # an earlier release has removed the lines
            if bare or (gone and (len(gone) >= _SPARE_OF_NODE or len(gone) == len(records))):
                self._shared.change(functools.partial(self._remove, group=group, serials=gone), group)
                for serial in gone:
                    self._lapse.forget(("issued", serial))

    def _groups(self) -> dict[str, list[Issued]]:
        with self._lock:  # also asked while another thread appends
            versions = self._shared.groups()
            self._read = {group: held for group, held in self._read.items() if group in versions}
            for group, version in versions.items():
                if group not in self._read or self._read[group][0] != version:
                    self._read[group] = version, _of_group(self._shared, group)
            return {group: records for group, (_, records) in self._read.items()}

    def _add(self, documents: Documents, group: str, added: list[Issued], unless: Unless | None, askers: Mapping[str, str]) -> None:
        """Add each once: it may be the second try of what has been written. Raises ControllerError and Taken."""
        lines = (documents.read(ISSUED) or b"").decode()
        if unless is None and documents.read(KNEW) is None and '"knew"' not in lines and not any(record.knew for record in added):
            held = set(lines.splitlines(keepends=True))  # of a node of which nothing was revoked: nothing is to be looked at
            documents.write(ISSUED, lines + "".join(line for line in map(_line, added) if line not in held))
            return
        records = {record.serial: record for record in _shared(documents.read, self._shared, group)}
        if unless is not None and any(map(unless, records.values())):
            raise Taken
        _put(documents, (records | {record.serial: record for record in _knowing(added, askers, records)}).values())

    def _remove(self, documents: Documents, group: str, serials: Collection[str]) -> None:
        _put(documents, [record for record in _shared(documents.read, self._shared, group) if record.serial not in serials])

    def _gone(self, records: Iterable[Issued]) -> list[Issued]:
        return [record for record in records if self._lapse.passed(("issued", record.serial), record.until)]


def _knowing(records: Iterable[Issued], askers: Mapping[str, str], held: Mapping[str, Issued]) -> list[Issued]:
    """Return the records with what was known when those were granted that asked for them."""
    asked = ((record, held.get(askers.get(record.serial, ""))) for record in records)
    return [record if asker is None else replace(record, knew=max(record.knew, asker.knew)) for record, asker in asked]


def _shared(read: Callable[[str], bytes | None], store: SharedStore, group: str) -> list[Issued]:
    """Return the records of a group. `read` gives its documents. Raises ControllerError."""
    records, _ = _parsed(read(ISSUED) or b"", store.where(f"{group}/{ISSUED}"))
    content = read(KNEW)  # second: what is written between the two lacks nothing that is on record
    if content is None:
        return records
    try:
        knew = parse_knew(content)
    except BadState as error:
        loss = "or delete it: a node that has joined again after a revocation may then have to join once more"
        raise fields.refuse(store.where(f"{group}/{KNEW}"), error, loss) from error
    return [replace(record, knew=max(record.knew, knew.get(record.serial, 0))) for record in records]


def _of_group(store: SharedStore, group: str) -> list[Issued]:
    return _shared(lambda name: store.read(name, group), store, group)


def _put(documents: Documents, records: Iterable[Issued]) -> None:
    records = list(records)
    knew = {record.serial: record.knew for record in records if record.knew}
    documents.write(ISSUED, "".join(map(_line, records)))
    documents.write(KNEW, json.dumps({"knew": knew}) + "\n" if knew else "")


def issued(store: Directory | SharedStore) -> list[Issued]:
    """Return every certificate on record. Raises ControllerError."""
    if isinstance(store, Directory):
        return read(store)[0]
    return [record for group in store.groups() for record in _of_group(store, group)]


def read(directory: Directory) -> tuple[list[Issued], bool]:
    """Return the certificates in a directory's file, and whether every line of it is whole. Raises ControllerError."""
    content = directory.read(ISSUED)
    return ([], True) if content is None else _parsed(content, directory.where(ISSUED))


def _parsed(content: bytes, place: str) -> tuple[list[Issued], bool]:
    records, bad = [], 0
    *lines, rest = content.split(b"\n")
    for line in lines:
        try:
            records.append(parse_line(line))
        except BadState:
            bad += 1
    if bad:
        error = BadState(f"{bad} of its lines are no records")
        loss = "or delete it: revoking by SPIFFE ID then misses what was issued before; `mesh-controller ca rotate` makes up for that"
        raise fields.refuse(place, error, loss)
    return records, not rest  # without its end it is an append that a crash cut off


def parse_line(line: bytes) -> Issued:
    """Return the record in one line. Raises BadState."""
    found = dict(fields.parse(line))
    knew = fields.field({"knew": found.pop("knew", 0)}, "knew", int)  # which stood here before there was knew.json
    record = fields.only(found, _FIELDS)
    serial, spiffe_id, node, issuer = (fields.field(record, name, str) for name in ("serial", "spiffe_id", "node", "issuer"))
    return Issued(check_serial(serial), spiffe_id, node, issuer, fields.field(record, "until", int), knew)


def parse_knew(content: bytes) -> dict[str, int]:
    """Return, by serial number, what a knew.json holds. Raises BadState."""
    found = fields.only(fields.parse(content), ("knew",))["knew"]
    if not isinstance(found, dict):
        raise BadState("knew is no JSON object")
    return {check_serial(serial): fields.field(found, serial, int) for serial in found}


def check_serial(text: str) -> str:
    """Return a serial number in lower-case hexadecimal digits as it is stored. Raises BadState for what no certificate, and so no list, can have."""
    if not 0 < len(text) <= 40 or not set(text) <= set("0123456789abcdef") or not serial_allowed(int(text, 16)):
        raise BadState("a serial number is not hexadecimal, or not between 1 and 2^159")
    return text


def _write(descriptor: int, content: bytes, size: int) -> None:
    """Append all of `content`, durably, or nothing."""
    try:
        while content:
            content = content[os.write(descriptor, content) :]
        os.fdatasync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _line(record: Issued) -> str:
    return json.dumps({name: getattr(record, name) for name in _FIELDS}) + "\n"
