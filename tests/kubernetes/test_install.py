"""The manifest on a real node: images, controller and agent as pods, the shop in the mesh, the agent replaced under load, and what is left after the end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import cgroup
from tests.kubernetes import shop
from tests.kubernetes.install import ROOT, Cluster, cluster, envoy, left, pinned, takes
from tests.kubernetes.installed import check
from tests.kubernetes.manifest import MANIFEST, OWN
from tests.kubernetes.shop import PYTHON, REDIS, SERVER, SHOP, ask, tail

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def bare() -> Iterator[Cluster]:
    """A node with the images, and no mesh."""
    with cluster() as found:
        shop.load_redis(found)
        yield found


@pytest.fixture(scope="module")
def installed(bare: Cluster) -> Cluster:
    """The mesh, as docs/kubernetes.md says how to install it, and the shop in it."""
    bare.install()
    takes(lambda: bare.settled("deployment", "meshagent-controller") and bare.settled("daemonset", "meshagent-agent"), bare)
    shop.open_shop(bare)
    return bare


def test_before_the_mesh_is_there_checks_of_cluster_and_node_find_no_error(bare: Cluster) -> None:
    code, found = check(bare.plane)
    assert "is not installed" in found["installed"][0]["what"]
    assert (code, severities(found)) == (0, {"ok", "warning"}), found
    argv = [sys.executable, "-m", "agent.cli.main", "check", "--cgroup", str(bare.machine.cgroup2), "-o", "json"]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    report = json.loads(run.stdout)
    assert (run.returncode, report["scope"]) == (0, "node"), run.stdout + run.stderr
    print(unwell(report))


def severities(found: dict[str, list[dict[str, str]]]) -> set[str]:
    """Of all findings of a check."""
    return {one["severity"] for findings in found.values() for one in findings}


def unwell(report: dict[str, Any]) -> list[str]:
    """What a check of a node warns of."""
    return [f"{one['check']}: {one['what']}" for one in report["findings"] if one["severity"] != "ok"]


def plugin(found: Cluster, *argv: str) -> subprocess.CompletedProcess[str]:
    """`kubectl meshagent`, as people run it: through the real exec, into the pod of the real agent."""
    path = f"{found.plane.assets}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(found.directory), "KUBECONFIG": str(found.plane.kubeconfig())}
    command = ["kubectl", "meshagent", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment, stdin=subprocess.DEVNULL)


def test_a_check_of_the_installed_mesh_finds_nothing_wrong_from_outside_and_in_the_agents_pod(installed: Cluster) -> None:
    takes(lambda: check(installed.plane)[0] == 0)
    code, found = check(installed.plane)
    assert (code, severities(found)) == (0, {"ok"}), found
    assert "nodes" in found
    run = plugin(installed, "check", "--node", "node-1", "-o", "json")
    report = json.loads(run.stdout)
    assert (run.returncode, report["scope"]) == (0, "node"), run.stdout + run.stderr
    print(unwell(report))
    run = plugin(installed, "check", "--node", "node-2")
    assert (run.returncode, "no agent runs on node node-2" in run.stderr) == (1, True), run.stderr


def test_the_plugin_brings_status_and_trace_with_their_exit_statuses(installed: Cluster) -> None:
    run = plugin(installed, "status", "-o", "json")
    assert (run.returncode, json.loads(run.stdout)["node"]) == (0, "node-1")
    names = {one["metadata"]["labels"]["app"]: one["metadata"]["name"] for one in installed.pods(SHOP)}
    shop.admit(installed, "redis", "frontend")

    def plan(caller: str) -> tuple[int, str]:
        traced = plugin(installed, "trace", "-n", SHOP, names[caller], "redis:6379", "-o", "json", "--duration", "0")
        return traced.returncode, traced.stdout + traced.stderr

    takes(lambda: plan("stranger")[0] == 1)
    assert "shop/redis" in plan("stranger")[1]
    code, said = plan("frontend")
    assert code == 0, said
    assert plugin(installed, "trace", "-n", SHOP, names["frontend"]).returncode == 2
    installed.plane.kubectl("delete", "authorizationpolicy", "redis", "-n", SHOP)


def test_controller_and_agent_run_as_the_manifest_says(installed: Cluster) -> None:
    (agent,), controllers = installed.pods(OWN, "agent"), installed.pods(OWN, "controller")
    assert len(controllers) == 2
    assert {pod["status"]["containerStatuses"][0]["restartCount"] for pod in (agent, *controllers)} == {0}
    status = json.loads(installed.agent("meshagent", "status", "-o", "json"))
    assert status["problems"] == []
    assert "Read-only file system" in installed.agent("touch", "/opt/meshagent/file", check=False)
    for controller in controllers:
        inside = ["exec", "-n", OWN, controller["metadata"]["name"], "--", "/usr/bin/python3", "-c"]
        assert installed.plane.kubectl(*inside, "import os; print(os.getuid(), os.getgid())").split() == ["65532", "65532"]
        for path in ("/root-file", "/opt/meshagent/file", "/etc/meshagent/ca/file"):
            assert "Read-only file system" in installed.plane.kubectl(*inside, f"open('{path}', 'w')", check=False)
        caps = installed.plane.kubectl(*inside, "print(open('/proc/self/status').read())")
        assert "CapEff:\t0000000000000000" in caps
        assert "Seccomp:\t2" in caps


def test_the_shop_is_in_the_mesh_and_policy_holds(installed: Cluster) -> None:
    takes(lambda: ask(installed, "frontend", "http://cart/") == "200")
    assert ask(installed, "frontend", "http://frontend/") == "200"
    shop.admit(installed, "cart", "frontend", methods=["GET"])
    takes(lambda: ask(installed, "stranger", "http://cart/") != "200")
    takes(lambda: ask(installed, "frontend", "http://cart/") == "200")
    said = json.loads(installed.plane.kubectl("get", "authorizationpolicy", "cart", "-n", SHOP, "-o", "json"))
    takes(lambda: "Accepted" in installed.plane.kubectl("get", "authorizationpolicy", "cart", "-n", SHOP, "-o", "json"))
    assert said["metadata"]["generation"] == 1


def test_status_and_trace_answer_in_the_agents_pod(installed: Cluster) -> None:
    status = json.loads(installed.agent("meshagent", "status", "-o", "json"))
    workloads = {one["name"].rpartition("-")[0].rpartition("-")[0]: one for one in status["workloads"] if one["namespace"] == SHOP}
    assert {name: one["redirected"] for name, one in workloads.items()} == dict.fromkeys(("redis", "cart", "frontend", "stranger"), True)
    assert workloads["cart"]["identity"] == f"spiffe://mesh.local/ns/{SHOP}/sa/cart"
    (frontend,) = (one["name"] for one in status["workloads"] if one["name"].startswith("frontend-"))
    traced = installed.agent("meshagent", "trace", f"{SHOP}/{frontend}", f"{SHOP}/cart", "--path", "/items")
    assert "cart" in traced
    assert "allow" in traced.lower(), traced


def used(found: Cluster, pod: dict[str, Any]) -> tuple[float, int]:
    """Seconds of CPU that a pod's processes have had, and their resident bytes (proc(5), /proc/PID/stat, fields 14, 15 and 24)."""
    directory = found.machine.cgroup2 / "kubepods" / "burstable" / f"pod{pod['metadata']['uid']}"
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in cgroup.pids(directory)]
    ticks, pages = sum(int(one[11]) + int(one[12]) for one in stats), sum(int(one[21]) for one in stats)
    return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE")


