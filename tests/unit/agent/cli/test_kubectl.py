"""`kubectl meshagent`: which flags it takes, what it refuses, and completion. Pods and `kubectl exec` are in tests/kubernetes/test_check.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from agent.cli import kubectl
from agent.cli.kubectl import Given


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trace a b", Given(rest=["trace", "a", "b"])),
        ("--context c trace a -n shop b", Given(context="c", namespace="shop", rest=["trace", "a", "b"])),
        ("trace a b --kubeconfig=f --context=c", Given(context="c", kubeconfig="f", rest=["trace", "a", "b"])),
        ("trace -nshop a b -ojson", Given(namespace="shop", rest=["trace", "a", "b", "-ojson"])),
        ("-n=shop status", Given(namespace="shop", rest=["status"])),
        ("status --node n --mesh-namespace m", Given(node="n", mesh="m", rest=["status"])),
        ("--all-nodes check -o json", Given(all_nodes=True, rest=["check", "-o", "json"])),
        ("trace a -- --context c", Given(rest=["trace", "a", "--", "--context", "c"])),
        ("--no-such-flag x", Given(rest=["--no-such-flag", "x"])),
    ],
)
def test_flags_of_kubectl_are_taken_wherever_they_are(line: str, expected: Given) -> None:
    assert kubectl.parse(line.split()) == expected


@pytest.mark.parametrize("line", ["trace --context", "-n", "--node="])
def test_a_flag_without_a_value_is_misuse(line: str) -> None:
    with pytest.raises(click.UsageError, match="needs a value"):
        kubectl.parse(line.split())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("check --all-nodes=yes", "--all-nodes takes no value"),
        ("status --all-nodes", "--all-nodes is for 'check'"),
        ("check --all-nodes --node n", "--node and --all-nodes exclude each other"),
        ("check --all-nodes --kubernetes", "--kubernetes looks at the cluster and not at nodes"),
        ("check --kubernetes --node n -o json", "--kubernetes looks at the cluster and not at nodes"),
    ],
)
def test_all_nodes_are_for_check_alone(line: str, why: str) -> None:
    found = run(*line.split())
    assert (found.returncode, why in found.stderr) == (2, True)


def test_help_on_a_check_of_all_nodes_is_that_of_check() -> None:
    assert run("check", "--all-nodes", "--help").stdout == run("check", "--help").stdout != ""


def run(*argv: str, code: str = "main") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/nowhere", "HOME": "/nowhere", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = f"from agent.cli.kubectl import {code}; {code}()"
    return subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("apply", "use kubectl apply itself"),
        ("get", "use kubectl get itself"),
        ("run", "the chart's DaemonSet"),
        ("uninstall", "on a node, use meshagent"),
    ],
)
def test_what_kubernetes_does_itself_is_misuse_with_what_to_do(command: str, said: str) -> None:
    found = run(command, "-f", "x")
    assert (found.returncode, found.stdout) == (2, "")
    assert said in found.stderr


def test_help_needs_no_cluster() -> None:
    assert "in an agent's pod" in run().stdout
    assert "--probe" in run("trace", "--help").stdout
    assert "version" in run("--version").stdout


def test_without_a_cluster_it_is_one_line() -> None:
    found = run("status")
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (1, "", 1)
    assert "cannot use" in found.stderr


@pytest.mark.parametrize(
    ("words", "expected", "directive"),
    [
        (["tr"], ["trace"], ":4"),
        (["--context", "c", "po"], ["policy"], ":4"),
        (["trace", "--err"], ["--errors-only"], ":4"),
        (["trace", "-o", "t"], ["table", "text"], ":4"),
        (["app"], [], ":4"),
        (["check", "--kubeconfig", "--"], [], ":0"),
    ],
)
def test_completion_answers_as_kubectl_asks(words: list[str], expected: list[str], directive: str) -> None:
    *lines, last = run(*words, code="complete").stdout.splitlines()
    assert ([line.partition("\t")[0] for line in lines], last) == (expected, directive)


def test_files_go_by_standard_input(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"kind: {name}\n")
    program = (
        "import sys; from agent.cli.kubectl import _with_files; "
        f"print(_with_files(['policy', 'try', '-f', {str(tmp_path / 'a.yaml')!r}, '--filename={tmp_path / 'b.yaml'}', '-o', 'json'])); "
        "print(sys.stdin.read())"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    assert found == "['policy', 'try', '-o', 'json', '-f', '-']\nkind: a\n\n---\nkind: b\n\n"
