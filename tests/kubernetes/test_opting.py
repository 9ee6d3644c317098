"""Pods that run go out of the mesh and into it by labels, their own and their namespace's: a server under load, and what is left in the pods."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.kubernetes.mesh import Cluster, takes
from tests.kubernetes.podshop import KEPT, SPACE, WEB, admits, answers, open_shop, seen

LABEL = "meshagent.io/mode"
PODS = ("web", "friend", "stranger")
MESH_PORTS = {15001, 15002, 15003, 15006, 15008, 15053}
"""Those that listen in a pod (ARCHITECTURE, "Ports and sockets")."""
LOAD = (
    "curl -s -m 5 {0} --rate 20/s -o /dev/null -w '%{{stderr}}%{{http_code}} %{{exitcode}} %{{time_total}}\\n' '{1}?[1-100000]'"
    " 2> /run/load-{2} & echo $! >> /run/callers;"
)
KEEP = f"(echo open > /run/kept; curl -s http://{{}}:{KEPT}/; echo ended > /run/kept) > /dev/null 2>&1 & echo $! > /run/keeper"


@pytest.fixture(scope="module")
def shop(whole: Cluster) -> Cluster:
    """With the shop in it."""
    open_shop(whole)
    return whole


@contextmanager
def load(found: Cluster) -> Iterator[None]:
    """The friend asks 20 times a second over connections that it keeps where it may, and as often over new ones: all of it is answered."""
    kinds = {"kept": "", "new": "-H 'Connection: close'"}
    script = " ".join(LOAD.format(options, WEB, name) for name, options in kinds.items())
    found.exec(SPACE, "friend", "sh", "-c", f"rm -f /run/callers; ({script}) > /dev/null 2>&1")
    began = time.monotonic()
    try:
        yield
        time.sleep(1)
    finally:
        found.exec(SPACE, "friend", "sh", "-c", "kill $(cat /run/callers)")
    took = time.monotonic() - began
    for name in kinds:
        said = [line.rpartition(" ") for line in found.exec(SPACE, "friend", "cat", f"/run/load-{name}").splitlines()]
        outcomes = Counter(outcome for outcome, _, _ in said)
        print(f"{name} connections: {dict(outcomes)} in {took:.1f} s, at most {max(float(one) for _, _, one in said):.3f} s each")
        assert set(outcomes) == {"200 0"}, (name, [(number, one) for number, one in enumerate(said) if one[0] != "200 0"])
        assert outcomes.total() > 10 * took, "the load did not go on"


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


def curl(found: Cluster, *options: str, port: int = 8080) -> list[str]:
    """A call of the server by the node itself, which is nobody for policies."""
    return ["curl", "-s", *options, f"http://{found.addresses(SPACE, 'web')[0]}:{port}/"]


def from_node(found: Cluster) -> str:
    """The status of such a call; 000 if there is no answer."""
    command = curl(found, "-m", "5", "-o", "/dev/null", "-w", "%{http_code}")
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.fixture(params=["connections", "requests"])
def policy(shop: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The server admits its friend: its connections, or those of its requests that Envoy has read."""
    shop.plane.apply(admits("web", "friend", **({"paths": ["/"]} if request.param == "requests" else {})))
    takes(lambda: in_force(shop) and shop.get(SPACE, "friend", f"{WEB}other") == ("403" if request.param == "requests" else "404"))
    yield shop
    shop.exec(SPACE, "friend", "sh", "-c", "kill $(cat /run/keeper)")
    label(shop, "namespace", SPACE, "mesh")
    label(shop, "pod", "web", "")
    shop.plane.apply(admits("web", "friend"))
    takes(lambda: answers(shop, WEB))


def in_force(found: Cluster) -> bool:
    """Is the friend answered, and the node not?"""
    return found.get(SPACE, "friend", WEB) == "200" and from_node(found) in {"000", "403"}


@pytest.mark.parametrize(("kind", "name", "pods"), [("pod", "web", ("web",)), ("namespace", SPACE, PODS)], ids=["pod", "namespace"])
def test_who_runs_goes_out_and_in_by_a_label_and_no_request_that_is_allowed_fails(
    policy: Cluster, request: pytest.FixtureRequest, kind: str, name: str, pods: tuple[str, ...]
) -> None:
    shop, before, names = policy, incarnations(policy), {f"{SPACE}/{one}" for one in pods}
    by_request = request.node.callspec.params["policy"] == "requests"
    assert set(anything(shop, *pods)) == set(pods)
    with load(shop):
        if not by_request:  # else it is no connection that a policy allows
            keep(shop)
        began = time.monotonic()
        label(shop, kind, name, "none")
        takes(lambda: from_node(shop) == "200" and shop.get(SPACE, "stranger", WEB) == "200")
        takes(lambda: anything(shop, *pods) == {})
        print(f"{', '.join(pods)}: out, and nothing is left, after {time.monotonic() - began:.1f} s")
        assert not names & shop.redirected()
        if by_request:
            keep(shop)
        with subprocess.Popen(curl(shop, port=KEPT)) as outsider:
            takes(lambda: kept(shop) == "open")
            time.sleep(1)
            assert outsider.poll() is None
            began = time.monotonic()
            label(shop, kind, name, "mesh" if kind == "namespace" else "")
            takes(lambda: in_force(shop))
            print(f"in, and policy holds, after {time.monotonic() - began:.1f} s")
            takes(lambda: outsider.poll() is not None)
        assert shop.get(SPACE, "stranger", WEB) in {"000", "403"}
        assert names <= shop.redirected()
        takes(lambda: kept(shop) == ("ended" if by_request else "open"))
    assert set(anything(shop, *pods)) == set(pods)
    assert incarnations(shop) == before
    assert shop.status()["problems"] == []


def keep(found: Cluster) -> None:
    """Have the friend open a connection on which nobody says anything."""
    found.exec(SPACE, "friend", "sh", "-c", KEEP.format(found.addresses(SPACE, "web")[0]))


def kept(found: Cluster) -> str:
    """What has become of it."""
    return found.exec(SPACE, "friend", "cat", "/run/kept").strip()


def test_a_caller_that_comes_in_may_use_the_ports_of_its_connections_to_services_from_before(shop: Cluster) -> None:
    """The node remembers how it translated those, and would give new ones to the same endpoint other ports."""
    ports = (40001, 40003, 40005)
    label(shop, "pod", "friend", "none")
    label(shop, "pod", "web", "none")
    takes(lambda: anything(shop, "friend", "web") == {})
    assert [from_port(shop, port) for port in ports] == ["200"] * 3
    label(shop, "pod", "friend", "")
    label(shop, "pod", "web", "")
    takes(lambda: {f"{SPACE}/friend", f"{SPACE}/web"} <= shop.redirected())  # a connection of before may be closed while they come in
    takes(lambda: answers(shop, WEB))
    assert [from_port(shop, port) for port in ports] == ["200"] * 3


def from_port(found: Cluster, port: int) -> str:
    """What the friend gets from a port of its own."""
    return found.exec(SPACE, "friend", "curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "--local-port", str(port), WEB)[:3]


def test_a_caller_that_is_out_of_the_mesh_is_not_who_policy_admits(shop: Cluster) -> None:
    before = incarnations(shop)
    label(shop, "pod", "friend", "none")
    takes(lambda: seen(shop, WEB) == ("000", "000"))
    takes(lambda: anything(shop, "friend") == {})
    label(shop, "pod", "friend", "")
    takes(lambda: answers(shop, WEB))
    assert incarnations(shop) == before