def test_at_rest_agent_and_controllers_use_less_than_they_ask_for(installed: Cluster) -> None:
    """With the shop there, and nobody who calls."""
    pods = [*installed.pods(OWN, "agent"), *installed.pods(OWN, "controller")]
    before, began = [used(installed, pod)[0] for pod in pods], time.monotonic()
    time.sleep(20)
    after, took = [used(installed, pod) for pod in pods], time.monotonic() - began
    for pod, start, (end, resident) in zip(pods, before, after, strict=True):
        asked = pod["spec"]["containers"][0]["resources"]["requests"]
        share = 1000 * (end - start) / took
        print(f"{pod['metadata']['name']}: {share:.0f} millicores, {resident / 1e6:.0f} MB resident")
        assert 0 < share < int(asked["cpu"].removesuffix("m"))
        assert resident < int(asked["memory"].removesuffix("Mi")) << 20


def test_the_agent_is_replaced_alone_and_no_request_fails(installed: Cluster) -> None:
    """Another image under load, then the pod killed: Envoy and the connections through it are the same afterwards."""
    installed.plane.kubectl("delete", "authorizationpolicy", "cart", "-n", SHOP, "--ignore-not-found")
    shop.deploy(installed, SHOP, "caller", PYTHON, *shop.CALLER, "http://cart/")
    shop.route(installed, "cart")
    takes(lambda: shop.settled(installed, SHOP, "caller") and shop.answered(installed))
    waypoint, begun, since = envoy(), len(tail(installed)), time.monotonic()
    (before,) = installed.pods(OWN, "agent")
    installed.machine.ctr("images", "tag", "localhost/meshagent/agent:0.1.0", "localhost/meshagent/agent:0.1.1")
    installed.plane.kubectl("set", "image", "daemonset/meshagent-agent", "agent=localhost/meshagent/agent:0.1.1", "-n", OWN)
    takes(lambda: installed.settled("daemonset", "meshagent-agent"))
    (upgraded,) = installed.pods(OWN, "agent")
    assert upgraded["metadata"]["uid"] != before["metadata"]["uid"]
    assert upgraded["spec"]["containers"][0]["image"].endswith(":0.1.1")
    installed.plane.kubectl("delete", "pod", upgraded["metadata"]["name"], "-n", OWN, "--force", "--grace-period=0")
    takes(lambda: len(installed.pods(OWN, "agent")) == 1 and installed.settled("daemonset", "meshagent-agent"))
    time.sleep(2)
    lines, took = tail(installed)[begun:], time.monotonic() - since
    assert len(lines) > 20 * took, "the load did not go on"
    assert shop.outcomes(lines) == {"kept 200", "new 200"}
    assert len({line.split()[2] for line in lines if line.startswith("kept")}) == 1, "one connection, all the time"
    assert envoy() == waypoint != 0
    assert "meshagent-waypoint" in Path(f"/proc/{waypoint}/cgroup").read_text()


