"""cgroup2 directories of the lab: found, made, emptied, removed. Called by the lab's other modules; knows nothing of nodes or pods."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path

from lab.errors import LabError


def mount_point(mounts: str | None = None) -> Path:
    """Return where cgroup2 is mounted: /sys/fs/cgroup, or below it on hybrid machines. `mounts` is the text of /proc/self/mounts."""
    text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    for line in text.splitlines():
        fields = line.split()
        if len(fields) > 2 and fields[2] == "cgroup2":
            return Path(fields[1])
    raise LabError("no cgroup2 file system is mounted: mount -t cgroup2 none /sys/fs/cgroup")


def create(path: Path) -> Path:
    """Make a cgroup and those above it."""
    path.mkdir(parents=True, exist_ok=True)
    return path


def pids(path: Path) -> list[int]:
    """Return the processes in a cgroup and those below it."""
    found: set[int] = set()
    for procs in path.glob("**/cgroup.procs"):
        with contextlib.suppress(OSError):  # removed meanwhile
            found.update(int(line) for line in procs.read_text().split())
    return sorted(found)


def kill(path: Path, timeout: float = 10.0) -> None:
    """SIGKILL everything in a cgroup and below it, and wait until all of it is gone. A cgroup that does not exist is empty."""
    if not path.is_dir():
        return
    deadline = time.monotonic() + timeout
    while True:
        try:
            (path / "cgroup.kill").write_text("1")
        except OSError:  # before Linux 5.14
            for pid in pids(path):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        left = deadline - time.monotonic()
        if wait_empty(path, min(1.0, max(left, 0.0))):
            return
        if left <= 0:
            raise LabError(f"processes {pids(path)} in {path} survive SIGKILL: they hang in the kernel (see /proc/PID/stack)")


def wait_empty(path: Path, timeout: float) -> bool:
    """Wait until a cgroup and those below it hold no live process; return whether that happened within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    try:
        with (path / "cgroup.events").open() as events:
            poller = select.poll()
            poller.register(events, select.POLLPRI)  # cgroup.events notifies that way: Documentation/admin-guide/cgroup-v2.rst
            while True:
                events.seek(0)
                if "populated 0" in events.read():
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poller.poll(left * 1000)
    except FileNotFoundError:
        return True


def remove(path: Path) -> None:
    """Remove an empty cgroup and those below it, deepest first. Removing what is not there is fine."""
    if not path.is_dir():
        return
    try:
        for directory, _, _ in os.walk(path, topdown=False):
            with contextlib.suppress(FileNotFoundError):
                Path(directory).rmdir()
    except OSError as error:
        raise LabError(f"cannot remove cgroup {error.filename}: {error.strerror}") from error
