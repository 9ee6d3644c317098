"""Which certificates have been issued and have not run out: issued.jsonl. Written before a certificate leaves the controller.

It answers what a revocation by SPIFFE ID means, and which nodes must know a new root before it signs. One line a certificate, appended and synced;
a line that a crash cut off belongs to a certificate that nobody got. What has run out goes now and then, and at the latest when there is no more room:
the file never grows larger than what can be read again, and is full only of certificates in force.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Final

from controller.errors import ControllerError
from controller.identity import fields
from controller.identity.directory import ISSUED, MAX_BYTES, Directory
from controller.identity.fields import BadState
from controller.identity.lapse import Lapse
from controller.identity.names import serial_allowed

_SPARE: Final = 1000  # lines that may have run out before the file is written anew
_FIELDS: Final = ("serial", "spiffe_id", "node", "issuer", "until")


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate. `serial` is hexadecimal, `issuer` the hash of the signing key, `until` Unix seconds; `node` asked for it."""

    serial: str
    spiffe_id: str
    node: str
    issuer: str
    until: int


class Ledger:
    """The list, in memory and on disk. Appended to by one thread at a time."""

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
        if not whole:
            self._rewrite()

    def append(self, records: Iterable[Issued]) -> None:
        """Add certificates, durably. Raises ControllerError: what cannot be recorded must not be issued, because it could not be revoked."""
        added = list(records)
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


def read(directory: Directory) -> tuple[list[Issued], bool]:
    """Return the certificates in a directory's file, and whether every line of it is whole. Raises ControllerError."""
    content = directory.read(ISSUED)
    if content is None:
        return [], True
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
        raise fields.refuse(directory.path / ISSUED, error, loss)
    return records, not rest  # without its end it is an append that a crash cut off


def parse_line(line: bytes) -> Issued:
    """Return the record in one line. Raises BadState."""
    record = fields.only(fields.parse(line), _FIELDS)
    serial, spiffe_id, node, issuer = (fields.field(record, name, str) for name in ("serial", "spiffe_id", "node", "issuer"))
    return Issued(check_serial(serial), spiffe_id, node, issuer, fields.field(record, "until", int))


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
    return json.dumps(asdict(record)) + "\n"
