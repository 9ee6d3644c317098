"""Pods of a real kubelet while they start: nobody is answered who may not be, and they start hardly later than others."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import cgroup
from tests.kubernetes.manifest import MARK
from tests.kubernetes.mesh import Cluster, pod, takes
from tests.kubernetes.podshop import SERVE, SPACE, admits, at, open_shop

LABEL = "meshagent.io/mode"
ANSWERING = ("connected", "ECONNRESET")
"""What tells somebody that there is a server."""


@pytest.fixture(scope="module")
def shop(whole: Cluster) -> Cluster:
    """With the shop in it, a server that admits its friend alone."""
    open_shop(whole)
    whole.plane.apply(admits("fresh", "friend"))
    return whole


@contextmanager
def knocking(network: Path | str, address: str) -> Iterator[Counter[str]]:
    """Somebody in a network namespace asks for a connection to the server's port every 5 ms; afterwards, how many came to what."""
    argv = ["nsenter", f"--net={network}", sys.executable, "-S", str(Path(__file__).with_name("knocker.py")), address, "8080"]
    outcomes: Counter[str] = Counter()
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as knocker:
        assert knocker.stdout is not None
        assert knocker.stdout.readline() == "knocking\n"
        yield outcomes
        outcomes.update(json.loads(knocker.communicate(timeout=30)[0]))


def test_nobody_who_may_not_is_answered_by_a_pod_that_starts(shop: Cluster) -> None:
    """Its program listens at once. A stranger in the mesh knocks at its first address, the node at its second; a pod outside of the mesh answers both."""
    addresses = ("10.244.0.200", "fd44::200")
    serve = f"until {SERVE.format('fresh')}; do :; done; sleep 10000"
    for number, mode in enumerate(("mesh", "mesh", "mesh", "none")):
        name = f"fresh-{number}"
        shop.machine.next_address(*addresses)
        with (
            knocking(shop.network(SPACE, "stranger"), addresses[0]) as stranger,
            knocking("/proc/self/ns/net", addresses[1]) as node,
        ):
            shop.run(SPACE, name, "/bin/sh", "-c", serve, account="web", labels={"app": "fresh", LABEL: mode})
            takes(lambda: all(shop.get(SPACE, "friend", at(one)) == "200" for one in addresses))
        print(f"{mode}: the stranger {dict(stranger)}, the node {dict(node)}")
        for outcomes in (stranger, node):
            assert outcomes.total() > 100
            assert any(outcomes[one] for one in ANSWERING) == (mode == "none")
        assert shop.addresses(SPACE, name) == list(addresses)
        assert shop.enrolled(f"{SPACE}/{name}") == (mode == "mesh")
        shop.plane.kubectl("delete", "pod", name, "-n", SPACE, "--wait=true")


def start(found: Cluster, *names: str) -> None:
    """Have pods ask the server before they do anything else, and keep what came of that; "mesh" or "none" begins their names and says whether they are in it.

    Those that are not ask as well: their Service is the node's affair.
    """
    (web, *_) = found.addresses(SPACE, "web")
    command = f"curl -s -m 5 http://{web}:8080/ > /run/said; echo $? >> /run/said; sleep 1000"
    spec = pod("friend", "/bin/sh", "-c", command) | {"nodeName": found.machine.name}
    found.plane.apply(*({"apiVersion": "v1", "kind": "Pod", "metadata": _metadata(name), "spec": spec} for name in names))
    takes(lambda: all(said(found, name)[-1:].isdigit() for name in names), 120)


def _metadata(name: str) -> dict[str, Any]:
    return {"name": name, "namespace": SPACE, "labels": {LABEL: name.partition("-")[0]}}


def said(found: Cluster, name: str) -> str:
    """What came of it: the page, and curl's exit status; as long as there is no container, that."""
    return found.exec(SPACE, name, "cat", "/run/said").rstrip("\n")


def took(found: Cluster, name: str) -> float:
    """Seconds from a pod's sandbox to its program (proc_pid_stat(5), starttime)."""
    uid = found.plane.kubectl("get", "pod", name, "-n", SPACE, "-o", "jsonpath={.metadata.uid}")
    processes = cgroup.pids(found.machine.cgroup2 / "kubepods" / "besteffort" / f"pod{uid}")
    sandbox, program, *_ = sorted(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) for pid in processes)
    return (program - sandbox) / os.sysconf("SC_CLK_TCK")


