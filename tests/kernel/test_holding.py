"""Pods that have no sockets before they are in the mesh: real cgroups named as the kubelet names them, and sandboxes that write the mark as a runtime does."""

from __future__ import annotations

import errno
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import features, netns
from agent.bpf.manifest import Counter, EventKind
from agent.holding import Holding
from lab import cgroup
from lab import netns as lab_netns
from tests.kernel.datanode import DataNode, snapshot, workload
from tests.kernel.kubelet import LAYOUTS, Kubelet, pod, running, uid

RESERVED, MARK = "net/ipv4/ip_local_reserved_ports", "15001-15008"
SOCKETS = """
import socket
for family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET6, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM),
                     (socket.AF_INET6, socket.SOCK_DGRAM), (socket.AF_INET, socket.SOCK_RAW), (socket.AF_UNIX, socket.SOCK_STREAM)):
    try:
        socket.socket(family, kind, socket.IPPROTO_ICMP if kind == socket.SOCK_RAW else 0).close()
        print("ok", end=" ")
    except OSError as error: print(error.errno, end=" ")
"""
HELD, FREE = "1 1 1 1 1 ok", "ok ok ok ok ok ok"
holds = pytest.mark.skipif(
    features.kernel_version() < features.SYSCTL_ANCESTOR_KERNEL, reason="this kernel cannot tell in which pod a setting is written"
)


@pytest.fixture
def kubelet(node: DataNode) -> Iterator[Kubelet]:
    """And an agent that has just said that it is here."""
    with running(node) as found:
        yield found
        holding(node).end()
        table = node.datapath.maps["mesh_held"]
        table.prune(set())


def holding(node: DataNode) -> Holding:
    return node.enrolment.holding


def say(node: DataNode, *outside: str, pods: bool = False) -> None:
    """What the agent does once a second."""
    holding(node).look_after(outside, pods=pods)
    holding(node).beat(served=True)


