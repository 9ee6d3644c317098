"""A virtual machine in the mesh of a cluster: its agent joins the controller of the API server with a token, its processes are Workloads there.

Two nodes of a lab are the cluster's node and the machine; the API server is in the controller's network namespace, where neither of them reaches it. The
cluster's node has a Pod, in a cgroup that is named as a kubelet names it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from lab import cgroup, mesh, mounts, netns, paths, process
from lab.errors import StartFailed
from lab.lab import Lab
from lab.process import Seat
from lab.topology import CONTROLLER_ADDRESSES, Node, Pod, Topology
from tests.kernel import shop
from tests.kubernetes.conftest import ASSETS
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.samples import namespace, pod, running

CONTROLLER = CONTROLLER_ADDRESSES[0]
ECHO = (sys.executable, str(Path(__file__).parents[1] / "kernel" / "echo.py"))
TOPOLOGY = Topology(
    nodes=(Node("node-1", 1), Node("vm-1", 2)),
    pods=(
        Pod("api", "node-1", ("10.77.1.20",), "shop", ECHO, {"POD": "api"}, (8080,)),
        Pod("billing", "vm-1", ("10.77.2.20",), "shop", ECHO, {"POD": "billing"}, (8080,)),
        Pod("intruder", "vm-1", ("10.77.2.21",), "shop", ECHO, {"POD": "intruder"}, (8080,)),
    ),
)
T = TypeVar("T")


KUBEPODS = paths.node_cgroup("node-1") / "kubepods"
MARKED = """
import socket, time
for _ in range(11):
    open("/proc/sys/net/ipv4/ip_local_reserved_ports", "wb", 0).write(b"15001-15008")
    began = time.monotonic()
    while True:
        try: socket.socket().close(); break
        except PermissionError: time.sleep(0.0005)
    print(time.monotonic() - began)
    time.sleep(0.3)
"""


def own(kind: str, name: str, spec: dict[str, Any], **labels: str) -> dict[str, Any]:
    """An object of our group in the namespace shop."""
    metadata = {"name": name, "namespace": "shop", "labels": labels}
    return {"apiVersion": "meshagent.io/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


def service(name: str, port: int | str) -> dict[str, Any]:
    spec = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": port}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"}, "spec": spec}


def workload(name: str) -> dict[str, Any]:
    """What an administrator writes for a process of the machine."""
    place = TOPOLOGY.pod(f"shop/{name}")
    spec = {"node": "vm-1", "addresses": list(place.addresses), "serviceAccount": name, "networkNamespace": paths.place_netns(place)}
    return own("Workload", name, spec, app=name)


def only(account: str, target: str, operation: dict[str, Any] | None = None) -> dict[str, Any]:
    """The AuthorizationPolicy that lets one service account in."""
    rule: dict[str, Any] = {"from": [{"source": {"serviceAccounts": [f"shop/{account}"]}}]}
    rule |= {"to": [{"operation": operation}]} if operation else {}
    return own("AuthorizationPolicy", target, {"selector": {"matchLabels": {"app": target}}, "action": "ALLOW", "rules": [rule]})


def mode(name: str) -> dict[str, Any]:
    """The namespace's PeerAuthentication."""
    return own("PeerAuthentication", "mode", {"mtls": {"mode": name}})


