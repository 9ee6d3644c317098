"""After the end, on the cluster's side: nothing of the mesh is left that was not there before, but what the documentation says."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kubernetes import controlplane
from tests.kubernetes.conftest import ASSETS
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import conditions
from tests.kubernetes.install import CHART, HELM
from tests.kubernetes.manifest import ACCOUNT, MANIFEST, OWN, objects
from tests.kubernetes.replicas import Replica
from tests.kubernetes.samples import namespace, pod, policy
from tests.unit.controller.identity.authorities import make

OWN_STATE = {f"Lease/{OWN}/meshagent-controller", f"ControllerState/{OWN}/authority", f"ControllerState/{OWN}/controllers"}
VOLATILE = ("Event/", "ComponentStatus/", "Warning", "Error")


@pytest.fixture(scope="module")
def whole_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane with the controllers that end namespaces, and no node."""
    assets = Path(os.environ.get(ASSETS) or "/nonexistent")
    if not (assets / "kube-controller-manager").exists():
        pytest.skip(f"no kube-controller-manager: `make test-kubernetes` builds it and says so in {ASSETS}")
    with controlplane.running(assets, tmp_path_factory.mktemp("whole"), whole=True) as found:
        found.install_gateway_api()
        found.apply(namespace("shop"))
        takes(lambda: "default" in found.kubectl("get", "serviceaccounts", "-n", "shop", check=False))
        yield found


def takes(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.3)


def everything(plane: ControlPlane) -> set[str]:
    """KIND/NAMESPACE/NAME of all that the API server has, but for what comes and goes by itself."""
    kinds = [line for line in plane.kubectl("api-resources", "--verbs=list,get", "-o", "name").split() if "." in line or line.isalpha()]
    shape = '{range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name}{"\\n"}{end}'
    said = plane.kubectl("get", ",".join(kinds), "-A", "-o", f"jsonpath={shape}", check=False)  # one that goes meanwhile is an error
    return {line for line in said.splitlines() if line.count("/") == 2 and not line.startswith(VOLATILE)}


def left(plane: ControlPlane, before: set[str]) -> set[str]:
    """What was not there before the mesh was."""
    return everything(plane) - before


def live(plane: ControlPlane, top: Path) -> None:
    """What a controller makes in its life: its Lease, ControllerStates, a status; and what an administrator makes: a Secret, a ConfigMap, policies."""
    plane.kubectl("create", "secret", "generic", "meshagent-ca", "-n", OWN, "--from-literal=tls.key=k")
    plane.kubectl("create", "configmap", "meshagent-root", "-n", OWN, "--from-literal=ca.crt=c")
    plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "authorizationpolicies.meshagent.io")
    takes(
        lambda: (
            "serverside-applied" in plane.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(policy("shop", "p")), check=False)
        )
    )
    root = make("root")
    root.write(top, "root")
    make("middle", root).write(top, "middle")
    controller = Replica(plane, top, "a", top, ACCOUNT)
    try:
        controller.start()
        controller.wait(60)
        takes(lambda: "Accepted" in conditions(plane, "authorizationpolicy", "shop", "p"))
        takes(lambda: everything(plane) >= OWN_STATE)
    finally:
        controller.kill()


def sysctls(plane: ControlPlane) -> list[dict[str, str]]:
    """What a pod that is made now gets."""
    made = pod("shop", "app")
    made["spec"]["serviceAccountName"] = "default"
    said = plane.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(made))
    found: list[dict[str, str]] = json.loads(said)["spec"].get("securityContext", {}).get("sysctls", [])
    return found


def test_kubectl_delete_leaves_nothing_in_the_cluster(whole_plane: ControlPlane, tmp_path: Path) -> None:
    before = everything(whole_plane)
    whole_plane.kubectl("apply", "--server-side", "-f", str(MANIFEST))
    live(whole_plane, tmp_path)
    takes(lambda: sysctls(whole_plane))
    whole_plane.kubectl("delete", "-f", str(MANIFEST), "--timeout=90s")
    takes(lambda: left(whole_plane, before) == set(), 90)
    takes(lambda: sysctls(whole_plane) == [])
    assert before - everything(whole_plane) == set(), "something of others has gone"


@pytest.mark.skipif(not HELM, reason="no Helm: scripts/render builds one")
def test_helm_leaves_definitions_and_what_is_in_its_namespace_and_the_namespace_takes_that_along(
    whole_plane: ControlPlane, tmp_path: Path
) -> None:
    def helm(*command: str) -> None:
        argv = [str(HELM), *command, "--namespace", OWN, "--kubeconfig", str(whole_plane.kubeconfig())]
        run = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"HOME": str(tmp_path)})
        assert run.returncode == 0, run.stderr

    before = everything(whole_plane)
    whole_plane.apply(namespace(OWN, "none"))
    helm("install", "meshagent", str(CHART))
    live(whole_plane, tmp_path)
    helm("uninstall", "meshagent")
    own = {one.rpartition("/")[2] for one in left(whole_plane, before) if one.startswith("CustomResourceDefinition/")}
    assert own == {one["metadata"]["name"] for one in objects("CustomResourceDefinition")}

    def remains() -> set[str]:
        return {one for one in left(whole_plane, before) if not one.startswith(("CustomResourceDefinition/", "APIService/"))}

    mine = {f"Secret/{OWN}/meshagent-ca", f"ConfigMap/{OWN}/meshagent-root", "AuthorizationPolicy/shop/p"}
    made = {f"Namespace//{OWN}", f"ConfigMap/{OWN}/kube-root-ca.crt", f"ServiceAccount/{OWN}/default"}
    takes(lambda: len(remains()) <= len(OWN_STATE | mine | made), 10)
    assert remains() == OWN_STATE | mine | made
    whole_plane.kubectl("delete", "namespace", OWN, "--timeout=90s")
    whole_plane.kubectl("delete", "crd", *sorted(own))
    takes(lambda: left(whole_plane, before) == set(), 90)
