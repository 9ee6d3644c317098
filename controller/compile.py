"""Validated objects into the workload model of meshapi/discovery.proto. Pure: called by `controller.mesh` after every change.

References that do not resolve are no errors here: they become `Backend.invalid` or protect nothing, and are reported as conditions.
"""

from __future__ import annotations

import calendar
import datetime as dt
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from controller import authentication, authorization, endpoints, externals, protocols, routerules, routes, telemetry, traffic
from controller.conflicts import virtual_addresses, workload_addresses
from controller.gateways import CONTROLLER, Ingress, Known
from controller.jwks import Fetched
from controller.objects import (
    ACCELERATION_LABEL,
    BALANCING_ANNOTATION,
    DEFAULT_POLICY_LABEL,
    EGRESS_ANNOTATION,
    FAIL_MODE_ANNOTATION,
    MODE_LABEL,
    ROOT_NAMESPACE,
    WAYPOINT_ANNOTATION,
    ZONE_LABEL,
    Key,
    Object,
    is_namespace_wide,
)
from controller.secrets import Pair
from meshapi import discovery_pb2 as pb

DEFAULT_DENY: Final = "(default-deny)"
"""Name of the policy that stands for meshagent.io/default-policy: deny; no object can have it."""
DEFAULT_MTLS: Final = "PERMISSIVE"
DEFAULT_AFFINITY_S: Final = 10800  # ClientIPConfig.timeoutSeconds left out (Service v1)
_DISTRIBUTIONS: Final = {"PreferClose": "PreferSameZone"}  # the old name (KEP-3015)
_BALANCING: Final = {"random": ""}
_NAMES_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Condition:
    """One line of an object's status, in Kubernetes' words."""

    type: str
    status: bool
    reason: str
    message: str

    def json(self) -> dict[str, str]:
        """Return it as it stands in `status.conditions`."""
        return {"type": self.type, "status": "True" if self.status else "False", "reason": self.reason, "message": self.message}


@dataclass(slots=True)
class Compiled:
    """The model by resource name, and what is to be said about each object."""

    entities: dict[str, pb.Entity] = field(default_factory=dict)
    conditions: dict[Key, list[Condition]] = field(default_factory=lambda: defaultdict(list))
    status: dict[Key, dict[str, Any]] = field(default_factory=dict)
    """What else stands in an object's status: of Gateways and of routes attached to them."""
    certificates: dict[str, dict[str, Pair]] = field(default_factory=dict, repr=False)
    """Of gateways, by node and by the name of the Secret. No part of the model."""
    pairs: dict[str, Pair] = field(default_factory=dict, repr=False)
    """The same of every node, and of gateways that have none just now."""
    awaited: list[float] = field(default_factory=list)
    """When certificates of gateways begin to hold that do not yet, Unix seconds."""


@dataclass(slots=True)
class _World:
    """Indexes over the objects, made once per compilation."""

    objects: Mapping[Key, Object]
    authority: bool
    services: dict[str, Object] = field(default_factory=dict)
    workloads: list[Object] = field(default_factory=list)
    slices: Mapping[str, list[Object]] = field(default_factory=dict)  # service -> EndpointSlices of it
    ports: dict[tuple[str, str], list[pb.PortMapping]] = field(default_factory=dict)  # service, workload -> where the service leads there
    members: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # namespace -> workloads
    enrolled: set[str] = field(default_factory=set)  # workloads in the mesh
    backing: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # service -> workloads
    backed: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # workload -> services
    policies: dict[str, list[Object]] = field(
        default_factory=lambda: defaultdict(list)
    )  # workload in the mesh -> policies; outside none holds, not for callers in it either
    service_policies: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # service -> policies that name it
    egress: str = "allow"  # where no Namespace says otherwise
    external_policies: dict[str, list[Object]] = field(
        default_factory=lambda: defaultdict(list)
    )  # ExternalService -> policies that name it
    authentications: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # workload -> RequestAuthentications
    service_authentications: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # service -> those that name it
    keys: Mapping[str, Fetched] = field(default_factory=dict)  # URI -> keys of token issuers
    mtls: dict[str, Object] = field(default_factory=dict)  # workload or namespace -> the PeerAuthentication that decides for it
    routes: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))  # service -> (port or 0, "KIND NS/NAME")
    grpc: set[tuple[str, int]] = field(default_factory=set)  # service ports that a GRPCRoute says speak gRPC, if nothing else does
    ingress: Ingress = field(default_factory=lambda: Ingress({}, (), dt.datetime.min.replace(tzinfo=dt.timezone.utc)))
    traffic: dict[traffic.Port, str] = field(default_factory=dict)  # service and port -> the TrafficPolicy that decides for it

    def of(self, kind: str) -> list[Object]:
        return [self.objects[key] for key in sorted(key for key in self.objects if key.kind == kind)]


