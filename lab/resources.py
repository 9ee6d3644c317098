"""Mesh resources made from, or read for, a lab: Workloads that describe its pods, and the addresses of its Services. Used by `lab.lab`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lab import paths
from lab.topology import Pod


def workload(pod: Pod) -> dict[str, Any]:
    """Return the Workload that describes a pod to the mesh."""
    metadata: dict[str, Any] = {"name": pod.name, "namespace": pod.namespace}
    if pod.labels:
        metadata["labels"] = dict(pod.labels)
    return {
        "apiVersion": "meshagent.io/v1alpha1",
        "kind": "Workload",
        "metadata": metadata,
        "spec": {
            "node": pod.node,
            "addresses": list(pod.addresses),
            "serviceAccount": pod.service_account,
            "networkNamespace": paths.place_netns(pod),
        },
    }


@dataclass(frozen=True, slots=True)
class VirtualService:
    """A Service as callers need to know it."""

    name: str
    namespace: str
    addresses: tuple[str, ...]

    def names(self, namespace: str) -> list[str]:
        """Return the names by which a pod in `namespace` may call it, as cluster DNS would have them."""
        own = f"{self.name}.{self.namespace}"
        return [*([self.name] if self.namespace == namespace else []), own, f"{own}.svc", f"{own}.svc.cluster.local"]


def services(directory: Path) -> list[VirtualService]:
    """Return the Services stored in a directory.

    Files that are no YAML, or are being written, are left out: refusing them is the controller's work.
    """
    found = []
    for path in sorted(p for p in directory.rglob("*") if p.suffix in (".yaml", ".yml", ".json")):
        for document in _documents(path):
            if document.get("kind") == "Service":
                metadata, spec = _mapping(document.get("metadata")), _mapping(document.get("spec"))
                found.append(VirtualService(str(metadata.get("name", "")), str(metadata.get("namespace", "default")), _addresses(spec)))
    return found


def _documents(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        documents = list(YAML(typ="safe").load_all(path.read_text()))
    except (OSError, YAMLError, UnicodeDecodeError):
        return []
    return [document for document in documents if isinstance(document, dict)]


def _addresses(spec: Mapping[str, Any]) -> tuple[str, ...]:
    listed = spec.get("clusterIPs") or [spec.get("clusterIP")]
    return tuple(str(address) for address in listed if address and address != "None")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
