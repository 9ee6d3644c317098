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
from controller.choosers import Choice, Choosers
from controller.conflicts import virtual_addresses, workload_addresses
from controller.gateways import CONTROLLER, ConditionType, Ingress, Known
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

    type: ConditionType
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
class World:
    """Indexes over the objects; `controller.recompile` changes those of pods, and nobody else changes any after a compilation."""

    objects: Mapping[Key, Object]
    authority: bool
    kinds: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # kind -> objects, in order of their keys
    services: dict[str, Object] = field(default_factory=dict)
    choosers: Choosers = field(default_factory=lambda: Choosers(()))  # Services and policies with a selector
    targeting: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # service -> policies that name it
    workloads: dict[str, Object] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)  # addresses that not only workloads say something of
    ports: dict[tuple[str, str], list[pb.PortMapping]] = field(default_factory=dict)  # service, workload -> where the service leads there
    mappings: dict[tuple[tuple[int, str, int], ...], list[pb.PortMapping]] = field(default_factory=dict)  # all that there are in `ports`
    enrolled: set[str] = field(default_factory=set)  # workloads in the mesh
    backing: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # service -> workloads
    backed: dict[str, dict[str, Object]] = field(default_factory=dict)  # workload -> services
    policies: dict[str, list[Object]] = field(default_factory=dict)  # workload in the mesh -> AuthorizationPolicies
    egress: str = "allow"  # where no Namespace says otherwise
    external_policies: dict[str, list[Object]] = field(
        default_factory=lambda: defaultdict(list)
    )  # ExternalService -> policies that name it
    authentications: dict[str, list[Object]] = field(default_factory=dict)  # workload in the mesh -> RequestAuthentications
    guards: dict[str, str] = field(default_factory=dict)  # workload -> name of the entity that has its requests looked at
    keys: Mapping[str, Fetched] = field(default_factory=dict)  # URI -> keys of token issuers
    selected: dict[Key, set[str]] = field(default_factory=dict)  # policy of any kind -> workloads
    mtls: dict[str, Object] = field(default_factory=dict)  # workload or namespace -> the PeerAuthentication that decides for it
    routes: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))  # service -> (port or 0, "KIND NS/NAME")
    grpc: set[tuple[str, int]] = field(default_factory=set)  # service ports that a GRPCRoute says speak gRPC, if nothing else does
    ingress: Ingress = field(default_factory=lambda: Ingress({}, (), dt.datetime.min.replace(tzinfo=dt.timezone.utc)))
    traffic: dict[traffic.Port, str] = field(default_factory=dict)  # service and port -> the TrafficPolicy that decides for it

    def of(self, kind: str) -> list[Object]:
        """Return the objects of a kind, in order of their keys."""
        return self.kinds.get(kind, [])


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
    return compile_world(World(objects, authority, keys=keys or {}, egress=egress), now, known)


def compile_world(world: World, now: float | None = None, known: Known | None = None) -> Compiled:
    """Fill the indexes of a new world, and return the model."""
    out = Compiled()
    for key in sorted(world.objects):
        world.kinds[key.kind].append(world.objects[key])
    _index_workloads(world, out)
    enrolled = [workload for name, workload in world.workloads.items() if name in world.enrolled]
    world.ingress = Ingress(world.objects, enrolled, dt.datetime.fromtimestamp(time.time() if now is None else now, dt.timezone.utc), known)
    _index_routes(world, out)
    _gateways(world, out)
    _index_traffic(world, out)
    _telemetry(world, out)
    for policy in world.of("AuthorizationPolicy"):
        out.entities[f"policy/{policy.key.qualified}"] = pb.Entity(policy=authorization.message(policy))
    for item in world.of("RequestAuthentication"):
        out.entities[f"authentication/{item.key.qualified}"] = pb.Entity(authentication=authentication.entity(item, world.keys))
    for policy in (policy for kind in POLICIES for policy in world.of(kind)):
        tell_policy(world, out, policy)
    for name in world.services:
        tell_service(world, out, name)
    for name in world.workloads:
        tell_workload(world, out, name)
    tell_externals(world, out)
    for namespace in world.of("Namespace"):
        out.conditions[namespace.key].append(_accepted())
        if namespace.labels.get(DEFAULT_POLICY_LABEL) == "deny":
            name = namespace.key.name
            # An ALLOW policy that matches nothing denies all that no other ALLOW policy allows.
            policy_ = pb.Policy(namespace=name, name=DEFAULT_DENY, action=pb.Policy.ALLOW)
            out.entities[f"policy/{name}/{DEFAULT_DENY}"] = pb.Entity(policy=policy_)
    return out