def compile_model(
    objects: Mapping[Key, Object],
    *,
    authority: bool = False,
    keys: Mapping[str, Fetched] | None = None,
    egress: str = "allow",
    now: float | None = None,
    known: Known | None = None,
) -> Compiled:
    """Return the workload model of `objects`; the same objects always give the same bytes, as long as certificates of gateways hold at `now` (Unix s).

    `authority` says that this controller gives workloads certificates; without them there is no mutual TLS, whatever objects ask for. `keys` are those that
    RequestAuthentications name by URI. `egress` is "allow" or "deny", for namespaces that do not say. `known` is about Secrets of gateways.
    """
    world, out = _World(objects, authority, keys=keys or {}, egress=egress), Compiled()
    world.slices = endpoints.by_service(world.of("EndpointSlice"))
    _index_backing(world, out)
    _index_policies(world, out)
    _index_authentications(world, out)
    _index_mtls(world, out)
    enrolled = [workload for workload in world.workloads if workload.key.qualified in world.enrolled]
    world.ingress = Ingress(objects, enrolled, dt.datetime.fromtimestamp(time.time() if now is None else now, dt.timezone.utc), known)
    _index_routes(world, out)
    _gateways(world, out)
    _index_traffic(world, out)
    _telemetry(world, out)
    for name, service in world.services.items():
        message = _service(world, name, service)
        out.entities[f"service/{name}"] = pb.Entity(service=message)
        out.conditions[service.key].append(_accepted())
        if wrong := _not_at_the_waypoint(service, message.ports):
            out.conditions[service.key].append(wrong)
    for workload in world.workloads:
        out.entities[f"workload/{workload.key.qualified}"] = pb.Entity(workload=_workload(world, out, workload))
        out.conditions[workload.key].append(_accepted())
    _externals(world, out)
    for namespace in world.of("Namespace"):
        out.conditions[namespace.key].append(_accepted())
        if namespace.labels.get(DEFAULT_POLICY_LABEL) == "deny":
            name = namespace.key.name
            # An ALLOW policy that matches nothing denies all that no other ALLOW policy allows.
            policy = pb.Policy(namespace=name, name=DEFAULT_DENY, action=pb.Policy.ALLOW)
            out.entities[f"policy/{name}/{DEFAULT_DENY}"] = pb.Entity(policy=policy)
    return out


def _externals(world: _World, out: Compiled) -> None:
    items = world.of(externals.KIND)
    taken = {address for workload in world.workloads for address in workload_addresses(workload)}
    ipv6 = any(":" in address for address in taken)
    taken |= {address for service in world.services.values() for address in virtual_addresses(service)}
    found = externals.compile_externals(items, externals.Known(frozenset(taken), world.services, ipv6, world.external_policies), _created)
    out.entities |= {f"service/{name}": pb.Entity(service=service) for name, service in found.services.items()}
    for key, conditions_ in found.conditions.items():
        out.conditions[key] += [Condition(*one) for one in conditions_]


def _accepted(message: str = "in force") -> Condition:
    return Condition("Accepted", True, "Accepted", message)


def _selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in selector.items())


