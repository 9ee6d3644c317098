"""Network namespaces by name: made, deleted and entered. Called by the lab's other modules.

A name is a file in /run/netns, so `ip netns` and `nsenter --net=` find it too. Unlike `ip netns add` this does not bind /run/netns onto
itself: the lab must leave no mount behind. Entering is done in a thread of its own, which ends afterwards: a namespace is a property of a
thread (man 7 network_namespaces), so the caller's never changes. `ip netns exec` is not used: it remounts /sys and hides the cgroups.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lab.errors import LabError

DIRECTORY = Path("/run/netns")
_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_MS_BIND = 0x1000  # include/uapi/linux/mount.h
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


def path(name: str) -> Path:
    """Return the file that names a namespace."""
    return DIRECTORY / name


def create(name: str) -> None:
    """Make a namespace and name it. Raises LabError if the name is taken or the kernel refuses."""
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    target = path(name)
    try:
        target.touch(mode=0o444, exist_ok=False)
    except FileExistsError:
        raise LabError(f"network namespace {name} exists already: `meshagent lab down` removes what an earlier lab left") from None

    def unshare_and_bind() -> None:
        _checked(_libc.unshare(_CLONE_NEWNET), f"cannot make network namespace {name}")
        source = b"/proc/thread-self/ns/net"
        _checked(_libc.mount(source, os.fsencode(target), b"none", _MS_BIND, None), f"cannot name network namespace {name}")

    try:
        _in_thread(unshare_and_bind)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def delete(name: str) -> None:
    """Take the name away; the namespace goes when its last process and socket do. Deleting what is not there is fine."""
    target = path(name)
    _libc.umount2(os.fsencode(target), _MNT_DETACH)  # fails harmlessly if nothing was mounted yet
    # Unlinking also detaches the copies of this mount in the pods' private mount namespaces (fs/namei.c, vfs_unlink).
    target.unlink(missing_ok=True)


def exists(name: str) -> bool:
    """Return whether a namespace has this name."""
    return path(name).exists()


def names(prefix: str) -> list[str]:
    """Return the names that start with `prefix`, sorted."""
    return sorted(entry.name for entry in DIRECTORY.glob(f"{prefix}*"))


def remove_directory() -> None:
    """Remove /run/netns if it holds nothing."""
    try:
        DIRECTORY.rmdir()
    except OSError:
        return  # others have namespaces there, or it is a mount of `ip netns`


def inside(name: str, function: Callable[[], T]) -> T:
    """Run `function` in a thread that has entered the namespace; sockets and processes it makes belong to that namespace."""

    def enter() -> T:
        try:
            descriptor = os.open(path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise LabError(f"network namespace {name} does not exist: is the lab up?") from None
        try:
            _checked(_libc.setns(descriptor, _CLONE_NEWNET), f"cannot enter network namespace {name}")
        finally:
            os.close(descriptor)
        return function()

    return _in_thread(enter)


def _in_thread(function: Callable[[], T]) -> T:
    """Run `function` in a fresh thread and hand over its result or exception."""
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise LabError(f"{what}: {os.strerror(ctypes.get_errno())}")
