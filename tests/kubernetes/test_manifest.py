"""The rendered manifest on a real API server: it is accepted, and a controller that has its rights, and no others, reads and writes all that it has to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from controller.documents import parse
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.test_source import namespace, policy, until
from tests.kubernetes.test_status import OWN, conditions, writing

MANIFEST = Path(__file__).parents[2] / "deploy" / "kubernetes" / "meshagent.yaml"
FULL = Path(__file__).parent / "rendered" / "full.yaml"
"""The chart with everything on, and Secrets shop/shop-tls, shop/api-tls and blog/blog-tls in controller.gatewaySecrets."""
HOLDING = 36
"""The minor version of Kubernetes that knows MutatingAdmissionPolicies of admissionregistration.k8s.io/v1."""
ACCOUNT = f"system:serviceaccount:{OWN}:meshagent-controller"


def objects(*kinds: str) -> list[dict[str, Any]]:
    """Those of the manifest, of these kinds or of all."""
    return [one.value for one in parse(MANIFEST.read_bytes(), str(MANIFEST)) if not kinds or one.value["kind"] in kinds]


def grant(plane: ControlPlane) -> None:
    """Give the controller's service account the rights of the manifest, and no others."""
    plane.apply(*objects("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"))


def test_the_manifest_is_accepted(plane: ControlPlane) -> None:
    plane.apply(*objects("Namespace"))
    said = plane.kubectl(
        "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", str(MANIFEST), check=False
    )
    errors = [line for line in said.splitlines() if "rror" in line or "ensure CRDs" in line]
    unknown = objects("MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding") if plane.minor < HOLDING else []
    assert said.count("serverside-applied") == len(objects()) - len(unknown), said
    assert all("MutatingAdmissionPolicy" in line or "ensure CRDs" in line for line in errors), errors
    assert bool(errors) == bool(unknown)


@pytest.mark.anyio
async def test_its_rights_are_enough_for_the_controller_and_no_more(plane: ControlPlane) -> None:
    plane.apply(namespace(OWN), namespace("rights"), policy("rights", "p"))
    grant(plane)
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: one.part.source.ready)
        await until(lambda: conditions(plane, "authorizationpolicy", "rights", "p").get("Accepted") == ("True", "Accepted"))
        await until(lambda: one.mesh.state.problems == ())  # 429 for a moment: the definitions are new
        assert one.part._writer.failed == 0
    for verb, what in (
        ("list", "secrets"),
        ("get", "secrets"),
        ("update", "pods"),
        ("delete", "nodes"),
        ("patch", "authorizationpolicies.meshagent.io"),
    ):
        assert plane.kubectl("auth", "can-i", verb, what, "-A", f"--as={ACCOUNT}", check=False).startswith("no"), (verb, what)


def test_with_every_value_turned_on_it_is_accepted_too(plane: ControlPlane) -> None:
    monitoring = plane.assets / "prometheus-operator"
    if not monitoring.exists():
        pytest.skip(f"no {monitoring}, which scripts/kubernetes fetches")
    plane.kubectl("apply", "--server-side", "-f", str(monitoring))
    plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(monitoring))
    plane.apply(*objects("Namespace"), namespace("shop"), namespace("blog"))
    kinds = [one.value["kind"] for one in parse(FULL.read_bytes(), str(FULL))]
    assert {"ServiceMonitor", "PrometheusRule", "ConfigMap"} <= set(kinds)
    said = plane.kubectl(
        "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", str(FULL), check=False
    )
    known = [kind for kind in kinds if plane.minor >= HOLDING or not kind.startswith("MutatingAdmissionPolicy")]
    assert said.count("serverside-applied") == len(known), said
