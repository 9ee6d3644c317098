"""meshagent as it is installed: deploy/kubernetes/meshagent.yaml on a whole control plane, its pods run by a real kubelet from the images of scripts/images."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lab import cgroup, mounts
from tests.kernel import shop
from tests.kubernetes import controlplane, node
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.manifest import MANIFEST, OWN
from tests.kubernetes.node import RUN, Node

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/meshagent"
BUILT = ROOT / "build/helm/helm"
HELM = os.environ.get("HELM") or shutil.which("helm") or (str(BUILT) if BUILT.exists() else None)
"""As scripts/render finds it, which also builds one."""
NEEDED = ("kube-controller-manager", "kube-scheduler", "kube-proxy")
READY_S = 120.0
BPF = Path("/sys/fs/bpf")
PINS = BPF / "meshagent"
LEFT = (Path("/run/meshagent-workload"), Path("/var/lib/meshagent"))
"""Made by kubelet, for volumes."""
ASSETS = "MESH_KUBERNETES_ASSETS"
_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_NETWORK = (
    "link set lo up",
    "link add wire type veth peer name far",
    "link set far up",
    "link set wire up",
    "address add 192.0.2.2/24 dev wire",
    "route add default dev wire",
)
_OPENSSL = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=meshagent "
    "-addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign -keyout tls.key -out tls.crt"
)
"""The chart's notes, word for word."""


@dataclass(slots=True)
class Cluster:
    """One node, whole."""

    plane: ControlPlane
    machine: Node
    directory: Path
    before: set[str] = field(default_factory=set)
    """`objects` before there was anything of the mesh."""

    def objects(self) -> set[str]:
        """What the API server holds, as KIND NAMESPACE/NAME: of the cluster, of Kubernetes' own namespaces and of the mesh's.

        Left out are events, what is deprecated, and addresses of Services.
        """
        found = []
        columns = "custom-columns=KIND:.kind,SPACE:.metadata.namespace,NAME:.metadata.name"
        for namespaced in ("true", "false"):
            kinds = self.plane.kubectl("api-resources", "--verbs=list", f"--namespaced={namespaced}", "-o", "name").split()
            wanted = ",".join(
                kind for kind in kinds if kind.partition(".")[0] not in {"events", "componentstatuses", "endpoints", "ipaddresses"}
            )
            found += [line.split() for line in self.plane.kubectl("get", wanted, "-A", "--no-headers", "-o", columns).splitlines()]
        spaces = ("<none>", "kube-system", "kube-public", "kube-node-lease", OWN)
        return {f"{kind} {space}/{name}" for kind, space, name in found if space in spaces}

    def added(self) -> set[str]:
        """Of these, those that were not there at the start."""
        return self.objects() - self.before

    def load(self, *names: str) -> None:
        """Give the node images of scripts/images."""
        for name in names:
            self.machine.ctr("images", "import", str(ROOT / "build/images" / f"{name}.tar"))

    def install(self, change: Callable[[str], str] = str) -> None:
        """What docs/kubernetes.md says."""
        self.plane.kubectl("apply", "--server-side", "-f", "-", stdin=change(MANIFEST.read_text()))
        self.sign()
        self.machine.name_services()

    def sign(self) -> None:
        """Give the mesh's namespace what it signs with."""
        made = self.directory / "ca"
        if not made.exists():
            made.mkdir()
            subprocess.run(_OPENSSL.split(), cwd=made, check=True, capture_output=True)
        files = [f"--from-file=tls.crt={made}/tls.crt", f"--from-file=tls.key={made}/tls.key", f"--from-file=ca.crt={made}/tls.crt"]
        self.plane.kubectl("-n", OWN, "create", "secret", "generic", "meshagent-ca", *files, check=False)
        self.plane.kubectl("-n", OWN, "create", "configmap", "meshagent-root", f"--from-file=ca.crt={made}/tls.crt", check=False)

    def helm(self, *command: str) -> str:
        """Run Helm in the mesh's namespace, while names of what it makes are answered; returns what it prints, on both streams."""
        argv = [str(HELM), *command, "--namespace", OWN, "--kubeconfig", str(self.plane.kubeconfig())]
        run = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"HOME": str(self.directory)}
        )
        while run.poll() is None:
            self.machine.name_services()
            time.sleep(0.5)
        said = run.communicate()[0]
        assert run.returncode == 0, f"{said}\n{self.told()}"
        return said

    def settled(self, kind: str, name: str, space: str = OWN) -> bool:
        """Are all pods of a Deployment or DaemonSet ready, of its newest generation, and no other is left?"""
        found: dict[str, Any] = json.loads(self.plane.kubectl("get", kind, name, "-n", space, "-o", "json"))
        status = found["status"]
        if status.get("observedGeneration") != found["metadata"]["generation"]:
            return False
        if kind == "daemonset":
            wanted = status["desiredNumberScheduled"]
            return bool(0 < wanted == status.get("updatedNumberScheduled") == status.get("numberReady"))
        wanted = found["spec"]["replicas"]
        return bool(wanted == status.get("updatedReplicas") == status.get("readyReplicas") == status.get("replicas"))

    def pods(self, space: str, component: str = "") -> list[dict[str, Any]]:
        """Those of a namespace that are not on their way out."""
        select = ("-l", f"app.kubernetes.io/component={component}") if component else ()
        found: list[dict[str, Any]] = json.loads(self.plane.kubectl("get", "pods", "-n", space, *select, "-o", "json"))["items"]
        return [one for one in found if "deletionTimestamp" not in one["metadata"]]

    def told(self) -> str:
        """Pods, events and what the mesh logged last, for a test that fails."""
        asked = [("get", "pods", "-A", "-o", "wide"), ("get", "events", "-A", "--sort-by=.lastTimestamp")]
        asked += [("logs", "-n", OWN, "--tail=20", what) for what in ("deployment/meshagent-controller", "daemonset/meshagent-agent")]
        return "\n".join("\n".join(self.plane.kubectl(*one, check=False).splitlines()[-30:]) for one in asked)

    def agent(self, *command: str, check: bool = True) -> str:
        """Run a command in the agent's pod, as kubectl exec."""
        (pod,) = self.pods(OWN, "agent")
        return self.plane.kubectl("exec", "-n", OWN, pod["metadata"]["name"], "--", *command, check=check)


