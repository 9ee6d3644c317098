"""A virtual machine in the mesh of a cluster whose controllers are pods: the manifest on a real node, docs/vm.md on the machine, and a pod of the kubelet."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import cgroup
from tests.kubernetes import controlplane, machine, policing
from tests.kubernetes import install as installing
from tests.kubernetes.install import ROOT, Cluster, takes
from tests.kubernetes.machine import Machine
from tests.kubernetes.manifest import OWN
from tests.kubernetes.node import LIMITS

pytestmark = pytest.mark.timeout(300)
SPACE, MACHINE = "shop", "vm-1"
ADDRESSES = {"billing": "10.9.1.20", "intruder": "10.9.1.21"}
PYTHON = "localhost/meshagent/controller:0.1.0"
LOAD = """
import http.client, sys, threading, time
end, said = time.monotonic() + 10, []
def ask():
    kept = http.client.HTTPConnection(sys.argv[1], timeout=5)
    while time.monotonic() < end:
        try:
            kept.request("GET", "/items")
            answer = kept.getresponse()
            answer.read()
            said.append(answer.status)
        except (OSError, http.client.HTTPException):
            kept.close()
threads = [threading.Thread(target=ask) for _ in range(16)]
for one in threads: one.start()
for one in threads: one.join()
print(said.count(200))
"""
SERVICE = re.compile(r"```yaml\n(apiVersion: v1\nkind: Service\n.*?)```", re.DOTALL)


@dataclass(slots=True)
class Mesh:
    """A cluster and a machine."""

    cluster: Cluster
    machine: Machine

    def apply(self, *objects: dict[str, Any]) -> None:
        self.cluster.plane.apply(*objects)

    def takes(self, condition: Any) -> None:
        """Wait until it is so."""
        try:
            takes(condition, self.cluster, 60)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.machine.log()}") from error

    def address(self, service: str) -> str:
        return self.cluster.plane.kubectl("get", "service", service, "-n", SPACE, "-o", "jsonpath={.spec.clusterIP}")

    def pod_address(self) -> str:
        return self.cluster.plane.kubectl("get", "pod", "api", "-n", SPACE, "-o", "jsonpath={.status.podIP}")

    def from_machine(self, workload: str, url: str, *options: str) -> str:
        """The status that a process of the machine gets, 000 for none; without a name it is no workload's."""
        return self.machine.run(workload, "curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", *options, url)

    def from_pod(self, url: str) -> str:
        """The status that the pod gets; the error's name if there is no answer."""
        program = (
            "import urllib.request, urllib.error, sys\n"
            "try: print(urllib.request.urlopen(sys.argv[1], timeout=5).status)\n"
            "except urllib.error.HTTPError as error: print(error.code)\n"
            "except OSError as error: print(type(error).__name__)\n"
        )
        return self.cluster.plane.kubectl("exec", "-n", SPACE, "api", "--", "/usr/bin/python3", "-c", program, url, check=False).strip()


@pytest.fixture(scope="module")
def found() -> Iterator[Mesh]:
    """STRICT everywhere in the namespace; the pod `api` and the machine's process `billing` admit each other, and nobody else."""
    with ExitStack() as stack:
        cluster = stack.enter_context(installing.cluster())
        cluster.install()
        vm = stack.enter_context(machine.beside(MACHINE, cluster.directory / "vm", ADDRESSES))
        made = Mesh(cluster, vm)
        open_shop(made)
        takes(lambda: cluster.settled("deployment", "meshagent-controller") and cluster.settled("daemonset", "meshagent-agent"), cluster)
        join(made)
        made.takes(lambda: {one["name"] for one in vm.status().get("workloads", ()) if one["redirected"]} == set(ADDRESSES))
        yield made


