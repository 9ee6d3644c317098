"""Pods that have no sockets before they are in the mesh: real cgroups named as the kubelet names them, and sandboxes that write the mark as a runtime does."""

from __future__ import annotations

import statistics
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import features
from agent.bpf.manifest import Counter
from agent.holding import Holding
from lab import netns as lab_netns
from tests.kernel.datanode import DataNode, snapshot
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
    kubelet.start(99, layout)
    holding(node)._pods.search()
    holding(node).beat(outside)


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


def test_an_agent_that_does_not_know_where_pods_are_is_none(node: DataNode, kubelet: Kubelet) -> None:
    space = kubelet.namespace("unknown")
    holding(node).beat(())
    assert not sandbox(kubelet, 1, space, LAYOUTS["kind"])


@holds
def test_a_pod_that_is_not_in_the_mesh_is_let_go_of(node: DataNode, kubelet: Kubelet) -> None:
    layout, space = LAYOUTS["systemd-best-effort"], kubelet.namespace("outside")
    beat(node, kubelet, layout)
    assert sandbox(kubelet, 1, space, layout)
    assert sandbox(kubelet, 2, space, layout)
    beat(node, kubelet, layout, uid(1))
    assert (sockets(kubelet, 1, space, layout), sockets(kubelet, 2, space, layout)) == (FREE, HELD)


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
    holding(node).beat(())
    assert held(node) == 0
    assert sandbox(kubelet, 1, space, layout)
    kubelet.remove(1, layout)
    holding(node).beat(())
    assert held(node) == 0


def test_a_socket_costs_little_more_where_nobody_is_held(kubelet: Kubelet) -> None:
    """A process outside of all labs' cgroups is not asked; one in a container is, on each level above it."""
    layout, space = LAYOUTS["kind"], kubelet.namespace("cost")
    code = "import socket, time\nn = 20000\nt = time.perf_counter()\nfor _ in range(n): socket.socket().close()\nprint((time.perf_counter() - t) / n * 1e9)"
    found: dict[str, list[float]] = {"asked": [], "not asked": []}
    for _ in range(5):
        for name, place in (("asked", kubelet.start(1, layout)), ("not asked", Path("/proc/self"))):
            argv = ["nsenter", f"--net={lab_netns.path(space)}", "python3", "-c", code]
            inside = (
                run(place, space, "python3", "-c", code)
                if name == "asked"
                else subprocess.run(argv, capture_output=True, text=True, check=True)
            )
            found[name].append(float(inside.stdout))
    more = statistics.median(a - b for a, b in zip(found["asked"], found["not asked"], strict=True))
    print(f"socket() and close(): {statistics.median(found['not asked']):.0f} ns, {more:.0f} ns more in a pod's container")
    assert more < 2000
