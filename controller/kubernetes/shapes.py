"""What is read of the API server's objects, kind by kind: its JSON becomes the same objects that the directory of YAML files gives. Pure.

Of Kubernetes' own kinds only the fields that a mesh needs are decoded; whatever else they hold is passed over. A Pod becomes an object in the shape of a
Workload, because it is one for everything behind this. Gateway API's kinds and our own are held against the schemas, as files are.
https://kubernetes.io/docs/reference/kubernetes-api/.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec

from controller.checks import switches
from controller.documents import Document, Path, path_text
from controller.errors import Problem
from controller.objects import Key, Object
from controller.schema import LABEL, SUBDOMAIN, kinds, validate
from controller.secrets import CERTIFICATE, KEY

ORIGIN: Final = "api-server"
UID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}")
"""RFC 4122, or the hash that names a static pod."""
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
_OWN: Final = "meshagent.io/"
_SLICE_OF: Final = "kubernetes.io/service-name"
_MANAGED_BY: Final = "endpointslice.kubernetes.io/managed-by"
_PORT_DIGITS: Final = 5
TLS: Final = "kubernetes.io/tls"
_NAMES_SHOWN: Final = 10
_ENDED: Final = frozenset({"Succeeded", "Failed"})


def newer(version: str, other: str) -> bool:
    """Is this resource version newer? Those that are no numbers cannot be compared, and what came later is newer."""
    if version.isdecimal() and other.isdecimal() and max(len(version), len(other)) < 40:
        return int(version) > int(other)
    return version != other


@dataclass(frozen=True, slots=True)
class Seen:
    """One object at one version. `object` is None if it is refused or says nothing to a mesh; `uid` and `generation` are for its status."""

    key: Key
    uid: str
    version: str
    generation: int = 0
    object: Object | None = None
    problems: tuple[Problem, ...] = ()
    status: Mapping[str, Any] | None = None
    """As it stands there, of kinds whose status is written here."""
    orphan: bool = False
    """It is not there any more, because the definition of its kind has been deleted."""
    pruned: bool = False
    """`object` is what was read before the definition of its kind has lost fields."""

    def same(self, other: Seen) -> bool:
        """Does the other mean the same to a mesh?"""
        return (self.object, self.problems, self.uid, self.generation) == (other.object, other.problems, other.uid, other.generation)

    def without_loss(self, before: Seen | None) -> Seen:
        """Return this version, with what it had `before` if fields are missing that nobody has removed.

        A definition that does not know a field takes it out of whatever is read or written
        (https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#field-pruning), and without that field a policy may
        allow more. Whoever changes a field makes a new generation, and pruning does not.
        """
        if before is None or before.object is None or self.object is None or not self.generation:
            return self
        if (self.uid, self.generation) != (before.uid, before.generation):
            return self
        if not (lost := sorted({path_text(path) for path in _lost(before.object.spec, self.object.spec, ("spec",))})):
            return self
        message = (
            f"the API server gives it without {', '.join(lost[:_NAMES_SHOWN])}, which nobody has removed: is its CustomResourceDefinition older than this "
            "controller? what was read before stays in force; apply the definitions of this version, then the object again"
        )
        problem = Problem(ORIGIN, 0, message, self.key.kind, self.key.name)
        return replace(self, object=before.object, problems=(problem,), pruned=True)

    def after(self, other: Seen) -> bool:
        """Is this newer?"""
        return newer(self.version, other.version)


def _lost(before: Any, after: Any, path: Path) -> Iterator[Path]:
    """The fields of `before` that `after` does not have."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name, value in before.items():
            if name in after:
                yield from _lost(value, after[name], (*path, name))
            else:
                yield (*path, name)
    elif isinstance(before, list) and isinstance(after, list):
        for index, value in enumerate(before):
            if index < len(after):
                yield from _lost(value, after[index], (*path, index))
            else:
                yield (*path, index)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind: where it is listed, and how its objects are read."""

    kind: str
    path: str
    """Of the list in all namespaces."""
    shape: Callable[[bytes], Seen | None] = field(repr=False)
    selector: Mapping[str, str] = field(default_factory=dict)
    """Parameters of lists and watches."""
    required: bool = True
    """An API server without it is not ready for a mesh."""
    name: str = "*"
    """Of the one object that is followed, where it is one."""
    definition: str = ""
    """Its CustomResourceDefinition."""
    rights: str = "see the ClusterRole of the controller's service account"
    """What to do if it may not be read."""

    def read(self, raw: bytes) -> Seen | None:
        """Read one object; None: its name says that nobody can mean it. Raises msgspec.MsgspecError for what has no metadata.

        One with metadata that is not understood is refused, so that what was known of it stays.
        """
        try:
            return self.shape(raw)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            meta = _PLAIN.decode(raw).metadata
            key = _key(self.kind, meta)
            problem = Problem(ORIGIN, 0, f"is not understood: {str(error)[:200]}", self.kind, meta.name[:253])
            return None if key is None else Seen(key, meta.uid, meta.resource_version, meta.generation, None, (problem,))


class _Meta(msgspec.Struct):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = msgspec.field(name="resourceVersion", default="")
    generation: int = 0
    created: str | None = msgspec.field(name="creationTimestamp", default=None)
    deleted: str | None = msgspec.field(name="deletionTimestamp", default=None)
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class _Port(msgspec.Struct):
    number: int = msgspec.field(name="containerPort", default=0)
    name: str = ""
    protocol: str = "TCP"


class _Call(msgspec.Struct):
    """What the kubelet connects to: HTTPGetAction, TCPSocketAction or GRPCAction."""

    port: int | str | None = None
    host: str = ""


class _Handler(msgspec.Struct):
    http: _Call | None = msgspec.field(name="httpGet", default=None)
    tcp: _Call | None = msgspec.field(name="tcpSocket", default=None)
    grpc: _Call | None = None


class _Lifecycle(msgspec.Struct):
    start: _Handler | None = msgspec.field(name="postStart", default=None)
    stop: _Handler | None = msgspec.field(name="preStop", default=None)


class _Container(msgspec.Struct):
    ports: list[_Port] | None = None
    restart: str | None = msgspec.field(name="restartPolicy", default=None)
    liveness: _Handler | None = msgspec.field(name="livenessProbe", default=None)
    readiness: _Handler | None = msgspec.field(name="readinessProbe", default=None)
    startup: _Handler | None = msgspec.field(name="startupProbe", default=None)
    lifecycle: _Lifecycle | None = None


class _PodSpec(msgspec.Struct):
    node: str = msgspec.field(name="nodeName", default="")
    account: str = msgspec.field(name="serviceAccountName", default="")
    host_network: bool = msgspec.field(name="hostNetwork", default=False)
    containers: list[_Container] | None = None
    init_containers: list[_Container] | None = msgspec.field(name="initContainers", default=None)


class _Ip(msgspec.Struct):
    ip: str = ""


class _Condition(msgspec.Struct):
    type: str = ""
    status: str = ""


class _PodStatus(msgspec.Struct):
    phase: str = ""
    ip: str = msgspec.field(name="podIP", default="")
    ips: list[_Ip] | None = msgspec.field(name="podIPs", default=None)
    conditions: list[_Condition] | None = None


class _Pod(msgspec.Struct):
    metadata: _Meta
    spec: _PodSpec = msgspec.field(default_factory=_PodSpec)
    status: _PodStatus = msgspec.field(default_factory=_PodStatus)


class _Plain(msgspec.Struct):
    metadata: _Meta


class _Stored(msgspec.Struct):
    metadata: _Meta
    documents: dict[str, str] = msgspec.field(default_factory=dict)


class _Secret(msgspec.Struct):
    metadata: _Meta
    type: str = ""
    data: dict[str, str] | None = None


class _ServicePort(msgspec.Struct):
    port: int = 0
    name: str | None = None
    protocol: str | None = None
    target: int | str | None = msgspec.field(name="targetPort", default=None)
    app_protocol: str | None = msgspec.field(name="appProtocol", default=None)


class _ServiceSpec(msgspec.Struct):
    type: str = "ClusterIP"
    selector: dict[str, str] | None = None
    address: str = msgspec.field(name="clusterIP", default="")
    addresses: list[str] | None = msgspec.field(name="clusterIPs", default=None)
    ports: list[_ServicePort] | None = None
    affinity: str = msgspec.field(name="sessionAffinity", default="None")
    affinity_config: dict[str, Any] | None = msgspec.field(name="sessionAffinityConfig", default=None)
    distribution: str | None = msgspec.field(name="trafficDistribution", default=None)


class _Service(msgspec.Struct):
    metadata: _Meta
    spec: _ServiceSpec = msgspec.field(default_factory=_ServiceSpec)


class _Target(msgspec.Struct):
    kind: str = ""
    name: str = ""


class _Serving(msgspec.Struct):
    ready: bool | None = None


class _Endpoint(msgspec.Struct):
    addresses: list[str] | None = None
    conditions: _Serving | None = None
    zone: str | None = None
    target: _Target | None = msgspec.field(name="targetRef", default=None)


class _SlicePort(msgspec.Struct):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class _Slice(msgspec.Struct):
    metadata: _Meta
    endpoints: list[_Endpoint] | None = None
    ports: list[_SlicePort] | None = None


def _pod(raw: bytes) -> Seen | None:
    found = _POD.decode(raw)
    meta, spec, status = found.metadata, found.spec, found.status
    key = _key("Pod", meta)
    if key is None:
        return None
    if not spec.node or status.phase in _ENDED:
        return _seen(key, meta, None)
    account = spec.account or "default"
    wrong = _first(
        ("metadata.uid", meta.uid, UID.fullmatch(meta.uid)),
        ("spec.serviceAccountName", account, SUBDOMAIN.fullmatch(account) and len(account) <= 253),
        ("spec.nodeName", spec.node, SUBDOMAIN.fullmatch(spec.node) and len(spec.node) <= 253),
    )
    if wrong is not None:
        return _seen(key, meta, None, wrong)
    containers = [*(spec.containers or ()), *(one for one in spec.init_containers or () if one.restart == "Always")]
    ports: dict[str, int] = {}
    for port in (port for container in containers for port in container.ports or ()):
        if port.name and 0 < port.number < 65536:
            ports.setdefault(f"{port.name}/{port.protocol}", port.number)
    ready = meta.deleted is None and any(one.type == "Ready" and one.status == "True" for one in status.conditions or ())
    shaped: dict[str, Any] = {
        "node": spec.node,
        "addresses": _addresses([one.ip for one in status.ips or ()] or [status.ip]),
        "serviceAccount": account,
        "ready": ready,
        "podUid": meta.uid,
    }
    if ports:
        shaped["ports"] = ports
    if called := {port for container in containers for port in _called(container)}:
        shaped["probePorts"] = sorted(called)
    if spec.host_network:
        shaped["hostNetwork"] = True
    if meta.deleted is not None:
        shaped["terminating"] = True
    return _seen(key, meta, shaped)


def _called(container: _Container) -> Iterator[int]:
    """The ports of its own pod that the kubelet calls for a container, by name as pkg/probe/util.go (ResolveContainerPort) finds them.

    A host is another place, and the kubelet's calls there are nobody's probes here.
    """
    life = container.lifecycle or _Lifecycle()
    named = {one.name: one.number for one in reversed(container.ports or ()) if one.name}  # the first of a name counts
    for handler in (container.liveness, container.readiness, container.startup, life.start, life.stop):
        for call in (handler.http, handler.tcp, handler.grpc) if handler is not None else ():
            if call is not None and not call.host:
                port = call.port if isinstance(call.port, int) else named.get(call.port or "", call.port)
                if 0 < (number := port if isinstance(port, int) else _decimal(port)) < 65536:
                    yield number


def _decimal(text: str | None) -> int:
    """A number that was written as text, which is the last thing that the kubelet tries; 0 if it is none."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= _PORT_DIGITS else 0


def _node(raw: bytes) -> Seen | None:
    meta = _PLAIN.decode(raw).metadata
    key = _key("Node", meta)
    return None if key is None else _seen(key, meta, {})


def _namespace(raw: bytes) -> Seen | None:
    """As a file would say it, so that it can be kept (`controller.kubernetes.lastgood`)."""
    meta = _PLAIN.decode(raw).metadata
    key = _key("Namespace", meta)
    if key is None:
        return None
    seen = _seen(key, meta, {})
    return replace(seen, object=seen.object and replace(seen.object, data={"apiVersion": "v1", "kind": key.kind, **seen.object.data}))


def _service(raw: bytes) -> Seen | None:
    """Of a NodePort or LoadBalancer what it is within the cluster; an ExternalName is a matter of DNS alone, and so is a Service without ports."""
    found = _SERVICE.decode(raw)
    spec, key = found.spec, _key("Service", found.metadata)
    if key is None:
        return None
    named = spec.addresses or ([spec.address] if spec.address else [])
    addresses = ["None"] if named == ["None"] else _addresses(named)
    ports = [_service_port(one) for one in spec.ports or () if one.protocol in {None, "TCP", "UDP"} and 0 < one.port < 65536]
    if spec.type == "ExternalName" or not addresses or not ports:
        return _seen(key, found.metadata, None)
    shaped: dict[str, Any] = {"clusterIPs": addresses, "ports": ports}
    if spec.selector:
        shaped["selector"] = spec.selector
    if spec.affinity == "ClientIP":
        shaped["sessionAffinity"] = "ClientIP"
        seconds = ((spec.affinity_config or {}).get("clientIP") or {}).get("timeoutSeconds")
        if isinstance(seconds, int) and 0 < seconds <= 86400:
            shaped["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": seconds}}
    if spec.distribution in {"PreferSameZone", "PreferSameNode", "PreferClose"}:
        shaped["trafficDistribution"] = spec.distribution
    return _seen(key, found.metadata, shaped)


