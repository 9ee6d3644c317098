"""When a mesh has caught up with what was applied."""

from __future__ import annotations

from typing import Any

from lab.settle import unsettled
from lab.topology import Node, Pod, Topology

LAB = Topology((Node("a", 1), Node("b", 2)), (Pod("web", "a", ("10.77.1.7",)), Pod("bare", "a", ("10.77.1.8",), mesh=False)))


def report(version: str, *workloads: dict[str, Any]) -> dict[str, Any]:
    return {"ready": True, "controller": {"version": version}, "workloads": list(workloads), "problems": []}


WEB = {"namespace": "default", "name": "web", "enrolled": True, "redirected": True}


def test_a_mesh_at_one_version_with_its_pods_redirected_has_settled() -> None:
    assert unsettled(LAB, {"a": report("7", WEB), "b": report("7")}) == []


def test_an_agent_that_does_not_answer_is_waited_for() -> None:
    assert unsettled(LAB, {"a": report("7", WEB), "b": {}}) == ["the agent of b is not ready"]


def test_a_pod_that_is_not_redirected_yet_is_named_with_the_problems() -> None:
    slow = {**report("7", {**WEB, "redirected": False}), "problems": ["no namespace"]}
    assert unsettled(LAB, {"a": slow, "b": report("7")}) == ["a has not enrolled default/web (no namespace)"]


def test_versions_must_agree() -> None:
    assert unsettled(LAB, {"a": report("7", WEB), "b": report("6")}) == ["agents hold different versions: a 7, b 6"]
