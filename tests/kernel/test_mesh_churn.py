"""Pods that come and go under the same name and address, and an uninstall after a crash: nothing is left, nobody gets by."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent import netns
from agent.bpf.manifest import HOOKED
from lab import mesh, mounts, paths
from lab.lab import Lab
from lab.topology import Pod
from tests.kernel import shop

pytestmark = pytest.mark.kernel

CYCLES = 23
BOUND_WITHIN_S = 1.0


def recreate(lab: Lab, name: str) -> Pod:
    """Delete a pod and make it again, as a restart of a container would."""
    pod = lab.topology.pod(name)
    lab.remove_pod(name)
    lab.add_pod(pod)
    return pod


def cookies(node: str) -> set[str]:
    """The namespaces that the receiver's check is linked to."""
    return {pin.name.removeprefix("netns-") for pin in (paths.agent_pins(node) / "links").glob("netns-*")}


def cookie(lab: Lab, name: str) -> str:
    return str(netns.cookie(lab.netns(name)))


def redirected(node: str) -> set[str]:
    return {w["name"] for w in shop.status(node)["workloads"] if w["redirected"]}


def holdings(node: str) -> dict[str, object]:
    """What an agent holds for its pods: mounts, links, rows of the tables, Envoy's listeners."""
    listeners = json.loads(mesh.envoy_get(node, "/listeners?format=json")[1]).get("listener_statuses", [])
    (maps,) = paths.agent_pins(node).glob("maps-*")
    tables = ("mesh_workload", "mesh_address", "mesh_policy", "mesh_service", "mesh_backend")
    return {
        "mounts": len(mounts.below(paths.agent_run(node))),
        "links": len(cookies(node)),
        "listeners": sorted(entry["name"] for entry in listeners),
        **{name: len(shop.dump(maps / name)) for name in tables},
    }


def settled(node: str) -> dict[str, object]:
    """The same, when nothing moves any more: rows that were replaced stay for a second or two."""
    found = holdings(node)
    while True:
        time.sleep(4)
        now = holdings(node)
        if now == found:
            return found
        found = now


def descriptors(lab: Lab) -> int:
    """How many files the agent of node-1 has open."""
    return len(list(Path(f"/proc/{lab.agent_pid('node-1')}/fd").iterdir()))


def test_a_pod_that_is_made_again_is_bound_to_its_new_namespace_within_a_second(lab: Lab) -> None:
    before = cookie(lab, "other")
    recreate(lab, "other")
    now = cookie(lab, "other")
    assert now != before
    shop.takes(lambda: now in cookies("node-1") and before not in cookies("node-1"), BOUND_WITHIN_S)
    shop.takes(lambda: "other" in redirected("node-1"), BOUND_WITHIN_S)
    assert "Operation not permitted" in shop.ping(lab, "other"), "policy knows it"
    shop.takes(lambda: shop.codes(lab, "other", "http://cart/items") == {"403": 1}, BOUND_WITHIN_S)
    assert shop.codes(lab, "other", "http://frontend/healthz") == {"200": 1}


def test_a_protected_pod_that_is_made_again_is_protected_within_a_second(lab: Lab) -> None:
    recreate(lab, "redis")
    now = cookie(lab, "redis")
    shop.takes(lambda: now in cookies("node-1"), BOUND_WITHIN_S)
    shop.takes(lambda: shop.ping(lab, "frontend") == "PONG", BOUND_WITHIN_S)
    assert "Operation not permitted" in shop.ping(lab, "other")
    assert shop.ping(lab, "client", "10.77.1.40").startswith("Could not connect")


def test_an_l7_pod_that_is_made_again_calls_and_is_called_within_a_second(lab: Lab) -> None:
    for name in ("frontend", "cart-v1-1"):
        recreate(lab, name)
    shop.takes(lambda: {"frontend", "cart-v1-1"} <= redirected("node-1"), BOUND_WITHIN_S)
    shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items?[1-23]") == {"200": 23}, 2 * BOUND_WITHIN_S)
    assert shop.codes(lab, "frontend", "http://cart/admin/counters") == {"403": 1}
    assert shop.codes(lab, "frontend", "http://10.77.1.21:8080/items?[1-23]") == {"200": 23}
    assert shop.codes(lab, "client", "http://10.77.1.21:8080/items") == {"curl 7": 1}


def test_a_pod_that_is_gone_is_shown_and_does_not_make_the_node_unready(lab: Lab) -> None:
    pod = lab.topology.pod("other")
    lab.remove_pod("other")
    shop.takes(lambda: "other" not in redirected("node-1"), BOUND_WITHIN_S)
    report = shop.status("node-1")
    assert report["ready"] is True
    assert any(problem.startswith("workload default/other is not redirected: ") for problem in report["problems"])
    lab.add_pod(pod)
    shop.takes(lambda: shop.status("node-1")["problems"] == [], BOUND_WITHIN_S)