def _service_port(port: _ServicePort) -> dict[str, Any]:
    more = {"name": port.name, "protocol": port.protocol, "targetPort": port.target, "appProtocol": port.app_protocol}
    return {"port": port.port, **_given(more)}


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def _slice(raw: bytes) -> Seen | None:
    found = _SLICE.decode(raw)
    key, service = _key("EndpointSlice", found.metadata), (found.metadata.labels or {}).get(_SLICE_OF, "")
    if key is None:
        return None
    if not LABEL.fullmatch(service):
        return _seen(key, found.metadata, None)
    ports = [
        {"name": one.name or "", "port": one.port, "protocol": one.protocol or "TCP"}
        for one in found.ports or ()
        if one.port is not None and 0 < one.port < 65536
    ]
    endpoints = [
        {
            "addresses": addresses,
            "ready": one.conditions is None or one.conditions.ready is not False,  # absent is ready
            "zone": one.zone or "",
            "pod": one.target.name if one.target is not None and one.target.kind == "Pod" else "",
        }
        for one in found.endpoints or ()
        if (addresses := _addresses(one.addresses or ()))
    ]
    return _seen(key, found.metadata, {"service": service, "ports": ports, "endpoints": endpoints})


def _secret(raw: bytes) -> Seen | None:
    """A certificate for Gateways. Its annotations are not read: kubectl may have written all of it there again."""
    found = _SECRET.decode(raw)
    meta, key = found.metadata, _key("Secret", found.metadata)
    if key is None:
        return None
    if found.type != TLS:
        problem = Problem(ORIGIN, 0, f"is of type {found.type[:80]!r}, not {TLS}", key.kind, key.qualified, "type")
        return Seen(key, meta.uid, meta.resource_version, meta.generation, None, (problem,))
    held = {name: text for name in (CERTIFICATE, KEY) if (text := (found.data or {}).get(name)) is not None}
    data = {"metadata": {"name": key.name, "namespace": key.namespace}, "type": TLS, "data": held}
    return Seen(key, meta.uid, meta.resource_version, meta.generation, Object(key, data, ORIGIN, 0))