STRICT = "strict"
OFTEN = {"periodSeconds": 1, "failureThreshold": 1}


def test_deployments_that_admit_nobody_become_ready_by_probes_of_every_kind(installed: Cluster) -> None:
    """The agent of the manifest, in its container, knows the kubelet: STRICT, and a policy that has no rule. One probe that fails would have them killed."""
    plane = installed.plane
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": STRICT, "labels": {"meshagent.io/mode": "mesh"}}})
    for kind, spec in (("PeerAuthentication", {"mtls": {"mode": "STRICT"}}), ("AuthorizationPolicy", {})):
        plane.apply({"apiVersion": "meshagent.io/v1alpha1", "kind": kind, "metadata": {"name": "all", "namespace": STRICT}, "spec": spec})
    shop.give_programs(installed, STRICT)
    probes: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
        "http": ({"httpGet": {"path": "/healthz", "port": "app"}}, 8080, (PYTHON, *SERVER)),
        "tcp": ({"tcpSocket": {"port": "app"}}, 6379, (REDIS, *shop.KEEP)),
        "grpc": ({"grpc": {"port": 9000}}, 9000, (PYTHON, "/opt/meshagent/venv/bin/python", "-u", "/programs/health.py", "9000")),
        "exec": ({"exec": {"command": ["/usr/bin/python3", "-c", ""]}}, 8080, (PYTHON, *SERVER)),
    }
    for name, (probe, port, (called, *command)) in probes.items():
        start = {**probe, "periodSeconds": 1, "failureThreshold": 60}
        every = {"startupProbe": start, "readinessProbe": {**probe, **OFTEN}, "livenessProbe": {**probe, **OFTEN, "timeoutSeconds": 5}}
        shop.deploy(installed, STRICT, name, called, *command, ports=[{"name": "app", "containerPort": port}], **every)
    takes(lambda: shop.settled(installed, STRICT, *probes), installed)
    time.sleep(5)
    pods = installed.pods(STRICT)
    states = {one["metadata"]["labels"]["app"]: one["status"]["containerStatuses"][0] for one in pods}
    assert {name: (state["ready"], state["restartCount"]) for name, state in states.items()} == dict.fromkeys(probes, (True, 0))
    redirected = {one["name"]: one["redirected"] for one in json.loads(installed.agent("meshagent", "status", "-o", "json"))["workloads"]}
    for one in pods:
        assert redirected[one["metadata"]["name"]]
        port = probes[one["metadata"]["labels"]["app"]][1]
        assert ask(installed, "stranger", f"http://{one['status']['podIP']}:{port}/healthz") == "URLError"
        with pytest.raises(ConnectionRefusedError):  # of this process, which runs on the node as the kubelet does
            socket.create_connection((one["status"]["podIP"], port), timeout=2)
    plane.kubectl("delete", "namespace", STRICT)


