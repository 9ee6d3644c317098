"""Network namespaces of the processes that an agent would serve, and who listens in them. Reads /proc only; used by machine.py and neighbours.py."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent import cgroups

_LISTENING, _UNCONNECTED = "0A", "07"  # TCP_LISTEN, TCP_CLOSE: include/net/tcp_states.h
_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")
OWN: Final = Path("/proc/self/ns/net")


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace by one of its processes. `cgroup`: that process's."""

    pid: int
    command: str
    cgroup: Path

    @property
    def path(self) -> Path:
        """What can be opened to enter it."""
        return Path(f"/proc/{self.pid}/ns/net")

    def __str__(self) -> str:
        return f"the network namespace of process {self.pid} ({self.command})"


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that takes connections or datagrams. `pid` 0: the kernel's own, or of a process that cannot be seen."""

    protocol: str
    port: int
    pid: int = 0
    command: str = ""
    cgroup: Path | None = None

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})" if self.pid else "the kernel, or a process that cannot be seen from here"


def namespaces(cgroup: Path) -> list[Namespace]:
    """Those of processes below a cgroup, each once, without this process's own."""
    tree = cgroups.Tree(cgroup)
    seen = {OWN.stat().st_ino}
    found = []
    for pid in _pids():
        try:
            inode = os.stat(f"/proc/{pid}/ns/net").st_ino  # noqa: PTH116  no Path for each of thousands of processes
        except OSError:
            continue  # ended, or not ours to look at
        if inode not in seen:
            place = tree.of(pid)
            if place is not None and (place == cgroup or cgroup in place.parents):
                seen.add(inode)
                found.append(Namespace(pid, command(pid), place))
    return found


def listeners(net: Path, ports: Mapping[str, frozenset[int]], cgroup: Path) -> list[Listener]:
    """Who listens on these ports, by protocol; `net` is /proc/PID/net of a process in the namespace."""
    inodes: dict[int, tuple[str, int]] = {}
    for protocol, wanted in ports.items():
        for name in (protocol, f"{protocol}6"):
            with contextlib.suppress(OSError):
                inodes |= {inode: (protocol, port) for port, inode in taken((net / name).read_text(), wanted)}
    if not inodes:
        return []
    tree = cgroups.Tree(cgroup)
    owners = dict(_owners(inodes.keys() - {0}))
    return sorted(
        {
            Listener(*at, pid=pid, command=command(pid), cgroup=tree.of(pid)) if (pid := owners.get(inode, 0)) else Listener(*at)
            for inode, at in inodes.items()
        },
        key=lambda one: (one.protocol, one.port, one.pid),
    )


def taken(table: str, ports: frozenset[int]) -> Iterator[tuple[int, int]]:
    """(port, inode) of the sockets that listen on some ports, from the text of /proc/net/tcp, udp, tcp6 or udp6 (proc(5))."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        port = int(fields[1].rpartition(":")[2], 16)
        if port in ports and fields[3] in {_LISTENING, _UNCONNECTED}:
            yield port, int(fields[9])


def command(pid: int) -> str:
    """A process's name, "?" if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())  # noqa: PTH208


def _owners(inodes: frozenset[int] | set[int]) -> Iterator[tuple[int, int]]:
    """(inode, pid) of who holds these sockets."""
    for pid in _pids() if inodes else ():
        try:
            names = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]  # noqa: PTH115, PTH208
        except OSError:
            continue
        for name in names:
            match = _SOCKET.fullmatch(name)
            if match and int(match[1]) in inodes:
                yield int(match[1]), pid
