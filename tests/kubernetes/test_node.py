"""Pods of a real kubelet in the mesh: a real control plane, containerd, the controller and the agent as on a node."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import cgroup, mounts
from tests.kernel import shop as lab_shop
from tests.kubernetes import node
from tests.kubernetes.controlplane import ControlPlane, Failed
from tests.kubernetes.node import BOX, Node
from tests.kubernetes.test_hold import MARK
from tests.kubernetes.test_manifest import objects
from tests.unit.agent.l7.harness import free_ports

NAME = "node-1"


def takes(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until it is so."""
    lab_shop.takes(condition, seconds, pause=0.1)


class Cluster:
    """A node with a mesh on it."""

    def __init__(self, plane: ControlPlane, machine: Node, top: Path) -> None:
        self.plane, self.machine, self.top = plane, machine, top
        self.processes: list[subprocess.Popen[bytes]] = []
        (self.metrics,) = free_ports(1)
        self.place = Path()

    def up(self, place: Path) -> None:
        """Start the controller and the agent, for all below a cgroup."""
        plane, top = self.plane, self.top
        self.start(
            "mesh-controller", "run", "--kubernetes", "--kubeconfig", plane.kubeconfig(), "--socket", top / "c.sock",
            "--ca-directory", top / "ca",
        )  # fmt: skip
        self.place = place
        self.start_agent()
        try:
            takes(self.status)
        except AssertionError as error:
            said = (path.read_text(errors="replace")[-2000:] for path in sorted(top.glob("*.log")))
            raise Failed("the mesh does not start: {}".format("\n".join(said))) from error

    def start_agent(self) -> None:
        """Also another one, when the one before has ended."""
        top = self.top
        self.start(
            "meshagent", "run", "--node", NAME, "--controller", f"unix:{top}/c.sock", "--cgroup", self.place, "--run-dir", top / "run",
            "--state-dir", top / "state", "--pin-dir", top / "bpf" / "m", "--metrics-address", "127.0.0.1", "--metrics-port", self.metrics,
        )  # fmt: skip

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

    def run(self, space: str, name: str, *command: str, labels: dict[str, str] | None = None, account: str = "", **more: Any) -> None:
        """Have kubelet run a pod, with the account of its name or another; `more` is of its container."""
        container = {"name": "app", "image": BOX, "imagePullPolicy": "Never", "command": list(command), **more}
        spec = {
            "nodeName": NAME,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "dnsPolicy": "Default",
            "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}],
            "serviceAccountName": account or name,
            "containers": [container],
        }
        metadata = {"name": name, "namespace": space, "labels": {"app": name, **(labels or {})}}
        self.plane.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})

    def exec(self, space: str, name: str, *command: str) -> str:
        """Have kubelet run a command in a pod; what it says on both streams, if it fails too."""
        return self.plane.kubectl("exec", "-n", space, name, "--", *command, check=False)

    def get(self, space: str, name: str, url: str, method: str = "GET") -> str:
        """The status of a request from a pod; 000 if there is no answer."""
        said = self.exec(space, name, "curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "status=%{http_code}\n", "-X", method, url)
        return said.partition("status=")[2][:3]

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


HTTPD = "mkdir -p /tmp/www/{0}; echo {0} > /tmp/www/index.html; echo in {0} > /tmp/www/{0}/index.html; exec httpd -f -p 8080 -h /tmp/www"


@pytest.fixture(scope="module")
def shop(cluster: Cluster) -> Cluster:
    """A namespace in the mesh: two versions of a server behind Services, and two who call."""
    plane = cluster.plane
    plane.install_gateway_api()
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"meshagent.io/mode": "mesh"}}})
    for name in ("v1", "v2", "friend", "stranger"):
        plane.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "shop"}})
        cluster.run("shop", name, *(("/bin/sh", "-c", HTTPD.format(name)) if name.startswith("v") else ("/bin/sleep", "1000")))
    for name, address in (("v1", "10.96.7.1"), ("v2", "10.96.7.2")):
        ports = [{"name": "web", "port": 80, "targetPort": 8080}]
        spec = {"clusterIP": address, "selector": {"app": name}, "ports": ports}
        plane.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
    takes(lambda: all(cluster.enrolled(f"shop/{name}") for name in ("v1", "v2", "friend", "stranger")))
    takes(lambda: cluster.get("shop", "friend", "http://10.96.7.1/") == "200")
    return cluster


def test_a_pod_reaches_a_service_by_its_cluster_address_and_no_proxy_runs_on_the_node(shop: Cluster) -> None:
    assert shop.exec("shop", "friend", "curl", "-s", "-m", "5", "http://10.96.7.1/") == "v1\n"
    assert shop.exec("shop", "friend", "curl", "-s", "-m", "5", "http://10.96.7.2/") == "v2\n"
    assert "10.96.7.1" not in subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout


def test_a_route_of_a_service_is_followed_by_requests_of_pods(shop: Cluster) -> None:
    rules = [
        {"matches": [{"path": {"type": "PathPrefix", "value": "/v2"}}], "backendRefs": [{"name": "v2", "port": 80}]},
        {"backendRefs": [{"name": "v1", "port": 80}]},
    ]
    spec = {"parentRefs": [{"group": "", "kind": "Service", "name": "v1"}], "rules": rules}
    route = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "split", "namespace": "shop"}}
    shop.plane.apply({**route, "spec": spec})
    takes(lambda: shop.exec("shop", "friend", "curl", "-s", "-m", "5", "http://10.96.7.1/v2/") == "in v2\n")
    assert shop.exec("shop", "friend", "curl", "-s", "-m", "5", "http://10.96.7.1/v1/") == "in v1\n"
    shop.plane.kubectl("delete", "httproute", "split", "-n", "shop")
    takes(lambda: shop.get("shop", "friend", "http://10.96.7.1/v2/") == "404")


