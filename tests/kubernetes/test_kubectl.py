"""`kubectl meshagent` through the real kubectl on a real API server; only `kubectl exec`, which a kubelet would answer, is recorded instead."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.installed import with_plugin
from tests.kubernetes.manifest import OWN

RECORDER = """#!/bin/sh
# kubectl, but for exec, which needs a kubelet: that is written down
for word in "$@"; do
  if [ "$word" = exec ]; then
    { [ -p /dev/stdin ] || [ -f /dev/stdin ]; } && cat > "$RECORD.stdin"
    for word in "$@"; do printf '%s\\0' "$word"; done > "$RECORD"
    exit "$EXIT_STATUS"
  fi
done
exec "$KUBECTL" "$@"
"""


@pytest.fixture
def kubectl(installed: ControlPlane, tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has the real kubectl behind a recorder of exec, and the plugin."""
    return with_plugin(installed, tmp_path, RECORDER) | {"RECORD": str(tmp_path / "argv"), "EXIT_STATUS": "0"}


def plugin(environment: dict[str, str], *argv: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [environment["KUBECTL"], "meshagent", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment | changes, stdin=subprocess.DEVNULL
    )


def recorded(environment: dict[str, str]) -> list[str]:
    return Path(environment["RECORD"]).read_text().split("\0")[:-1]


def test_a_trace_runs_in_the_agents_pod_on_the_node_of_its_source(kubectl: dict[str, str]) -> None:
    run = plugin(kubectl, "trace", "cart", "redis:6379", "-n", "check-shop", "--path", "/a b'c\"$(d)", "--context", "test", EXIT_STATUS="0")
    assert run.returncode == 0, run.stderr
    assert recorded(kubectl) == [
        *("--context", "test", "exec", "-n", OWN, "agent-2", "-c", "agent", "--", "meshagent"),
        *("trace", "-n", "check-shop", "cart", "redis:6379", "--path", "/a b'c\"$(d)"),
    ]
    assert plugin(kubectl, "trace", "--", "check-shop/cart", "redis").returncode == 0
    assert recorded(kubectl)[3] == "agent-2"
    assert recorded(kubectl)[-6:] == ["trace", "-n", "default", "--", "check-shop/cart", "redis"]  # the context's


def test_exit_statuses_are_the_commands_own(kubectl: dict[str, str]) -> None:
    for status in (1, 2, 137):
        assert plugin(kubectl, "trace", "cart", "redis", "-n", "check-shop", EXIT_STATUS=str(status)).returncode == status


def test_a_trace_of_what_is_no_pod_is_asked_of_any_agent(kubectl: dict[str, str]) -> None:
    assert plugin(kubectl, "trace", "shop/vm-1", "redis").returncode == 0
    assert recorded(kubectl)[3] in {"agent-1", "agent-2"}


def test_other_commands_need_a_node_where_there_are_several(kubectl: dict[str, str]) -> None:
    run = plugin(kubectl, "status", "-o", "json")
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "Error: which node? give --node with one of check-1, check-2\n")
    assert plugin(kubectl, "status", "--node", "check-1", "-o", "json").returncode == 0
    assert recorded(kubectl) == ["exec", "-n", OWN, "agent-1", "-c", "agent", "--", "meshagent", "status", "-o", "json"]
    run = plugin(kubectl, "status", "--node", "check-9")
    assert (run.returncode, run.stderr) == (1, "Error: no agent runs on node check-9; there are agents on check-1, check-2\n")
    assert plugin(kubectl, "check", "--node", "check-2").returncode == 0
    assert recorded(kubectl)[2:] == [OWN, "agent-2", "-c", "agent", "--", "meshagent", "check"]
    assert plugin(kubectl, "identity", "show", "cart", "-n", "check-shop").returncode == 0
    assert recorded(kubectl)[3] == "agent-2"


def test_policies_of_this_machine_go_to_the_pod_by_standard_input(kubectl: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("kind: AuthorizationPolicy\n")
    assert plugin(kubectl, "policy", "try", "-f", str(tmp_path / "p.yaml"), "--node", "check-1").returncode == 0
    assert recorded(kubectl) == ["exec", "-i", "-n", OWN, "agent-1", "-c", "agent", "--", "meshagent", "policy", "try", "-f", "-"]
    assert Path(f"{kubectl['RECORD']}.stdin").read_text() == "kind: AuthorizationPolicy\n"


def test_check_looks_at_the_cluster_from_here(kubectl: dict[str, str]) -> None:
    run = plugin(kubectl, "check", "-o", "json", "--context", "test")
    assert (run.returncode, json.loads(run.stdout)["scope"]) == (0, "cluster"), run.stderr
    assert not Path(kubectl["RECORD"]).exists()
    assert plugin(kubectl, "check", "--context", "none").returncode == 1


def test_a_node_whose_agent_does_not_answer_is_an_error_of_that_node_and_the_others_are_checked(kubectl: dict[str, str]) -> None:
    run = plugin(kubectl, "check", "--all-nodes", "-o", "json", EXIT_STATUS="7")
    said = json.loads(run.stdout)
    assert (run.returncode, said["worst"], [one["scope"] for one in said["reports"]]) == (1, "error", ["cluster", "node", "node"]), (
        run.stderr
    )
    assert [one["worst"] for one in said["reports"]] == ["ok", "error", "error"]
    (finding,) = said["reports"][2]["findings"]
    assert (finding["where"], finding["cause"]) == (f"pod {OWN}/agent-2", "exit status 7, and no report")
    assert "kubectl meshagent check --node check-2" in finding["nextStep"]
    run = plugin(kubectl, "check", "--all-nodes", "--node", "check-1")
    assert (run.returncode, "--node and --all-nodes exclude each other" in run.stderr) == (2, True)


def test_what_was_found_of_the_cluster_is_said_where_no_agent_is_found(kubectl: dict[str, str]) -> None:
    run = plugin(kubectl, "--all-nodes", "check", "-o", "json", "--mesh-namespace", "default")
    cluster, none = json.loads(run.stdout)["reports"]
    assert (run.returncode, cluster["scope"], len(cluster["findings"]) > 1) == (1, "cluster", True), run.stderr
    (finding,) = none["findings"]
    assert (finding["what"], "no agent runs in namespace default" in finding["cause"]) == ("no node was checked", True)


def test_a_mesh_that_is_installed_elsewhere_is_not_found(kubectl: dict[str, str]) -> None:
    run = plugin(kubectl, "status", "--mesh-namespace", "default")
    assert (run.returncode, "give --mesh-namespace" in run.stderr) == (1, True)


def test_kubectl_completes_the_plugins_commands(kubectl: dict[str, str]) -> None:
    run = subprocess.run([kubectl["KUBECTL"], "__complete", "meshagent", "tr"], capture_output=True, text=True, check=True, env=kubectl)
    assert run.stdout.splitlines()[0].split("\t")[0] == "trace"
