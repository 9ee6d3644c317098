"""News about network namespaces without polling: of files that name them (inotify) and of their addresses (netlink), behind one descriptor.

Owned by `agent.enrolment`; the supervisor's event loop waits for `fileno`. Everything hangs on one epoll instance, so that a namespace may be added in
the worker thread while the loop waits. A bind mount raises no event (fsnotify knows no mounts): the file made for it does, right before the mount, so
that for a moment after one `eager` is True and the caller looks often.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import struct
import threading
import time
from collections.abc import Iterable

_IN_CREATE, _IN_DELETE, _IN_MOVED = 0x100, 0x200, 0x40 | 0x80  # include/uapi/linux/inotify.h
_IN_IGNORED, _IN_Q_OVERFLOW = 0x8000, 0x4000
_IN_ONLYDIR = 0x1000000
_EVENT = struct.Struct("=iIII")
_READ = 1 << 16
EAGER_S = 0.2
"""How long after a name appeared its namespace may be mounted there."""
_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """See the module. Thread-safe."""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._inotify = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._inotify < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"watch directories: {os.strerror(code)}; see the sysctl fs.inotify.max_user_instances")
        self._epoll.register(self._inotify, select.EPOLLIN)
        self._paths: frozenset[str] = frozenset()
        self._directories: dict[str, int] = {}
        self._notices: dict[int, int] = {}
        self._changed: set[int] = set()
        self._named = False
        self._eager_until = 0.0

    def fileno(self) -> int:
        """Readable while there is news that nobody has drained."""
        return self._epoll.fileno()

    @property
    def eager(self) -> bool:
        """True for a moment after a file of interest appeared: the namespace is about to be mounted on it."""
        return time.monotonic() < self._eager_until

    def follow(self, paths: Iterable[str]) -> None:
        """Watch the directories of these files, and only these files. A directory that does not exist yet is tried again at the next call."""
        with self._lock:
            self._paths = frozenset(paths)
            wanted = {os.path.dirname(path) for path in self._paths}  # noqa: PTH120  the poll calls this
            for directory in self._directories.keys() - wanted:
                _libc.inotify_rm_watch(self._inotify, self._directories.pop(directory))
            for directory in wanted - self._directories.keys():
                mask = _IN_CREATE | _IN_DELETE | _IN_MOVED | _IN_ONLYDIR
                number = _libc.inotify_add_watch(self._inotify, os.fsencode(directory), mask)
                if number >= 0:
                    self._directories[directory] = number

    @property
    def complete(self) -> bool:
        """True if every directory of `follow` is watched."""
        with self._lock:
            return len(self._directories) == len({os.path.dirname(path) for path in self._paths})  # noqa: PTH120

    def add(self, cookie: int, notices: int) -> None:
        """Take over the netlink descriptor `notices` of a namespace; one that was held for it is closed."""
        with self._lock:
            self._close(cookie)
            self._notices[cookie] = notices
            self._epoll.register(notices, select.EPOLLIN)

    def keep(self, cookies: set[int]) -> None:
        """Close what belongs to other namespaces."""
        with self._lock:
            for cookie in self._notices.keys() - cookies:
                self._close(cookie)
            self._changed &= cookies

    def _close(self, cookie: int) -> None:
        held = self._notices.pop(cookie, None)
        if held is not None:
            os.close(held)  # leaves the epoll set with it

    def drain(self) -> None:
        """Take in what has come. Never blocks."""
        with self._lock:
            owners = {fd: cookie for cookie, fd in self._notices.items()}
            for fd, _ in self._epoll.poll(0):
                if fd == self._inotify:
                    self._read_names()
                elif fd in owners:
                    self._changed.add(owners[fd])
                    _empty(fd)

    def _read_names(self) -> None:
        while True:
            try:
                events = os.read(self._inotify, _READ)
            except BlockingIOError:
                return
            places = {number: directory for directory, number in self._directories.items()}
            at = 0
            while at < len(events):
                number, mask, _, length = _EVENT.unpack_from(events, at)
                name = os.fsdecode(events[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0"))
                at += _EVENT.size + length
                if mask & _IN_IGNORED:  # the directory is gone, or is not wanted any more
                    if number in places:
                        self._directories.pop(places[number], None)
                    self._named = True
                elif mask & _IN_Q_OVERFLOW or f"{places.get(number, '')}/{name}" in self._paths:
                    self._named = True
                    if not mask & _IN_DELETE:
                        self._eager_until = time.monotonic() + EAGER_S

    @property
    def news(self) -> bool:
        """True if something has come that nobody has taken."""
        return self._named or bool(self._changed)

    def take_named(self) -> bool:
        """True once after files of interest came or went."""
        named, self._named = self._named, False
        return named

    def take_changed(self) -> set[int]:
        """Cookies of namespaces whose addresses changed, each once."""
        self.drain()
        with self._lock:
            changed, self._changed = self._changed, set()
            return changed

    def doubt(self, cookies: Iterable[int]) -> None:
        """Have these namespaces looked at again."""
        with self._lock:
            self._changed |= set(cookies)

    def close(self) -> None:
        """Close every descriptor; may be called twice."""
        with self._lock:
            for cookie in list(self._notices):
                self._close(cookie)
            if not self._epoll.closed:
                self._epoll.close()
                os.close(self._inotify)

    def __del__(self) -> None:
        if hasattr(self, "_notices"):
            self.close()


def _empty(fd: int) -> None:
    """Throw away what waits: that something changed is all that counts, also when the queue overflowed (ENOBUFS)."""
    with contextlib.suppress(BlockingIOError):
        while True:
            try:
                os.read(fd, _READ)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
