"""What `meshagent uninstall` removes and what it leaves, without a kernel; the rest is in tests/kernel."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent import lock, uninstall
from agent.config import Config

# Everything that an agent writes, and what it was writing when it was killed.
OWN = (
    "agent.lock", "agent.sock", "cgroup", "xds.sock", "envoy.log", "envoy.json", "envoy-admin.sock", "envoy-bootstrap.json", "ids.json", "loader.log",
    "manifest-2e99c10a35ae.json", ".ids.json.x1y2", ".manifest-2e99c10a35ae.json.x1y2", ".envoy.json.x1y2",
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = Config(
        node="",
        controller="",
        cgroup=tmp_path / "cgroup",
        pin_dir=tmp_path / "pins",
        run_dir=tmp_path / "run",
        state_dir=tmp_path / "state",
    )
    for directory in (made.pin_dir / "links", made.run_dir / "netns", made.state_dir):
        directory.mkdir(parents=True)
    for name in OWN:
        (made.run_dir / name).touch()
    (made.identity_dir / "door").mkdir(parents=True)
    (made.identity_dir / "svids.json").touch()
    made.workload_socket.parent.mkdir()
    made.workload_socket.touch()
    for name in ("snapshot.pb", ".snapshot.pb.x1y2"):
        (made.state_dir / name).touch()
    made.log_dir.mkdir()
    for name in ("requests.log", "requests.log.1", "connections.log"):
        (made.log_dir / name).touch()
    for name in ("mesh_connect4", "netns-7"):
        (made.pin_dir / "links" / name).touch()
    return made


@contextmanager
def agent(config: Config, *, stubborn: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    code = (
        "import signal, sys, time; from pathlib import Path; from agent import lock\n"
        f"if {stubborn}: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "lock.acquire(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(config.run_dir / "agent.lock")], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_everything_an_agent_ever_wrote_is_removed_and_said(config: Config) -> None:
    done = uninstall.uninstall(config)
    assert done == [
        f"removed programs, maps and 2 links below {config.pin_dir}",
        f"removed {config.run_dir}",
        f"removed {config.state_dir}",
        f"removed {config.workload_socket.parent}",
    ]
    assert [path.exists() for path in (config.pin_dir, config.run_dir, config.state_dir)] == [False] * 3


def test_doing_it_again_finds_nothing(config: Config) -> None:
    uninstall.uninstall(config)
    assert uninstall.uninstall(config) == []


def test_what_other_agents_keep_in_the_same_directory_stays(config: Config) -> None:
    (config.run_dir / "node-2").mkdir()
    (config.run_dir / "node-2" / "agent.sock").touch()
    (config.run_dir / "controller.sock").touch()
    uninstall.uninstall(config)
    assert sorted(path.name for path in config.run_dir.iterdir()) == ["controller.sock", "node-2"]
    assert (config.run_dir / "node-2" / "agent.sock").exists()


def test_an_agent_that_runs_is_stopped_first(config: Config) -> None:
    with agent(config) as process:
        assert uninstall.uninstall(config)[0] == f"stopped the agent (pid {process.pid})"
        assert process.wait(5) == -15


def test_an_agent_that_does_not_listen_is_killed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uninstall, "_PATIENCE_S", 0.3)
    with agent(config, stubborn=True) as process:
        started = time.monotonic()
        uninstall.uninstall(config)
        assert process.wait(5) == -9
        assert time.monotonic() - started < 5


def test_a_lock_that_a_killed_agent_left_is_nobodys(config: Config) -> None:
    with agent(config) as process:
        process.kill()
        process.wait()
    assert lock.holder(config.run_dir / "agent.lock") is None
    assert not any(line.startswith("stopped") for line in uninstall.uninstall(config))
