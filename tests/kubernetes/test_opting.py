"""Pods that run go out of the mesh and into it by their label, and what is left in them."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.kubernetes.mesh import Cluster, takes
from tests.kubernetes.test_pods import SPACE, WEB, answers, open_shop, seen

LABEL = "meshagent.io/mode"
PODS = ("web", "friend", "stranger")
MESH_PORTS = {15001, 15002, 15003, 15006, 15008, 15053}
"""Those that listen in a pod (ARCHITECTURE, "Ports and sockets")."""


@pytest.fixture(scope="module")
def shop(whole: Cluster) -> Cluster:
    """With the shop in it."""
    open_shop(whole)
    return whole


def label(found: Cluster, kind: str, name: str, mode: str) -> None:
    """Give an object the label with this value; "": take it away."""
    change = f"{LABEL}={mode}" if mode else f"{LABEL}-"
    found.plane.kubectl("label", kind, name, "-n", SPACE, change, "--overwrite")


def incarnations(found: Cluster) -> list[tuple[str, str, int]]:
    """Of the shop's pods: their UIDs, their containers and how often these were started again."""
    pods = (json.loads(found.plane.kubectl("get", "pod", name, "-n", SPACE, "-o", "json")) for name in PODS)
    running = ((one["metadata"]["uid"], one["status"]["containerStatuses"][0]) for one in pods)
    return [(uid, state["containerID"], state["restartCount"]) for uid, state in running]


def left(found: Cluster, name: str) -> dict[str, Any]:
    """What the mesh has in a pod: ports on which it listens, sockets of its Envoy, links of its programs, mounts of the pod's network namespace."""
    network = found.network(SPACE, name)
    number = network.stat().st_ino
    sockets = subprocess.run(
        ["nsenter", f"--net={network}", "ss", "-Htuanp"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    waypoint = f"pid={found.status()['waypoint']['pid']},"
    listening = {int(line.split()[4].rpartition(":")[2]) for line in sockets if line.split()[1] in {"LISTEN", "UNCONN"}}
    links = json.loads(subprocess.run(["bpftool", "-j", "link", "show"], capture_output=True, text=True, check=True).stdout)
    mounts = [one.name for one in (found.top / "run" / "netns").iterdir() if one.stat().st_ino == number]
    return {
        "ports": listening & MESH_PORTS,
        "sockets": [line for line in sockets if waypoint in line],
        "links": [one["id"] for one in links if one.get("netns_ino") == number],
        "mounts": mounts,
    }


def anything(found: Cluster, *names: str) -> dict[str, dict[str, Any]]:
    """What of `left` there is, by pod."""
    return {name: some for name in names if (some := {kind: what for kind, what in left(found, name).items() if what})}


def test_a_caller_that_is_out_of_the_mesh_is_not_who_policy_admits(shop: Cluster) -> None:
    before = incarnations(shop)
    label(shop, "pod", "friend", "none")
    takes(lambda: seen(shop, WEB) == ("000", "000"))
    takes(lambda: anything(shop, "friend") == {})
    label(shop, "pod", "friend", "")
    takes(lambda: answers(shop, WEB))
    assert incarnations(shop) == before