def run(place: Path, namespace: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a cgroup and a network namespace."""
    join = ["sh", "-c", f'echo 0 > {place}/cgroup.procs && exec "$@"', "sh", "nsenter", f"--net={lab_netns.path(namespace)}"]
    return subprocess.run([*join, *argv], capture_output=True, text=True, check=False, timeout=20)


def sandbox(kubelet: Kubelet, number: int, namespace: str, layout: str, value: str = MARK, name: str = RESERVED) -> bool:
    """Prepare a sandbox as runc does, from inside the pod's cgroup; False if the kernel refuses to."""
    place = kubelet.start(number, layout, container="sandbox.scope")
    ran = run(place, namespace, "python3", "-c", f"open('/proc/sys/{name}', 'wb', 0).write(b'{value}')")
    assert ran.returncode == 0 or "Operation not permitted" in ran.stderr, ran.stderr
    return ran.returncode == 0


def sockets(kubelet: Kubelet, number: int, namespace: str, layout: str) -> str:
    """What a process of another container of the pod gets: TCP, UDP, raw, and a Unix socket."""
    return run(kubelet.start(number, layout, container="app.scope"), namespace, "python3", "-c", SOCKETS).stdout.strip()


def beat(node: DataNode, kubelet: Kubelet, layout: str, *outside: str) -> None:
    """The kubelet has made the directories of its pods, and the agent knows them."""
    for number, each in enumerate(LAYOUTS.values()):  # of the same driver
        if each.split("/")[0] == layout.split("/", maxsplit=1)[0]:
            kubelet.start(90 + number, each)
    if layout == LAYOUTS["kind"]:
        kubelet.start(89, layout.replace("besteffort", "burstable"))
    holding(node)._pods.search()
    say(node, *outside)


def later(node: DataNode) -> None:
    """All pods that are held have been for three seconds more."""
    table = node.datapath.maps["mesh_held"]
    for key, (since,) in list(table.items()):
        table.put(key, struct.pack("=Q", struct.unpack("=Q", since)[0] - 3 * 10**9))


def held(node: DataNode) -> int:
    return node.datapath.maps["mesh_held"].count()


@holds
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_pod_has_no_sockets_before_it_is_in_the_mesh(node: DataNode, kubelet: Kubelet, layout: str) -> None:
    space = kubelet.namespace("held", "10.79.3.1")
    beat(node, kubelet, layout)
    assert sandbox(kubelet, 1, space, layout)
    assert sockets(kubelet, 1, space, layout) == HELD
    beat(node, kubelet, layout)
    assert sockets(kubelet, 1, space, layout) == HELD  # nobody has said anything about it
    kubelet.process(1, space, kubelet.start(1, layout, container="sandbox.scope"))
    node.enforce(snapshot(pod(1, ("10.79.3.1",))))
    assert sockets(kubelet, 1, space, layout) == FREE
    assert held(node) == 0


@holds
def test_other_pods_and_other_settings_are_nobodys_business(node: DataNode, kubelet: Kubelet) -> None:
    layout, space = LAYOUTS["systemd-burstable"], kubelet.namespace("other")
    holding(node).end()
    assert sandbox(kubelet, 1, space, layout, "20000-20010")
    assert sandbox(kubelet, 1, space, layout, "150-151")
    assert sandbox(kubelet, 1, space, layout, "15001", "net/ipv4/tcp_keepalive_time")
    assert run(kubelet.start(1, layout), space, "cat", f"/proc/sys/{RESERVED}").stdout == "150-151\n"
    beat(node, kubelet, layout)
    assert sandbox(kubelet, 2, space, layout)
    assert sockets(kubelet, 1, space, layout) == FREE
    assert (held(node), sockets(kubelet, 2, space, layout)) == (1, HELD)


@holds
def test_a_mark_with_ports_of_the_applications_own_holds_too(node: DataNode, kubelet: Kubelet) -> None:
    layout, space = LAYOUTS["cgroupfs-guaranteed"], kubelet.namespace("own")
    beat(node, kubelet, layout)
    assert sandbox(kubelet, 1, space, layout, f"{MARK},30000-30010,31000")
    assert held(node) == 1
    assert run(kubelet.start(1, layout), space, "cat", f"/proc/sys/{RESERVED}").stdout == "15001-15008,30000-30010,31000\n"


def test_without_an_agent_there_is_no_sandbox(node: DataNode, kubelet: Kubelet) -> None:
    layout, space = LAYOUTS["cgroupfs-burstable"], kubelet.namespace("absent")
    refused = node.datapath.counters()[Counter.SANDBOX_REFUSED.name.lower()]
    holding(node).end()
    assert not sandbox(kubelet, 1, space, layout)
    beat(node, kubelet, layout)
    assert sandbox(kubelet, 1, space, layout)
    alive = node.datapath.maps["mesh_alive"]
    alive.put(bytes(4), struct.pack("=Q", time.monotonic_ns() - 6 * 10**9))  # it was killed six seconds ago
    assert not sandbox(kubelet, 2, space, layout)
    assert node.datapath.counters()[Counter.SANDBOX_REFUSED.name.lower()] == refused + 2


def test_an_agent_that_does_not_know_where_pods_are_is_none(node: DataNode, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "kubernetes_node", lambda: True)
    space = kubelet.namespace("unknown")
    holding(node)._pods.search()
    say(node)
    assert "there is no kubepods cgroup below" in holding(node).problems([pod(1)])[0]
    assert holding(node).problems([workload("caller")]) == []
    assert not sandbox(kubelet, 1, space, LAYOUTS["kind"])


def test_where_no_pods_are_the_setting_is_anybodys(node: DataNode, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine, with and without its agent; until a kubelet comes."""
    monkeypatch.setattr(features, "kubernetes_node", lambda: False)
    layout, space = LAYOUTS["systemd-burstable"], kubelet.namespace("machine")
    holding(node)._pods.search()
    say(node)
    assert sandbox(kubelet, 1, space, layout)  # of which the agent knows nothing yet
    holding(node).end()
    assert sandbox(kubelet, 1, space, layout)
    beat(node, kubelet, layout)
    assert holding(node).problems([pod(1)]) == []
    holding(node).end()
    assert not sandbox(kubelet, 1, space, layout)


def test_where_the_controller_knows_of_pods_some_are(node: DataNode, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the kubelet keeps its state where nobody looks for it, and no pod has been found yet."""
    monkeypatch.setattr(features, "kubernetes_node", lambda: False)
    space = kubelet.namespace("unknown")
    holding(node)._pods.search()
    say(node, pods=True)
    assert "there is no kubepods cgroup below" in holding(node).problems([pod(1)])[0]
    assert not sandbox(kubelet, 1, space, LAYOUTS["kind"])


def test_directories_of_pods_that_miss_are_a_problem(node: DataNode, kubelet: Kubelet) -> None:
    layout = LAYOUTS["cgroupfs-burstable"]
    kubelet.start(1, layout)
    holding(node)._pods.search()
    say(node)
    (said,) = holding(node).problems([pod(1)])
    assert f"{kubelet.directory(1, layout).parent.parent}/besteffort, so pods beside it are not held" in said
    beat(node, kubelet, layout)
    assert holding(node).problems([pod(1)]) == []


@holds
def test_the_agent_is_told_of_a_pod_that_is_held(node: DataNode, kubelet: Kubelet) -> None:
    """The mark may come when the pod is in the mesh already: whoever let go of it a moment ago must look again."""
    layout, space = LAYOUTS["cgroupfs-burstable"], kubelet.namespace("told")
    beat(node, kubelet, layout)
    with node.events() as events:
        assert sandbox(kubelet, 1, space, layout, "20000-20010")
        assert sandbox(kubelet, 1, space, layout)
        assert sandbox(kubelet, 1, space, layout)
        assert sandbox(kubelet, 2, space, layout)
    assert [event.kind for event in events] == [EventKind.HELD] * 2


@holds
def test_a_pod_that_is_not_in_the_mesh_is_let_go_of(node: DataNode, kubelet: Kubelet) -> None:
    layout, space = LAYOUTS["systemd-best-effort"], kubelet.namespace("outside")
    beat(node, kubelet, layout)
    assert sandbox(kubelet, 1, space, layout)
    assert sandbox(kubelet, 2, space, layout)
    beat(node, kubelet, layout, uid(1))
    assert sockets(kubelet, 1, space, layout) == HELD  # the controller may not have heard of the namespace's label yet
    later(node)
    beat(node, kubelet, layout, uid(1))
    assert (sockets(kubelet, 1, space, layout), sockets(kubelet, 2, space, layout)) == (FREE, HELD)


@holds
def test_a_pod_of_the_nodes_own_network_is_let_go_of(node: DataNode, kubelet: Kubelet) -> None:
    """A privileged one may write the setting of the whole node."""
    layout, space = LAYOUTS["cgroupfs-best-effort"], kubelet.namespace("node")
    beat(node, kubelet, layout)
    kubelet.process(1, "", kubelet.start(1, layout, container="sandbox.scope"))
    assert sandbox(kubelet, 1, space, layout)
    assert sockets(kubelet, 1, space, layout) == HELD
    later(node)
    beat(node, kubelet, layout)
    assert sockets(kubelet, 1, space, layout) == FREE


@holds
def test_a_class_of_service_is_never_taken_for_a_pod(node: DataNode, kubelet: Kubelet) -> None:
    layout, space = LAYOUTS["systemd-best-effort"], kubelet.namespace("class")
    place = kubelet.start(1, layout).parent.parent
    beat(node, kubelet, LAYOUTS["systemd-burstable"])
    assert sandbox(kubelet, 1, space, layout)
    table = node.datapath.maps["mesh_held"]
    assert [struct.unpack("=Q", key)[0] for key, _ in table.items()] == [kubelet.directory(1, layout).stat().st_ino]
    table.put(struct.pack("=Q", place.stat().st_ino), bytes(8))  # made when the agent had not seen the directory yet
    say(node)
    assert held(node) == 1
    cgroup.remove(place)
    assert sandbox(kubelet, 2, space, layout)  # the directory is there again, and nobody has looked yet
    beat(node, kubelet, layout)
    assert sockets(kubelet, 3, space, layout) == FREE


def test_another_driver_of_the_kubelet_is_noticed(node: DataNode, kubelet: Kubelet) -> None:
    kubelet.start(1, LAYOUTS["cgroupfs-burstable"])
    beat(node, kubelet, LAYOUTS["cgroupfs-best-effort"])
    before = node.datapath.maps["mesh_kubepods"].count()
    for name in ("systemd-burstable", "systemd-best-effort"):
        kubelet.start(1, LAYOUTS[name])
    holding(node)._pods._searched_at -= 10
    say(node)
    assert (before, node.datapath.maps["mesh_kubepods"].count()) == (3, 6)


@holds
def test_a_sandbox_that_cannot_be_looked_at_is_held(node: DataNode, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, first, second = LAYOUTS["systemd-guaranteed"], kubelet.namespace("one", "10.79.3.1"), kubelet.namespace("two", "10.79.3.2")
    beat(node, kubelet, layout)
    kubelet.process(1, first, kubelet.start(1, layout, container="sandbox.scope"))
    node.enforce(snapshot(pod(1)))
    kubelet.stop(1)
    assert sandbox(kubelet, 1, second, layout)
    kubelet.process(1, second, kubelet.start(1, layout, container="sandbox.scope"))
    with monkeypatch.context() as patch:
        patch.setattr(netns, "look", lambda _: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many open files")))
        node.enrolment.namespaces_changed(snapshot(pod(1)))
        assert [name for name, _ in node.enrolment.enforce(snapshot(pod(1)), frozenset()).missing] == ["default/pod-1"]
    assert sockets(kubelet, 1, second, layout) == HELD
    node.enforce(snapshot(pod(1)))
    assert sockets(kubelet, 1, second, layout) == FREE


def test_an_agent_without_its_controller_is_none(node: DataNode, kubelet: Kubelet) -> None:
    layout, space = LAYOUTS["systemd-burstable"], kubelet.namespace("unserved")
    beat(node, kubelet, layout)
    assert sandbox(kubelet, 1, space, layout)
    holding(node).beat(served=False)
    assert not sandbox(kubelet, 2, space, layout)


@holds
def test_a_second_sandbox_is_held_until_it_is_in_the_mesh_itself(node: DataNode, kubelet: Kubelet) -> None:
    layout, first, second = LAYOUTS["systemd-guaranteed"], kubelet.namespace("first", "10.79.3.1"), kubelet.namespace("second", "10.79.3.2")
    beat(node, kubelet, layout)
    kubelet.process(1, first, kubelet.start(1, layout, container="sandbox.scope"))
    node.enforce(snapshot(pod(1)))
    kubelet.stop(1)
    assert sandbox(kubelet, 1, second, layout)
    node.enrolment.let_go()  # it knows of the first one only
    assert sockets(kubelet, 1, second, layout) == HELD
    kubelet.process(1, second, kubelet.start(1, layout, container="sandbox.scope"))
    node.enforce(snapshot(pod(1)))
    assert sockets(kubelet, 1, second, layout) == FREE


@holds
def test_pods_that_have_gone_and_those_that_do_not_fit(node: DataNode, kubelet: Kubelet) -> None:
    layout, space = LAYOUTS["systemd-burstable"], kubelet.namespace("many")
    table = node.datapath.maps["mesh_held"]
    beat(node, kubelet, layout)
    for number in range(table.capacity):
        table.put(struct.pack("=Q", (1 << 40) + number), bytes(8))
    assert not sandbox(kubelet, 1, space, layout)
    say(node)
    assert held(node) == 0
    assert sandbox(kubelet, 1, space, layout)
    kubelet.remove(1, layout)
    say(node)
    assert held(node) == 0