def tell_service(world: World, out: Compiled, name: str) -> None:
    """Say in the model what a service is, and of its object what became of it."""
    service = world.services[name]
    message = _service(world, name, service)
    out.entities[f"service/{name}"] = pb.Entity(service=message)
    wrong = _not_at_the_waypoint(service, message.ports)
    out.conditions[service.key] = [_accepted(), *([wrong] if wrong else [])]


def tell_workload(world: World, out: Compiled, name: str) -> None:
    """The same of a workload."""
    workload = world.workloads[name]
    out.entities[f"workload/{name}"] = pb.Entity(workload=_workload(world, out, workload))
    out.conditions[workload.key] = [_accepted()]


def tell_externals(world: World, out: Compiled) -> None:
    """The same of what is outside; its addresses are those that nobody else has."""
    items = world.of(externals.KIND)
    if not items:
        return
    taken = {address for workload in world.workloads.values() for address in workload_addresses(workload)}
    ipv6 = any(":" in address for address in taken)
    taken |= {address for service in world.services.values() for address in virtual_addresses(service)}
    found = externals.compile_externals(items, externals.Known(frozenset(taken), world.services, ipv6, world.external_policies), _created)
    out.entities |= {f"service/{name}": pb.Entity(service=service) for name, service in found.services.items()}
    for key, said in found.conditions.items():
        out.conditions[key] = [Condition(*one) for one in said]


def _accepted(message: str = "in force") -> Condition:
    return _IN_FORCE if message == "in force" else Condition("Accepted", True, "Accepted", message)


def _index_workloads(world: World, out: Compiled) -> None:
    """Find who stands behind which service, and which policies are whose."""
    _index_choosers(world)
    pods = world.of("Pod")
    for workload in (*_apart(world, out), *(pod for pod in pods if not pod.spec.get("hostNetwork"))):
        world.workloads[workload.key.qualified] = workload
    _index_standins(world, [pod for pod in pods if pod.spec.get("hostNetwork")])
    for workload in world.workloads.values():
        enter(world, workload)


def _index_choosers(world: World) -> None:
    """Find Services and policies by what they choose."""
    choices = []
    for service in world.of("Service"):
        world.services[service.key.qualified] = service
        if selector := service.spec.get("selector"):
            choices.append(Choice(service, service.key.namespace, selector))
    for policy in sorted((policy for kind in POLICIES for policy in world.of(kind)), key=_created):
        world.selected[policy.key] = set()
        if "targetRefs" not in policy.spec:
            choices.append(Choice(policy, *_scope(policy)))
        for name in _target_services(policy):
            world.targeting[name].append(policy)
        for name in _target_externals(policy) if policy.key.kind == "AuthorizationPolicy" else ():
            world.external_policies[name].append(policy)
        if policy.key.kind == "PeerAuthentication" and is_namespace_wide(policy.spec):
            world.mtls.setdefault(policy.key.namespace, policy)
    world.choosers = Choosers(choices)


def _index_standins(world: World, hosts: list[Object]) -> None:
    """Make workloads of what has an address and no identity, behind the services that lead there."""
    taken = {address for service in world.services.values() for address in virtual_addresses(service)}
    taken |= externals.claimed(world.of(externals.KIND))
    standins = endpoints.StandIns(world.workloads.values(), hosts, taken)
    slices = endpoints.by_service(world.of("EndpointSlice"))
    for name, service in world.services.items():
        for holder, mapped in () if service.spec.get("selector") else standins.of_slices(slices.get(name, ())):
            _back(world, service, holder, mapped)
    for pod in hosts:
        if (standin := standins.holder(pod)) is not None:
            for service in (one for one in world.choosers.of(pod) if one.key.kind == "Service"):
                _back(world, service, standin, endpoints.targets_at(pod))
    world.shared = standins.asked
    world.workloads |= {one.key.qualified: one for one in standins.made()}


def enter(world: World, workload: Object) -> None:
    """Take a workload into the indexes of everything that chooses it, or a service that it stands behind."""
    name = workload.key.qualified
    if _is_enrolled(world, workload):
        world.enrolled.add(name)
    chosen: dict[Key, Object] = {}
    for one in world.choosers.of(workload):
        if one.key.kind == "Service":
            _back(world, one, workload, endpoints.targets_at(workload))
        else:
            chosen[one.key] = one
    for service in world.backed.get(name, ()):
        chosen |= {policy.key: policy for policy in world.targeting.get(service, ()) if not _foreign(policy, name)}
    for key, policy in chosen.items():
        world.selected[key].add(name)
        if name not in world.enrolled:
            continue  # nobody enforces anything for it, callers in the mesh neither
        if key.kind == "AuthorizationPolicy":
            world.policies.setdefault(name, []).append(policy)
        elif key.kind == "RequestAuthentication":
            world.authentications.setdefault(name, []).append(policy)
    deciding = [one for key, one in chosen.items() if key.kind == "PeerAuthentication" and not is_namespace_wide(one.spec)]
    if deciding:
        world.mtls[name] = min(deciding, key=lambda one: (_created(one), one.key))


