"""What a kubelet does to the kernel, without one: cgroups of pods with the names that it gives them, and processes in namespaces of theirs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent import netns
from agent.model import Workload
from agent.pods import Pods
from lab import cgroup, paths
from lab import netns as lab_netns
from tests.kernel import datanode
from tests.kernel.datanode import DataNode, snapshot
from tests.kernel.test_enrolment import give, up

SYSTEMD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{_}.slice"
LAYOUTS = {
    "systemd-burstable": SYSTEMD,
    "systemd-best-effort": "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{_}.slice",
    "systemd-guaranteed": "kubepods.slice/kubepods-pod{_}.slice",
    "cgroupfs-burstable": "kubepods/burstable/pod{uid}",
    "cgroupfs-best-effort": "kubepods/besteffort/pod{uid}",
    "cgroupfs-guaranteed": "kubepods/pod{uid}",
    "kind": "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{_}.slice",
}


def uid(number: int) -> str:
    return f"0f6f7d2a-3b1c-4e5d-8a9b-{number:012x}"


def pod(number: int, addresses: tuple[str, ...] = (), policies: tuple[str, ...] = ()) -> Workload:
    return Workload(
        f"default/pod-{number}", "pod", datanode.NODE, {}, addresses, "", enrolled=True, ready=True, policies=policies, pod_uid=uid(number)
    )


class Kubelet:
    """Makes the cgroups of pods, and starts processes in them as a runtime does: in the node's namespace, from which they join their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.running: dict[int, list[subprocess.Popen[bytes]]] = {}
        self.namespaces: set[str] = set()

    def directory(self, number: int, layout: str = SYSTEMD) -> Path:
        return self.root / layout.format(uid=uid(number), _=uid(number).replace("-", "_"))

    def start(self, number: int, layout: str = SYSTEMD, container: str = "cri-containerd-1.scope") -> Path:
        """The pod's cgroup, and one of a container, with nothing in it."""
        return cgroup.create(self.directory(number, layout) / container)

    def namespace(self, name: str, address: str = "") -> str:
        full = f"{paths.PREFIX}-kube-{name}"
        lab_netns.create(full)
        self.namespaces.add(full)
        up(full)
        if address:
            give(full, address)
        return full

    def process(self, number: int, namespace: str, place: Path) -> subprocess.Popen[bytes]:
        """In the namespace of this name, "" for the node's; returns when it is there."""
        join = ["nsenter", f"--net={lab_netns.path(namespace)}"] if namespace else []
        running = self.spawn(number, [*join, "sleep", "1000"], place)
        wanted = lab_netns.path(namespace) if namespace else Path("/proc/self/ns/net")
        while netns.mark(f"/proc/{running.pid}/ns/net") != netns.mark(str(wanted)):
            time.sleep(0.001)
        return running

    def spawn(self, number: int, argv: list[str], place: Path) -> subprocess.Popen[bytes]:
        running = subprocess.Popen(argv, preexec_fn=lambda: enter(place))  # noqa: PLW1509  the child only writes a file
        self.running.setdefault(number, []).append(running)
        return running

    def stop(self, number: int) -> None:
        """End the pod's processes; the cgroups stay."""
        for running in self.running.pop(number, ()):
            running.kill()
            running.wait()

    def remove(self, number: int, layout: str = SYSTEMD) -> None:
        self.stop(number)
        cgroup.remove(self.directory(number, layout))

    def forget(self, namespace: str) -> None:
        lab_netns.delete(namespace)
        self.namespaces.discard(namespace)

    def close(self) -> None:
        for number in list(self.running):
            self.stop(number)
        for name in list(self.namespaces):
            self.forget(name)
        for top in ("kubepods.slice", "kubepods", "kubelet.slice"):
            cgroup.remove(self.root / top)


def enter(place: Path) -> None:
    (place / "cgroup.procs").write_text("0")


@contextmanager
def running(node: DataNode) -> Iterator[Kubelet]:
    """On a node with nothing on it."""
    node.enforce(snapshot())
    node.enrolment._pods = Pods(node.config.cgroup)
    made = Kubelet(node.config.cgroup)
    yield made
    made.close()
    node.enforce(snapshot())