def _index_backing(world: _World, out: Compiled) -> None:
    pods = world.of("Pod")
    hosts = [pod for pod in pods if pod.spec.get("hostNetwork")]
    world.workloads = [*_apart(world, out), *(pod for pod in pods if not pod.spec.get("hostNetwork"))]
    by_label: dict[tuple[str, str, str], list[Object]] = defaultdict(list)
    for workload in world.workloads:
        world.members[workload.key.namespace].append(workload)
        if _is_enrolled(world, workload):
            world.enrolled.add(workload.key.qualified)
    for workload in (*world.workloads, *hosts):
        for name, value in workload.labels.items():
            by_label[workload.key.namespace, name, value].append(workload)
    taken = {address for service in world.of("Service") for address in virtual_addresses(service)}
    standins = endpoints.StandIns(world.workloads, hosts, taken)
    for service in world.of("Service"):
        name = service.key.qualified
        world.services[name] = service
        for holder, mapped in _endpoints(world, service, by_label, standins):
            ports = [
                pb.PortMapping(service_port=port["port"], target_port=target, protocol=port.get("protocol", "TCP"))
                for port in sorted(service.spec["ports"], key=lambda one: (one["port"], one.get("protocol", "TCP")))
                if (target := mapped(port)) is not None
            ]
            slot = (name, holder.key.qualified)
            if ports and slot not in world.ports:
                world.backing[name].append(holder)
                world.backed[holder.key.qualified].append(service)
            known = {(one.service_port, one.protocol) for one in world.ports.get(slot, ())}
            if ports:
                world.ports[slot] = [*world.ports.get(slot, ()), *(one for one in ports if (one.service_port, one.protocol) not in known)]
    world.workloads += standins.made()


def _endpoints(
    world: _World, service: Object, by_label: Mapping[tuple[str, str, str], list[Object]], standins: endpoints.StandIns
) -> Iterator[tuple[Object, endpoints.Targets]]:
    """Yield who stands behind a service, and how its ports are mapped there."""
    selector = service.spec.get("selector")
    if not selector:
        yield from standins.of_slices(world.slices.get(service.key.qualified, ()))
        return
    # Only workloads with the rarest of the wanted labels can match: not every service against every workload.
    candidates = min((by_label.get((service.key.namespace, name, value), []) for name, value in selector.items()), key=len)
    for workload in candidates:
        if _selects(selector, workload.labels) and (holder := standins.holder(workload)) is not None:
            yield holder, endpoints.targets_at(workload)


def _apart(world: _World, out: Compiled) -> list[Object]:
    """The Workloads that no Pod has the name of."""
    found = []
    for item in world.of("Workload"):
        if Key("Pod", item.key.namespace, item.key.name) in world.objects:
            message = "a Pod of its namespace has its name, which would be one workload in policies, metrics and traces: rename it"
            out.conditions[item.key].append(Condition("Accepted", False, "NameTaken", message))
        else:
            found.append(item)
    return found


def _is_enrolled(world: _World, workload: Object) -> bool:
    """Is it in the mesh? A Workload is there to be, unless it says otherwise; a Pod is if it, or its Namespace, says so."""
    mode = _inherited(world, workload, MODE_LABEL)
    return mode == "mesh" if workload.key.kind == "Pod" else bool(workload.spec.get("networkNamespace")) and mode != "none"


def _index_policies(world: _World, out: Compiled) -> None:
    for policy in world.of("AuthorizationPolicy"):
        out.entities[f"policy/{policy.key.qualified}"] = pb.Entity(policy=authorization.message(policy))
        protected, unresolved = _selected(world, policy)
        for name in protected & world.enrolled:
            world.policies[name].append(policy)
        for service in _target_services(policy):
            world.service_policies[service].append(policy)
        outside = _target_externals(policy)
        for name in outside:
            world.external_policies[name].append(policy)
        conditions = out.conditions[policy.key]
        conditions.append(_accepted("in force" if outside or world.enrolled & protected else "valid"))
        conditions += unresolved
        if (protected or not (unresolved or outside)) and (wrong := _unenforced(world, protected, "its namespace")):
            conditions.append(wrong)


def _index_authentications(world: _World, out: Compiled) -> None:
    for item in world.of("RequestAuthentication"):
        out.entities[f"authentication/{item.key.qualified}"] = pb.Entity(authentication=authentication.entity(item, world.keys))
        selected, unresolved = _selected(world, item)
        for name in selected & world.enrolled:
            world.authentications[name].append(item)
        for service in _target_services(item):
            world.service_authentications[service].append(item)
        conditions = out.conditions[item.key]
        conditions.append(_accepted("in force" if world.enrolled & selected else "valid"))
        conditions += unresolved
        wrong = _unenforced(world, selected, "its namespace") if selected or not unresolved else None
        if portless := sorted(name for name in selected if not _token_ports(world, name)):
            reason, message = "NoHTTPPort", f"tokens are not looked at where no HTTP port of a Service leads: {_names(portless)}"
            wrong = Condition("Enforced", False, wrong.reason if wrong else reason, f"{wrong.message}; {message}" if wrong else message)
        if wrong:
            conditions.append(wrong)
        reason, message = authentication.problems(item, world.keys)
        if reason:
            conditions.append(Condition("KeysCurrent", False, reason, message))


