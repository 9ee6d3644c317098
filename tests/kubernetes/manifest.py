"""The rendered manifest as a test reads it, and the rights that it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from controller.documents import parse
from tests.kubernetes.controlplane import ControlPlane

OWN = "meshagent-system"
MANIFEST = Path(__file__).parents[2] / "deploy" / "kubernetes" / "meshagent.yaml"
FULL = Path(__file__).parent / "rendered" / "full.yaml"
"""The chart with everything on, and Secrets shop/shop-tls, shop/api-tls and blog/blog-tls in controller.gatewaySecrets."""
HOLDING = 36
"""The minor version of Kubernetes that knows MutatingAdmissionPolicies of admissionregistration.k8s.io/v1."""
ACCOUNT = f"system:serviceaccount:{OWN}:meshagent-controller"
RIGHTS = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
RESERVED, MARK, LABEL = "net.ipv4.ip_local_reserved_ports", "15001-15008", "meshagent.io/mode"


def objects(*kinds: str) -> list[dict[str, Any]]:
    """Those of the manifest, of these kinds or of all."""
    return [one.value for one in parse(MANIFEST.read_bytes(), str(MANIFEST)) if not kinds or one.value["kind"] in kinds]


def grant(plane: ControlPlane) -> None:
    """Give the controller's service account the rights of the manifest, and no others."""
    plane.apply(*objects(*RIGHTS))
