"""`kubectl meshagent check --all-nodes`: the cluster, and then every node, by the check that the agent's pod of each runs through `kubectl exec`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import click

from agent import report
from agent.check.finding import Finding, Report, Severity, error
from agent.cli.check import show
from agent.errors import NotFound
from meshapi.text import shown

AT_ONCE: Final = 8
TIMEOUT_S: Final = 180.0
"""For one node: its check compiles all programs."""
_SHOWN: Final = 300
_LONGEST: Final = 4096


def reports(kubectl: Sequence[str], namespace: str, agents: Mapping[str, str], options: Sequence[str]) -> list[Report]:
    """What the check of each node says, by name of the node; `agents`: the pod on each. Raises NotFound if there is no kubectl."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda node: _report(kubectl, namespace, node, agents[node], options), sorted(agents)))


def say(found: Sequence[Report], output: str) -> int:
    """Print the cluster's report, and of nodes what is not well; return the exit status."""
    worst = max(one.worst for one in found)
    if output == "json":
        parts = [report.as_json(one) | {"worst": one.worst.name.lower()} for one in found]
        click.echo(json.dumps({"reports": parts, "worst": worst.name.lower()}))
    else:
        for one in found:
            show(one, brief=one.scope == "node")
    return int(worst is Severity.ERROR)


def unseen(why: str, namespace: str) -> Report:
    """A report that says why no node could be checked."""
    step = "mend first what was found of the cluster; if the mesh is elsewhere, give --mesh-namespace, --context or --kubeconfig"
    return Report("agents", namespace, (error("agent", "no node was checked", f"namespace {namespace}", cause=why, next_step=step),))


def _report(kubectl: Sequence[str], namespace: str, node: str, pod: str, options: Sequence[str]) -> Report:
    argv = [*kubectl, "exec", "-n", namespace, pod, "-c", "agent", "--", "meshagent", "check", *options, "-o", "json"]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError as failure:
        raise NotFound("there is no kubectl in PATH, which runs the check in the agents' pods: install it") from failure
    except OSError as failure:
        raise NotFound(f"kubectl, which runs the check in the agents' pods, cannot be started: {failure}") from failure
    except subprocess.TimeoutExpired:
        why = f"no answer within {TIMEOUT_S:.0f} s"
    else:
        try:
            return Report("node", node, _findings(done.stdout))
        except (ValueError, KeyError, TypeError, AttributeError):
            why = shown(" ".join(done.stderr.split())[-_SHOWN:]) or f"exit status {done.returncode}, and no report"
    step = f"kubectl meshagent check --node {node}; the pod's log and events: kubectl -n {namespace} describe pod {pod}"
    return Report("node", node, (error("agent", "it was not checked", f"pod {namespace}/{pod}", cause=why, next_step=step),))


def _findings(text: str) -> tuple[Finding, ...]:
    """Raises ValueError, KeyError, TypeError or AttributeError if it is no report: a check that has looked has found something, if only that it is well."""
    said: list[dict[str, str]] = json.loads(text)["findings"]
    if not said:
        raise ValueError("no findings")
    words = [[shown(one[name], _LONGEST) for name in ("check", "what", "where", "cause", "nextStep")] for one in said]
    return tuple(Finding(Severity[one["severity"].upper()], *found) for one, found in zip(said, words, strict=True))
