"""Network namespaces: cookies, mounts that outlive their processes, and running a function inside one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from agent.errors import EnvironmentUnfit

SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h, Linux 5.14
CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
NSFS_MAGIC = "nsfs"

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


def resolve(name: str) -> Path:
    """A path as it is; a bare name is one below /run/netns, where `ip netns add` puts it."""
    return Path(name) if "/" in name else Path("/run/netns") / name


def run_in(path: Path, function: Callable[[], T]) -> T:
    """Call `function` in a thread of its own that has joined the namespace at `path`; other threads stay where they are (setns(2)).

    Raises OSError if the namespace is gone, and whatever `function` raises.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(fd, CLONE_NEWNET):
                    code = ctypes.get_errno()
                    raise OSError(code, f"join network namespace {path}: {os.strerror(code)}")
            finally:
                os.close(fd)
            result.append(function())
        except BaseException as error:  # noqa: BLE001  handed to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=body, name=f"netns-{path.name}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def cookie(path: Path) -> int:
    """The namespace's cookie: unique until the next boot (net/core/net_namespace.c). Raises OSError if `path` is no namespace."""

    def read() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            return int(struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0])

    return run_in(path, read)


def addresses(path: Path) -> tuple[str, ...]:
    """Every global address configured in the namespace: those that a workload does not declare must be known too, or they were a way round policy."""

    def read() -> tuple[str, ...]:
        from pyroute2 import IPRoute  # noqa: PLC0415  0.1 s that commands need not wait for
        from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

        try:
            with IPRoute() as route:  # opened here, inside the namespace
                return tuple(m.get_attr("IFA_LOCAL") or m.get_attr("IFA_ADDRESS") for m in route.get_addr() if m["scope"] == 0)
        except NetlinkError as error:
            raise OSError(error.code, f"read the addresses in network namespace {path}: {error}") from error

    return run_in(path, read)


def hold(source: Path, directory: Path) -> tuple[int, Path]:
    """Mount the namespace at `source` below `directory` under its cookie, so that the name cannot come to mean another namespace.

    Returns cookie and path. Doing it again is harmless. Raises OSError if `source` is no namespace, EnvironmentUnfit if mounting is refused.
    """
    number = cookie(source)
    if number in _own_cookies():
        raise EnvironmentUnfit(
            f"network namespace {source} is the node's own: workloads there are not supported, give the process a namespace of its own"
        )
    target = directory / str(number)
    if target not in held(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.touch(mode=0o600)
        done = subprocess.run(["mount", "--bind", str(source), str(target)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise EnvironmentUnfit(f"cannot mount network namespace {source} at {target}: {done.stderr.strip()}; CAP_SYS_ADMIN is needed")
        if cookie(target) != number:  # replaced between the two looks: what is mounted is not what was asked for
            release(target)
            raise FileNotFoundError(f"network namespace {source} was replaced while it was being held")
    return number, target


@functools.cache
def _own_cookies() -> frozenset[int]:
    """The agent's own namespace and that of the machine's first process, where it may be looked at."""
    found = {cookie(Path("/proc/self/ns/net"))}
    with contextlib.suppress(OSError):
        found.add(cookie(Path("/proc/1/ns/net")))
    return frozenset(found)


def held(directory: Path) -> list[Path]:
    """The namespaces mounted below `directory`."""
    prefix = str(directory) + "/"
    return [Path(target) for target, kind in _mounts() if kind == NSFS_MAGIC and target.startswith(prefix)]


def release(target: Path) -> None:
    """Undo `hold`. The namespace itself goes when nothing else uses it."""
    subprocess.run(["umount", "--lazy", str(target)], capture_output=True, check=False)
    target.unlink(missing_ok=True)


def _mounts() -> Iterator[tuple[str, str]]:
    """(mount point, file system type) of every mount (proc(5), /proc/PID/mounts); later mounts cover earlier ones."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        yield fields[1].encode().decode("unicode_escape"), fields[2]


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`, which need not exist yet."""
    best, kind = "", ""
    resolved = str(path.resolve())
    for target, found in _mounts():
        if (resolved == target or resolved.startswith(target.rstrip("/") + "/")) and len(target) >= len(best):
            best, kind = target, found
    return kind
