"""The mesh on a node of tests: controller and agent as processes beside its kubelet, with directories of their own, which are gone when `running` ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import cgroup, mounts
from tests.kernel import shop
from tests.kubernetes.controlplane import ControlPlane, Failed
from tests.kubernetes.node import BOX, Node
from tests.ports import free_ports


def takes(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until it is so."""
    shop.takes(condition, seconds, pause=0.1)


def program(name: str) -> Path:
    """One of those that are installed with this package."""
    return Path(sys.executable).with_name(name)


@dataclass(slots=True)
class Cluster:
    """A node with a mesh on it."""

    plane: ControlPlane
    machine: Node
    top: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """The last one is the agent."""
    metrics: int = field(default_factory=lambda: free_ports(1)[0])

    def up(self) -> None:
        """Start the controller and the agent."""
        self.mount()
        self.start(
            "mesh-controller", "run", "--kubernetes", "--kubeconfig", self.plane.kubeconfig(), "--socket", self.top / "c.sock",
            "--ca-directory", self.top / "ca",
        )  # fmt: skip
        self.start_agent()
        try:
            takes(self.status)
        except AssertionError as error:
            said = (path.read_text(errors="replace")[-2000:] for path in sorted(self.top.glob("*.log")))
            raise Failed("the mesh does not start: {}".format("\n".join(said))) from error

    def mount(self) -> None:
        """The BPF file system of this agent's pins."""
        (self.top / "bpf").mkdir(exist_ok=True)
        mounts.mount_bpffs(self.top / "bpf")

    def start_agent(self) -> None:
        """Also another one, when the one before has ended. Names are the cluster's DNS's affair, as on any node of Kubernetes."""
        self.start(
            "meshagent", "run", "--node", self.machine.name, "--controller", f"unix:{self.top}/c.sock", *self._places(),
            "--metrics-address", "127.0.0.1", "--metrics-port", self.metrics, "--no-names",
        )  # fmt: skip

    def kill_agent(self) -> None:
        """End it as a crash does."""
        agent = self.processes.pop()
        agent.kill()
        agent.wait(30)

    def _places(self) -> list[str]:
        run, state, pins = (str(self.top / name) for name in ("run", "state", "bpf/m"))
        return ["--run-dir", run, "--state-dir", state, "--pin-dir", pins, "--cgroup", str(self.machine.cgroup2)]

    def start(self, name: str, *arguments: object) -> None:
        with (self.top / f"{name}.log").open("ab") as log:
            self.processes.append(subprocess.Popen([program(name), *map(str, arguments)], stderr=log, stdout=log))

    def status(self) -> dict[str, Any]:
        argv = [str(program("meshagent")), "status", "-o", "json", "--run-dir", str(self.top / "run")]
        text = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False).stdout
        found: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
        return found

    def redirected(self) -> set[str]:
        """Who is in the mesh, as NAMESPACE/NAME."""
        return {f"{one['namespace']}/{one['name']}" for one in self.status().get("workloads", ()) if one["redirected"]}

    def enrolled(self, name: str) -> bool:
        return name in self.redirected()

    def run(self, space: str, name: str, *command: str, labels: dict[str, str] | None = None, account: str = "", **more: Any) -> None:
        """Have kubelet run a pod, with the account of its name or another; `more` is of its container."""
        spec = pod(account or name, *command, **more) | {"nodeName": self.machine.name, "tolerations": [{"operator": "Exists"}]}
        metadata = {"name": name, "namespace": space, "labels": {"app": name, **(labels or {})}}
        self.plane.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})

    def exec(self, space: str, name: str, *command: str) -> str:
        """Have kubelet run a command in a pod; what it says on both streams, if it fails too."""
        return self.plane.kubectl("exec", "-n", space, name, "--", *command, check=False)

    def get(self, space: str, name: str, url: str, method: str = "GET") -> str:
        """The status of a request from a pod; 000 if there is no answer."""
        said = self.exec(space, name, "curl", "-s", "-g", "-m", "5", "-o", "/dev/null", "-w", "status=%{http_code}\n", "-X", method, url)
        return said.partition("status=")[2][:3]

    def addresses(self, space: str, name: str) -> list[str]:
        """Of a pod, as the API server knows them."""
        return self.plane.kubectl("get", "pod", name, "-n", space, "-o", "jsonpath={.status.podIPs[*].ip}").split()

    def network(self, space: str, name: str) -> Path:
        """The network namespace of a pod without limits, as one of its processes has it."""
        uid = self.plane.kubectl("get", "pod", name, "-n", space, "-o", "jsonpath={.metadata.uid}")
        first, *_ = cgroup.pids(self.machine.cgroup2 / "kubepods" / "besteffort" / f"pod{uid}")
        return Path(f"/proc/{first}/ns/net")

    def lose(self) -> None:
        """End the agent and Envoy, and take away what a reboot takes from a mesh: programs, tables, pins, mounts, all but the state directory."""
        waypoint = self.status()["waypoint"]["pid"]
        self.kill_agent()
        os.kill(waypoint, signal.SIGKILL)
        for place in (*mounts.below(self.top / "run"), self.top / "bpf"):
            subprocess.run(["umount", "-l", str(place)], check=True)
        shutil.rmtree(self.top / "run")

    def close(self) -> None:
        """End both, and take the mesh off the node."""
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            process.wait(30)
        subprocess.run([program("meshagent"), "uninstall", *self._places()], check=False, timeout=60)
        mounts.unmount_bpffs(self.top / "bpf")
        shutil.rmtree(self.top, ignore_errors=True)


def pod(account: str, *command: str, **more: Any) -> dict[str, Any]:
    """The spec of one that runs a command of the box; `more` is of its container."""
    container = {"name": "app", "image": BOX, "imagePullPolicy": "Never", "command": list(command), **more}
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 0,
        "serviceAccountName": account,
        "containers": [container],
    }


@contextmanager
def running(plane: ControlPlane, machine: Node, top: Path) -> Iterator[Cluster]:
    """A mesh that answers."""
    top.mkdir()
    found = Cluster(plane, machine, top)
    try:
        found.up()
        yield found
    finally:
        found.close()