def open_shop(made: Mesh) -> None:
    """A pod behind a Service, and the machine's processes: one behind a Service, one that nobody lets in."""
    made.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE, "labels": {"meshagent.io/mode": "mesh"}}})
    files = {"index.html": "all\n", "items": "items\n"}
    made.apply(core("ConfigMap", "files", data=files), core("ServiceAccount", "api"))
    for name in ("api", "billing"):
        ports = [{"name": "http", "port": 80, "targetPort": 8080}]
        made.apply(core("Service", name, spec={"selector": {"app": name}, "ports": ports}))
    container = {
        "name": "app",
        "image": PYTHON,
        "imagePullPolicy": "Never",
        "command": ["/usr/bin/python3", "-m", "http.server", "8080", "--directory", "/files"],
        "volumeMounts": [{"name": "files", "mountPath": "/files"}],
    }
    spec = {"serviceAccountName": "api", "terminationGracePeriodSeconds": 0, "containers": [container]}
    spec |= {"volumes": [{"name": "files", "configMap": {"name": "files"}}]}
    made.apply(core("Pod", "api", spec=spec))
    served = made.machine.top / "files"
    served.mkdir()
    for file, content in files.items():
        (served / file).write_text(content)
    for name, address in ADDRESSES.items():
        place = {"node": MACHINE, "addresses": [address], "serviceAccount": name, "networkNamespace": made.machine.netns(name)}
        made.apply(own("Workload", name, place))
        made.machine.serve(name, served)
    made.apply(own("PeerAuthentication", "mode", {"mtls": {"mode": "STRICT"}}), only("billing", "api"), only("api", "billing"))


def join(made: Mesh) -> None:
    """What docs/vm.md says: the Service for machines, a token of a controller's pod, and an agent that joins with it."""
    plane = made.cluster.plane
    (manifest,) = SERVICE.findall((ROOT / "docs/vm.md").read_text())
    plane.kubectl("apply", "--server-side", "-f", "-", stdin=manifest)
    asked = (
        "exec",
        "-n",
        OWN,
        "deploy/meshagent-controller",
        "--",
        "mesh-controller",
        "token",
        "create",
        "--kubernetes",
        "--node",
        MACHINE,
    )
    (token,) = (word for word in plane.kubectl(*asked).split() if word.startswith("mesh1."))  # kubectl says, too, which pod it took
    ports = json.loads(plane.kubectl("get", "service", "meshagent-machines", "-n", OWN, "-o", "json"))["spec"]["ports"]
    # No load balancer here: a node's port of the same Service, which is where one would lead.
    discovery, joining = (f"{controlplane.address()}:{port['nodePort']}" for port in ports)
    made.machine.start_agent(discovery, joining, token)


def core(kind: str, name: str, **more: Any) -> dict[str, Any]:
    """An object of Kubernetes' own."""
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": SPACE, "labels": {"app": name}}, **more}


