"""One agent for one node: an advisory lock on a file in the run directory, held as long as the process lives (flock(2))."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from agent.errors import AlreadyRunning


def acquire(path: Path) -> int:
    """Take the lock and write the own pid; returns the descriptor, which must stay open. Raises AlreadyRunning with the other's pid."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        other = holder(path)
        os.close(fd)
        raise AlreadyRunning(
            f"an agent already runs for {path.parent} (pid {other}): stop it, or give this one another --run-dir and node"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def holder(path: Path) -> int | None:
    """Pid of the agent that holds the lock now, None if nobody does."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.read(fd, 32) or b"0") or None
    else:
        return None
    finally:
        os.close(fd)
