"""The manifest on a real node: images, controller and agent as pods, the shop in the mesh, an upgrade under load, and what is left after the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import cgroup
from tests.kubernetes.conftest import ASSETS
from tests.kubernetes.install import BPF, CHART, HELM, MANIFEST, NEEDED, OWN, ROOT, Cluster, cluster, takes
from tests.kubernetes.node import RUN, image, libraries

pytestmark = pytest.mark.timeout(600)
SHOP = "shop"
REDIS = "registry.test/redis:1"
PYTHON = "localhost/meshagent/controller:0.1.0"
"""The image with Python that is there anyway."""
PINS = BPF / "meshagent"
LEFT = (Path("/run/meshagent-workload"), Path("/var/lib/meshagent"))
"""Made by kubelet, for volumes."""


@pytest.fixture(scope="module")
def installed() -> Iterator[Cluster]:
    """The mesh, as docs/kubernetes.md says how to install it, and the shop in it."""
    assets = Path(os.environ.get(ASSETS) or "/nonexistent")
    lacking = [name for name in NEEDED if not (assets / name).exists()]
    if lacking:
        pytest.skip(f"no {', '.join(lacking)}: `make test-kubernetes` builds them and says so in {ASSETS}")
    if not all((ROOT / "build/images" / f"{name}.tar").exists() for name in ("agent", "controller")):
        pytest.skip("no images: `make images` builds them, and `make test-kubernetes` before it tests them")
    if PINS.exists() or (RUN.exists() and any(RUN.iterdir())):
        pytest.fail(f"this machine has a mesh already ({PINS}, {RUN}): `meshagent uninstall` takes it off")
    top = Path(tempfile.mkdtemp(prefix="mesh-", dir="/dev/shm"))
    try:
        with cluster(assets, top) as found:
            try:
                found.load("agent", "controller")
                program = Path(str(shutil.which("redis-server")))
                image(top / "redis.tar", REDIS, {str(one): one for one in (program, *libraries(program))}, [str(program)])
                found.machine.ctr("images", "import", str(top / "redis.tar"))
                found.install()
                takes(lambda: found.settled("deployment", "meshagent-controller") and found.settled("daemonset", "meshagent-agent"), found)
                _open_shop(found)
                yield found
            finally:
                _clean(found)
    finally:
        shutil.rmtree(top, ignore_errors=True)


def _open_shop(found: Cluster) -> None:
    """The demo's programs as Deployments in an enrolled namespace."""
    metadata = {"name": SHOP, "labels": {"meshagent.io/mode": "mesh"}}
    found.plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    programs = {
        name: (ROOT / path).read_text() for name, path in (("server.py", "lab/shop/server.py"), ("caller.py", "tests/kubernetes/caller.py"))
    }
    found.plane.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "programs", "namespace": SHOP}, "data": programs})
    python = ("/usr/bin/python3", "-u", "/programs/server.py")
    _run(found, "redis", REDIS, "/usr/bin/redis-server", "--port", "6379", "--protected-mode", "no", "--save", "", port=6379, serves=6379)
    _run(found, "cart", PYTHON, *python, port=80, env={"APP": "cart", "VERSION": "v1"})
    _run(found, "frontend", PYTHON, *python, port=80, env={"APP": "frontend", "CART_URL": "http://cart", "REDIS": "redis:6379"})
    _run(found, "stranger", PYTHON, "/usr/bin/python3", "-c", "import time; time.sleep(1e6)")
    found.machine.name_services()
    takes(lambda: all(found.settled("deployment", name, SHOP) for name in ("redis", "cart", "frontend", "stranger")), found)


