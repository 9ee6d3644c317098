"""The arguments of `meshagent run` and `meshagent uninstall`, up to where the agent begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from agent import cgroups, features, logs, supervisor
from agent.bpf import upgrade
from agent.check.finding import Finding
from agent.cli import daemon
from agent.cli.main import main
from agent.config import Config, TlsFiles


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations that agents would have been started with; none is."""
    found: list[Config] = []

    class Stub:
        def __init__(self, config: Config) -> None:
            found.append(config)

        async def run(self) -> None:
            """End at once."""

    monkeypatch.setattr(supervisor, "Supervisor", Stub)
    monkeypatch.setattr(logs, "configure", lambda _: None)
    return found


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, ["run", *arguments], env=env or {})


def pems(tmp_path: Path) -> list[str]:
    options = []
    for name in ("ca", "cert", "key"):
        (tmp_path / name).touch()
        options += [f"--tls-{name}", str(tmp_path / name)]
    return options


def test_the_defaults_are_a_node_with_a_controller_beside_it(started: list[Config]) -> None:
    assert run("--node", "n1").exit_code == 0
    (config,) = started
    assert (config.node, config.controller, config.tls) == ("n1", "unix:///run/meshagent/controller.sock", None)
    assert (config.run_dir, config.metrics_port, config.trust_domain) == (Path("/run/meshagent"), 15020, "mesh.local")


def test_every_option_reaches_the_configuration(started: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "kubernetes_node", lambda: False)
    values: dict[str, Any] = {
        "controller": "10.0.0.1:1", "trust-domain": "t", "cgroup": "/c", "pin-dir": "/p", "run-dir": "/r", "state-dir": "/s",
        "metrics-address": "127.0.0.1", "metrics-port": 23, "envoy": "/e", "envoy-concurrency": 7, "envoy-memory": "512Mi",
        "kubelet-cgroup": "/c/k",
    }  # fmt: skip
    result = run("--node", "n1", *pems(tmp_path), *(str(part) for name, value in values.items() for part in (f"--{name}", value)))
    assert result.exit_code == 0, result.output
    assert started == [
        Config(
            node="n1", controller="10.0.0.1:1", tls=TlsFiles(tmp_path / "ca", tmp_path / "cert", tmp_path / "key"), trust_domain="t",
            cgroup=Path("/c"), pin_dir=Path("/p"), run_dir=Path("/r"), state_dir=Path("/s"), metrics_address="127.0.0.1", metrics_port=23,
            envoy="/e", envoy_concurrency=7, envoy_memory=512 << 20, kubelet_cgroup=Path("/c/k"),
        )
    ]  # fmt: skip


def test_every_option_is_an_environment_variable(started: list[Config]) -> None:
    assert run(env={"MESHAGENT_RUN_NODE": "n2", "MESHAGENT_RUN_METRICS_PORT": "307"}).exit_code == 0
    assert [(config.node, config.metrics_port) for config in started] == [("n2", 307)]


@pytest.mark.parametrize(("given", "taken"), [("2Gi", 2 << 30), ("500M", 500_000_000), ("134217728", 128 << 20), ("max", 0), ("", None)])
def test_envoys_memory_is_written_as_in_kubernetes(started: list[Config], given: str, taken: int | None) -> None:
    assert run("--node", "n", "--envoy-memory", given).exit_code == 0
    assert [config.envoy_memory for config in started] == [taken]


