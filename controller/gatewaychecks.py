"""What a schema cannot say about Gateways, and about parents of routes that may be one. Called by `controller.checks`.

Mostly the rules (CEL) of the standard's CustomResourceDefinitions: https://gateway-api.sigs.k8s.io/reference/spec/. What the standard makes a condition of a
listener is no error here (`controller.gateways`). Each check yields (path, message).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from controller.documents import Path

Found = tuple[Path, str]

GROUP: Final = "gateway.networking.k8s.io"


def kind_of(reference: Mapping[str, Any]) -> str:
    """Return "Service" or "Gateway": of a parentRef without kind the standard makes a Gateway (ParentReference.kind, default)."""
    found: str = reference.get("kind", "Gateway")
    return found


def parent(path: Path, reference: Mapping[str, Any]) -> Iterator[Found]:
    """Hold the kind of a parentRef against its group, whose default is that of Gateways."""
    kind, group = kind_of(reference), reference.get("group")
    if kind == "Gateway" and group not in {None, GROUP}:
        yield (
            (*path, "group"),
            f'must be "{GROUP}" for kind Gateway' + ("" if "kind" in reference else "; for a Service write kind: Service"),
        )
    elif kind == "Service" and group == GROUP:
        yield (*path, "group"), 'must be "" for kind Service'


def gateway(spec: Mapping[str, Any]) -> Iterator[Found]:
    """Check the listeners of a Gateway, each by itself, and that no two have one name."""
    seen: set[str] = set()
    for index, listener in enumerate(spec["listeners"]):
        path: Path = ("spec", "listeners", index)
        if listener["name"] in seen:
            yield (*path, "name"), f'"{listener["name"]}" is used twice'
        seen.add(listener["name"])
        protocol, tls = listener["protocol"], listener.get("tls")
        if tls is not None and protocol in {"HTTP", "TCP", "UDP"}:
            yield (*path, "tls"), f"does not belong to protocol {protocol}"
        if protocol == "HTTPS":
            if tls is None:
                yield (*path, "tls"), "is required for protocol HTTPS"
            elif tls.get("mode", "Terminate") != "Terminate":
                yield (*path, "tls", "mode"), 'must be "Terminate" for protocol HTTPS'
            elif not tls.get("certificateRefs"):
                yield (*path, "tls", "certificateRefs"), "is required for mode Terminate"
        if "hostname" in listener and protocol in {"TCP", "UDP"}:
            yield (*path, "hostname"), f"does not belong to protocol {protocol}"
        yield from _namespaces((*path, "allowedRoutes", "namespaces"), listener.get("allowedRoutes", {}).get("namespaces", {}))


def _namespaces(path: Path, namespaces: Mapping[str, Any]) -> Iterator[Found]:
    selects = namespaces.get("from", "Same") == "Selector"
    if selects is not ("selector" in namespaces):
        yield (*path, "selector"), 'is required for from: "Selector"' if selects else 'belongs to from: "Selector"'
    for index, expression in enumerate(namespaces.get("selector", {}).get("matchExpressions", ())):
        if (expression["operator"] in {"In", "NotIn"}) is not bool(expression.get("values")):
            wanted = "is required" if expression["operator"] in {"In", "NotIn"} else "does not belong here"
            yield (*path, "selector", "matchExpressions", index, "values"), f"{wanted} for operator {expression['operator']}"
