"""News about network namespaces without polling: of files and cgroups that lead to them (inotify), of processes in them and of their addresses.

Owned by `agent.enrolment`; the supervisor's event loop waits for `fileno`, behind which is all of it. Everything hangs on one epoll instance, so that a
namespace may be added in the worker thread while the loop waits. A bind mount raises no event (fsnotify knows no mounts): the file made for it does,
right before the mount, so that for a moment after one `eager` is True and the caller looks often. So it is with a cgroup, in which a process comes to be
a moment later, and with that process, which may join its namespace only then.
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

_IN_MODIFY, _IN_CREATE, _IN_DELETE, _IN_MOVED = 0x2, 0x100, 0x200, 0x40 | 0x80  # include/uapi/linux/inotify.h
_IN_IGNORED, _IN_Q_OVERFLOW = 0x8000, 0x4000
_IN_ONLYDIR = 0x1000000
_NAMES = _IN_CREATE | _IN_DELETE | _IN_MOVED | _IN_ONLYDIR
_EVENT = struct.Struct("=iIII")
_READ = 1 << 16
EAGER_S = 0.2
"""How long after a name appeared its namespace may be mounted there, or its process started."""
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
        self._wanted: dict[str, int] = {}
        """Directories and files to watch, and for what."""
        self._watched: dict[str, int] = {}
        """The kernel's number of each that is watched."""
        self._notices: dict[int, int] = {}
        self._processes: dict[int, int] = {}
        self._changed: set[int] = set()
        self._named = False
        self._eager_until = 0.0

    def fileno(self) -> int:
        """Readable while there is news that nobody has drained."""
        return self._epoll.fileno()

    @property
    def eager(self) -> bool:
        """True for a moment after a name of interest appeared or a file changed: the namespace is about to be there."""
        return time.monotonic() < self._eager_until

    def follow(self, paths: Iterable[str], contents: Iterable[str] = ()) -> None:
        """Watch for these names in their directories, and for no others; and for what is in the files `contents`.

        What does not exist yet is tried again by `retry`. What was replaced is watched anew: a directory of cgroups that is removed raises no event.
        """
        with self._lock:
            self._paths = frozenset(paths)
            self._wanted = dict.fromkeys({os.path.dirname(path) for path in self._paths}, _NAMES)  # noqa: PTH120  hundreds
            self._wanted |= dict.fromkeys(contents, _IN_MODIFY)
            for path in self._watched.keys() - self._wanted.keys():
                self._unwatch(path)
            self._try(self._wanted.keys())

    def retry(self) -> None:
        """Try again to watch what did not exist."""
        with self._lock:
            self._try(self._wanted.keys() - self._watched.keys())

    def _try(self, paths: Iterable[str]) -> None:
        for path in paths:
            number = _libc.inotify_add_watch(self._inotify, os.fsencode(path), self._wanted[path])  # of the same inode it is the same
            if self._watched.get(path, number) != number:
                self._unwatch(path)
            if number >= 0:
                self._watched[path] = number

    def _unwatch(self, path: str) -> None:
        _libc.inotify_rm_watch(self._inotify, self._watched.pop(path))

    @property
    def complete(self) -> bool:
        """True if everything that was asked of `follow` is watched."""
        with self._lock:
            return len(self._watched) == len(self._wanted)

    def add(self, cookie: int, notices: int, process: int | None = None) -> None:
        """Take over the netlink descriptor `notices` of a namespace and that of the process that it is found by, if any; those held for it are closed.

        The end of that process is told as a change of the namespace.
        """
        with self._lock:
            self._close(cookie)
            self._notices[cookie] = notices
            self._epoll.register(notices, select.EPOLLIN)
            if process is not None:
                self._processes[cookie] = process
                self._epoll.register(process, select.EPOLLIN)

    def keep(self, cookies: set[int]) -> None:
        """Close what belongs to other namespaces."""
        with self._lock:
            for cookie in self._notices.keys() - cookies:
                self._close(cookie)
            self._changed &= cookies

    def _close(self, cookie: int) -> None:
        for kind in (self._notices, self._processes):
            held = kind.pop(cookie, None)
            if held is not None:
                os.close(held)  # leaves the epoll set with it

    def drain(self) -> None:
        """Take in what has come. Never blocks."""
        with self._lock:
            owners = {fd: cookie for cookie, fd in self._notices.items()}
            found = {fd: cookie for cookie, fd in self._processes.items()}
            for fd, _ in self._epoll.poll(0):
                if fd == self._inotify:
                    self._read_names()
                elif fd in owners:
                    self._changed.add(owners[fd])
                    _empty(fd)
                elif fd in found:
                    self._changed.add(found[fd])
                    os.close(self._processes.pop(found[fd]))

    def _read_names(self) -> None:
        while True:
            try:
                events = os.read(self._inotify, _READ)
            except BlockingIOError:
                return
            places = {number: path for path, number in self._watched.items()}
            at = 0
            while at < len(events):
                number, mask, _, length = _EVENT.unpack_from(events, at)
                name = os.fsdecode(events[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0"))
                at += _EVENT.size + length
                place = places.get(number, "")
                if mask & _IN_IGNORED:  # it is gone, or is not wanted any more
                    self._watched.pop(place, None)
                    self._named = True
                elif mask & _IN_Q_OVERFLOW or (mask & _IN_MODIFY and place) or f"{place}/{name}" in self._paths:
                    self._named = True
                    if not mask & _IN_DELETE:
                        self._eager_until = time.monotonic() + EAGER_S

    @property
    def news(self) -> bool:
        """True if something has come that nobody has taken."""
        return self._named or bool(self._changed)

    def take_named(self) -> bool:
        """True once after names of interest came or went, or files of interest changed."""
        named, self._named = self._named, False
        return named

    def take_changed(self) -> set[int]:
        """Cookies of namespaces whose addresses changed or whose processes ended, each once."""
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
