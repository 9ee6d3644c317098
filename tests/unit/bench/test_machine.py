"""CPU time and memory from the texts of /proc."""

from __future__ import annotations

import os

import pytest

from bench.agent import resident_mb
from bench.machine import busy_seconds, used_seconds
from lab.errors import LabError


def test_busy_time_leaves_out_idle_iowait_steal_and_guest() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    assert busy_seconds("cpu  1 20 300 4000 50000 600000 7000000 80000000 900000000 0\ncpu0 9 9 9\n") == pytest.approx(7600321 / ticks)


def test_the_machine_has_worked_since_boot() -> None:
    assert busy_seconds() > 0


def test_a_process_uses_cpu_time() -> None:
    before = used_seconds([os.getpid()])
    while used_seconds([os.getpid()]) == before:
        pass
    assert used_seconds([os.getpid(), os.getpid()]) > 2 * before


def test_resident_memory_is_read_as_megabytes() -> None:
    assert resident_mb("Name:\tmeshagent\nVmHWM:\t   99999 kB\nVmRSS:\t   68000 kB\n") == 69.632


def test_an_agent_that_ended_has_no_memory() -> None:
    with pytest.raises(LabError, match="ended"):
        resident_mb("Name:\tmeshagent\nState:\tZ (zombie)\n")
