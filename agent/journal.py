"""The last good state on disk: one file to which every change is appended, rewritten when it has grown by a quarter.

Owned by `agent.discovery`. The file is a line that names the format, then frames: a kind, a length, that many bytes. Frames between two
COMMIT frames are one group, which counts only as a whole. The first group holds everything, each later one what an applied response
changed. A COMMIT carries the version and a SHA-256 over all of the file before it (each over the one before and its own group), so that
nothing that was torn, flipped, left out or put behind can pass: reading stops before the first group that is not as it was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from meshapi import discovery_pb2 as pb

PUT: Final = b"+"
"""An encoded Resource that came or changed."""
DROP: Final = b"-"
"""The name of a resource that is gone."""
COMMIT: Final = b"="
"""End of a group. As read: the version in UTF-8."""

_FORMAT: Final = b"meshagent last good snapshot, format 1\n"
_HEAD: Final = struct.Struct("<cI")
_DIGEST: Final = hashlib.sha256().digest_size
_MOST_PENDING: Final = 100
_NOT_WORTH_REWRITING: Final = 1 << 20
_BUFFER: Final = 1 << 18
_BREATH_EVERY: Final = 64
_BREATH_S: Final = 0.0005

Frame = tuple[bytes, bytes]
_Pending: TypeAlias = "pb.DiscoveryResponse | _Coalesced"
_Change = tuple[str, bytes | None]
"""The name of a resource and what it is now, encoded; None: it is gone."""


class DamagedError(ValueError):
    """A group that is not as it was written, or none at all: what was read before it counts."""


class Journal:
    """One file. `add` is called by the event loop, `write` by one worker thread at a time, `read` before both."""

    def __init__(self, path: Path) -> None:
        """Touch nothing yet; without `read` the first `write` replaces what is there."""
        self.path = path
        self._writing = threading.Lock()
        self._lock = threading.Lock()
        self._pending: list[_Pending] = []
        self._in_hand = 0
        self._end = 0
        """Where the next group goes: behind the last one that counts. 0: there is no usable file."""
        self._base = 0
        """Where the first group ends."""
        self._digest = b""
        self._rewrite_at = 0

    def read(self) -> Iterator[Frame]:
        """Yield the frames of all groups that are as they were written; the whole of a group may turn out bad only at its COMMIT.

        From a COMMIT on its group counts: the next `write` goes behind the last one that was yielded. Raises OSError (FileNotFoundError:
        there is none), or DamagedError if anything follows the last good group, or if there is none.
        """
        self._end = 0
        with self.path.open("rb", buffering=_BUFFER) as file:
            digest = _start(file)
            while True:
                position = file.tell()
                if position == os.fstat(file.fileno()).st_size and self._end:
                    return
                group = hashlib.sha256(digest)
                for kind, content in _frames(file, group, position):
                    if kind == COMMIT:
                        self._base = self._base if self._end else file.tell()
                        self._end, self._digest = file.tell(), group.digest()
                        self._plan_rewrite()
                    yield kind, content
                digest = self._digest

    def add(self, response: pb.DiscoveryResponse) -> None:
        """Remember what an applied response changed until it is written. If the disk is slower than the changes come, many become one."""
        with self._lock:
            last = self._pending[-1] if len(self._pending) > self._in_hand else None
            if isinstance(last, _Coalesced):
                last.add(response)
            elif len(self._pending) - self._in_hand < _MOST_PENDING:
                self._pending.append(response)
            else:
                self._pending.append(_Coalesced([response]))

    def write(self) -> None:
        """Bring everything pending to the disk (fsync(2)). Raises OSError, with all of it still pending and what was stored as it was."""
        with self._writing:
            with self._lock:
                self._in_hand = len(self._pending)
                batch = self._pending[: self._in_hand]
            if len(batch) > _MOST_PENDING:  # the disk was away for long
                batch = [_Coalesced(batch)]
                with self._lock:
                    self._pending[: self._in_hand] = batch
                    self._in_hand = 1
            try:
                if batch:
                    self._store(batch)
            except BaseException:
                with self._lock:
                    self._in_hand = 0
                raise
            with self._lock:
                del self._pending[: self._in_hand]
                self._in_hand = 0

    def shrink(self) -> None:
        """Rewrite the file if it says too much for what counts. Raises OSError, with the file as it was."""
        with self._writing:
            if self._end and self._end >= self._rewrite_at:
                try:
                    self._rewrite()
                except ValueError as error:
                    raise OSError(f"it is no longer what was written: {error}; restart the agent, which then begins a new one") from error

    def _store(self, batch: Sequence[_Pending]) -> None:
        if not self._end:
            with _replacing(self.path) as file:
                writer = _Writer(file)
                base = 0
                for group in batch:
                    writer.group(_each(group), group.version)
                    base = base or file.tell()
            self._base = base
        else:
            with self.path.open("r+b", buffering=_BUFFER) as file:
                if file.seek(0, os.SEEK_END) < self._end:
                    raise OSError(f"{self.path} became shorter: something else writes to it; restart the agent to begin a new one")
                file.truncate(self._end)  # what a failed attempt left
                file.seek(self._end)
                writer = _Writer(file, self._digest)
                for group in batch:
                    writer.group(_each(group), group.version)
                _sync(file)
        self._end, self._digest = writer.end, writer.digest
        if self._end == self._base or not self._rewrite_at:
            self._plan_rewrite()

    def _plan_rewrite(self) -> None:
        self._rewrite_at = self._base + max(self._base // 4, _NOT_WORTH_REWRITING)

    def _rewrite(self) -> None:
        """Write a file with only what counts now, atomically. Never holds more than the names that changed since the first group."""
        self._rewrite_at = self._end + max(self._base // 4, _NOT_WORTH_REWRITING)  # if this fails, the next time is not the next change
        with self.path.open("rb", buffering=_BUFFER) as file:
            latest, version = self._latest(file)
            with _replacing(self.path) as target:
                writer = _Writer(target)
                file.seek(0)
                writer.group(self._counting(file, latest), version)
        self._end = self._base = writer.end
        self._digest = writer.digest
        self._plan_rewrite()

    def _latest(self, file: BinaryIO) -> tuple[dict[str, int], str]:
        """Where the last word on each resource that changed since the first group is (-1: it is gone), and the newest version."""
        file.seek(self._base)
        latest: dict[str, int] = {}
        version = ""
        while (position := file.tell()) < self._end:
            kind, content = _frame(file, self._end)
            if kind == PUT:
                latest[_name(content)] = position
            elif kind == DROP:
                latest[content.decode()] = -1
            else:
                version = content[_DIGEST:].decode()
        return latest, version

    def _counting(self, file: BinaryIO, latest: Mapping[str, int]) -> Iterator[_Change]:
        """Yield the frames that count. DamagedError if not all is as it was written: a rewrite must not make damage look whole."""
        digest = _start(file)
        while (position := file.tell()) < self._end:
            group = hashlib.sha256(digest)
            for kind, content in _frames(file, group, position):
                if kind == PUT and latest.get(name := _name(content), position) == position:
                    yield name, content
                position = file.tell()
            digest = group.digest()
        if digest != self._digest:
            raise DamagedError("something else wrote to it")


class _Writer:
    """Appends groups to a file; every so often it lets other threads run: whoever brings a change into force is in more of a hurry."""

    def __init__(self, file: BinaryIO, digest: bytes = b"") -> None:
        """Begin a file if there is no `digest` of what stands before."""
        self._file = file
        if not digest:
            file.write(_FORMAT)
        self.digest = digest or hashlib.sha256(_FORMAT).digest()
        self.end = file.tell()

    def group(self, changes: Iterable[_Change], version: str) -> None:
        """Append one group."""
        digest = hashlib.sha256(self.digest)
        for number, (changed, content) in enumerate(changes, 1):
            frame = _encoded(PUT, content) if content is not None else _encoded(DROP, changed.encode())
            digest.update(frame)
            self._file.write(frame)
            if not number % _BREATH_EVERY:
                time.sleep(_BREATH_S)
        name = version.encode()
        head = _HEAD.pack(COMMIT, _DIGEST + len(name))
        digest.update(head + name)
        self.digest = digest.digest()
        self._file.write(head + self.digest + name)
        self.end = self._file.tell()


class _replacing:  # noqa: N801 - reads as what it does
    """A file that takes the place of `path` when the block ends, durably; if it fails, `path` stays. One agent per directory: one name will do."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(f".{path.name}.new")

    def __enter__(self) -> BinaryIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._new.unlink(missing_ok=True)
        self._file: BinaryIO = os.fdopen(os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=_BUFFER)
        return self._file

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with self._file:
                if kind is None:
                    _sync(self._file)
            if kind is None:
                self._new.replace(self._path)
                _sync_directory(self._path.parent)
        finally:
            self._new.unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make a rename durable. Where that fails, a power cut may bring the older file back: older, but whole."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _name(resource: bytes) -> str:
    try:
        return pb.Resource.FromString(resource).name
    except Exception as error:
        raise DamagedError(f"no encoded resource: {error}") from error


