"""Pods of a real kubelet in the mesh: a real control plane, containerd, the controller and the agent as on a node."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import cgroup, mounts
from tests.kubernetes import node
from tests.kubernetes.controlplane import ControlPlane, Failed
from tests.kubernetes.node import BOX, Node
from tests.unit.agent.l7.harness import free_ports

NAME = "node-1"


def takes(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


class Cluster:
    """A node with a mesh on it."""

    def __init__(self, plane: ControlPlane, machine: Node, top: Path) -> None:
        self.plane, self.machine, self.top = plane, machine, top
        self.processes: list[subprocess.Popen[bytes]] = []
        (self.metrics,) = free_ports(1)

    def up(self, place: Path) -> None:
        """Start the controller and the agent, for all below a cgroup."""
        plane, top = self.plane, self.top
        self.start(
            "mesh-controller", "run", "--kubernetes", "--kubeconfig", plane.kubeconfig(), "--socket", top / "c.sock",
            "--ca-directory", top / "ca",
        )  # fmt: skip
        self.start(
            "meshagent", "run", "--node", NAME, "--controller", f"unix:{top}/c.sock", "--cgroup", place, "--run-dir", top / "run",
            "--state-dir", top / "state", "--pin-dir", top / "bpf" / "m", "--metrics-address", "127.0.0.1", "--metrics-port", self.metrics,
        )  # fmt: skip
        try:
            takes(self.status)
        except AssertionError as error:
            said = (path.read_text(errors="replace")[-2000:] for path in sorted(top.glob("*.log")))
            raise Failed("the mesh does not start: {}".format("\n".join(said))) from error

    def start(self, program: str, *arguments: object) -> None:
        with (self.top / f"{program}.log").open("ab") as log:
            self.processes.append(subprocess.Popen([Path(sys.executable).with_name(program), *map(str, arguments)], stderr=log, stdout=log))

    def status(self) -> dict[str, Any]:
        argv = [str(Path(sys.executable).with_name("meshagent")), "status", "-o", "json", "--run-dir", str(self.top / "run")]
        text = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False).stdout
        found: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
        return found

    def enrolled(self, name: str) -> bool:
        return any(f"{one['namespace']}/{one['name']}" == name and one["redirected"] for one in self.status().get("workloads", ()))

    def run(self, space: str, name: str, *command: str, labels: dict[str, str] | None = None, **more: Any) -> None:
        """Have kubelet run a pod; `more` is of its container."""
        container = {"name": "app", "image": BOX, "imagePullPolicy": "Never", "command": list(command), **more}
        spec = {
            "nodeName": NAME,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "dnsPolicy": "Default",
            "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}],
            "serviceAccountName": name,
            "containers": [container],
        }
        metadata = {"name": name, "namespace": space, "labels": {"app": name, **(labels or {})}}
        self.plane.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})

    def close(self, place: Path) -> None:
        """End both, and take the mesh off the node."""
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            process.wait(30)
        argv = [str(Path(sys.executable).with_name("meshagent")), "uninstall", "--run-dir", str(self.top / "run")]
        argv += ["--state-dir", str(self.top / "state"), "--pin-dir", str(self.top / "bpf" / "m"), "--cgroup", str(place)]
        subprocess.run(argv, check=False, timeout=60)


@pytest.fixture(scope="module")
def cluster(plane: ControlPlane) -> Iterator[Cluster]:
    """The mesh on a node with real pods."""
    top = Path(tempfile.mkdtemp(prefix="mesh-", dir="/dev/shm"))
    root = cgroup.mount_point()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, top, ignore_errors=True)
        (top / "bpf").mkdir()
        mounts.mount_bpffs(top / "bpf")
        stack.callback(mounts.unmount_bpffs, top / "bpf")
        try:
            machine = stack.enter_context(node.running(plane, top / "node", root, NAME))
        except Failed as error:
            pytest.fail(str(error))
        found = Cluster(plane, machine, top)
        stack.callback(found.close, root)
        found.up(root)
        yield found


def test_pods_of_a_kubelet_are_enrolled_when_their_namespace_is(cluster: Cluster) -> None:
    plane = cluster.plane
    for space, mode in (("real", "mesh"), ("other", "none")):
        plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space, "labels": {"meshagent.io/mode": mode}}})
        for name in ("web", "friend"):
            plane.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": space}})
            cluster.run(space, name, "/bin/sleep", "1000")
    takes(lambda: all(cluster.enrolled(f"real/{name}") for name in ("web", "friend")))
    takes(lambda: plane.kubectl("get", "pod", "-n", "other", "-o", "jsonpath={.items[*].status.phase}") == "Running Running")
    assert not cluster.enrolled("other/web")
    plane.kubectl("label", "namespace", "other", "meshagent.io/mode=mesh", "--overwrite")
    takes(lambda: all(cluster.enrolled(f"other/{name}") for name in ("web", "friend")))
    assert cluster.status()["problems"] == []


def test_a_pod_that_is_deleted_leaves_nothing_on_the_node(cluster: Cluster) -> None:
    plane = cluster.plane
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "gone", "labels": {"meshagent.io/mode": "mesh"}}})
    plane.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "app", "namespace": "gone"}})
    held = cluster.top / "run" / "netns"
    before = len(list(held.iterdir()))
    for _ in range(3):
        cluster.run("gone", "app", "/bin/sleep", "1000")
        takes(lambda: cluster.enrolled("gone/app"))
        plane.kubectl("delete", "pod", "app", "-n", "gone", "--force", "--grace-period=0")
        takes(lambda: not cluster.enrolled("gone/app"))
    takes(lambda: len(list(held.iterdir())) == before)


def test_probes_of_the_kubelet_reach_strict_pods_and_other_calls_of_the_node_do_not(cluster: Cluster) -> None:
    """This kubelet shares its cgroup with everything else here: its process is what is recognised."""
    plane = cluster.plane
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": {"meshagent.io/mode": "mesh"}}})
    for kind, spec in (("PeerAuthentication", {"mtls": {"mode": "STRICT"}}), ("AuthorizationPolicy", {})):
        plane.apply({"apiVersion": "meshagent.io/v1alpha1", "kind": kind, "metadata": {"name": "all", "namespace": "strict"}, "spec": spec})

    def probed(name: str) -> None:
        """A pod that is ready as soon as the kubelet has been answered over HTTP, and that is killed if it is not over TCP."""
        plane.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "strict"}})
        cluster.run(
            *("strict", name, "/bin/httpd", "-f", "-p", "8080", "-h", "/etc"),
            ports=[{"name": "web", "containerPort": 8080}],
            readinessProbe={"httpGet": {"path": "/hostname", "port": "web"}, "periodSeconds": 1},
            livenessProbe={"tcpSocket": {"port": 8080}, "periodSeconds": 1, "failureThreshold": 1, "initialDelaySeconds": 3},
        )
        takes(lambda: cluster.enrolled(f"strict/{name}"))
        ready = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
        takes(lambda: plane.kubectl("get", "pod", name, "-n", "strict", "-o", ready) == "True")

    probed("before")
    address = plane.kubectl("get", "pod", "before", "-n", "strict", "-o", "jsonpath={.status.podIP}")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, 8080), timeout=5)