def policy(operation: dict[str, Any] | None = None) -> dict[str, Any]:
    """Who may call v1: its friend, all or what `operation` says."""
    rule: dict[str, Any] = {"from": [{"source": {"serviceAccounts": ["shop/friend"]}}]}
    if operation:
        rule["to"] = [{"operation": operation}]
    metadata = {"name": "friends", "namespace": "shop"}
    spec = {"selector": {"matchLabels": {"app": "v1"}}, "action": "ALLOW", "rules": [rule]}
    return {"apiVersion": "meshagent.io/v1alpha1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec}


def test_service_accounts_decide_who_connects_and_who_asks_for_what(shop: Cluster) -> None:
    pod = shop.plane.kubectl("get", "pod", "v1", "-n", "shop", "-o", "jsonpath={.status.podIP}")
    urls = "http://10.96.7.1/", f"http://{pod}:8080/"
    for url in urls:
        assert (shop.get("shop", "stranger", url), shop.get("shop", "friend", url)) == ("200", "200")
    shop.plane.apply(policy())
    takes(lambda: shop.get("shop", "stranger", urls[0]) == "000")
    assert [shop.get("shop", "stranger", url) for url in urls] == ["000", "000"], "no connection, by whichever address"
    assert [shop.get("shop", "friend", url) for url in urls] == ["200", "200"]
    shop.plane.apply(policy({"paths": ["/v1/*"]}))
    takes(lambda: shop.get("shop", "friend", urls[0]) == "403")
    for url in urls:
        assert (shop.get("shop", "friend", f"{url}v1/"), shop.get("shop", "friend", url)) == ("200", "403")
        assert shop.get("shop", "stranger", f"{url}v1/") in {"000", "403"}, "of whom no rule speaks need not even connect"
    shop.plane.kubectl("delete", "authorizationpolicy", "friends", "-n", "shop")
    takes(lambda: shop.get("shop", "stranger", urls[0]) == "200")


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


@pytest.fixture(scope="module")
def marking(shop: Cluster) -> Cluster:
    """The API server marks pods that are to be in the mesh."""
    plane = shop.plane
    plane.apply(*objects("MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"))
    takes(lambda: MARK in plane.kubectl("run", "tried", "-n", "shop", "--image", BOX, "--dry-run=server", "-o", "json"))
    return shop


def starts(marking: Cluster, name: str, number: int) -> float:
    """Have a pod ask v1 for its page before it does anything else, and keep what came of that; returns seconds from its sandbox's start to its program's."""
    called = f"{name}-{number}"
    marking.run(
        "shop", called, "/bin/sh", "-c", "curl -s -m 5 http://10.96.7.1/ > /run/said; echo $? >> /run/said; sleep 1000", account=name
    )
    uid = marking.plane.kubectl("get", "pod", called, "-n", "shop", "-o", "jsonpath={.metadata.uid}")

    def has_answered() -> bool:
        return (
            marking.exec("shop", called, "cat", "/run/said").rstrip("\n")[-1:].isdigit()
        )  # as long as there is no container it is told so

    takes(has_answered)
    directory = marking.machine.cgroup2 / "kubepods" / "besteffort" / f"pod{uid}"
    found = [int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) for pid in cgroup.pids(directory)]
    return (sorted(found)[1] - min(found)) / os.sysconf("SC_CLK_TCK")


def test_the_first_thing_that_a_pod_does_is_decided_by_policy(marking: Cluster) -> None:
    plane = marking.plane
    plane.apply(policy())
    takes(lambda: marking.get("shop", "stranger", "http://10.96.7.1/") == "000")
    took = [starts(marking, name, number) for number in range(5) for name in ("friend", "stranger")]
    assert {marking.exec("shop", f"friend-{number}", "cat", "/run/said") for number in range(5)} == {"v1\n0\n"}
    assert {marking.exec("shop", f"stranger-{number}", "cat", "/run/said") for number in range(5)} == {"7\n"}
    assert plane.kubectl("get", "pod", "friend-1", "-n", "shop", "-o", "jsonpath={.spec.securityContext.sysctls[0].value}") == MARK
    print(
        f"from a sandbox's start to its pod's program: {statistics.median(took):.2f} s (median of {len(took)}), at most {max(took):.2f} s"
    )
    plane.kubectl("delete", "authorizationpolicy", "friends", "-n", "shop")


def test_a_pod_of_the_mesh_waits_for_an_agent_that_is_away(marking: Cluster) -> None:
    plane = marking.plane
    agent = marking.processes[-1]
    agent.kill()
    agent.wait(30)
    time.sleep(6)  # the programs give it five seconds
    marking.run("shop", "late", "/bin/sleep", "1000", account="friend")
    plane.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "free", "namespace": "default"}})
    marking.run("default", "free", "/bin/sleep", "1000")
    takes(lambda: plane.kubectl("get", "pod", "free", "-o", "jsonpath={.status.phase}") == "Running")
    takes(lambda: "operation not permitted" in plane.kubectl("get", "events", "-n", "shop", "--field-selector", "involvedObject.name=late"))
    assert plane.kubectl("get", "pod", "late", "-n", "shop", "-o", "jsonpath={.status.phase}") == "Pending"
    assert marking.get("shop", "friend", "http://10.96.7.1/") == "200"  # those that run go on
    marking.start_agent()
    takes(lambda: marking.enrolled("shop/late"), 120)
    takes(lambda: marking.get("shop", "late", "http://10.96.7.1/") == "200")