def secret_kind(key: Key) -> Kind:
    """How one Secret is followed."""
    return Kind(
        key.kind,
        f"/api/v1/namespaces/{key.namespace}/secrets",
        _secret,
        {"fieldSelector": f"metadata.name={key.name}"},
        name=key.qualified,
        rights=f"a Gateway names it; if it may, add namespace {key.namespace} with name {key.name} to controller.gatewaySecrets of the chart",
    )


def stored(raw: bytes) -> Seen | None:
    """A ControllerState (`controller.kubernetes.store`): its documents stand as the spec."""
    found = _STORED.decode(raw)
    key = _key("ControllerState", found.metadata)
    return None if key is None else _seen(key, found.metadata, found.documents)


_POD = msgspec.json.Decoder(_Pod)
_STORED = msgspec.json.Decoder(_Stored)
_SECRET = msgspec.json.Decoder(_Secret)
_PLAIN = msgspec.json.Decoder(_Plain)
_SERVICE = msgspec.json.Decoder(_Service)
_SLICE = msgspec.json.Decoder(_Slice)
_CLUSTER: Final = frozenset({"Node", "Namespace", *(name for name, kind in kinds().items() if not kind.namespaced)})


def _key(kind: str, meta: _Meta) -> Key | None:
    if len(meta.name) > 253 or not SUBDOMAIN.fullmatch(meta.name):
        return None
    if kind in _CLUSTER:
        return Key(kind, "", meta.name)
    return Key(kind, meta.namespace, meta.name) if LABEL.fullmatch(meta.namespace) else None