def test_a_value_that_does_not_parse_is_shown_with_its_name(started: list[Config]) -> None:
    result = run("--node", "n", env={"MESHAGENT_RUN_METRICS_PORT": "http"})
    assert result.exit_code == 2
    assert "metrics-port" in result.stderr
    assert "'http'" in result.stderr
    assert started == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param([], "Missing option '--node'", id="no-node"),
        pytest.param(
            ["--node", "n", "--controller", "10.0.0.1:15010"], "reached over TCP: --tls-ca, --tls-cert and --tls-key", id="no-tls"
        ),
        pytest.param(["--node", "n", "--tls-ca", "/etc/hosts"], "--tls-ca, --tls-cert and --tls-key belong together", id="half-tls"),
        pytest.param(["--node", "n", "--tls-ca", "/nonexistent"], "does not exist", id="no-file"),
        pytest.param(["--node", "n", "--metrics-port", "0"], "metrics-port", id="port-zero"),
        pytest.param(["--node", "n", "--metrics-port", "65536"], "metrics-port", id="port-too-high"),
        pytest.param(["--node", "n", "--envoy-concurrency", "0"], "envoy-concurrency", id="no-threads"),
        pytest.param(["--node", "n", "--envoy-memory", "2 Gi"], "'2 Gi' is no size", id="no-size"),
        pytest.param(["--node", "n", "--envoy-memory", "127Mi"], "'127Mi' is too little", id="too-small-for-envoy"),
        pytest.param(["--node", "n", "--envoy-memory", f"{1 << 54}Ki"], "is more than any machine has", id="too-large-for-the-kernel"),
        pytest.param(["--node", "n", "--log-level", "loud"], "log-level", id="log-level"),
        pytest.param(["--node", "n", "--run-dir", "/etc/hosts"], "is a file", id="directory-is-a-file"),
    ],
)
def test_misuse_is_exit_code_2_and_starts_nothing(started: list[Config], arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert started == []


def test_the_cgroup_is_where_cgroup2_is_mounted_unless_given(started: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "cgroup2_mount", lambda: Path("/sys/fs/cgroup/unified"))
    run("--node", "n")
    monkeypatch.setattr(features, "cgroup2_mount", lambda: None)
    run("--node", "n")
    assert [config.cgroup for config in started] == [Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")]


def test_uninstall_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = CliRunner().invoke(main, ["uninstall"])
    assert (result.exit_code, result.stderr) == (1, "Error: this needs root: run it with sudo, or as user 0 in a container\n")


@pytest.mark.parametrize(("done", "said"), [([], "nothing was left\n"), (["stopped Envoy", "removed /r"], "stopped Envoy\nremoved /r\n")])
def test_uninstall_says_what_it_removed(monkeypatch: pytest.MonkeyPatch, done: list[str], said: str) -> None:
    asked: list[Config] = []

    def remove(config: Config) -> list[str]:
        asked.append(config)
        return done

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(daemon, "remove_everything", remove)
    result = CliRunner().invoke(main, ["uninstall", "--run-dir", "/r", "--pin-dir", "/p", "--state-dir", "/s", "--cgroup", "/c"])
    assert (result.exit_code, result.stdout) == (0, said)
    assert [(c.run_dir, c.pin_dir, c.state_dir, c.cgroup) for c in asked] == [(Path("/r"), Path("/p"), Path("/s"), Path("/c"))]


def test_the_cgroup_that_the_agent_has_from_its_environment_all_commands_have(
    monkeypatch: pytest.MonkeyPatch, started: list[Config], tmp_path: Path
) -> None:
    served: list[Path] = []

    def remove(config: Config) -> list[str]:
        served.append(config.cgroup)
        return []

    def check(config: Config) -> upgrade.Report:
        served.append(config.cgroup)
        return upgrade.Report(upgrade.SAFE, in_force=False)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(daemon, "remove_everything", remove)
    monkeypatch.setattr(upgrade, "check", check)
    for argv in (["run", "--node", "n"], ["uninstall"], ["upgrade-check"], ["uninstall", "--cgroup", "/c"]):
        result = CliRunner().invoke(main, argv, env={"MESHAGENT_RUN_CGROUP": "/sys/fs/cgroup/own"})
        assert result.exit_code == 0, result.output
    assert [*(config.cgroup for config in started), *served] == [*[Path("/sys/fs/cgroup/own")] * 3, Path("/c")]
    assert CliRunner().invoke(main, ["uninstall", "--run-dir", str(tmp_path)], env={"MESHAGENT_RUN_CGROUP": ""}).exit_code == 0
    assert served[-1] == features.cgroup2_mount()


def test_the_cgroup_that_an_agent_serves_is_known_to_commands_without_its_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: list[Config]
) -> None:
    """An operator's shell on a virtual machine reads no agent.env; an option still counts more, and `run` serves what it is told."""
    asked: list[Config] = []

    def remove(config: Config) -> list[str]:
        asked.append(config)
        return []

    def check(config: Config) -> upgrade.Report:
        asked.append(config)
        return upgrade.Report(upgrade.SAFE, in_force=False)

    def look(config: Config, _: str) -> Iterator[Finding]:
        asked.append(config)
        return iter(())

    monkeypatch.delenv("MESHAGENT_RUN_CGROUP", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(daemon, "remove_everything", remove)
    monkeypatch.setattr(upgrade, "check", check)
    monkeypatch.setattr("agent.cli.check._node", look)
    cgroups.note_served(tmp_path, Path("/sys/fs/cgroup/own"))
    runner = CliRunner()
    for command in (["check"], ["uninstall"], ["upgrade-check"], ["uninstall", "--cgroup", "/c"], ["run", "--node", "n"]):
        result = runner.invoke(main, [*command, "--run-dir", str(tmp_path)])
        assert result.exit_code == 0, result.output
    assert [config.cgroup for config in asked] == [*[Path("/sys/fs/cgroup/own")] * 3, Path("/c")]
    assert started[0].cgroup == features.cgroup2_mount()


@pytest.mark.parametrize("content", [b"", b"relative\n", b"\xff"])
def test_what_is_no_path_of_a_cgroup_is_not_taken_for_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cgroup").write_bytes(content)
    assert cgroups.served(tmp_path) is None


def test_capacities_of_maps_reach_the_agent(started: list[Config]) -> None:
    result = run("--node", "n", "--map-capacity", "mesh_flow=131072", "--map-capacity", "mesh_stats=23")
    assert result.exit_code == 0, result.output
    assert started[0].map_capacities == {"mesh_flow": 131072, "mesh_stats": 23}


@pytest.mark.parametrize("given", ["mesh_flow", "mesh_flow=many", "mesh_flow=0", "mesh_nothing=5", "mesh_flow=99999999999"])
def test_a_capacity_that_cannot_be_is_misuse(started: list[Config], given: str) -> None:
    result = run("--node", "n", "--map-capacity", given)
    assert (result.exit_code, started) == (2, [])
    assert given.partition("=")[0] in result.output
