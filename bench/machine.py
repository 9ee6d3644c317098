"""The machine under a benchmark: where and how its programs are scheduled, and how much CPU the whole of it used. Called by the benchmarks.

What is measured runs as SCHED_RR with the lowest priority, in every mode alike: a neighbour that computes on the same CPUs would otherwise
keep a woken program waiting for the rest of its slice (milliseconds, where the question is about microseconds). Fair programs keep their 5 %
(sched_rt_runtime_us, man 7 sched). Both CPUs are kept from halting meanwhile (`awake`): on a virtual machine a wake-up of a halted CPU goes through
the hypervisor and takes, by chance, ten times as long as all that is measured here.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PRIORITY = 1


@dataclass(frozen=True, slots=True)
class Cpus:
    """Two CPUs: `near` for the client, `far` for what is called. The same one if the machine has no more."""

    near: int
    far: int


def cpus() -> Cpus:
    """Choose the two lowest CPUs that this process may use."""
    usable = sorted(os.sched_getaffinity(0))
    return Cpus(usable[0], usable[min(1, len(usable) - 1)])


def pinned(cpu: int, argv: Sequence[str]) -> list[str]:
    """Return the command that runs `argv` on one CPU, ahead of other programs."""
    return ["chrt", "--rr", str(PRIORITY), "taskset", "-c", str(cpu), *argv]


def pin(pid: int, cpu: int) -> None:
    """Do the same to all threads that a running process has now; those they start later inherit it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {cpu})
        os.sched_setscheduler(int(task.name), os.SCHED_RR, os.sched_param(PRIORITY))


@contextmanager
def awake(chosen: Cpus) -> Iterator[tuple[int, ...]]:
    """Keep the CPUs from halting with a program each that runs whenever nothing else wants to (SCHED_IDLE); yields their pids."""
    spin = ["sh", "-c", "while :; do :; done"]
    with ExitStack() as stack:
        found = []
        for cpu in sorted({chosen.near, chosen.far}):
            argv = ["setpriv", "--pdeathsig", "KILL", "chrt", "--idle", "0", "taskset", "-c", str(cpu), *spin]
            spinner = stack.enter_context(subprocess.Popen(argv, stdin=subprocess.DEVNULL))
            stack.callback(spinner.kill)
            found.append(spinner.pid)
        yield tuple(found)


def busy_seconds(stat: str | None = None) -> float:
    """Return CPU seconds that all CPUs have worked since boot, the kernel's own work included. `stat` is the text of /proc/stat.

    man 5 proc_stat: user, nice, system, irq and softirq count; idle, iowait and steal do not; guest is part of user already.
    """
    text = Path("/proc/stat").read_text() if stat is None else stat
    user, nice, system, _idle, _iowait, irq, softirq = map(int, text.split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def used_seconds(pids: Iterable[int]) -> float:
    """Return CPU seconds that all threads of these processes have used, to the nanosecond (Documentation/scheduler/sched-stats.rst)."""
    return sum(_used_ns(task) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def _used_ns(task: Path) -> int:
    try:
        return int((task / "schedstat").read_text().split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return 0  # the thread has ended since its process was looked at
