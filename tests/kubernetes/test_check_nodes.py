"""`kubectl meshagent check --all-nodes`: the real kubectl and API server, and the agents of two nodes of a lab, which their own checks look at.

What a kubelet would do for `kubectl exec` is done here: the command is run in the node's network namespace.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import mesh, topology
from lab.cli import SHOP
from lab.errors import StartFailed
from lab.lab import Lab
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.installed import with_plugin

EXEC = """#!{python}
import json, os, sys
words = sys.argv[1:]
if "exec" not in words:
    os.execv(os.environ["KUBECTL"], [os.environ["KUBECTL"], *words])
with open(os.environ["AGENTS"]) as file:
    argv, environment = json.load(file)[words[words.index("-n") + 2]]
os.execvpe(argv[0], [*argv, *words[words.index("check") + 1 :]], environment)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes, each with its agent."""
    running = Lab(topology.load(SHOP / "lab.yaml"))
    try:
        running.up()
        yield running
    except StartFailed as error:
        pytest.fail(f"{error}\n{error.log}")
    finally:
        running.down()


@pytest.fixture
def kubectl(installed: ControlPlane, lab: Lab, tmp_path: Path) -> dict[str, str]:
    """An environment with kubectl, and the plugin; pods agent-1 and agent-2 are the lab's agents."""
    agents = {}
    for number in (1, 2):
        node = f"node-{number}"
        argv = lab.command(node, [mesh.program("meshagent"), "check", *mesh.agent_directories(node)])
        agents[f"agent-{number}"] = argv, lab.environment(lab.topology.place(node))
    (tmp_path / "agents").write_text(json.dumps(agents))
    return with_plugin(installed, tmp_path, EXEC.format(python=sys.executable)) | {"AGENTS": str(tmp_path / "agents")}


def check(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    command = [environment["KUBECTL"], "meshagent", "check", "--all-nodes", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment, stdin=subprocess.DEVNULL)


def errors(report: dict[str, Any]) -> list[str]:
    return [one["what"] for one in report["findings"] if one["severity"] == "error"]


def test_every_node_is_checked_and_what_is_wrong_on_one_is_said_of_that_one(kubectl: dict[str, str], lab: Lab) -> None:
    run = check(kubectl, "-o", "json")
    found = {one["name"]: one for one in json.loads(run.stdout)["reports"]}
    assert [one["scope"] for one in found.values()] == ["cluster", "node", "node"]
    assert found.keys() >= {"check-1", "check-2"}
    for name in ("check-1", "check-2"):
        said = {one["check"] for one in found[name]["findings"]}
        assert {"kernel", "waypoint", "controller", "certificates"} <= said, said
        assert errors(found[name]) == []
    assert run.returncode == 0, run.stderr
    lab.kill_agent("node-2")
    run = check(kubectl)
    assert run.returncode == 1
    ends = [line for line in run.stdout.splitlines() if line.startswith(("node ", "cluster "))]
    assert [line.partition(" error")[0] for line in ends[1:]] == ["node check-1: 0", "node check-2: 1"], run.stdout
    assert "programs are in force, and no agent answers" in run.stdout.partition(ends[1])[2]
