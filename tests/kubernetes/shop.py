"""The demo's programs as Deployments of an installed mesh, and who asks them. Any Python of theirs is that of the controller's image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.kubernetes.install import ROOT, Cluster, takes
from tests.kubernetes.node import image, libraries

SHOP = "shop"
REDIS = "registry.test/redis:1"
PYTHON = "localhost/meshagent/controller:0.1.0"
"""The image with Python that is there anyway."""
SERVER = ("/usr/bin/python3", "-u", "/programs/server.py")
CALLER = ("/usr/bin/python3", "-u", "/programs/caller.py")
KEEP = ("/usr/bin/redis-server", "--protected-mode", "no", "--save", "")
IDLE = ("/usr/bin/python3", "-c", "import time; time.sleep(1e6)")
_PROGRAMS = ("lab/shop/server.py", "tests/kubernetes/caller.py", "tests/kubernetes/health.py")
_CART_URL = {"CART_URL": "http://cart", "REDIS": "redis:6379"}


def load_redis(found: Cluster) -> None:
    """Give the node an image of this machine's redis."""
    program, archive = Path(str(shutil.which("redis-server"))), found.directory / "redis.tar"
    image(archive, REDIS, {str(one): one for one in (program, *libraries(program))}, [str(program)])
    found.machine.ctr("images", "import", str(archive))


def open_shop(found: Cluster) -> None:
    """Redis, cart and frontend in an enrolled namespace, and a stranger, who does nothing."""
    metadata = {"name": SHOP, "labels": {"meshagent.io/mode": "mesh"}}
    found.plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    give_programs(found, SHOP)
    serve(found, "redis", REDIS, *KEEP, port=6379, serves=6379)
    serve(found, "cart", PYTHON, *SERVER, port=80, env={"APP": "cart", "VERSION": "v1"})
    serve(found, "frontend", PYTHON, *SERVER, port=80, env={"APP": "frontend", **_CART_URL})
    deploy(found, SHOP, "stranger", PYTHON, *IDLE)
    found.machine.name_services()
    takes(lambda: settled(found, SHOP, "redis", "cart", "frontend", "stranger"), found)


def settled(found: Cluster, space: str, *names: str) -> bool:
    """Are these Deployments ready?"""
    return all(found.settled("deployment", name, space) for name in names)


def instances(found: Cluster) -> dict[str, int]:
    """Pods of the shop by UID, and how often their containers were started again."""
    return {one["metadata"]["uid"]: one["status"]["containerStatuses"][0]["restartCount"] for one in found.pods(SHOP)}


def give_programs(found: Cluster, space: str) -> None:
    """Those that pods run with Python, as a ConfigMap that `deploy` mounts."""
    data = {Path(path).name: (ROOT / path).read_text() for path in _PROGRAMS}
    found.plane.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "programs", "namespace": space}, "data": data})


def serve(found: Cluster, name: str, called: str, *command: str, port: int, serves: int = 8080, env: dict[str, str] | None = None) -> None:
    """A Service and a Deployment of the shop."""
    appears = {"name": "redis" if port == 6379 else "http", "port": port, "targetPort": serves}
    spec = {"selector": {"app": name}, "ports": [appears]}
    found.plane.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": SHOP}, "spec": spec})
    deploy(found, SHOP, name, called, *command, env=env)


def deploy(
    found: Cluster,
    space: str,
    name: str,
    called: str,
    *command: str,
    labels: dict[str, str] | None = None,
    env: dict[str, str] | None = None,
    **more: Any,
) -> None:
    """A Deployment of one pod, whose ServiceAccount has the name of its app; `more` is of its container."""
    labels = labels or {"app": name}
    meta = {"name": labels["app"], "namespace": space}
    container = {
        "name": "app",
        "image": called,
        "imagePullPolicy": "Never",
        "command": list(command),
        "env": [{"name": key, "value": value} for key, value in (env or {}).items()],
        "volumeMounts": [{"name": "programs", "mountPath": "/programs"}],
        **more,
    }
    pod = {
        "serviceAccountName": labels["app"],
        "terminationGracePeriodSeconds": 0,
        "containers": [container],
        "volumes": [{"name": "programs", "configMap": {"name": "programs"}}],
    }
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    found.plane.apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {**meta, "name": name}, "spec": spec},
    )