def _seen(key: Key, meta: _Meta, spec: Mapping[str, Any] | None, *problems: Problem) -> Seen:
    """One object; of the mesh's own labels and annotations, what is nonsense is a problem, and as if it were not there."""
    if spec is None:
        return Seen(key, meta.uid, meta.resource_version, meta.generation, None, problems)
    own = {name: value for name, value in (meta.annotations or {}).items() if name.startswith(_OWN)}
    said = {"labels": dict(meta.labels or {}), "annotations": own}
    for (_, where, name), message in list(switches(key.kind, said)):
        if said[str(where)].pop(str(name)):  # an empty one says nothing
            problems += (Problem(ORIGIN, 0, message, key.kind, key.qualified, path_text(("metadata", where, name))),)
    more = {"namespace": key.namespace, **said, "creationTimestamp": meta.created}
    metadata = {"name": key.name, **_given(more)}
    made = Object(key, {"metadata": metadata, "spec": spec}, ORIGIN, 0)
    return Seen(key, meta.uid, meta.resource_version, meta.generation, made, problems)


def _first(*checks: tuple[str, str, object]) -> Problem | None:
    return next((Problem(ORIGIN, 0, f"{value[:80]!r} is none", "Pod", "", path) for path, value, good in checks if not good), None)


def _addresses(texts: Iterable[str]) -> list[str]:
    """Those that are addresses of one host, in their one spelling."""
    found = []
    for text in texts:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        if not (address.is_unspecified or address.is_multicast or address.is_loopback or "%" in text) and str(address) not in found:
            found.append(str(address))
    return found


