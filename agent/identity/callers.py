"""Who is at the other end of a unix socket: asked of the kernel, never of the caller.

What decides is the network namespace that the caller's socket was made in, by its cookie: the very property by which the kernel programs know a workload
at connect(). The accepted socket belongs to the namespace of the connecting one (net/unix/af_unix.c, unix_stream_connect: unix_create1(sock_net(sk), ...)),
for as long as it exists, so that no process has to be looked up and none can be mistaken for another.

Besides, the process that connected has to be there still, in that namespace and in the cgroup that the agent serves. That only narrows: it keeps out a
socket that somebody else was given, and a pid that was reused meanwhile belongs to the same workload or is refused. The process is known by SO_PEERPIDFD
(Linux 6.5, include/uapi/asm-generic/socket.h), before that by SO_PEERCRED and pidfd_open(2) (unix(7)); that the pidfd's process still runs after
everything was read from /proc/PID says that it was this process's (pidfd_open(2)).
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.cgroups import Tree
from agent.model import LocalWorkload
from agent.netns import SO_NETNS_COOKIE

_SO_PEERPIDFD: Final = 77  # include/uapi/asm-generic/socket.h
_INT = struct.Struct("=i")
_CREDENTIALS = struct.Struct("=iII")  # struct ucred, include/linux/socket.h
_COOKIE = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who called. `netns_cookie` is 0, which no namespace has, if `refused` says why it is nobody."""

    netns_cookie: int = 0
    pid: int = 0
    refused: str = ""


class Callers:
    """Identifies callers for one agent."""

    def __init__(self, cgroup: Path, local: Callable[[int], LocalWorkload | None]) -> None:
        """`local` knows the workload of a namespace's cookie."""
        self._cgroup = cgroup
        self._tree = Tree(cgroup)
        self._local = local

    def identify(self, connection: socket.socket) -> Caller:
        """Who connected. Never raises OSError; a handful of system calls."""
        try:
            return self._identify(connection)
        except (OSError, ValueError) as error:
            return Caller(refused=f"the calling process cannot be identified: {error}")

    def _identify(self, connection: socket.socket) -> Caller:
        cookie = int(_COOKIE.unpack(connection.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, _COOKIE.size))[0])
        pid, pidfd = _process(connection)
        try:
            local = self._local(cookie)
            if local is None:
                return Caller(pid=pid, refused=f"process {pid} runs in no network namespace of an enrolled workload of this node")
            reason = self._foreign(pid, local)
            if _ended(pidfd):
                reason = f"process {pid} has ended"
        finally:
            os.close(pidfd)
        return Caller(pid=pid, refused=reason) if reason else Caller(cookie, pid)

    def _foreign(self, pid: int, local: LocalWorkload) -> str:
        """Why a process is not the workload's, or ""."""
        theirs, ours = os.stat(f"/proc/{pid}/ns/net"), os.stat(local.netns_path)  # noqa: PTH116
        if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
            return f"process {pid} uses a socket of workload {local.workload.name} from another network namespace"
        place = self._tree.of(pid)
        if place is None or (place != self._cgroup and self._cgroup not in place.parents):
            return f"process {pid} is in the network namespace of {local.workload.name}, but runs outside of cgroup {self._cgroup}"
        return ""


def _process(connection: socket.socket) -> tuple[int, int]:
    """(pid, pidfd) of the process that connected. Raises OSError; ValueError if it cannot be seen from here."""
    pid = int(_CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0])
    if pid <= 0:
        raise ValueError("it is in a process namespace that the agent does not see (does the agent's pod have hostPID?)")
    try:
        pidfd = int(_INT.unpack(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, _INT.size))[0])
    except OSError:
        pidfd = os.pidfd_open(pid)  # an older kernel; of a process that ended, the newer ones give a pidfd that says so
    return pid, pidfd


def _ended(pidfd: int) -> bool:
    """A pidfd is readable once its process has ended (pidfd_open(2))."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