def leave(world: World, workload: Object) -> tuple[set[str], set[Key]]:
    """Take a workload out of all indexes; return the services that it stood behind, and the policies that chose it."""
    name = workload.key.qualified
    world.enrolled.discard(name)
    services = set(world.backed.pop(name, ()))
    for service in services:
        world.backing[service].discard(name)
        del world.ports[service, name]
    policies = {key for key, selected in world.selected.items() if name in selected}
    for key in policies:
        world.selected[key].discard(name)
    for index in (world.policies, world.authentications, world.mtls, world.guards):
        index.pop(name, None)
    return services, policies


def _back(world: World, service: Object, holder: Object, mapped: endpoints.Targets) -> None:
    """Let `holder` stand behind a service, with the ports for which it has a target."""
    found = sorted(
        (port["port"], port.get("protocol", "TCP"), target) for port in service.spec["ports"] if (target := mapped(port)) is not None
    )
    if not found:
        return
    name, held = service.key.qualified, holder.key.qualified
    world.backing[name].add(held)
    world.backed.setdefault(held, {})[name] = service
    known = {(one.service_port, one.protocol): one.target_port for one in world.ports.get((name, held), ())}
    slots = *((*slot, target) for slot, target in known.items()), *(one for one in found if one[:2] not in known)
    if slots not in world.mappings:  # of a service's many workloads nearly all have the same
        world.mappings[slots] = [
            pb.PortMapping(service_port=port, protocol=protocol, target_port=target) for port, protocol, target in slots
        ]
    world.ports[name, held] = world.mappings[slots]


def _scope(policy: Object) -> tuple[str, Mapping[str, str]]:
    """The namespace of workloads that a policy without targetRefs chooses, "" for all, and their labels."""
    everywhere = policy.key.kind == "PeerAuthentication" and policy.key.namespace == ROOT_NAMESPACE and is_namespace_wide(policy.spec)
    return "" if everywhere else policy.key.namespace, policy.spec.get("selector", {}).get("matchLabels", {})


def _apart(world: World, out: Compiled) -> list[Object]:
    """The Workloads that no Pod has the name of."""
    found = []
    for item in world.of("Workload"):
        if Key("Pod", item.key.namespace, item.key.name) in world.objects:
            message = "a Pod of its namespace has its name, which would be one workload in policies, metrics and traces: rename it"
            out.conditions[item.key].append(Condition("Accepted", False, "NameTaken", message))
        else:
            found.append(item)
    return found


def _is_enrolled(world: World, workload: Object) -> bool:
    """Is it in the mesh? A Workload is there to be, unless it says otherwise; a Pod is if it, or its Namespace, says so."""
    mode = _inherited(world, workload, MODE_LABEL)
    return mode == "mesh" if workload.key.kind == "Pod" else bool(workload.spec.get("networkNamespace")) and mode != "none"


def tell_policy(world: World, out: Compiled, policy: Object) -> None:
    """Say of the object of a policy of any kind what became of it."""
    out.conditions[policy.key] = list(_TELLERS[policy.key.kind](world, policy))


def _tell_authorization(world: World, policy: Object) -> Iterator[Condition]:
    protected, unresolved = world.selected[policy.key], _unresolved(world, policy)
    outside = _target_externals(policy)
    yield _accepted("in force" if outside or not world.enrolled.isdisjoint(protected) else "valid")
    yield from unresolved
    if (protected or not (unresolved or outside)) and (wrong := _unenforced(world, protected, "its namespace")):
        yield wrong


def _tell_authentication(world: World, item: Object) -> Iterator[Condition]:
    selected, unresolved = world.selected[item.key], _unresolved(world, item)
    yield _accepted("in force" if not world.enrolled.isdisjoint(selected) else "valid")
    yield from unresolved
    wrong = _unenforced(world, selected, "its namespace") if selected or not unresolved else None
    if portless := sorted(name for name in selected if not _token_ports(world, name)):
        reason, message = "NoHTTPPort", f"tokens are not looked at where no HTTP port of a Service leads: {_names(portless)}"
        wrong = Condition("Enforced", False, wrong.reason if wrong else reason, f"{wrong.message}; {message}" if wrong else message)
    if wrong:
        yield wrong
    reason, message = authentication.problems(item, world.keys)
    if reason:
        yield Condition("KeysCurrent", False, reason, message)