@contextmanager
def impostor(lab: Lab) -> Iterator[None]:
    """A pod that the mesh does not know has the frontend's addresses: it came before the Workload of the pod that is gone was deleted."""
    frontend = lab.topology.pod("frontend")
    lab.remove_pod("frontend")
    lab.add_pod(Pod("impostor", "node-1", frontend.addresses, mesh=False))
    try:
        yield
    finally:
        lab.remove_pod("impostor")
        lab.add_pod(frontend)
        shop.takes(lambda: shop.ping(lab, "frontend") == "PONG", 2 * BOUND_WITHIN_S)


def test_a_pod_that_takes_over_an_address_does_not_take_over_the_identity(lab: Lab) -> None:
    arrived = sum(shop.answered(lab, "cart-v1-1").values())
    with impostor(lab):
        for _ in range(2):  # before the agent has noticed, and after
            for address in lab.topology.pod("redis").addresses:
                assert shop.ping(lab, "impostor", address).startswith("Could not connect")
            for host in ("10.77.1.21", "[fd77:0:0:1::21]"):
                assert shop.codes(lab, "impostor", f"http://{host}:8080/items") == {"curl 7": 1}
            shop.takes(lambda: "frontend" not in redirected("node-1"), BOUND_WITHIN_S)
        assert sum(shop.answered(lab, "cart-v1-1").values()) == arrived + 1  # the question itself


def test_a_pod_that_takes_over_an_address_gets_a_strangers_rights_from_the_waypoint(lab: Lab) -> None:
    with shop.applied(lab, shop.ALL_MAY_READ):
        shop.takes(lambda: shop.codes(lab, "client", "http://10.77.1.21:8080/items") == {"200": 1})
        with impostor(lab):
            shop.takes(lambda: "frontend" not in redirected("node-1"), BOUND_WITHIN_S)
            assert shop.codes(lab, "impostor", "http://10.77.1.21:8080/items") == {"200": 1}
            assert shop.codes(lab, "impostor", "http://10.77.1.21:8080/flaky") == {"403": 1}


def test_many_pods_that_come_and_go_leave_nothing_behind(lab: Lab) -> None:
    before, open_files = settled("node-1"), descriptors(lab)
    seen = set()
    for _ in range(CYCLES):
        recreate(lab, "other")
        now = cookie(lab, "other")
        shop.takes(lambda now=now: now in cookies("node-1"), BOUND_WITHIN_S)  # type: ignore[misc]
        seen.add(now)
    assert len(seen) == CYCLES
    shop.takes(lambda: holdings("node-1") == before, 5)
    assert not (seen - {cookie(lab, "other")}) & cookies("node-1")
    assert descriptors(lab) <= open_files + 3
    assert "Operation not permitted" in shop.ping(lab, "other")
    shop.takes(lambda: shop.status("node-1")["problems"] == [], 5)  # the last name server may not be there yet
    assert shop.status("node-1")["waypoint"]["nacks"] == 0


def test_an_uninstall_after_a_crash_leaves_nothing_and_a_start_after_it_is_whole(lab: Lab) -> None:
    programs, envoy = shop.program_ids("node-1"), shop.status("node-1")["waypoint"]["pid"]
    links = _links(programs)
    lab.kill_agent("node-1")
    assert "Operation not permitted" in shop.ping(lab, "other"), "still in force"
    directories = mesh.agent_directories("node-1")
    run = lab.meshagent("uninstall", *directories)
    assert run.returncode == 0, run.stderr
    assert "stopped Envoy" in run.stdout
    assert not shop.alive(envoy)
    shop.takes(lambda: not _links(programs), 5)
    namespaces = 1 + len([p for p in lab.topology.pods_of("node-1") if p.mesh])  # the probe's is one more
    assert len(links) == len(HOOKED) - 1 + namespaces
    assert not _loaded(programs)
    for path in (paths.agent_pins("node-1"), paths.agent_run("node-1"), paths.agent_state("node-1")):
        assert not path.exists(), path
    assert not (paths.node_cgroup("node-1") / "meshagent-waypoint").exists()
    assert mounts.below(paths.agent_run("node-1")) == []
    again = lab.meshagent("uninstall", *directories)
    assert (again.returncode, again.stdout) == (0, "nothing was left\n")
    assert shop.ping(lab, "other", "10.77.1.40") == "PONG", "the mesh is off"
    lab.start_agent("node-1")
    shop.takes(lambda: "Operation not permitted" in shop.ping(lab, "other"), 5)
    shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items") == {"200": 1}, 5)


def _bpftool(what: str) -> list[dict[str, object]]:
    out = subprocess.run(["bpftool", "-j", what, "show"], capture_output=True, text=True, check=True).stdout
    found: list[dict[str, object]] = json.loads(out)
    return found


def _links(programs: list[int]) -> list[object]:
    return [link["id"] for link in _bpftool("link") if link.get("prog_id") in programs]


def _loaded(programs: list[int]) -> list[object]:
    return [program["id"] for program in _bpftool("prog") if program["id"] in programs]
