"""What the lab reads from the machine, and how it waits for programs."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from lab import cgroup, mesh, network, process
from lab.errors import LabError, StartFailed
from lab.process import Process

HYBRID = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        pytest.param(HYBRID, "/sys/fs/cgroup/unified", id="hybrid"),
        pytest.param("cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n", "/sys/fs/cgroup", id="pure"),
    ],
)
def test_cgroup2_is_found_where_it_is_mounted(mounts: str, expected: str) -> None:
    assert cgroup.mount_point(mounts) == Path(expected)


def test_a_machine_without_cgroup2_is_told_what_to_do() -> None:
    with pytest.raises(LabError, match="no cgroup2 file system is mounted: mount -t cgroup2"):
        cgroup.mount_point("tmpfs / tmpfs rw 0 0\n")


def test_interface_names_fit_into_the_kernels_15_characters_and_differ() -> None:
    names = {network.port_name(f"a-very-long-namespace/pod-{i}") for i in range(23)}
    assert len(names) == 23
    assert max(map(len, names)) <= 15


def watched(child: subprocess.Popen[bytes], log: Path) -> Process:
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    return Process("child", child.pid, started, log)


def test_waiting_for_a_program_that_dies_ends_at_once_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    log.write_text("line one\nno such bridge\n")
    with subprocess.Popen(["sleep", "60"]) as child:
        target = watched(child, log)
        assert target.alive()
        child.kill()
        started = time.monotonic()
        with pytest.raises(StartFailed, match="child ended before it was ready") as failure:
            mesh.wait_ready(target, lambda: False, timeout=30)
        assert time.monotonic() - started < 5
        assert failure.value.log == "line one\nno such bridge"
        assert not target.alive(), "a zombie is not alive"


def test_waiting_ends_when_time_is_up(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        with pytest.raises(StartFailed, match="child is not ready after 0 s"):
            mesh.wait_ready(watched(child, tmp_path / "none"), lambda: False, timeout=0.2)
        child.kill()


def test_a_reused_pid_is_not_mistaken_for_the_program(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        real = watched(child, tmp_path / "none")
        other = Process("other", real.pid, real.started - 1, real.log)
        assert not other.alive()
        assert other.stop(1.0)
        assert real.alive(), "it must not have been signalled"
        assert real.stop(5.0)


def test_tail_returns_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n" for i in range(23)))
    assert process.tail(log, 2) == "line 21\nline 22"
    assert process.tail(tmp_path / "none") == ""


def test_envoy_stats_are_counters_and_gauges_only() -> None:
    text = '{"stats": [{"name": "a", "value": 7}, {"name": "b", "value": "text"}, {"histograms": {}}]}'
    assert mesh.parse_envoy_stats(text) == {"a": 7}
