"""Telemetry: what its schema cannot say, what it decides for, and its message. Pure.

`check` is called by `controller.checks`; `attach` and `message` by `controller.compile`, which turns what they find into conditions. Which part of which
Telemetry holds for a request is found out by agents (`agent.observation`): all that is decided here is who speaks for a Service, a namespace or the mesh.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from controller import externals, protocols
from controller.documents import Path
from controller.gateways import Grants
from controller.objects import ROOT_NAMESPACE, Key, Object
from meshapi import discovery_pb2 as pb

KIND: Final = "Telemetry"
MESH: Final = "mesh"
Found = tuple[Path, str]
Wrong = tuple[str, str]
"""Reason and message of a condition."""

_PARTS: Final = ("tracing", "accessLogs", "connectionLogs")
_OF_NAMESPACES: Final = (("tracing", "collector"), ("tracing", "acceptFromOutside"), ("connectionLogs",))
"""What belongs to the waypoints of a namespace's workloads, or to its connections, whatever Service is called."""
_OTLP_PORT: Final = 4317  # https://opentelemetry.io/docs/specs/otlp/#otlpgrpc-default-port
_MILLIONTHS: Final = 10_000  # in a percent
_ALL: Final = 100 * _MILLIONTHS


def check(spec: Mapping[str, Any]) -> Iterator[Found]:
    """Yield what is wrong with a spec that obeys the schema."""
    if not any(name in spec for name in _PARTS):
        yield ("spec",), f"says nothing: give at least one of {', '.join(_PARTS)}"
    seen = set()
    for index, reference in enumerate(spec.get("targetRefs", [])):
        if reference["name"] in seen:
            yield ("spec", "targetRefs", index), f"Service {reference['name']} is listed twice"
        seen.add(reference["name"])
    for path in _OF_NAMESPACES if "targetRefs" in spec else ():
        if _holds(spec, path):
            yield ("spec", *path), "is for a namespace, not for Services: write it into a Telemetry without targetRefs"
    for part in ("tracing", "accessLogs"):
        yield from _sampling(("spec", part, "sampling"), spec.get(part, {}).get("sampling"))
    collector = spec.get("tracing", {}).get("collector", {})
    if (collector.get("group", "") == "meshagent.io") is not (collector.get("kind") == externals.KIND):
        group = "meshagent.io" if collector.get("kind") == externals.KIND else '""'
        yield ("spec", "tracing", "collector", "group"), f"must be {group} for kind {collector.get('kind', 'Service')}"


def _holds(spec: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    found: Any = spec
    for name in path:
        if name not in found:
            return False
        found = found[name]
    return True


def _sampling(path: Path, percent: float | None) -> Iterator[Found]:
    if percent and not _millionths(percent):
        yield path, "is less than one in a million: give 0, or at least 0.0001"


def _millionths(percent: float) -> int:
    return round(percent * _MILLIONTHS)


@dataclass(slots=True)
class Attached:
    """What became of one Telemetry."""

    scopes: list[str] = field(default_factory=list)
    """What it decides for, as the model spells it, sorted."""
    missing: list[str] = field(default_factory=list)
    """Targets that are not there, in words."""
    lost: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """The one that decides instead, and for what, in words."""


def attach(items: Iterable[Object], services: Mapping[str, Object]) -> dict[str, Attached]:
    """Find the one Telemetry that decides for each scope. `items` come oldest first; the result is by their qualified names."""
    found: dict[str, Attached] = {}
    holders: dict[str, str] = {}
    for item in items:
        mine = found[item.key.qualified] = Attached()
        for scope, words in _scopes(item):
            if scope.startswith("service/") and words.removeprefix("Service ") not in services:
                mine.missing.append(f"there is no {words}")
            elif (holder := holders.setdefault(scope, item.key.qualified)) != item.key.qualified:
                mine.lost[holder].append(words)
            else:
                mine.scopes.append(scope)
        mine.scopes.sort()
    return found


def _scopes(item: Object) -> Iterator[tuple[str, str]]:
    namespace = item.key.namespace
    for reference in item.spec.get("targetRefs", ()):
        name = f"{namespace}/{reference['name']}"
        yield f"service/{name}", f"Service {name}"
    if "targetRefs" not in item.spec:
        yield (MESH, "the mesh") if namespace == ROOT_NAMESPACE else (f"namespace/{namespace}", f"namespace {namespace}")


def message(item: Object, scopes: Iterable[str], objects: Mapping[Key, Object], grants: Grants) -> tuple[pb.Telemetry, Wrong | None]:
    """Return the model's form of a Telemetry that decides for these scopes, and why its collector cannot be used; then it has none."""
    spec = item.spec
    result, wrong = pb.Telemetry(namespace=item.key.namespace, name=item.key.name, scopes=scopes), None
    if (tracing := spec.get("tracing")) is not None:
        result.tracing.SetInParent()
        if "acceptFromOutside" in tracing:
            result.tracing.accept_from_outside = tracing["acceptFromOutside"]
        if "sampling" in tracing:
            result.tracing.sampling = _millionths(tracing["sampling"])
        if "collector" in tracing:
            found = _collector(item.key, tracing["collector"], objects, grants)
            if isinstance(found, str):
                result.tracing.collector, result.tracing.port = found, tracing["collector"].get("port", _OTLP_PORT)
            else:
                wrong = found
    if (logs := spec.get("accessLogs")) is not None:
        result.access_logs.enabled = logs["enabled"]
        result.access_logs.sampling = _millionths(logs["sampling"]) if "sampling" in logs else _ALL
        result.access_logs.errors_always = logs.get("errorsAlways", True)
    if (connections := spec.get("connectionLogs")) is not None:
        result.connection_logs = connections["enabled"]
    return result, wrong


def _collector(source: Key, reference: Mapping[str, Any], objects: Mapping[Key, Object], grants: Grants) -> str | Wrong:
    kind, namespace = reference.get("kind", "Service"), reference.get("namespace", source.namespace)
    name, port = f"{namespace}/{reference['name']}", reference.get("port", _OTLP_PORT)
    if not grants.allow(source, kind, namespace, reference["name"]):
        return (
            "RefNotPermitted",
            f"no ReferenceGrant of namespace {namespace} lets {KIND} of {source.namespace} use {kind} {name}: no spans are sent",
        )
    target = objects.get(Key(kind, namespace, reference["name"]))
    if target is None:
        return "BackendNotFound", f"there is no {kind} {name}: no spans are sent"
    ports = {one["port"]: one for one in target.spec["ports"] if kind == externals.KIND or one.get("protocol", "TCP") == "TCP"}
    if port not in ports:
        return "BackendNotFound", f"{kind} {name} has no TCP port {port}: no spans are sent"
    if kind == externals.KIND and ports[port]["protocol"] not in {"GRPC", "HTTP2"}:
        return "UnsupportedProtocol", f"port {port} of {kind} {name} must have protocol GRPC: spans go by OTLP over gRPC"
    if kind != externals.KIND and (protocols.declared(ports[port]).lower() or "grpc") not in protocols.GRPC:
        return "UnsupportedProtocol", f"port {port} of {kind} {name} is declared not to speak gRPC: spans go by OTLP over gRPC"
    return name