def _token_ports(world: _World, workload: str) -> set[int]:
    """Target ports of a workload that its RequestAuthentications are about: what its services do not declare to speak something else than HTTP."""
    found = set()
    for service in world.backed[workload]:
        http = {port["port"] for port in service.spec["ports"] if _may_be_http(port)}
        mapped = world.ports[service.key.qualified, workload]
        found |= {one.target_port for one in mapped if one.protocol == "TCP" and one.service_port in http}
    return found


def _may_be_http(port: Mapping[str, Any]) -> bool:
    return port.get("protocol", "TCP") == "TCP" and (protocols.declared(port).lower() or "http") in protocols.HTTP


def _target_services(item: Object) -> list[str]:
    references = (reference for reference in item.spec.get("targetRefs", ()) if reference["kind"] == "Service")
    return [f"{item.key.namespace}/{reference['name']}" for reference in references]


def _target_externals(item: Object) -> list[str]:
    references = (reference for reference in item.spec.get("targetRefs", ()) if reference["kind"] == externals.KIND)
    return [f"{item.key.namespace}/{reference['name']}" for reference in references]


def _selected(world: _World, item: Object) -> tuple[set[str], list[Condition]]:
    """Return the workloads that an object's targetRefs or selector choose, and what is to be said about targets that are not there."""
    if "targetRefs" not in item.spec:
        labels = item.spec.get("selector", {}).get("matchLabels", {})
        members = world.members.get(item.key.namespace, ())
        return {workload.key.qualified for workload in members if _selects(labels, workload.labels)}, []
    services = _target_services(item)
    missing = [f"Service {service}" for service in services if service not in world.services]
    missing += [
        f"{externals.KIND} {name}" for name in _target_externals(item) if Key(externals.KIND, *name.split("/")) not in world.objects
    ]
    message = f"there is no {', no '.join(missing)}: nothing is protected there"
    return (
        {workload.key.qualified for service in services for workload in world.backing.get(service, ())},
        [Condition("ResolvedRefs", False, "TargetNotFound", message)] if missing else [],
    )


def _index_mtls(world: _World, out: Compiled) -> None:
    """Find the PeerAuthentication that decides for each workload, namespace and, as that of ROOT_NAMESPACE, the mesh: the oldest.

    https://istio.io/latest/docs/reference/config/security/peer_authentication/; what comes too late says so as Gateway API's policies do
    (https://gateway-api.sigs.k8s.io/geps/gep-713/, Conflicted).
    """
    for item in sorted(world.of("PeerAuthentication"), key=_created):
        selected, unresolved = _selected(world, item)
        wide, where = is_namespace_wide(item.spec), "its namespace"
        if wide and item.key.namespace == ROOT_NAMESPACE:
            selected, where = {workload.key.qualified for workload in world.workloads}, "the mesh"
        scopes = [item.key.namespace] if wide else sorted(selected)
        lost: dict[str, list[str]] = defaultdict(list)
        for scope in scopes:
            if (holder := world.mtls.setdefault(scope, item)) is not item:
                lost[holder.key.qualified].append(scope)
        conditions = out.conditions[item.key]
        beaten = bool(scopes) and sum(map(len, lost.values())) == len(scopes)
        if not beaten:
            decided = selected.difference(*lost.values())
            conditions.append(_accepted("in force" if world.authority and world.enrolled & decided else "valid"))
        if lost:
            words = (f"PeerAuthentication {holder} decides for {where if wide else _names(held)}" for holder, held in lost.items())
            message = f"{'; '.join(words)}: the oldest counts, by creationTimestamp (without one it is the oldest), then by name"
            conditions.append(Condition("Accepted" if beaten else "Uncontested", False, "Conflicted", message))
        conditions += unresolved
        if not world.authority:
            conditions.append(_NO_AUTHORITY)
        elif not beaten and (selected or not unresolved) and (wrong := _unenforced(world, selected, where)):
            conditions.append(wrong)