def own(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {**core(kind, name, spec=spec), "apiVersion": "meshagent.io/v1alpha1"}


def only(account: str, target: str, **operation: Any) -> dict[str, Any]:
    """The AuthorizationPolicy that lets one service account in, with all requests or with some."""
    rule: dict[str, Any] = {"from": [{"source": {"serviceAccounts": [f"{SPACE}/{account}"]}}]}
    rule |= {"to": [{"operation": operation}]} if operation else {}
    return own("AuthorizationPolicy", target, {"selector": {"matchLabels": {"app": target}}, "action": "ALLOW", "rules": [rule]})


def test_a_machine_that_joined_controllers_in_pods_calls_a_pod_by_its_identity(found: Mesh) -> None:
    url = f"http://{found.address('api')}/"
    found.takes(lambda: found.from_machine("billing", url) == "200")
    assert found.from_machine("intruder", url) == "000"
    assert found.machine.status()["problems"] == []
    plan = found.machine.meshagent("trace", f"{SPACE}/billing", f"{SPACE}/api", "-o", "text")
    assert "mTLS between nodes (HBONE)" in plan


def test_a_pod_of_the_kubelet_calls_a_process_of_the_machine(found: Mesh) -> None:
    url = f"http://{found.address('billing')}/"
    found.takes(lambda: found.from_pod(url) == "200")
    found.takes(lambda: found.from_pod(f"http://{ADDRESSES['billing']}:8080/") == "200")
    assert found.from_machine("intruder", url) == "000"
    found.apply(only("nobody", "billing"))
    found.takes(lambda: found.from_pod(url) == "ConnectionRefusedError" or "Error" in found.from_pod(url))
    found.apply(only("api", "billing"))
    found.takes(lambda: found.from_pod(url) == "200")


def test_plaintext_is_refused_on_both_sides(found: Mesh) -> None:
    """Neither the machine itself nor the node is a workload."""
    pod, process = f"http://{found.pod_address()}:8080/", f"http://{ADDRESSES['intruder']}:8080/"

    def seen() -> tuple[str, str]:
        direct = ["curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", process]
        return found.from_machine("", pod), subprocess.run(direct, capture_output=True, text=True, check=False).stdout

    assert seen() == ("000", "000")
    found.apply(own("PeerAuthentication", "mode", {"mtls": {"mode": "PERMISSIVE"}}))
    found.cluster.plane.kubectl("delete", "authorizationpolicy", "api", "-n", SPACE)
    found.takes(lambda: seen() == ("200", "200"))
    found.apply(own("PeerAuthentication", "mode", {"mtls": {"mode": "STRICT"}}), only("billing", "api"))
    found.takes(lambda: seen() == ("000", "000"))


def test_requests_are_decided_by_the_identity_of_the_other_side(found: Mesh) -> None:
    api, billing = f"http://{found.address('api')}/", f"http://{found.address('billing')}/"
    found.apply(only("billing", "api", paths=["/items"]), only("api", "billing", paths=["/items"]))
    found.takes(lambda: (found.from_machine("billing", api), found.from_pod(billing)) == ("403", "403"))
    found.takes(lambda: (found.from_machine("billing", f"{api}items"), found.from_pod(f"{billing}items")) == ("200", "200"))
    assert found.from_machine("intruder", f"{api}items") in {"000", "403"}
    found.apply(only("billing", "api"), only("api", "billing"))
    found.takes(lambda: (found.from_machine("billing", api), found.from_pod(billing)) == ("200", "200"))


def test_a_machine_follows_controllers_that_are_replaced(found: Mesh) -> None:
    plane, url = found.cluster.plane, f"http://{found.address('api')}/"
    plane.kubectl("rollout", "restart", "deployment/meshagent-controller", "-n", OWN)
    plane.kubectl("rollout", "status", "deployment/meshagent-controller", "-n", OWN, "--timeout=90s")
    assert found.from_machine("billing", url) == "200"
    found.apply(only("api", "billing"), only("intruder", "api"))
    found.takes(lambda: (found.from_machine("billing", url), found.from_machine("intruder", url)) == ("000", "200"))
    found.apply(only("billing", "api"))
    found.takes(lambda: (found.from_machine("billing", url), found.from_machine("intruder", url)) == ("200", "000"))
    found.takes(lambda: found.machine.status()["problems"] == [])
    said = "jsonpath={.items[*].status.conditions[?(@.type=='Accepted')].status}"
    assert plane.kubectl("get", "workloads", "-n", SPACE, "-o", said) == "True True"


def limit(pod: dict[str, Any]) -> Path:
    """Where the memory of a pod's only container is counted (Documentation/admin-guide/cgroup-v1/memory.rst)."""
    return LIMITS / str(pod["status"]["containerStatuses"][0]["containerID"]).removeprefix("containerd://")


def count(place: Path, name: str) -> int:
    return int((place / f"memory.{name}").read_text())


@pytest.mark.skipif(not LIMITS.parent.exists(), reason=f"cgroup v1 has no memory controller here: no {LIMITS.parent}")
def test_under_load_agent_with_envoy_and_controllers_stay_below_the_limits_of_the_manifest(found: Mesh) -> None:
    """Envoy is counted with its agent here, because in cgroup v1 it stays where it was started: on a node it has a limit of its own."""
    plane = found.cluster.plane
    found.apply(only("billing", "api", methods=["GET"]), only("api", "billing", methods=["GET"]))
    found.takes(lambda: found.from_pod(f"http://{found.address('billing')}/items") == "200")
    asked = ("exec", "-n", SPACE, "api", "--", "/usr/bin/python3", "-c", LOAD, found.address("billing"))
    served = int(plane.kubectl(*asked))
    assert served > 100
    agent, *controllers = [*found.cluster.pods(OWN, "agent"), *found.cluster.pods(OWN, "controller")]
    for pod in (agent, *controllers):
        place = limit(pod)
        assert count(place, "limit_in_bytes") == 1 << 30
        print(f"{pod['metadata']['name']}: {count(place, 'max_usage_in_bytes') >> 20} MiB at most, {served} requests in 10 s")
        assert count(place, "failcnt") == 0, "nothing had to be reclaimed"
        assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
    assert len(cgroup.pids(limit(agent))) > 1, "the agent and Envoy"


@pytest.mark.skipif(not LIMITS.parent.exists(), reason=f"cgroup v1 has no memory controller here: no {LIMITS.parent}")
def test_a_container_that_takes_more_than_its_limit_is_ended(found: Mesh) -> None:
    """That the limits of these tests hold."""
    container = {"name": "app", "image": PYTHON, "imagePullPolicy": "Never", "resources": {"limits": {"memory": "64Mi"}}}
    container["command"] = ["/usr/bin/python3", "-c", "bytearray(256 << 20)"]
    found.apply(core("Pod", "greedy", spec={"restartPolicy": "Never", "containers": [container]}))
    said = "jsonpath={.status.containerStatuses[0].state.terminated.exitCode}"
    found.takes(lambda: found.cluster.plane.kubectl("get", "pod", "greedy", "-n", SPACE, "-o", said) == "137")


def test_the_network_policy_lets_in_nodes_machines_and_monitoring_and_nobody_else(found: Mesh) -> None:
    """As nftables understands it: the CNI plugin of these tests enforces none."""
    plane = found.cluster.plane
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "monitoring"}})
    for space in ("monitoring", "default"):
        container = {
            "name": "app",
            "image": PYTHON,
            "imagePullPolicy": "Never",
            "command": ["/usr/bin/python3", "-c", "import time; time.sleep(1e6)"],
        }
        spec = {"terminationGracePeriodSeconds": 0, "containers": [container]}
        plane.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "knocker", "namespace": space}, "spec": spec})
        plane.kubectl("wait", "--for=condition=Ready", "pod/knocker", "-n", space, "--timeout=60s")
    (controller, *_) = found.cluster.pods(OWN, "controller")
    address, ports = controller["status"]["podIP"], (15010, 15011, 15021)

    def knock(place: str) -> tuple[bool, ...]:
        """Who is let in at which port."""
        program = f"import socket; socket.create_connection(('{address}', %d), timeout=1); print('in')"
        exec_ = ("exec", "-n", place, "knocker", "--", "/usr/bin/python3", "-c")
        said = (
            found.machine.run("", "/usr/bin/python3", "-c", program % port)
            if place == MACHINE
            else plane.kubectl(*exec_, program % port, check=False)
            for port in ports
        )
        return tuple(one.startswith("in") for one in said)

    places = ("default", "monitoring", MACHINE)
    assert [knock(place) for place in places] == [(True, True, True)] * 3
    with policing.enforced(plane, OWN):
        assert [knock(place) for place in places] == [(True, True, False), (True, True, True), (True, True, False)]
    blocks = [{"ipBlock": {"cidr": f"{machine.OWN}/32"}}]
    patch = json.dumps([{"op": "add", "path": "/spec/ingress/0/from", "value": blocks}])  # networkPolicy.nodes
    plane.kubectl("patch", "networkpolicy", "meshagent-controller", "-n", OWN, "--type=json", "-p", patch)
    with policing.enforced(plane, OWN):
        assert [knock(place) for place in places] == [(False, False, False), (False, False, True), (True, True, False)]
        time.sleep(16)  # three of the kubelet's probes, of which as many may fail
        assert found.cluster.settled("deployment", "meshagent-controller")
        plane.kubectl("delete", "pod", found.cluster.pods(OWN, "agent")[0]["metadata"]["name"], "-n", OWN, "--wait=true")
        found.takes(lambda: found.cluster.settled("daemonset", "meshagent-agent"))  # it joins, and is told all, through the policy
        assert found.machine.status()["problems"] == []
