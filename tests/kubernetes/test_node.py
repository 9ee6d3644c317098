"""Pods of a real kubelet in the mesh: a real control plane, containerd, the controller and the agent as on a node."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import cgroup
from tests.kubernetes import mesh, node
from tests.kubernetes.controlplane import ControlPlane, Failed
from tests.kubernetes.manifest import MARK, objects
from tests.kubernetes.mesh import Cluster, takes
from tests.kubernetes.node import BOX


@pytest.fixture(scope="module")
def cluster(plane: ControlPlane) -> Iterator[Cluster]:
    """The mesh on a node with real pods."""
    top = Path(tempfile.mkdtemp(prefix="mesh-", dir="/dev/shm"))
    try:
        with node.running(plane, top / "node", cgroup.mount_point()) as machine, mesh.running(plane, machine, top / "mesh") as found:
            yield found
    except Failed as error:
        pytest.fail(str(error))
    finally:
        shutil.rmtree(top, ignore_errors=True)


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


@pytest.fixture(scope="module")
def strict(cluster: Cluster) -> Cluster:
    """A namespace that admits nobody."""
    plane = cluster.plane
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": {"meshagent.io/mode": "mesh"}}})
    for kind, spec in (("PeerAuthentication", {"mtls": {"mode": "STRICT"}}), ("AuthorizationPolicy", {})):
        plane.apply({"apiVersion": "meshagent.io/v1alpha1", "kind": kind, "metadata": {"name": "all", "namespace": "strict"}, "spec": spec})
    return cluster


def probed(strict: Cluster, name: str) -> None:
    """Run a pod there that is ready as soon as the kubelet has been answered over HTTP, and that is killed if it is not over TCP."""
    strict.plane.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "strict"}})
    strict.run(
        *("strict", name, "/bin/httpd", "-f", "-p", "8080", "-h", "/etc"),
        ports=[{"name": "web", "containerPort": 8080}],
        readinessProbe={"httpGet": {"path": "/hostname", "port": "web"}, "periodSeconds": 1},
        livenessProbe={"tcpSocket": {"port": 8080}, "periodSeconds": 1, "failureThreshold": 1, "initialDelaySeconds": 3},
    )
    takes(lambda: strict.enrolled(f"strict/{name}"))
    takes(lambda: ready(strict, name))


def ready(strict: Cluster, name: str) -> bool:
    """Does the kubelet say so?"""
    condition = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
    return strict.plane.kubectl("get", "pod", name, "-n", "strict", "-o", condition) == "True"


def test_probes_of_the_kubelet_reach_strict_pods_and_other_calls_of_the_node_do_not(strict: Cluster) -> None:
    """This kubelet shares its cgroup with everything else here: its process is what is recognised."""
    probed(strict, "before")
    address, _ = strict.addresses("strict", "before")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, 8080), timeout=5)


def test_a_kubelet_that_is_started_again_has_its_new_pods_enrolled_and_may_probe_as_the_one_before(strict: Cluster) -> None:
    if not strict.enrolled("strict/before"):
        probed(strict, "before")
    strict.machine.restart_kubelet()
    probed(strict, "after")
    time.sleep(3)  # of probes, the first of which that fails kills
    for name in ("before", "after"):
        assert ready(strict, name)
        assert strict.plane.kubectl("get", "pod", name, "-n", "strict", "-o", "jsonpath={.status.containerStatuses[0].restartCount}") == "0"


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
    marking.kill_agent()
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
