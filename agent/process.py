"""Programs that outlive the agent: started in a session of their own, recorded on disk, adopted by the next agent, ended without hitting another.

A process is known by its pid together with its start time (proc(5), stat field 22), never by a name. Used by the parts that own such a
program: `agent.l7.envoy` and `agent.names`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from agent import files


@dataclass(frozen=True, slots=True)
class Process:
    """One process for ever: a pid is reused, a pid with its start time (clock ticks since boot) is not."""

    pid: int
    start: int
    config: str
    """Hash of everything that it was started with."""

    def alive(self) -> bool:
        """Return True if it runs and is no zombie."""
        stat = _stat(self.pid)
        return stat is not None and stat == ("live", self.start)


def spawn(launcher: str, argv: Sequence[str], output: Path, config: str) -> Process:
    """Start a shell script that ends in `exec`, with `argv` as $0, $1 and so on, in a session of its own; what it prints goes to `output`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    pid = os.posix_spawn(
        "/bin/sh",
        ["sh", "-c", launcher, *argv],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(output), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    stat = _stat(pid)
    return Process(pid, stat[1] if stat else 0, config)


def leave_no_core(process: Process) -> None:
    """Have the kernel write no core dump of a process, and hand none to a handler: it gets private keys over its lifetime.

    A limit of 1 byte is less than any dump and, where core_pattern names a program, means "no dump" (fs/coredump.c, do_coredump); 0 would not do there.
    Whoever may not raise a limit of 0 keeps it.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(process.pid, resource.RLIMIT_CORE, (1, 1))


def record(path: Path, process: Process) -> None:
    """Remember a process for the next agent and for `meshagent uninstall`."""
    files.write(path, json.dumps(asdict(process)).encode())


def recorded(path: Path) -> Process | None:
    """Return the process of a record if it still lives."""
    try:
        process = Process(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return process if process.alive() else None


def send(process: Process, number: signal.Signals) -> bool:
    """Send a signal to this very process; False if it is gone."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not process.alive():
            return False
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def end(process: Process, patience_s: float = 5.0) -> None:
    """Ask, wait, force. The pidfd makes sure that no other process is hit."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if not process.alive():
            return
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            if poll.poll(patience_s * 1000):
                break
    finally:
        os.close(pidfd)
        reap(process.pid)


def reap(pid: int) -> None:
    """Collect the exit status if the process is a child of ours; an adopted one is its reaper's."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _stat(pid: int) -> tuple[str, int] | None:
    """Return ("live" or "zombie", start time in ticks) from /proc/PID/stat, or None."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return ("zombie" if fields[0] in {"Z", "X"} else "live", int(fields[19]))