def _token_ports(world: World, workload: str) -> set[int]:
    """Target ports of a workload that its RequestAuthentications are about: what its services do not declare to speak something else than HTTP.

    A Service of another namespace leads to it if an EndpointSlice says so, and decides about ports that none of its own leads to.
    """
    own: set[int] = set()
    found: set[int] = set()
    namespace = workload.partition("/")[0]
    for service in sorted(world.backed.get(workload, {}).values(), key=lambda one: one.key.namespace != namespace):
        http = {port["port"] for port in service.spec["ports"] if _may_be_http(port)}
        mapped = {one.service_port: one.target_port for one in world.ports[service.key.qualified, workload] if one.protocol == "TCP"}
        if service.key.namespace == namespace:
            own.update(mapped.values())
            found.update(target for port, target in mapped.items() if port in http)
        else:
            found.update(target for port, target in mapped.items() if port in http and target not in own)
    return found


def _may_be_http(port: Mapping[str, Any]) -> bool:
    return port.get("protocol", "TCP") == "TCP" and (protocols.declared(port).lower() or "http") in protocols.HTTP


_IN_FORCE: Final = Condition("Accepted", True, "Accepted", "in force")


def _target_services(item: Object) -> list[str]:
    references = (reference for reference in item.spec.get("targetRefs", ()) if reference["kind"] == "Service")
    return [f"{item.key.namespace}/{reference['name']}" for reference in references]


def _target_externals(item: Object) -> list[str]:
    references = (reference for reference in item.spec.get("targetRefs", ()) if reference["kind"] == externals.KIND)
    return [f"{item.key.namespace}/{reference['name']}" for reference in references]


def _unresolved(world: World, item: Object) -> list[Condition]:
    """What is to be said about targets that are not there, or that lead to workloads about which the object may not decide."""
    missing = [f"Service {service}" for service in _target_services(item) if service not in world.services]
    missing += [
        f"{externals.KIND} {name}" for name in _target_externals(item) if Key(externals.KIND, *name.split("/")) not in world.objects
    ]
    message = f"there is no {', no '.join(missing)}: nothing is protected there"
    conditions = [Condition("ResolvedRefs", False, "TargetNotFound", message)] if missing else []
    behind = {workload for service in _target_services(item) for workload in world.backing.get(service, ())}
    if foreign := sorted(workload for workload in behind if _foreign(item, workload)):
        message = (
            f"behind its Services are workloads of other namespaces, which EndpointSlices name, and about which only their own namespaces' objects decide: "
            f"{_names(foreign)}"
        )
        conditions.append(Condition("SelectedInItsNamespace", False, "OtherNamespace", message))
    return conditions


def _foreign(policy: Object, workload: str) -> bool:
    """Is it a workload of a namespace about which the policy has nothing to say, although its Service leads there?"""
    return workload.partition("/")[0] not in {policy.key.namespace, *endpoints.STAND_INS}


def _tell_mtls(world: World, item: Object) -> Iterator[Condition]:
    """A PeerAuthentication decides for each workload, namespace and, in ROOT_NAMESPACE, the mesh, if it is the oldest.

    https://istio.io/latest/docs/reference/config/security/peer_authentication/; what comes too late says so as Gateway API's policies do
    (https://gateway-api.sigs.k8s.io/geps/gep-713/, Conflicted).
    """
    selected, unresolved = world.selected[item.key], _unresolved(world, item)
    wide = is_namespace_wide(item.spec)
    where = "the mesh" if wide and item.key.namespace == ROOT_NAMESPACE else "its namespace"
    scopes = [item.key.namespace] if wide else sorted(selected)
    lost: dict[str, list[str]] = defaultdict(list)
    for scope in scopes:
        if (holder := world.mtls[scope]) is not item:
            lost[holder.key.qualified].append(scope)
    beaten = bool(scopes) and sum(map(len, lost.values())) == len(scopes)
    if not beaten:
        decided = selected.difference(*lost.values()) if lost else selected
        yield _accepted("in force" if world.authority and not world.enrolled.isdisjoint(decided) else "valid")
    if lost:
        words = (f"PeerAuthentication {holder} decides for {where if wide else _names(held)}" for holder, held in lost.items())
        message = f"{'; '.join(words)}: the oldest counts, by creationTimestamp (without one it is the oldest), then by name"
        yield Condition("Accepted" if beaten else "Uncontested", False, "Conflicted", message)
    yield from unresolved
    if not world.authority:
        yield _NO_AUTHORITY
    elif not beaten and (selected or not unresolved) and (wrong := _unenforced(world, selected, where)):
        yield wrong