@pytest.fixture
def demo(installed: Cluster) -> Iterator[Cluster]:
    """The demo in the namespace that its files mean."""
    with shop.demo(installed, "default", *(ROOT / f"lab/shop/mesh/{name}.yaml" for name in ("services", "policies", "routes"))):
        yield installed


def test_routes_and_policies_of_the_demo_hold_as_they_are(demo: Cluster) -> None:
    takes(lambda: ask(demo, "frontend", "http://frontend/", "default") == "200")
    calls = shop.ask_often(demo, "frontend", "http://cart/items", 500, "default")
    assert {status for status, _ in calls} == {200}
    versions = Counter(body["version"] for _, body in calls)
    print(versions)
    assert abs(versions["v1"] - 400) < 45  # five standard deviations of what weights of 80 and 20 give
    assert {status for status, _ in shop.ask_often(demo, "frontend", "http://cart/flaky", 60, "default")} == {200}
    counters = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8080/admin/counters').read().decode())"
    failed = json.loads(shop.run(demo, "default", "cart-v1-1", counters))
    assert failed["GET /flaky 503"] > 5, "it has failed, and the caller has not seen it"
    assert ask(demo, "frontend", "http://cart/admin/counters", "default") == "403"
    assert ask(demo, "other", "http://cart/items", "default") == "403"
    assert ask(demo, "other", "http://redis:6379/", "default") == "URLError"
    assert ask(demo, "other", "http://frontend/", "default") == "200", "nobody protects it"


def test_nothing_of_it_is_left_on_the_node_and_in_the_cluster_and_pods_go_on_without_it(installed: Cluster) -> None:
    shop.route(installed, "cart")
    shop.admit(installed, "cart", "frontend")
    takes(lambda: ask(installed, "stranger", "http://cart/") == "403")
    before, pods, plane = pinned(), shop.instances(installed), installed.plane
    assert all(len(found) >= 10 for found in before.values()), before
    plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(MANIFEST.with_name("uninstall.yaml")))
    takes(lambda: installed.settled("daemonset", "meshagent-agent"))
    assert "removed programs, maps" in plane.kubectl("logs", "-n", OWN, "daemonset/meshagent-agent")
    plane.kubectl("delete", "-f", str(MANIFEST), "--wait=true")
    takes(lambda: left(installed, before) == [], seconds=20)  # the last reference goes with the last program run
    takes(lambda: installed.added() == {f"Namespace <none>/{SHOP}"}, installed)
    assert ask(installed, "stranger", "http://frontend/") == "200", "over the cart and redis"
    assert ask(installed, "stranger", "http://cart/") == "200", "nobody is there who would refuse it"
    shop.deploy(installed, SHOP, "later", PYTHON, *shop.IDLE)
    takes(lambda: shop.settled(installed, SHOP, "later"), installed)
    assert ask(installed, "later", "http://frontend/") == "200"
    assert shop.instances(installed).items() >= pods.items()
