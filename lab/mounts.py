"""File systems that the lab mounts where they are missing: bpffs, and a tmpfs for its run directory.

Called by `lab.lab` and `lab.teardown`.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from lab.errors import LabError

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8  # include/uapi/linux/mount.h
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def kind(path: Path) -> str:
    """Return the type of the file system that `path` is (or would be) on."""
    best, found = "", ""
    for target, fstype in _table():
        if (path == Path(target) or Path(target) in path.parents) and len(target) >= len(best):
            best, found = target, fstype
    return found


def is_mount(path: Path) -> bool:
    """Return whether something is mounted exactly here."""
    return any(target == str(path) for target, _ in _table())


def below(path: Path) -> list[Path]:
    """Return what is mounted at or below `path`, deepest first."""
    found = [Path(target) for target, _ in _table() if Path(target) == path or path in Path(target).parents]
    return sorted(found, key=lambda target: len(target.parts), reverse=True)


def mount_bpffs(path: Path) -> bool:
    """Mount a BPF file system if there is none; return whether it was missing."""
    if kind(path) == "bpf":
        return False
    if not path.is_dir():
        raise LabError(f"{path} does not exist: this kernel has no BPF, or sysfs is not mounted")
    _mount("bpf", path, 0, "mode=0700")
    return True


def unmount_bpffs(path: Path) -> bool:
    """Unmount a BPF file system that nobody has pinned anything in; return whether it is gone.

    The kernel's own iterators (maps.debug, progs.debug) do not count.
    """
    if not is_mount(path):
        return True
    if any(entry.name not in ("maps.debug", "progs.debug") for entry in path.iterdir()):
        return False
    return int(_libc.umount2(os.fsencode(path), 0)) == 0


def mount_tmpfs(path: Path) -> None:
    """Give `path` a tmpfs of its own unless it is on one already."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if kind(path) != "tmpfs":
        _mount("tmpfs", path, _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "mode=0700,size=256m")


def unmount_below(path: Path) -> None:
    """Unmount everything at or below `path`."""
    for target in below(path):
        _libc.umount2(os.fsencode(target), _MNT_DETACH)


def _mount(fstype: str, path: Path, flags: int, options: str) -> None:
    if _libc.mount(fstype.encode(), os.fsencode(path), fstype.encode(), flags, options.encode()) != 0:
        raise LabError(f"cannot mount {fstype} at {path}: {os.strerror(ctypes.get_errno())}")


def _table() -> list[tuple[str, str]]:
    """Return (target, type) of every mount, in the order of /proc/self/mounts (octal escapes decoded)."""
    rows = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split(" ")
        rows.append((fields[1].encode().decode("unicode_escape"), fields[2]))
    return rows