def _index_traffic(world: _World, out: Compiled) -> None:
    """Find the TrafficPolicy of each service port, and say what became of those that lost or whose target is not there."""
    policies = sorted(world.of("TrafficPolicy"), key=_created)
    found = traffic.attach(policies, world.services)
    for policy in policies:
        name, attached = policy.key.qualified, found[policy.key.qualified]
        conditions = out.conditions[policy.key]
        for port in attached.ports:
            world.traffic[port] = name
        if attached.ports:
            out.entities[f"traffic/{name}"] = pb.Entity(traffic=traffic.message(policy, attached.ports))
            conditions.append(_accepted())
        if attached.lost:
            words = "; ".join(f"TrafficPolicy {holder} decides for {_names(held)}" for holder, held in attached.lost.items())
            message = f"{words}: who names the port goes first, then the oldest, by creationTimestamp (without one it is the oldest), then by name"
            conditions.append(Condition("Uncontested" if attached.ports else "Accepted", False, "Conflicted", message))
        if attached.missing:
            beaten = not attached.ports and not attached.lost
            conditions.append(Condition("Accepted" if beaten else "ResolvedRefs", False, "TargetNotFound", "; ".join(attached.missing)))


def _telemetry(world: _World, out: Compiled) -> None:
    """Find the Telemetry of each Service, namespace and, as that of ROOT_NAMESPACE, the mesh, and say what became of the others."""
    items = sorted(world.of(telemetry.KIND), key=_created)
    attached = telemetry.attach(items, world.services)
    for item in items:
        name, found = item.key.qualified, attached[item.key.qualified]
        conditions = out.conditions[item.key]
        if found.scopes:
            entity, wrong = telemetry.message(item, found.scopes, world.objects, world.ingress.grants)
            out.entities[f"telemetry/{name}"] = pb.Entity(telemetry=entity)
            conditions.append(_accepted())
            if wrong:
                conditions.append(Condition("ResolvedRefs", False, *wrong))
        if found.lost:
            words = "; ".join(f"Telemetry {holder} decides for {_names(held)}" for holder, held in found.lost.items())
            message = f"{words}: the oldest counts, by creationTimestamp (without one it is the oldest), then by name"
            conditions.append(Condition("Uncontested" if found.scopes else "Accepted", False, "Conflicted", message))
        if found.missing:
            beaten = not found.scopes and not found.lost
            conditions.append(Condition("Accepted" if beaten else "TargetsResolved", False, "TargetNotFound", "; ".join(found.missing)))


_NO_AUTHORITY: Final = Condition(
    "Enforced",
    False,
    "NoCertificateAuthority",
    "has no effect: this controller gives workloads no certificates, nothing is encrypted; run mesh-controller with --ca-directory",
)


def _unenforced(world: _World, selected: set[str], where: str) -> Condition | None:
    """Say where a policy is not enforced although it is valid: outside the mesh nobody can."""
    if not selected:
        return Condition("Enforced", False, "NothingSelected", f"selects no workload of {where}: nothing is protected")
    outside = sorted(selected - world.enrolled)
    if not outside:
        return None
    return Condition(
        "Enforced",
        False,
        "NotEnrolled" if len(outside) == len(selected) else "PartlyEnrolled",
        f"nothing enforces it for {_names(outside)}: not in the mesh; "
        f"to enroll a Pod label it, or its Namespace, {MODE_LABEL}: mesh; a Workload needs spec.networkNamespace and no label {MODE_LABEL}: none",
    )


