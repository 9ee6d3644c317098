"""The units: what systemd says of them, and that they say what the agent's DaemonSet and the command lines say."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from agent.cli.daemon import run as agent_run
from controller.main import run as controller_run
from tests.unit.deploy.test_manifests import DEPLOY, PLAIN, containers, of

UNITS = DEPLOY / "systemd"
BOTH = pytest.mark.parametrize("name", ["meshagent", "mesh-controller"])
EXPOSURE = {"meshagent": 4.4, "mesh-controller": 1.3}
"""At most, of 10 (systemd-analyze security, systemd 252). What the agent's is made of stands in its unit."""
FOR_NAMES = {"SETUID", "SETGID", "SETPCAP", "KILL"}
"""Name servers run as nobody; in a cluster there are none."""


def settings(name: str) -> dict[str, list[str]]:
    """Each setting's values, in order."""
    found = defaultdict(list)
    for line in (UNITS / f"{name}.service").read_text().splitlines():
        if match := re.fullmatch(r"(\w+)=(.*)", line):
            found[match[1]].append(match[2])
    return found


def analyze(*argv: object) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze, which needs no systemd that runs."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is Debian's package systemd")
    return subprocess.run(["systemd-analyze", *map(str, argv)], capture_output=True, text=True, timeout=60, check=False)


@BOTH
def test_systemd_understands_every_line_of_a_unit(name: str, tmp_path: Path) -> None:
    unit = tmp_path / f"{name}.service"
    text = (UNITS / unit.name).read_text()
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))  # which is not installed here
    run = analyze("verify", unit)
    assert [line for line in run.stderr.splitlines() if name in line] == []


@BOTH
def test_a_unit_is_no_more_exposed_than_it_was(name: str) -> None:
    run = analyze("security", "--offline=true", f"--threshold={int(EXPOSURE[name] * 10)}", UNITS / f"{name}.service")
    assert run.returncode == 0, run.stdout


def test_the_agent_has_the_capabilities_of_the_daemon_set_and_those_for_names() -> None:
    (agent,) = (one for one in containers(PLAIN) if one["name"] == "agent")
    assert of(PLAIN, "DaemonSet")
    in_cluster = set(agent["securityContext"]["capabilities"]["add"])
    given = {name.removeprefix("CAP_") for line in settings("meshagent")["CapabilityBoundingSet"] for name in line.split()}
    assert given == in_cluster | FOR_NAMES


def test_the_controller_has_no_capability_and_is_not_root() -> None:
    assert settings("mesh-controller")["CapabilityBoundingSet"] == [""]
    assert settings("mesh-controller")["User"] == ["mesh-controller"]
    assert (UNITS / "mesh-controller.sysusers").read_text().startswith("u mesh-controller ")


@pytest.mark.parametrize(
    ("file", "prefix", "command"),
    [
        pytest.param("agent.env", "MESHAGENT_RUN_", agent_run, id="agent"),
        pytest.param("controller.env", "MESH_CONTROLLER_RUN_", controller_run, id="controller"),
    ],
)
def test_every_variable_of_an_example_is_an_option(file: str, prefix: str, command: object) -> None:
    options = {str(option.name).upper() for option in command.params}  # type: ignore[attr-defined]
    names = re.findall(r"^#?([A-Z_]+)=", (UNITS / file).read_text(), re.MULTILINE)
    assert names
    assert {name.removeprefix(prefix) for name in names} <= options
