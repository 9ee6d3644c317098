"""The mesh as it stands in an API server where it is installed, with what controllers and kubelets would write there."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.certificates import pair
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.manifest import OWN, objects

READY = {"conditions": [{"type": "Ready", "status": "True"}], "phase": "Running"}
GONE = {"DaemonSet": "daemonset/meshagent-agent", "Deployment": "deployment/meshagent-controller"}
AGENT_LABELS = {"app.kubernetes.io/name": "meshagent", "app.kubernetes.io/component": "agent"}


def node(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"kubernetes.io/os": "linux"}}}


def pod(name: str, where: str, namespace: str = OWN, args: Sequence[str] = (), **labels: str) -> dict[str, Any]:
    spec = {"nodeName": where, "containers": [{"name": "agent", "image": "none", "args": list(args)}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": labels}, "spec": spec}


def ready(plane: ControlPlane, agents: int = 2, *, wanted: int = 2, updated: int = 2) -> None:
    numbers = {
        "desiredNumberScheduled": wanted,
        "currentNumberScheduled": wanted,
        "updatedNumberScheduled": updated,
        "numberReady": agents,
        "numberMisscheduled": 0,
    }
    plane.set_status("daemonset", OWN, "meshagent-agent", {**numbers, "observedGeneration": 99})
    plane.set_status(
        "deployment", OWN, "meshagent-controller", {"replicas": 2, "updatedReplicas": 2, "readyReplicas": 2, "observedGeneration": 99}
    )


@contextmanager
def installing(plane: ControlPlane) -> Iterator[ControlPlane]:
    """The manifest, two nodes, an agent on each; statuses as a controller-manager and kubelets would write them."""
    plane.install_gateway_api()
    plane.apply(*objects("Namespace"))
    plane.apply(*objects("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "DaemonSet", "Deployment"))
    plane.apply(node("check-1"), node("check-2"), {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "check-shop"}})
    plane.apply(*(pod(f"agent-{n}", f"check-{n}", **AGENT_LABELS) for n in (1, 2)), pod("cart", "check-2", "check-shop"))
    for n in (1, 2):
        plane.set_status("pod", OWN, f"agent-{n}", READY)
    ready(plane)
    ca = pair("root", life=dt.timedelta(days=400))[0].decode()
    root = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "meshagent-root", "namespace": OWN}, "data": {"ca.crt": ca}}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "meshagent-ca", "namespace": OWN}, "data": {"tls.key": "aGlkZGVu"}}
    plane.apply(root, secret)
    yield plane
    for name in (*GONE.values(), "pods/agent-1", "pods/agent-2", "configmap/meshagent-root", "secret/meshagent-ca"):
        plane.kubectl("delete", "-n", OWN, "--force", "--grace-period=0", name, check=False)
    plane.kubectl("delete", "pod", "-n", "check-shop", "--force", "--grace-period=0", "cart", check=False)
    plane.kubectl("delete", "node", "check-1", "check-2")


def check(
    plane: ControlPlane, *options: str, user: str = "admin", groups: tuple[str, ...] = ()
) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """(exit status, findings by the check's name)."""
    argv = ["check", "--kubernetes", "--kubeconfig", str(plane.kubeconfig(user, *groups)), "-o", "json", *options]
    run = subprocess.run([sys.executable, "-m", "agent.cli.main", *argv], capture_output=True, text=True, timeout=120, check=False)
    assert run.stderr == ""
    report = json.loads(run.stdout)
    found: dict[str, list[dict[str, str]]] = {}
    for finding in report["findings"]:
        assert finding["severity"] == "ok" or finding["nextStep"], finding
        found.setdefault(finding["check"], []).append(finding)
    worst = "error" if run.returncode else report["worst"]
    assert report["worst"] == worst
    return run.returncode, found


def with_plugin(plane: ControlPlane, directory: Path, kubectl: str) -> dict[str, str]:
    """An environment with the plugin, and with `kubectl` (a script; the real one is $KUBECTL) for what it calls by that name."""
    programs = directory / "bin"
    programs.mkdir()
    for name, text in {
        "kubectl": kubectl,
        "kubectl-meshagent": f"#!{sys.executable}\nfrom agent.cli.kubectl import main\nmain()\n",
        "kubectl_complete-meshagent": f"#!{sys.executable}\nfrom agent.cli.kubectl import complete\ncomplete()\n",
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(directory),
        "KUBECONFIG": str(plane.kubeconfig()),
        "KUBECTL": str(plane.assets / "kubectl"),
    }