_TELLERS: Final = {
    "AuthorizationPolicy": _tell_authorization,
    "RequestAuthentication": _tell_authentication,
    "PeerAuthentication": _tell_mtls,
}
POLICIES: Final = tuple(_TELLERS)
"""Kinds that choose workloads."""


def _index_traffic(world: World, out: Compiled) -> None:
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


def _telemetry(world: World, out: Compiled) -> None:
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


def _unenforced(world: World, selected: set[str], where: str) -> Condition | None:
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


def _inherited(world: World, workload: Object, label: str) -> str:
    """Value of a label of the workload or else of its Namespace; "" if neither has it."""
    namespace = world.objects.get(Key("Namespace", "", workload.key.namespace))
    return workload.labels.get(label) or (namespace.labels.get(label, "") if namespace else "")


def _workload(world: World, out: Compiled, workload: Object) -> pb.Workload:
    spec, name = workload.spec, workload.key.qualified
    namespace = world.objects.get(Key("Namespace", "", workload.key.namespace))
    node = world.objects.get(Key("Node", "", spec["node"]))
    enrolled = name in world.enrolled
    policies = {policy.key.qualified for policy in world.policies.get(name, ())}
    if enrolled and namespace and namespace.labels.get(DEFAULT_POLICY_LABEL) == "deny":
        policies.add(f"{workload.key.namespace}/{DEFAULT_DENY}")
    authentications = world.authentications.get(name, ())
    if authentications and (ports := _token_ports(world, name)):
        guard = authentication.guard(workload.key.namespace, ports)
        world.guards[name] = f"policy/{guard.namespace}/{guard.name}"
        out.entities.setdefault(world.guards[name], pb.Entity(policy=guard))
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
        backing=[pb.Backing(service=found, ports=world.ports[found, name]) for found in sorted(world.backed.get(name, ()))],
        policies=sorted(policies),
        zone=spec.get("zone") or workload.labels.get(ZONE_LABEL) or (node.labels.get(ZONE_LABEL, "") if node else ""),
        weight=spec.get("weight", 1),
        acceleration="" if acceleration == "disabled" else acceleration,
        mtls=_MODES[mtls],
        mtls_ports=[pb.PortMtls(port=port, mode=_MODES[mode]) for port, mode in sorted(mtls_ports.items())],
        authentications=sorted(item.key.qualified for item in authentications),
        probe_ports=spec.get("probePorts", ()) if enrolled else (),
        egress_deny=enrolled and (namespace.annotations.get(EGRESS_ANNOTATION, world.egress) if namespace else world.egress) == "deny",
    )


_MODES: Final = {"DISABLE": pb.Workload.DISABLE, "PERMISSIVE": pb.Workload.PERMISSIVE, "STRICT": pb.Workload.STRICT}


def _mtls(world: World, workload: Object) -> tuple[str, dict[int, str]]:
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


def _targets(world: World, service: Object, port: Mapping[str, Any]) -> set[int]:
    """Where a port of a service leads: one target port, or by a name several, as its workloads have it."""
    target = port.get("targetPort") or port["port"]
    if isinstance(target, int) and service.spec.get("selector"):
        return {target}
    name, slot = service.key.qualified, (port["port"], port.get("protocol", "TCP"))
    mapped = (one for holder in world.backing.get(name, ()) for one in world.ports[name, holder])
    return {one.target_port for one in mapped if (one.service_port, one.protocol) == slot} or (
        {target} if isinstance(target, int) else set()
    )


def _service(world: World, name: str, service: Object) -> pb.Service:
    targeting, backing = world.targeting.get(name, ()), world.backing.get(name, ())
    protecting = {policy.key.qualified: policy for policy in targeting if policy.key.kind == "AuthorizationPolicy"}
    for workload in backing:
        protecting.update((policy.key.qualified, policy) for policy in world.policies.get(workload, ()))
    policies = [protecting[policy] for policy in sorted(protecting)]
    named = {item.key.qualified for item in targeting if item.key.kind == "RequestAuthentication"}
    named.update(item.key.qualified for workload in backing for item in world.authentications.get(workload, ()))
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


def _index_routes(world: World, out: Compiled) -> None:
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


def _gateways(world: World, out: Compiled) -> None:
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
        kind: ConditionType = "ParentsResolved" if holds else "Accepted"
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