def _encoded(kind: bytes, content: bytes) -> bytes:
    return _HEAD.pack(kind, len(content)) + content


class _Coalesced:
    """What several responses, one after the other, come to."""

    def __init__(self, parts: Sequence[_Pending]) -> None:
        self.version = ""
        self.latest: dict[str, bytes | None] = {}
        for part in parts:
            self.add(part)

    def add(self, later: _Pending) -> None:
        """Take time that depends on `later`, not on what is here."""
        self.version = later.version
        self.latest.update(_each(later))


def _each(pending: _Pending) -> Iterator[_Change]:
    if isinstance(pending, _Coalesced):
        yield from pending.latest.items()
        return
    for name in pending.removed:
        yield name, None
    for resource in pending.resources:
        yield resource.name, resource.SerializeToString()


def _start(file: BinaryIO) -> bytes:
    """Return the digest that the first group builds upon."""
    if file.read(len(_FORMAT)) != _FORMAT:
        raise DamagedError("it does not begin as one")
    return hashlib.sha256(_FORMAT).digest()


def _frame(file: BinaryIO, size: int) -> Frame:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise DamagedError("it ends in the middle of a change")
    kind, length = _HEAD.unpack(head)
    if kind not in {PUT, DROP, COMMIT} or (kind == COMMIT and length < _DIGEST):
        raise DamagedError("noise where a change should begin")
    if length > size - file.tell():
        raise DamagedError("it ends in the middle of a change")
    return kind, file.read(length)


def _frames(file: BinaryIO, digest: hashlib._Hash, begin: int) -> Iterator[Frame]:
    """Yield the frames of one group, its COMMIT last and only if `digest`, which everything read is added to, is the one it carries."""
    size = os.fstat(file.fileno()).st_size
    while True:
        try:
            kind, content = _frame(file, size)
        except DamagedError as error:
            raise DamagedError(f"the change at byte {begin}: {error}") from None
        digest.update(_HEAD.pack(kind, len(content)))
        if kind != COMMIT:
            digest.update(content)
            yield kind, content
            continue
        digest.update(content[_DIGEST:])
        if digest.digest() != content[:_DIGEST]:
            raise DamagedError(f"the change at byte {begin}: its digest does not match")
        yield COMMIT, content[_DIGEST:]
        return