def takes(condition: Callable[[], object], of: Cluster | None = None, seconds: float = READY_S) -> None:
    """Wait until it is so; what a cluster says is told otherwise."""
    shop.takes(condition, seconds, pause=0.1, said=of.told if of else str)


@contextmanager
def own_network() -> Iterator[None]:
    """A network namespace for what this thread starts, with an address and a way out that leads nowhere: pods' addresses are nobody else's there."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        for command in _NETWORK:
            subprocess.run(["ip", *command.split()], check=True)
        yield
    finally:
        libc.setns(before, _CLONE_NEWNET)
        os.close(before)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster of one node, which has the images and no mesh. What a test has left of one when it failed is taken off by the node's own command, from here."""
    assets = Path(os.environ.get(ASSETS) or "/nonexistent")
    if lacking := [name for name in NEEDED if not (assets / name).exists()]:
        pytest.skip(f"no {', '.join(lacking)}: `make test-kubernetes` builds them and says so in {ASSETS}")
    if not all((ROOT / "build/images" / f"{name}.tar").exists() for name in ("agent", "controller")):
        pytest.skip("no images: `make images` builds them, and `make test-kubernetes` before it tests them")
    if PINS.exists() or (RUN.exists() and any(RUN.iterdir())):
        pytest.fail(f"this machine has a mesh already ({PINS}, {RUN}): `meshagent uninstall` takes it off")
    directory = Path(tempfile.mkdtemp(prefix="mesh-", dir="/dev/shm"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        if mounts.mount_bpffs(BPF):  # as systemd does on a node
            stack.callback(mounts.unmount_bpffs, BPF)
        stack.enter_context(own_network())
        plane = stack.enter_context(controlplane.running(assets, directory / "plane", whole=True))
        plane.install_gateway_api()
        machine = stack.enter_context(node.running(plane, directory / "node", cgroup.mount_point(), "node-1"))
        found = Cluster(plane, machine, directory)
        stack.callback(_clean, found)
        found.load("agent", "controller")
        found.before = found.objects()
        yield found


def _clean(found: Cluster) -> None:
    if PINS.exists():
        found.plane.kubectl("delete", "-n", OWN, "daemonset", "meshagent-agent", "--ignore-not-found", check=False)
        argv = [str(ROOT / ".venv/bin/meshagent"), "uninstall", "--cgroup", str(found.machine.cgroup2)]
        subprocess.run(argv, check=False, timeout=60)
    for path in LEFT:
        shutil.rmtree(path, ignore_errors=True)


def envoy() -> int:
    """The process of the node's waypoint; 0 if there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{RUN}/envoy-bootstrap.json".encode() in (process / "cmdline").read_bytes().split(b"\0"):
                return int(process.name)
        except OSError:
            continue
    return 0


def in_kernel(kind: str, under: Path | None = None) -> set[int]:
    """Numbers of all programs, maps or links; of those that are pinned in a directory, if one is given (bpftool(8), -f)."""
    said = subprocess.run(["bpftool", "-j", "-f", kind, "show"], capture_output=True, text=True, check=True).stdout
    found: list[dict[str, Any]] = json.loads(said)
    return {one["id"] for one in found if under is None or any(path.startswith(f"{under}/") for path in one.get("pinned", ()))}


def pinned() -> dict[str, set[int]]:
    """Numbers of what the mesh has pinned, by kind."""
    return {kind: in_kernel(kind, under=PINS) for kind in ("prog", "map", "link")}


def left(found: Cluster, before: dict[str, set[int]]) -> list[str]:
    """What there still is of a mesh on a node: programs, maps and links of before, pins, Envoy, its cgroup, mounts and files."""
    said = [f"{kind} {held & in_kernel(kind)}" for kind, held in before.items() if held & in_kernel(kind)]
    said += [str(path) for path in (PINS, found.machine.cgroup2 / "meshagent-waypoint") if path.exists()]
    said += [f"Envoy is process {envoy()}"] if envoy() else []
    said += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {RUN}/" in line]
    return said + [str(path) for folder in (RUN, *LEFT) if folder.exists() for path in folder.iterdir()]
