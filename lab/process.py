"""Programs inside a place of the lab: how to enter it, start there, know whether it lives, and end it. Called by `lab.lab` and `lab.mesh`.

A background program is nobody's child, so it outlives `lab up`; it is known by its pid together with its start time, because pids are
reused. Signals go through a pidfd for the same reason.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError, StartFailed

BASE_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}

# Joins the cgroup first, so that every later step is already counted there. Each step replaces the shell: the program gets this pid.
_ENTER = """
set -e
echo 0 > "$1/cgroup.procs"
net=$2 host=$3 hosts=$4
shift 4
if [ -z "$host" ]; then exec nsenter --net="$net" -- "$@"; fi
exec nsenter --net="$net" -- unshare --uts --mount --propagation private -- /bin/sh -c '
  set -e
  echo "$1" > /proc/sys/kernel/hostname
  mount --bind "$2" /etc/hosts
  shift 2
  exec "$@"' sh "$host" "$hosts" "$@"
"""
_BACKGROUND = """
log=$1
shift
"$@" < /dev/null >> "$log" 2>&1 &
echo $!
"""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a program runs. With a `hostname` it also gets a host name and an /etc/hosts of its own."""

    cgroup: Path
    netns: Path
    hostname: str = ""
    hosts: Path = Path("/etc/hosts")


@dataclass(frozen=True, slots=True)
class Process:
    """A background program; `started` is field 22 of /proc/PID/stat, in clock ticks since boot."""

    name: str
    pid: int
    started: int
    log: Path

    def alive(self) -> bool:
        """Return whether this very process still runs (a zombie does not)."""
        found = _stat(self.pid)
        return found is not None and found == (self.started, False)

    def wait(self, timeout: float) -> bool:
        """Wait until it has ended; return whether it did within `timeout` seconds."""
        descriptor = self._open()
        if descriptor is None:
            return True
        try:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            return bool(poller.poll(timeout * 1000))
        finally:
            os.close(descriptor)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal if it still runs."""
        descriptor = self._open()
        if descriptor is None:
            return
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return
        finally:
            os.close(descriptor)

    def stop(self, timeout: float) -> bool:
        """End it with SIGTERM, and with SIGKILL after `timeout` seconds; return whether SIGTERM was enough."""
        self.signal(signal.SIGTERM)
        if self.wait(timeout):
            return True
        self.kill()
        return False

    def kill(self) -> None:
        """End it with SIGKILL and wait until it is gone."""
        self.signal(signal.SIGKILL)
        if not self.wait(5.0):
            raise LabError(f"{self.name} (pid {self.pid}) survives SIGKILL: it hangs in the kernel (see /proc/{self.pid}/stack)")

    def _open(self) -> int | None:
        """Return a pidfd of this very process, or None if it is gone."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.alive():
            return descriptor
        os.close(descriptor)
        return None


def current() -> Process:
    """Return the calling process."""
    started, _ = _stat(os.getpid()) or (0, False)
    return Process("lab", os.getpid(), started, Path(os.devnull))


def command(seat: Seat, argv: Sequence[str]) -> list[str]:
    """Return the command that runs `argv` in a seat; standard streams, exit code and signals are those of `argv`."""
    if not seat.netns.exists():
        raise LabError(f"network namespace {seat.netns.name} does not exist: is the lab up?")
    if not seat.cgroup.is_dir():
        raise LabError(f"cgroup {seat.cgroup} does not exist: is the lab up?")
    return ["/bin/sh", "-c", _ENTER, "lab", str(seat.cgroup), str(seat.netns), seat.hostname, str(seat.hosts), *argv]


def start(name: str, seat: Seat, argv: Sequence[str], env: Mapping[str, str], directory: Path, log: Path) -> Process:
    """Start a background program whose output is appended to `log`."""
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    run = subprocess.run(
        ["/bin/sh", "-c", _BACKGROUND, "lab", str(log), *command(seat, argv)],
        cwd=directory,
        env={**BASE_ENV, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        start_new_session=True,
    )
    pid = int(run.stdout)
    found = _stat(pid)
    if found is None:
        raise StartFailed(f"{name} ended as soon as it was started", tail(log))
    return Process(name, pid, found[0], log)


def tail(log: Path, lines: int = 25) -> str:
    """Return the end of a log file, or "" if there is none."""
    try:
        with log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 64 * 1024))
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def deadline_left(deadline: float) -> float:
    """Return the seconds until a `time.monotonic()` deadline, never negative."""
    return max(0.0, deadline - time.monotonic())


def _stat(pid: int) -> tuple[int, bool] | None:
    """Return (start time, zombie) of a pid, or None if there is no such process (man 5 proc_pid_stat)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[19]), fields[0] in ("Z", "X")
