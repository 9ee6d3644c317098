"""Network namespaces: cookies, addresses, mounts that outlive their processes, and running a function inside one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from agent import netlink
from agent.errors import EnvironmentUnfit

SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h, Linux 5.14
CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
NSFS_MAGIC = "nsfs"
_MS_BIND = 0x1000  # include/uapi/linux/mount.h
_MNT_DETACH = 2  # include/linux/fs.h

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


def resolve(name: str) -> Path:
    """A path as it is; a bare name is one below /run/netns, where `ip netns add` puts it."""
    return Path(name) if "/" in name else Path("/run/netns") / name


def listening(path: Path) -> set[int]:
    """TCP ports on which somebody listens over IPv4 in the namespace at `path` (proc_pid_net(5), tcp). Raises OSError if it is gone."""
    lines = run_in(path, Path("/proc/thread-self/net/tcp").read_text).splitlines()[1:]
    return {int(words[1].rpartition(":")[2], 16) for words in map(str.split, lines) if words[3] == _LISTEN}


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
    return run_in(path, _cookie_here)


def _cookie_here() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return int(struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0])


def addresses(path: Path) -> tuple[str, ...]:
    """Every global address configured in the namespace: those that a workload does not declare must be known too, or they were a way round policy."""
    return _global(run_in(path, _addresses_here))


def _global(found: list[tuple[str, int]]) -> tuple[str, ...]:
    """Those of scope RT_SCOPE_UNIVERSE (include/uapi/linux/rtnetlink.h)."""
    return tuple(address for address, scope in found if scope == 0)


_RTM_GETADDR = 22  # include/uapi/linux/rtnetlink.h
_IFA_ADDRESS, _IFA_LOCAL = 1, 2  # include/uapi/linux/if_addr.h
_RTMGRP_IFADDR = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_ANSWER_S = 5
_LISTEN = "0A"  # include/net/tcp_states.h, as /proc shows it


def _addresses_here() -> list[tuple[str, int]]:
    """Every address and its scope."""
    found: list[tuple[str, int]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
        route.settimeout(_ANSWER_S)
        route.bind((0, 0))
        request = struct.pack("=B7x", socket.AF_UNSPEC)  # struct ifaddrmsg
        for start, end, buffer in netlink.exchange(route, "read the addresses of a network namespace", _RTM_GETADDR, netlink.DUMP, request):
            found += _address(bytes(buffer[start:end]))
    return found


def _address(message: bytes) -> list[tuple[str, int]]:
    """The address and scope in a struct ifaddrmsg with its attributes; nothing if it is of another family."""
    family, scope = message[0], message[3]
    found = netlink.attributes(message, 8)
    # IPv4 and point-to-point links: IFA_LOCAL is the own address and IFA_ADDRESS the peer's; IPv6 mostly has IFA_ADDRESS alone.
    raw = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    return [(socket.inet_ntop(family, raw), scope)] if raw and family in {socket.AF_INET, socket.AF_INET6} else []


@dataclass(frozen=True, slots=True)
class Seen:
    """One look into a namespace."""

    cookie: int
    addresses: tuple[str, ...]
    loopback: bool
    """Its loopback addresses can be bound: a runtime makes the namespace first and configures it a moment later."""
    notices: int
    """Descriptor of a netlink socket in the namespace: readable after every change of its addresses since the look. The caller closes it."""


def look(source: Path) -> Seen:
    """Cookie and addresses of the namespace at `source`, and news of later changes. Raises OSError if it is no namespace."""

    def read() -> Seen:
        # First the subscription, then the question: a change in between is told twice rather than never.
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        ) as notices:
            notices.bind((0, _RTMGRP_IFADDR))
            number, found = _cookie_here(), _addresses_here()
            present = {address for address, _ in found}
            loopback = "127.0.0.1" in present and ("::1" in present or not _ipv6_here())
            return Seen(number, _global(found), loopback, notices.detach())

    return run_in(source, read)


def _ipv6_here() -> bool:
    try:
        return Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text().strip() == "0"  # of the reader's namespace
    except OSError:
        return False


def create(target: Path) -> None:
    """Make a new namespace and mount it at `target`; one that is mounted there already stays."""
    if is_namespace(target):
        return
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.touch(mode=0o600)

    def unshare() -> None:
        _checked(_libc.unshare(CLONE_NEWNET), "make a network namespace")
        bind(Path("/proc/thread-self/ns/net"), target)

    run_in(Path("/proc/self/ns/net"), unshare)


def apart(function: Callable[[], T]) -> T:
    """Run `function` in a new network namespace, which goes with it. Raises what `function` raises, and OSError."""

    def enter() -> T:
        _checked(_libc.unshare(CLONE_NEWNET), "make a network namespace")
        return function()

    return run_in(Path("/proc/self/ns/net"), enter)


def _checked(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def bind(source: Path, target: Path) -> None:
    """mount --bind without a process: forking one costs 10 ms in a process of this size."""
    _checked(_libc.mount(os.fsencode(source), os.fsencode(target), b"none", _MS_BIND, None), f"mount {source} at {target}")


@functools.cache
def _nsfs_device() -> int:
    """All namespace files are in one file system (fs/nsfs.c)."""
    return Path("/proc/self/ns/net").stat().st_dev


GONE = (0, 0)


def mark(path: str) -> tuple[int, int]:
    """Device and inode of the namespace file at `path`: another namespace has another. GONE if there is none, or a file that is none (yet)."""
    try:
        found = os.stat(path)  # noqa: PTH116  polled for every workload: a Path costs as much again
    except OSError:
        return GONE
    return (found.st_dev, found.st_ino) if found.st_dev == _nsfs_device() else GONE


def is_namespace(path: Path) -> bool:
    """True if a namespace is there."""
    return mark(str(path)) != GONE


def hold(source: Path, number: int, directory: Path) -> Path:
    """Mount the namespace at `source` below `directory` under its cookie `number`, so that the name cannot come to mean another namespace.

    Returns where. Doing it again is harmless. Raises OSError if `source` is no namespace any more, EnvironmentUnfit if mounting is refused.
    """
    if number in _own_cookies():
        raise EnvironmentUnfit(
            f"network namespace {source} is the node's own: workloads there are not supported, give the process a namespace of its own"
        )
    target = directory / str(number)
    if not is_namespace(target):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.touch(mode=0o600)
        try:
            bind(source, target)
        except OSError as error:
            target.unlink(missing_ok=True)
            if not is_namespace(source):
                raise FileNotFoundError(f"network namespace {source} went while it was being held") from error
            raise EnvironmentUnfit(f"cannot hold network namespace {source}: {error.strerror}; CAP_SYS_ADMIN is needed") from error
        if cookie(target) != number:  # replaced between the two looks: what is mounted is not what was asked for
            release(target)
            raise FileNotFoundError(f"network namespace {source} was replaced while it was being held")
    return target


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
    """Undo `hold` and `create`. The namespace itself goes when nothing else uses it."""
    _libc.umount2(os.fsencode(target), _MNT_DETACH)  # fails harmlessly if nothing is mounted
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