def _names(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


def _inherited(world: _World, workload: Object, label: str) -> str:
    """Value of a label of the workload or else of its Namespace; "" if neither has it."""
    namespace = world.objects.get(Key("Namespace", "", workload.key.namespace))
    return workload.labels.get(label) or (namespace.labels.get(label, "") if namespace else "")


def _workload(world: _World, out: Compiled, workload: Object) -> pb.Workload:
    spec, name = workload.spec, workload.key.qualified
    namespace = world.objects.get(Key("Namespace", "", workload.key.namespace))
    node = world.objects.get(Key("Node", "", spec["node"]))
    enrolled = name in world.enrolled
    policies = {policy.key.qualified for policy in world.policies[name]}
    if enrolled and namespace and namespace.labels.get(DEFAULT_POLICY_LABEL) == "deny":
        policies.add(f"{workload.key.namespace}/{DEFAULT_DENY}")
    if world.authentications[name] and (ports := _token_ports(world, name)):
        guard = authentication.guard(workload.key.namespace, ports)
        out.entities.setdefault(f"policy/{guard.namespace}/{guard.name}", pb.Entity(policy=guard))
        policies.add(f"{guard.namespace}/{guard.name}")
    acceleration = _inherited(world, workload, ACCELERATION_LABEL)
    mtls, mtls_ports = _mtls(world, workload) if enrolled and world.authority else ("DISABLE", {})
    return pb.Workload(
        namespace=workload.key.namespace,
        name=workload.key.name,
        service_account=spec.get("serviceAccount", "default"),
        node=spec["node"],
        labels=dict(workload.labels),
        addresses=workload_addresses(workload),
        network_namespace=spec.get("networkNamespace", ""),
        pod_uid=spec.get("podUid", ""),
        enrolled=enrolled,
        ready=spec.get("ready", True),
        backing=[pb.Backing(service=found, ports=world.ports[found, name]) for found in (one.key.qualified for one in world.backed[name])],
        policies=sorted(policies),
        zone=spec.get("zone") or workload.labels.get(ZONE_LABEL) or (node.labels.get(ZONE_LABEL, "") if node else ""),
        weight=spec.get("weight", 1),
        acceleration="" if acceleration == "disabled" else acceleration,
        mtls=_MODES[mtls],
        mtls_ports=[pb.PortMtls(port=port, mode=_MODES[mode]) for port, mode in sorted(mtls_ports.items())],
        authentications=sorted(item.key.qualified for item in world.authentications[name]),
        probe_ports=spec.get("probePorts", ()) if enrolled else (),
        egress_deny=enrolled and (namespace.annotations.get(EGRESS_ANNOTATION, world.egress) if namespace else world.egress) == "deny",
    )


_MODES: Final = {"DISABLE": pb.Workload.DISABLE, "PERMISSIVE": pb.Workload.PERMISSIVE, "STRICT": pb.Workload.STRICT}


def _mtls(world: _World, workload: Object) -> tuple[str, dict[int, str]]:
    """Return the mode of a workload, which is the most specific one that is set, and those of its ports that differ."""
    own, namespace = workload.key.qualified, workload.key.namespace
    specs = [world.mtls[scope].spec for scope in (own, namespace, ROOT_NAMESPACE) if scope in world.mtls]
    modes = (spec.get("mtls", {}).get("mode", "UNSET") for spec in specs)
    mode = next((found for found in modes if found != "UNSET"), DEFAULT_MTLS)
    ports = world.mtls[own].spec.get("portLevelMtls", {}) if own in world.mtls else {}
    wished = {int(port): entry.get("mode", "UNSET") for port, entry in ports.items()}
    for port in world.ingress.ports(workload):
        if wished.get(port, "UNSET") in {"STRICT", "UNSET"} and (mode == "STRICT" or wished.get(port) == "STRICT"):
            wished[port] = "PERMISSIVE"
    return mode, {port: found for port, found in wished.items() if found not in {"UNSET", mode}}


def _targets(world: _World, service: Object, port: Mapping[str, Any]) -> set[int]:
    """Where a port of a service leads: one target port, or by a name several, as its workloads have it."""
    target = port.get("targetPort") or port["port"]
    if isinstance(target, int) and service.spec.get("selector"):
        return {target}
    name, slot = service.key.qualified, (port["port"], port.get("protocol", "TCP"))
    mapped = (one for holder in world.backing[name] for one in world.ports[name, holder.key.qualified])
    return {one.target_port for one in mapped if (one.service_port, one.protocol) == slot} or (
        {target} if isinstance(target, int) else set()
    )


def _service(world: _World, name: str, service: Object) -> pb.Service:
    protecting: dict[str, Object] = {policy.key.qualified: policy for policy in world.service_policies[name]}
    for workload in world.backing[name]:
        protecting.update((policy.key.qualified, policy) for policy in world.policies[workload.key.qualified])
    policies = [protecting[policy] for policy in sorted(protecting)]
    named = {item.key.qualified for item in world.service_authentications[name]}
    named.update(item.key.qualified for workload in world.backing[name] for item in world.authentications[workload.key.qualified])
    ports = []
    for port in service.spec["ports"]:
        waypoint, reason = _level(world.routes[name], policies, service, port, _targets(world, service, port))
        if not waypoint and named and _may_be_http(port):
            waypoint, reason = True, f"RequestAuthentication {min(named)}"
        if not waypoint and port.get("protocol", "TCP") == "TCP" and (policy := world.traffic.get((name, port["port"]))):
            waypoint, reason = True, f"TrafficPolicy {policy}"
        is_grpc = not {(name, port["port"]), (name, 0)}.isdisjoint(world.grpc)
        ports.append(
            pb.ServicePort(
                port=port["port"],
                name=port.get("name", ""),
                protocol=port.get("protocol", "TCP"),
                app_protocol=protocols.spoken(port) or ("grpc" if is_grpc and port.get("protocol", "TCP") == "TCP" else ""),
                waypoint=waypoint,
                reason=reason,
            )
        )
    distribution, balancing = service.spec.get("trafficDistribution", ""), service.annotations.get(BALANCING_ANNOTATION, "")
    return pb.Service(
        namespace=service.key.namespace,
        name=service.key.name,
        addresses=virtual_addresses(service),
        ports=ports,
        traffic_distribution=_DISTRIBUTIONS.get(distribution, distribution),
        affinity_s=_affinity(service.spec),
        load_balancing=_BALANCING.get(balancing, balancing),
        fail_open=service.annotations.get(FAIL_MODE_ANNOTATION) == "open",
    )


def _affinity(spec: Mapping[str, Any]) -> int:
    if spec.get("sessionAffinity", "None") == "None":
        return 0
    seconds: int = spec.get("sessionAffinityConfig", {}).get("clientIP", {}).get("timeoutSeconds", DEFAULT_AFFINITY_S)
    return seconds


def _not_at_the_waypoint(service: Object, ports: Iterable[pb.ServicePort]) -> Condition | None:
    """Say which wishes of a service hold on its L4 ports only: the waypoint balances requests, not connections."""
    wishes = []
    if _affinity(service.spec):
        wishes.append("spec.sessionAffinity")
    if service.annotations.get(BALANCING_ANNOTATION):
        wishes.append(f"annotation {BALANCING_ANNOTATION}")
    names = ", ".join(str(port.port) for port in ports if port.waypoint)
    if not wishes or not names:
        return None
    message = f"{' and '.join(wishes)} hold for connections; ports that are L7 are balanced by request, to the less busy endpoint: {names}"
    return Condition("BalancedAsWished", False, "BalancedByRequest", message)


def _level(
    routes: Iterable[tuple[int, str]], policies: Iterable[Object], service: Object, port: Mapping[str, Any], targets: Iterable[int]
) -> tuple[bool, str]:
    """Decide whether a port, which leads to `targets`, is L7, and say why in words."""
    if port.get("protocol", "TCP") != "TCP":
        return False, "UDP is never L7"
    app_protocol = protocols.declared(port)
    is_http = app_protocol.lower() in protocols.HTTP
    for wanted, route in routes:
        # A route for every port does not turn a port that is declared to speak something else (redis, tls) into HTTP.
        if wanted == port["port"] or (wanted == 0 and (is_http or not app_protocol)):
            return True, route
    for policy in policies:
        if any(authorization.needs_request(rule, target) for rule in policy.spec.get("rules", []) for target in targets):
            return True, f"AuthorizationPolicy {policy.key.qualified} has HTTP rules"
    if service.annotations.get(WAYPOINT_ANNOTATION) == "true":
        if is_http:
            return True, f"annotation {WAYPOINT_ANNOTATION} and appProtocol {app_protocol}"
        return False, f"annotation {WAYPOINT_ANNOTATION} has no effect without appProtocol http, h2c or grpc"
    return False, "no L7 feature is used"


def _index_routes(world: _World, out: Compiled) -> None:
    attached = routes.attach({kind: world.of(kind) for kind in routes.KINDS}, world.services, _created)
    for route in sorted((route for kind in routes.KINDS for route in world.of(kind)), key=lambda one: (_created(one), one.key.qualified)):
        attached[route.key].ingress = world.ingress.attach(route)
    world.grpc = routes.spoken_grpc(world.of("GRPCRoute"), attached)
    resolver = routes.Resolver(
        world.services, {item.key.qualified: item for item in world.of("CallerMatch")}, world.grpc, authorization.source_message
    )
    for item in world.of("CallerMatch"):
        out.conditions[item.key].append(_accepted("valid"))
    for route in (route for kind in routes.KINDS for route in world.of(kind)):
        found = attached[route.key]
        for service, port in found.parents:
            world.routes[service].append((port, str(route.key)))
        _route(resolver, out, route, found, world.ingress)


def _gateways(world: _World, out: Compiled) -> None:
    for gateway, entity, said, status in world.ingress.results(workload_addresses):
        out.entities[f"gateway/{gateway.key.qualified}"] = pb.Entity(gateway=entity)
        out.conditions[gateway.key] += [Condition(*one) for one in said]
        out.status[gateway.key] = status
    out.certificates, out.pairs, out.awaited = world.ingress.certificates(), world.ingress.pairs(), world.ingress.awaited
    for item in (*world.of("Secret"), *world.of("ReferenceGrant")):
        out.conditions[item.key].append(_accepted("valid"))


def _route(resolver: routes.Resolver, out: Compiled, route: Object, found: routes.Attached, ingress: Ingress) -> None:
    conditions = out.conditions[route.key]
    holds = bool(found.parents or found.ingress.parents)
    if holds:
        conditions.append(_accepted())
    if problems := [*found.wrong, *found.ingress.wrong]:
        kind = "ParentsResolved" if holds else "Accepted"
        conditions.append(Condition(kind, False, problems[0][0], routes.texts(problems)))
    wrong: list[tuple[str, str]] = []
    rules = [routerules.message(resolver, route, index, rule, wrong) for index, rule in enumerate(route.spec.get("rules", [{}]))]
    denied = ingress.denied(route) if found.ingress.parents else []
    wrong += [
        ("RefNotPermitted", f"no ReferenceGrant lets gateways send requests of {route.key} to Service {name}: they are answered with 500")
        for name in denied
    ]
    if wrong:
        conditions.append(Condition("ResolvedRefs", False, routes.reason(wrong), routes.texts(sorted(wrong))))
    else:
        conditions.append(Condition("ResolvedRefs", True, "ResolvedRefs", "every backend is known"))
    if said_of_parents := [*found.status, *found.ingress.status]:
        out.status[route.key] = {
            "parents": [
                {"parentRef": dict(reference), "controllerName": CONTROLLER, "conditions": [said.json(), conditions[-1].json()]}
                for reference, said in said_of_parents
            ]
        }
    if route.spec.get("hostnames") and (found.parents or not found.ingress.status):
        message = "spec.hostnames do nothing in routes for Services (GEP-1294): match the header Host instead"
        conditions.append(Condition("HostnamesApplied", False, "Ignored", message))
    if holds:
        is_grpc = route.key.kind == "GRPCRoute"
        name = f"{route.key.name}:grpc" if is_grpc else route.key.name
        entity = pb.Route(
            namespace=route.key.namespace,
            name=name,
            parents=[*(pb.Parent(service=service, port=port) for service, port in found.parents), *found.ingress.parents],
            rules=rules,
            created=_created(route),
            grpc=is_grpc,
            not_from_gateways=denied,
        )
        out.entities[f"route/{route.key.namespace}/{name}"] = pb.Entity(route=entity)


def _created(item: Object) -> int:
    """Unix seconds of an RFC 3339 time in UTC, as Kubernetes writes it; 0 for anything else."""
    timestamp = item.metadata.get("creationTimestamp") or ""
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", timestamp):
        return 0
    try:
        return calendar.timegm(time.strptime(timestamp, "%Y-%m-%dT%H:%M:%SZ"))
    except ValueError:
        return 0