def _run(
    found: Cluster, name: str, called: str, *command: str, port: int = 0, serves: int = 8080, env: dict[str, str] | None = None
) -> None:
    """A Deployment with a ServiceAccount, and with a Service if it has a port."""
    meta = {"name": name, "namespace": SHOP}
    found.plane.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta})
    if port:
        appears = {"name": "redis" if port == 6379 else "http", "port": port, "targetPort": serves}
        found.plane.apply(
            {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"selector": {"app": name}, "ports": [appears]}}
        )
    container = {
        "name": "app",
        "image": called,
        "imagePullPolicy": "Never",
        "command": list(command),
        "env": [{"name": key, "value": value} for key, value in (env or {}).items()],
        "volumeMounts": [{"name": "programs", "mountPath": "/programs"}],
    }
    pod = {
        "serviceAccountName": name,
        "terminationGracePeriodSeconds": 0,
        "containers": [container],
        "volumes": [{"name": "programs", "configMap": {"name": "programs"}}],
    }
    template = {"metadata": {"labels": {"app": name}}, "spec": pod}
    spec = {"replicas": 1, "selector": {"matchLabels": {"app": name}}, "template": template}
    found.plane.apply({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": spec})


def _clean(found: Cluster) -> None:
    """If a test failed before the mesh was uninstalled: the node's own command, from here."""
    if PINS.exists():
        found.plane.kubectl("delete", "-n", OWN, "daemonset", "meshagent-agent", "--ignore-not-found", check=False)
        argv = [str(ROOT / ".venv/bin/meshagent"), "uninstall", "--cgroup", str(found.machine.cgroup2)]
        subprocess.run(argv, check=False, timeout=60)
    for path in LEFT:
        shutil.rmtree(path, ignore_errors=True)


def ask(found: Cluster, caller: str, url: str) -> str:
    """The status of a request from a Deployment of the shop; the error's name if there is no answer."""
    program = (
        "import urllib.request, urllib.error, sys\n"
        "try: print(urllib.request.urlopen(sys.argv[1], timeout=5).status)\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
        "except OSError as error: print(type(error).__name__)\n"
    )
    return found.plane.kubectl("exec", "-n", SHOP, f"deploy/{caller}", "--", "/usr/bin/python3", "-c", program, url, check=False).strip()


def envoy() -> int:
    """The process of the node's waypoint; 0 if there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{RUN}/envoy-bootstrap.json".encode() in (process / "cmdline").read_bytes().split(b"\0"):
                return int(process.name)
        except OSError:
            continue
    return 0


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
    rule = {"from": [{"source": {"serviceAccounts": [f"{SHOP}/frontend"]}}], "to": [{"operation": {"methods": ["GET"]}}]}
    spec = {"selector": {"matchLabels": {"app": "cart"}}, "action": "ALLOW", "rules": [rule]}
    metadata = {"name": "cart", "namespace": SHOP}
    installed.plane.apply({"apiVersion": "meshagent.io/v1alpha1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec})
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
    traced = installed.agent("meshagent", "trace", f"{SHOP}/{frontend}", f"{SHOP}/cart", check=False)
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
    _run(installed, "caller", PYTHON, "/usr/bin/python3", "-u", "/programs/caller.py", "http://cart/")
    _allow_caller(installed)
    takes(lambda: installed.settled("deployment", "caller", SHOP) and answered(installed))
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
    assert Counter(" ".join(line.split()[:2]) for line in lines).keys() == {"kept 200", "new 200"}
    assert len({line.split()[2] for line in lines if line.startswith("kept")}) == 1, "one connection, all the time"
    assert envoy() == waypoint != 0
    assert "meshagent-waypoint" in Path(f"/proc/{waypoint}/cgroup").read_text()


def _allow_caller(found: Cluster) -> None:
    found.plane.kubectl("delete", "authorizationpolicy", "cart", "-n", SHOP, "--ignore-not-found")
    timeouts = {
        "parentRefs": [{"group": "", "kind": "Service", "name": "cart"}],
        "rules": [{"backendRefs": [{"name": "cart", "port": 80}]}],
    }
    route = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "cart", "namespace": SHOP}}
    found.plane.apply({**route, "spec": timeouts})


def answered(found: Cluster) -> bool:
    """Has the caller had answers for half a second?"""
    last = tail(found)[-20:]
    return len(last) == 20 and all(line.split()[1] == "200" for line in last)


def tail(found: Cluster) -> list[str]:
    """What the caller has said."""
    said = found.plane.kubectl("logs", "-n", SHOP, "deploy/caller", "--tail=-1", check=False).splitlines()
    return [line for line in said if line.startswith(("kept ", "new "))]


def in_kernel(kind: str, under: Path | None = None) -> set[int]:
    """Numbers of all programs, maps or links; of those that are pinned in a directory, if one is given (bpftool(8), -f)."""
    said = subprocess.run(["bpftool", "-j", "-f", kind, "show"], capture_output=True, text=True, check=True).stdout
    found: list[dict[str, Any]] = json.loads(said)
    return {one["id"] for one in found if under is None or any(path.startswith(f"{under}/") for path in one.get("pinned", ()))}


def test_nothing_is_left_on_a_node_from_which_it_is_uninstalled(installed: Cluster) -> None:
    pinned = {kind: in_kernel(kind, under=PINS) for kind in ("prog", "map", "link")}
    assert all(len(found) >= 10 for found in pinned.values()), pinned
    plane = installed.plane
    plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(MANIFEST.with_name("uninstall.yaml")))
    takes(lambda: installed.settled("daemonset", "meshagent-agent"))
    assert "removed programs, maps" in plane.kubectl("logs", "-n", OWN, "daemonset/meshagent-agent")
    plane.kubectl("delete", "-f", str(MANIFEST), "--wait=true")
    takes(lambda: not plane.kubectl("get", "pods", "-n", OWN, "-o", "name", "--ignore-not-found").strip())
    assert not PINS.exists()
    assert envoy() == 0
    assert not (installed.machine.cgroup2 / "meshagent-waypoint").exists()
    assert list(RUN.iterdir()) == []
    assert [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {RUN}/" in line] == []
    assert [path for path in LEFT if path.exists() and any(path.iterdir())] == []
    takes(
        lambda: not any(held & in_kernel(kind) for kind, held in pinned.items()), seconds=10
    )  # the last reference goes with the last program run
    assert ask(installed, "frontend", "http://cart/") == "200", "pods go on without it"


@pytest.mark.skipif(HELM is None, reason="no Helm: HELM names it, or it is in PATH")
def test_helm_installs_waits_until_the_mesh_is_ready_and_uninstalls(installed: Cluster) -> None:
    plane = installed.plane
    takes(lambda: f"namespace/{OWN}" not in plane.kubectl("get", "namespaces", "-o", "name").split())
    plane.kubectl("create", "namespace", OWN)
    plane.kubectl("label", "namespace", OWN, "pod-security.kubernetes.io/enforce=privileged")
    installed.sign()
    began = time.monotonic()
    installed.helm("install", "meshagent", str(CHART), "--wait", "--timeout", "180s")
    print(f"helm install --wait: {time.monotonic() - began:.0f} s")
    assert installed.settled("deployment", "meshagent-controller")
    assert installed.settled("daemonset", "meshagent-agent")
    status = json.loads(installed.agent("meshagent", "status", "-o", "json"))
    assert status["problems"] == []
    assert {one["redirected"] for one in status["workloads"] if one["namespace"] == SHOP} == {True}
    takes(lambda: ask(installed, "frontend", "http://cart/") == "200")
    installed.helm("upgrade", "meshagent", str(CHART), "--reuse-values", "--set", "agent.remove=true", "--wait", "--timeout", "180s")
    assert "removed programs, maps" in plane.kubectl("logs", "-n", OWN, "daemonset/meshagent-agent")
    installed.helm("uninstall", "meshagent")
    takes(lambda: not plane.kubectl("get", "pods", "-n", OWN, "-o", "name", "--ignore-not-found").startswith("pod/"))
    assert not PINS.exists()
    assert envoy() == 0