@contextmanager
def demo(found: Cluster, space: str, *files: Path) -> Iterator[None]:
    """The demo of `make demo`: objects of these files as they are, two versions of the cart, one pod of which fails, frontend, redis and another, who calls."""
    found.plane.kubectl("label", "namespace", space, "meshagent.io/mode=mesh")
    for file in files:
        found.plane.kubectl("apply", "--server-side", "-n", space, "-f", str(file))
    give_programs(found, space)
    carts = {"cart-v1-1": "v1", "cart-v1-2": "v1", "cart-v2-1": "v2"}
    for name, version in carts.items():
        environment = {"APP": "cart", "VERSION": version, "POD_NAME": name, "FAIL_POD": "cart-v1-1"}
        deploy(found, space, name, PYTHON, *SERVER, labels={"app": "cart", "version": version, "pod": name}, env=environment)
    deploy(found, space, "frontend", PYTHON, *SERVER, env={"APP": "frontend", **_CART_URL})
    deploy(found, space, "redis", REDIS, *KEEP)
    deploy(found, space, "other", PYTHON, *IDLE)
    found.machine.name_services()
    takes(lambda: settled(found, space, *carts, "frontend", "redis", "other"), found)
    yield
    found.plane.kubectl("delete", "deployment", "--all", "-n", space, "--wait=true")
    for file in files:
        found.plane.kubectl("delete", "-n", space, "-f", str(file))
    found.plane.kubectl("label", "namespace", space, "meshagent.io/mode-")
    takes(lambda: not found.pods(space))


def admit(found: Cluster, app: str, *accounts: str, **operation: list[str]) -> None:
    """A policy that lets these accounts of the shop, and nobody else, reach an app of it."""
    rule: dict[str, Any] = {"from": [{"source": {"serviceAccounts": [f"{SHOP}/{one}" for one in accounts]}}]}
    if operation:
        rule["to"] = [{"operation": operation}]
    spec = {"selector": {"matchLabels": {"app": app}}, "action": "ALLOW", "rules": [rule]}
    metadata = {"name": app, "namespace": SHOP}
    found.plane.apply({"apiVersion": "meshagent.io/v1alpha1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec})


def route(found: Cluster, app: str) -> None:
    """A route that leads to where it would lead anyway: requests go through Envoy."""
    spec = {"parentRefs": [{"group": "", "kind": "Service", "name": app}], "rules": [{"backendRefs": [{"name": app, "port": 80}]}]}
    metadata = {"name": app, "namespace": SHOP}
    found.plane.apply({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": metadata, "spec": spec})


def ask(found: Cluster, caller: str, url: str, space: str = SHOP) -> str:
    """The status of a request from a Deployment; the error's name if there is no answer."""
    program = (
        "import urllib.request, urllib.error, sys\n"
        "try: print(urllib.request.urlopen(sys.argv[1], timeout=5).status)\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
        "except OSError as error: print(type(error).__name__)\n"
    )
    return run(found, space, caller, program, url, check=False).strip()


def ask_often(found: Cluster, caller: str, url: str, times: int, space: str = SHOP) -> list[tuple[int, dict[str, Any]]]:
    """Status and JSON of requests, one after the other, each over a connection of its own."""
    program = (
        "import json, sys, urllib.request, urllib.error\n"
        "for _ in range(int(sys.argv[2])):\n"
        "    try: answer = urllib.request.urlopen(sys.argv[1], timeout=5)\n"
        "    except urllib.error.HTTPError as error: answer = error\n"
        "    body = answer.read()\n"
        "    print(json.dumps([answer.status, json.loads(body) if body.startswith(b'{') else {}]))\n"
    )
    lines = run(found, space, caller, program, url, str(times)).splitlines()
    return [(status, body) for status, body in map(json.loads, lines)]


def run(found: Cluster, space: str, name: str, program: str, *arguments: str, check: bool = True) -> str:
    """What a Python program says in the pod of a Deployment, as kubectl exec."""
    inside = ["exec", "-n", space, f"deploy/{name}", "--", "/usr/bin/python3", "-c", program, *arguments]
    return found.plane.kubectl(*inside, check=check)


def tail(found: Cluster, name: str = "caller") -> list[str]:
    """What a Deployment that runs CALLER has said."""
    said = found.plane.kubectl("logs", "-n", SHOP, f"deploy/{name}", "--tail=-1", check=False).splitlines()
    return [line for line in said if line.startswith(("kept ", "new "))]


def outcomes(lines: list[str]) -> set[str]:
    """What came of calls: `kept` or `new`, and the status or the error's name."""
    return {" ".join(line.split()[:2]) for line in lines}


def answered(found: Cluster, name: str = "caller", *, status: str = "200") -> bool:
    """Has it had this answer for half a second?"""
    last = tail(found, name)[-20:]
    return len(last) == 20 and outcomes(last) == {f"kept {status}", f"new {status}"}