class Mesh:
    """An API server with a controller, and two nodes."""

    def __init__(self, lab: Lab, plane: ControlPlane) -> None:
        self.lab, self.plane = lab, plane

    def at_home(self, function: Callable[[], T]) -> T:
        """Call `function` where the API server is."""
        return netns.inside(paths.CONTROLLER_NETNS, function)

    def apply(self, *objects: dict[str, Any]) -> None:
        """Apply objects to the API server."""
        self.at_home(lambda: self.plane.apply(*objects))

    def kubectl(self, *argv: str) -> str:
        """Run kubectl."""
        return self.at_home(lambda: self.plane.kubectl(*argv))

    def start(self) -> None:
        """Start the controller and both agents, which join it with tokens over TCP."""
        for directory in (paths.AGENT_STATE, paths.AGENT_RUN):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        options = ["--listen", f"{CONTROLLER}:15010", "--join-listen", f"{CONTROLLER}:15011", "--ca-directory", str(paths.CA)]
        source = ["--kubernetes", "--kubeconfig", str(self.plane.kubeconfig()), "--socket", str(paths.CONTROLLER_SOCKET)]
        argv = [mesh.program("mesh-controller"), "run", *source, *options]
        seat = Seat(paths.controller_cgroup(), netns.path(paths.CONTROLLER_NETNS))
        started = process.start("controller", seat, argv, {}, Path("/"), paths.log("controller"))
        mesh.wait_controller(self.lab._remember(started), 60)
        agents = [(node, self.lab._remember(self.agent(node))) for node in TOPOLOGY.nodes]
        for node, agent in agents:
            mesh.wait_agent(node, agent, 60)

    def agent(self, node: Node) -> process.Process:
        """Start a node's agent as `meshagent.service` does on a machine."""
        token = paths.RUN / f"token-{node.name}"
        made = subprocess.run(
            [mesh.program("mesh-controller"), "token", "create", "--ca-directory", paths.CA, "--node", node.name],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        token.write_text(made.stdout)
        argv = [
            mesh.program("meshagent"),
            "run",
            "--node",
            node.name,
            "--controller",
            f"{CONTROLLER}:15010",
            "--join-token-file",
            str(token),
        ]
        argv += [*mesh.agent_directories(node.name), "--metrics-address", node.gateways[0]]
        argv.append("--keys-on-disk")  # /run of a machine for tests may be no tmpfs
        name, seat = f"agent-{node.name}", Seat(paths.agent_cgroup(node.name), paths.node_netns(node))
        return process.start(name, seat, argv, {}, Path("/"), paths.log(name))

    def run_pod(self, name: str) -> None:
        """Have a pod of the API server be the process that runs in the lab's: what scheduler, kubelet and runtime do."""
        place = self.lab.topology.pod(f"shop/{name}")
        self.apply(pod("shop", name, place.node, app=name))
        uid = self.kubectl("get", "pod", name, "-n", "shop", "-o", "jsonpath={.metadata.uid}")
        container = cgroup.create(KUBEPODS / "besteffort" / f"pod{uid}" / "container")
        (container / "cgroup.procs").write_text(str(self.lab.state.processes[f"shop_{name}"].pid))
        self.at_home(lambda: running(self.plane, "shop", name, *place.addresses))

    def enrolled(self, node: str) -> set[str]:
        """Workloads of a node that are in the mesh."""
        return {one["name"] for one in self.lab.status(node).get("workloads", ()) if one["redirected"]}

    def calls(self, caller: str, service: str, path: str = "/") -> tuple[str, str]:
        """The status that a caller gets from a Service, 000 for none, and who answered."""
        address = self.kubectl("get", "service", service, "-n", "shop", "-o", "jsonpath={.spec.clusterIP}")
        argv = ["curl", "-s", "-m", "5", "-w", "\n%{http_code}", f"http://{address}{path}"]
        body, _, status = self.lab.exec(f"shop/{caller}", argv).stdout.rpartition("\n")
        return status, json.loads(body).get("pod", "") if body.startswith("{") else ""

    def takes(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Wait until it is so."""
        shop.takes(condition, seconds, pause=0.1, said=lambda: [self.lab.status(node.name).get("problems") for node in TOPOLOGY.nodes])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh that has settled: STRICT everywhere in the namespace, and each Service open to one caller."""
    assets = os.environ.get(ASSETS)
    if not assets:
        pytest.skip(f"no control plane: `make test-kubernetes` builds one and says so in {ASSETS}")
    plane = ControlPlane(Path(assets), tmp_path_factory.mktemp("control-plane"))
    with Lab(TOPOLOGY, mesh=False) as lab:
        mounted = mounts.mount_bpffs(paths.BPF)
        made = Mesh(lab, plane)
        try:
            # Without a default route the API server does not know which address it has.
            subprocess.run(["ip", "-n", paths.CONTROLLER_NETNS, "route", "add", "default", "via", TOPOLOGY.nodes[0].wire[0]], check=True)
            made.at_home(plane.prepare)
            made.at_home(plane.start)
            made.at_home(plane.install_crds)
            made.apply(namespace("meshagent-system"), namespace("shop"))
            made.apply(service("api", "web"), service("billing", 8080), mode("STRICT"))
            made.apply(only("billing", "api"), only("api", "billing"))
            made.start()
            made.run_pod("api")
            made.apply(workload("billing"), workload("intruder"))
            made.takes(lambda: made.enrolled("node-1") == {"api"} and made.enrolled("vm-1") == {"billing", "intruder"})
            yield made
        except StartFailed as error:
            pytest.fail(f"{error}: {error.log}")
        finally:
            lab.down()
            for part in ("kube-apiserver", "etcd"):
                plane.stop(part)
            if mounted:
                mounts.unmount_bpffs(paths.BPF)


def test_a_process_of_the_machine_calls_a_service_of_the_cluster_by_its_identity(found: Mesh) -> None:
    found.takes(lambda: found.calls("billing", "api") == ("200", "api"))
    assert found.calls("intruder", "api") == ("000", "")
    plan = found.lab.ask("vm-1", "trace", "shop/billing", "shop/api", "-o", "text").stdout
    assert "mTLS between nodes (HBONE)" in plan
    denied = found.lab.ask("vm-1", "trace", "shop/intruder", "shop/api", "-o", "text").stdout
    assert "DENY" in denied
    assert "no rule matches" in denied


def test_a_pod_calls_a_service_whose_endpoint_is_a_process_of_the_machine(found: Mesh) -> None:
    found.takes(lambda: found.calls("api", "billing") == ("200", "billing"))
    assert found.calls("intruder", "billing") == ("000", "")


def test_requests_are_decided_by_the_identity_of_the_machines_process(found: Mesh) -> None:
    found.apply(only("billing", "api", {"methods": ["GET"], "paths": ["/items"]}))
    found.takes(lambda: found.calls("billing", "api", "/") == ("403", ""))
    assert found.calls("billing", "api", "/items") == ("200", "api")
    assert found.calls("intruder", "api", "/items")[0] in {"000", "403"}
    found.apply(only("billing", "api"))
    found.takes(lambda: found.calls("billing", "api", "/") == ("200", "api"))


def test_plaintext_from_another_node_is_refused_where_the_api_server_says_strict(found: Mesh) -> None:
    """The cluster's node itself is no workload; whom it calls has no AuthorizationPolicy."""

    def call() -> str:
        url = "http://10.77.2.21:8080/"
        return found.lab.exec("node-1", ["curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", url]).stdout

    assert call() == "000"
    found.apply(mode("PERMISSIVE"))
    found.takes(lambda: call() == "200")
    found.apply(mode("STRICT"))
    found.takes(lambda: call() == "000")


def test_the_api_server_says_of_the_machines_workloads_what_became_of_them(found: Mesh) -> None:
    said = "jsonpath={.items[*].status.conditions[?(@.type=='Accepted')].status}"
    found.takes(lambda: found.kubectl("get", "workloads", "-n", "shop", "-o", said) == "True True")


def test_a_pod_that_is_in_the_mesh_and_marked_then_is_let_go_of_at_once(found: Mesh) -> None:
    """The kubelet that made only one directory of pods has not started yet; a runtime that is slow writes the mark when the agent has the pod already."""

    def unheld() -> list[str]:
        return [one for one in found.lab.status("node-1")["problems"] if "are not held" in one]

    assert [f"{KUBEPODS}/burstable" in one for one in unheld()] == [True]
    cgroup.create(KUBEPODS / "burstable")
    found.takes(lambda: not unheld())
    (container,) = KUBEPODS.glob("besteffort/pod*/container")
    join = ["sh", "-c", f'echo 0 > {container}/cgroup.procs && exec "$@"', "sh", "nsenter", f"--net={found.lab.netns('shop/api')}"]
    said = subprocess.run([*join, sys.executable, "-c", MARKED], capture_output=True, text=True, check=True, timeout=60).stdout
    waited = sorted(map(float, said.split()))
    print(f"sockets came {', '.join(f'{one * 1000:.0f}' for one in waited)} ms after the mark")
    assert len(waited) == 11
    assert waited[5] < 0.06  # looked at four times a second it was 0.12


def test_a_workload_that_is_deleted_is_out_of_the_mesh(found: Mesh) -> None:
    found.kubectl("delete", "workload", "intruder", "-n", "shop")
    found.takes(lambda: found.enrolled("vm-1") == {"billing"})
    found.takes(lambda: found.calls("billing", "api") == ("200", "api"))