def _validated(kind: str, raw: bytes) -> Seen | None:
    """An object of a kind that has a schema here, without what servers alone write."""
    meta = _PLAIN.decode(raw).metadata
    value = msgspec.json.decode(raw)
    annotations = {name: text for name, text in (meta.annotations or {}).items() if name != _LAST_APPLIED}
    more = {"namespace": meta.namespace, "labels": meta.labels, "annotations": annotations, "creationTimestamp": meta.created}
    metadata = {"name": meta.name, **_given(more)}
    document = {name: content for name, content in value.items() if name != "status"}
    document |= {"apiVersion": value.get("apiVersion", kinds()[kind].api_version), "kind": kind, "metadata": metadata}
    checked = validate(Document(document, 0, {}), ORIGIN)
    if checked.key is None:
        return None
    status = value.get("status")
    held = status if isinstance(status, dict) else {}
    return Seen(checked.key, meta.uid, meta.resource_version, meta.generation, checked.object, checked.problems, held)


def _path(api_version: str, plural: str) -> str:
    return f"/apis/{api_version}/{plural}" if "/" in api_version else f"/api/{api_version}/{plural}"


_BY_HAND: Final = {"Namespace", "Service", "Secret"}
"""Kinds with a schema that are read in another way; of Secrets only those that Gateways name (`secret_kind`)."""


@functools.cache
def followed() -> tuple[Kind, ...]:
    """Every kind that is listed and watched."""
    core = (
        Kind("Namespace", _path("v1", "namespaces"), _namespace),
        Kind("Node", _path("v1", "nodes"), _node),
        Kind("Pod", _path("v1", "pods"), _pod),
        Kind("Service", _path("v1", "services"), _service),
        Kind(
            "EndpointSlice",
            _path("discovery.k8s.io/v1", "endpointslices"),
            _slice,
            # Those of Services with a selector are made from the pods that are watched here anyway.
            {"labelSelector": f"{_MANAGED_BY}!=endpointslice-controller.k8s.io"},
        ),
    )
    ours = tuple(
        Kind(
            name,
            _path(kind.api_version, kind.plural),
            functools.partial(_validated, name),
            required=kind.api_version.startswith("meshagent.io/"),
            definition=f"{kind.plural}.{kind.api_version.partition('/')[0]}",
        )
        for name, kind in sorted(kinds().items())
        if name not in _BY_HAND
    )
    return core + ours
