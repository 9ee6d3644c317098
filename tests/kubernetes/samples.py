"""Objects of Kubernetes and of the mesh, as small as they can be, for a control plane without a node."""

from __future__ import annotations

import base64
from typing import Any

from tests.kubernetes.controlplane import ControlPlane
from tests.unit.controller.test_gateways import Signer

API = "gateway.networking.k8s.io"
SIGNER = Signer()


def namespace(name: str, mode: str = "mesh") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"meshagent.io/mode": mode}}}


def pod(space: str, name: str, node: str = "node-1", **labels: str) -> dict[str, Any]:
    containers = [{"name": "app", "image": "app", "ports": [{"name": "web", "containerPort": 8080}]}]
    spec = {"nodeName": node, "serviceAccountName": name, "containers": containers, "terminationGracePeriodSeconds": 0}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": space, "labels": labels}, "spec": spec}


def service(space: str, name: str) -> dict[str, Any]:
    spec = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": "web"}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": space}, "spec": spec}


def policy(space: str, name: str) -> dict[str, Any]:
    spec = {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["elsewhere"]}}]}]}
    metadata = {"name": name, "namespace": space}
    return {"apiVersion": "meshagent.io/v1alpha1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec}


def running(plane: ControlPlane, space: str, name: str, *addresses: str) -> None:
    """Say of a pod what a kubelet says of one that runs."""
    status = {
        "phase": "Running",
        "podIP": addresses[0],
        "podIPs": [{"ip": address} for address in addresses],
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    plane.set_status("pod", space, name, status)


def listener(name: str, port: int, *, protocol: str = "HTTP", **more: Any) -> dict[str, Any]:
    return {"name": name, "port": port, "protocol": protocol, **more}


def secret(space: str, name: str, chain: str, key: str, kind: str = "kubernetes.io/tls") -> dict[str, Any]:
    data = {"tls.crt": base64.b64encode(chain.encode()).decode(), "tls.key": base64.b64encode(key.encode()).decode()}
    return {"apiVersion": "v1", "kind": "Secret", "type": kind, "metadata": {"name": name, "namespace": space}, "data": data}
