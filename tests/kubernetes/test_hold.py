"""Pods that are to be in the mesh are marked by the API server (deploy/helm/meshagent/templates/hold.yaml)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.manifest import HOLDING, LABEL, MARK, RESERVED, objects
from tests.kubernetes.samples import namespace


@pytest.fixture(scope="module")
def marking(plane: ControlPlane) -> ControlPlane:
    """An API server that has the policy, which it takes some seconds to learn."""
    if plane.minor < HOLDING:
        pytest.skip(f"Kubernetes 1.{HOLDING} marks pods, and this is 1.{plane.minor}")
    plane.apply(*objects("MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"))
    for space, mode in (("marked", "mesh"), ("unmarked", "none")):
        plane.apply({**namespace(space), "metadata": {"name": space, "labels": {LABEL: mode}}})
    for _ in range(300):
        if sysctls(plane, "marked"):
            return plane
    raise AssertionError("the API server does not mark pods")


def sysctls(
    plane: ControlPlane, space: str, mode: str = "", context: dict[str, Any] | None = None, **spec: object
) -> list[tuple[str, str]]:
    """What a pod gets that is made there: its settings, by name and value."""
    labels = {LABEL: mode} if mode else {}
    security = {} if context is None else {"securityContext": context}
    whole = {"containers": [{"name": "app", "image": "app"}], **security, **spec}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "p-", "namespace": space, "labels": labels}, "spec": whole}
    made = json.loads(plane.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(pod)))
    return [(one["name"], one["value"]) for one in made["spec"].get("securityContext", {}).get("sysctls", ())]


def test_a_pod_is_marked_if_it_is_to_be_in_the_mesh(marking: ControlPlane) -> None:
    assert sysctls(marking, "marked") == [(RESERVED, MARK)]
    assert sysctls(marking, "unmarked") == []
    assert sysctls(marking, "unmarked", "mesh") == [(RESERVED, MARK)]
    assert sysctls(marking, "marked", "none") == []
    assert sysctls(marking, "marked", "Mesh") == [(RESERVED, MARK)], "nonsense is as if it were not there"
    assert sysctls(marking, "unmarked", "Mesh") == []


def test_a_pod_without_a_network_of_its_own_is_not(marking: ControlPlane) -> None:
    assert sysctls(marking, "marked", hostNetwork=True) == []
    assert sysctls(marking, "marked", os={"name": "windows"}) == []


def test_what_a_pod_sets_itself_stays(marking: ControlPlane) -> None:
    other = {"name": "net.ipv4.tcp_keepalive_time", "value": "60"}
    assert sysctls(marking, "marked", context={"sysctls": [other], "fsGroup": 7}) == [(other["name"], "60"), (RESERVED, MARK)]
    ports = {"name": RESERVED, "value": "30000-30010"}
    assert sysctls(marking, "marked", context={"sysctls": [ports, other]}) == [(other["name"], "60"), (RESERVED, f"{MARK},30000-30010")]
    for own in (MARK, f"{MARK},9000"):
        assert sysctls(marking, "marked", context={"sysctls": [{"name": RESERVED, "value": own}]}) == [(RESERVED, own)]


def test_a_restricted_namespace_takes_marked_pods(marking: ControlPlane) -> None:
    labels = {LABEL: "mesh", "pod-security.kubernetes.io/enforce": "restricted"}
    marking.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "restricted", "labels": labels}})
    context = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    container = {"name": "app", "image": "app", "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}
    assert sysctls(marking, "restricted", context=context, containers=[container]) == [(RESERVED, MARK)]


def test_pods_of_the_mesh_itself_are_not_marked(marking: ControlPlane) -> None:
    marking.apply(*objects("Namespace"))
    assert sysctls(marking, "meshagent-system", "mesh") == []
