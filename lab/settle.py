"""Whether a lab's agents have caught up with what was applied, judged by what `meshagent status -o json` says. Called by `lab.lab`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lab.topology import Topology


def unsettled(topology: Topology, reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what is still to come, for people; [] if every agent is ready, at one version, with its mesh pods redirected.

    `reports` maps a node's name to its agent's status, {} if that did not answer.
    """
    found = []
    versions: dict[str, str] = {}
    for node in topology.nodes:
        report = reports.get(node.name) or {}
        if not report.get("ready"):
            found.append(f"the agent of {node.name} is not ready{_problems(report)}")
            continue
        versions[node.name] = str(report.get("controller", {}).get("version"))
        taken = {f"{w['namespace']}/{w['name']}" for w in report.get("workloads", []) if w.get("enrolled") and w.get("redirected")}
        missing = sorted({pod.full_name for pod in topology.pods_of(node.name) if pod.mesh} - taken)
        if missing:
            found.append(f"{node.name} has not enrolled {', '.join(missing)}{_problems(report)}")
    if len(set(versions.values())) > 1:
        found.append("agents hold different versions: " + ", ".join(f"{node} {version}" for node, version in versions.items()))
    return found


def _problems(report: Mapping[str, Any]) -> str:
    problems = report.get("problems") or []
    return f" ({'; '.join(map(str, problems))})" if problems else ""
