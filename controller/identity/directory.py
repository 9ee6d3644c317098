"""The CA directory (`--ca-directory`): who may read it, who may change it when, and how. Used by everything that keeps state, in both processes.

    authority.json  roots with their keys, JWT keys: the CA file, the only place where private keys are kept; 0600
    trust.json      what is trusted now, for `mesh-controller token` and `ca show`; public
    tokens.json     join tokens, hashed
    revoked.json    certificates that are not believed although they have not run out
    issued.jsonl    certificates that have not run out, one a line
    lists.json      revocation lists (CRLs) as they were signed last, also of issuers that sign no more; public
    tunnels.json    workloads that tunnels between nodes end at (`controller.readiness`); public
    status.json     what a rotation waits for; written for `ca show` only
    knew.json       what was known of revocations when they were issued, by serial number; where several controllers share a state, beside each issued.jsonl
    withdrawn.json  after which `ca rotate --now` the JWT keys were made, where several controllers share a state; public
    wireguard.json  WireGuard public keys of nodes (controller.wireguard); public. wireguard-since.json: of those, what nodes announced after a revocation

Controllers that share an API server have authority.json and status.json here, and everything else there (`controller.store`).
Each file is replaced as a whole (or, issued.jsonl, appended to), so that a crash leaves the old version or the new one. The commands and a running
controller change them under one lock; the controller sees within a second what a command changed.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, TypeVar

from controller.errors import ControllerError
from controller.files import write_atomically
from controller.store import Documents

T = TypeVar("T")
AUTHORITY: Final = "authority.json"
TRUST: Final = "trust.json"
TOKENS: Final = "tokens.json"
REVOKED: Final = "revoked.json"
ISSUED: Final = "issued.jsonl"
KNEW: Final = "knew.json"
LISTS: Final = "lists.json"
STATUS: Final = "status.json"
LOCK_WAIT_S: Final = 10.0  # a lock is held for milliseconds
_LOCK: Final = ".lock"
_OWNER: Final = ".controller.lock"
MAX_BYTES: Final = 256 << 20
Signature = tuple[int, int, int]


class Directory:
    """One CA directory: the `Store` of a controller that has it alone. Every method raises ControllerError with what, where, the cause and the next step."""

    alone: Final = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self) -> None:
        """Make the directory if it is not there (0700), and refuse one that others may write to."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ControllerError(f"cannot make the CA directory {self.path}: {error.strerror}; give another --ca-directory") from error
        self.check()

    def check(self) -> None:
        """Refuse a directory that is not there, or that others may write to: they could put their own authority there."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise ControllerError(
                f"cannot open the CA directory {self.path}: {error.strerror}; it is made by `mesh-controller run --ca-directory`, "
                "so start the controller first, or give the --ca-directory that it has"
            ) from error
        if not stat.S_ISDIR(status.st_mode):
            raise ControllerError(f"the CA directory {self.path} is no directory: give another --ca-directory")
        if status.st_mode & 0o022:
            raise ControllerError(
                f"others may write to the CA directory {self.path} (mode {stat.S_IMODE(status.st_mode):04o}): they could become any "
                f"workload; make sure nobody did, then `chmod 700 {self.path}`"
            )
        if status.st_uid != os.geteuid():
            raise ControllerError(
                f"the CA directory {self.path} belongs to user id {status.st_uid}, this process to {os.geteuid()}: run as its owner, "
                f"or `chown -R` it if it was copied from elsewhere"
            )

    def where(self, name: str) -> str:
        """Return the path of a file, for people."""
        return str(self.path / name)

    def names(self) -> set[str]:
        """Names of the state files that are there."""
        return {name for name in (AUTHORITY, TRUST, TOKENS, REVOKED, ISSUED, LISTS) if (self.path / name).exists()}

    def read(self, name: str, *, private: bool = False) -> bytes | None:
        """Return a file's content, None if there is no such file. A private file that others may read is refused."""
        path = self.path / name
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise ControllerError(f"{path} is not a regular file: put back what was there, or restore it from a backup")
                if status.st_mode & 0o022 or status.st_uid not in {0, os.geteuid()}:
                    raise ControllerError(
                        f"others may write to {path} (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}): it decides who is believed; "
                        f"make sure that nobody changed it, then `chown {os.geteuid()} {path}` and `chmod 600 {path}`"
                    )
                if private and status.st_mode & 0o077:
                    raise ControllerError(
                        f"others may read {path} (mode {stat.S_IMODE(status.st_mode):04o}), which holds the CA's private keys: probably copied "
                        f"without its mode; `chmod 600 {path}`, and if somebody may have read it, `mesh-controller ca rotate` as well"
                    )
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ControllerError(
                f"cannot read {path}: {error.strerror or error}; check its owner and mode, or restore it from a backup"
            ) from error
        if len(content) > MAX_BYTES:
            raise ControllerError(f"{path} is larger than {MAX_BYTES >> 20} MiB, which it never is: restore it from a backup")
        return content

    def write(self, name: str, text: str) -> None:
        """Replace a file, mode 0600, durably."""
        try:
            write_atomically(self.path / name, text)
        except OSError as error:
            raise ControllerError(
                f"cannot write {self.path / name}: {error.strerror or error}; is the disk full or read-only? nothing was changed"
            ) from error

    def tidy(self) -> None:
        """Remove what a crash left of a write, which may hold private keys; call it with the directory locked."""
        for left in self.path.glob(".*.tmp"):
            left.unlink(missing_ok=True)

    def signature(self, name: str) -> Signature | None:
        """Return what tells one version of a file from another; None without the file."""
        return signature_of(self.path / name)

    def change(self, work: Callable[[Documents], T]) -> T:
        """Let `work` read and replace files while nobody else does."""
        with self.locked():
            return work(self)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process and thread from changing the directory; blocks for at most LOCK_WAIT_S."""
        deadline = time.monotonic() + LOCK_WAIT_S
        with self._open(_LOCK) as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise ControllerError(
                            f"{self.path / _LOCK} has been held for {LOCK_WAIT_S:.0f} s: a `mesh-controller` command hangs or is stopped; "
                            f"find it with `fuser {self.path / _LOCK}`"
                        ) from error
                    time.sleep(0.005)
            yield

    def own(self) -> IO[str]:
        """Make this process the directory's only controller, until the returned file is closed."""
        file = self._open(_OWNER)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ControllerError(
                f"another controller uses the CA directory {self.path}: stop it, or give this one its own --ca-directory (and so its own root)"
            ) from error
        return file

    def _open(self, name: str) -> IO[str]:
        path = self.path / name
        try:
            return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+", encoding="utf-8")
        except OSError as error:
            raise ControllerError(f"cannot open {path}: {error.strerror}; run as the owner of {self.path}") from error


def signature_of(path: Path) -> Signature | None:
    """Return what tells one version of a file from another; None without the file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino)