def times(found: Cluster, names: Sequence[str]) -> dict[str, list[float]]:
    """How long each took, by mode. Those in the mesh were answered at once; none of them is left."""
    listed = json.loads(found.plane.kubectl("get", "pods", "-n", SPACE, "-o", "json"))["items"]
    settings = {one["metadata"]["name"]: one["spec"].get("securityContext", {}).get("sysctls", ()) for one in listed}
    assert {name: [one["value"] for one in settings[name]] for name in names} == {
        name: [MARK] if name.startswith("mesh") else [] for name in names
    }
    assert {said(found, name) for name in names if name.startswith("mesh")} == {"web\n0"}
    taken = {mode: [took(found, name) for name in names if name.startswith(mode)] for mode in ("mesh", "none")}
    found.plane.kubectl("delete", "pod", *names, "-n", SPACE, "--force", "--grace-period=0")
    return taken


def later(taken: dict[str, list[float]]) -> float:
    """By how much those in the mesh started later than those outside of it, seconds."""
    medians = {mode: statistics.median(of) for mode, of in taken.items()}
    print("from sandbox to program: " + ", ".join(f"{mode} {m:.2f} s (at most {max(taken[mode]):.2f})" for mode, m in medians.items()))
    return medians["mesh"] - medians["none"]


def test_a_pod_of_the_mesh_starts_no_more_than_200_ms_later_than_one_outside_of_it(shop: Cluster) -> None:
    names = []
    for number in range(10):
        for mode in ("mesh", "none") if number % 2 else ("none", "mesh"):
            names.append(f"{mode}-{number}")
            start(shop, names[-1])
    assert later(times(shop, names)) < 0.2


def test_ten_pods_of_the_mesh_that_start_at_once_do_so_no_more_than_200_ms_later_than_ten_outside_of_it(shop: Cluster) -> None:
    """In five rounds, whose differences go both ways: who of twenty comes first is the kubelet's affair, and each waits for those before it."""
    found = []
    for number in range(5):
        names = [f"{mode}-{number}-at-once-{one}" for one in range(10) for mode in (("mesh", "none") if number % 2 else ("none", "mesh"))]
        start(shop, *names)
        found.append(later(times(shop, names)))
    assert statistics.median(found) < 0.2


@pytest.mark.parametrize("first", ["kubelet", "agent"])
def test_after_a_reboot_a_pod_runs_without_policy_only_where_the_kubelet_is_there_before_the_agent(shop: Cluster, first: str) -> None:
    """A stranger asks again and again from its start on. What it gets, if the agent comes later, it gets no more when that is there."""
    plane, machine = shop.plane, shop.machine
    ask = "while :; do curl -s -m 1 http://10.96.7.1/ >> /run/said; sleep 0.02; done"
    shop.run(SPACE, "asker", "/bin/sh", "-c", ask, account="stranger")
    takes(lambda: shop.enrolled(f"{SPACE}/asker"))
    shop.lose()
    machine.reboot()
    if first == "kubelet":
        machine.start_kubelet()
        takes(lambda: said(shop, "asker").startswith("web"))
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    shop.mount()
    shop.start_agent()
    if first == "agent":
        takes(shop.status)
        machine.start_kubelet()
    takes(lambda: {f"{SPACE}/{name}" for name in ("web", "friend", "asker")} <= shop.redirected(), 120)
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    takes(lambda: shop.get(SPACE, "friend", "http://10.96.7.1/") == "200")
    takes(lambda: shop.exec(SPACE, "asker", "ls", "/run/said").strip() == "/run/said")
    got = said(shop, "asker")
    assert bool(got) == (first == "kubelet")
    print(
        f"the {first} first: pods are in the mesh {now - began:.1f} s after the agent was started; the stranger got {len(got.split())} answers"
    )
    time.sleep(1)
    assert said(shop, "asker") == got
    takes(lambda: shop.status()["problems"] == [])
    plane.kubectl("delete", "pod", "asker", "-n", SPACE, "--force", "--grace-period=0")
