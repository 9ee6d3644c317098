"""Validated objects into the workload model of meshapi/discovery.proto. Pure: called by `controller.mesh` after every change.

References that do not resolve are no errors here: they become `Backend.invalid` or protect nothing, and are reported as conditions.
"""

from __future__ import annotations

import calendar
import ipaddress
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from controller.conflicts import virtual_addresses, workload_addresses
from controller.durations import milliseconds
from controller.objects import (
    ACCELERATION_LABEL,
    BALANCING_ANNOTATION,
    DEFAULT_POLICY_LABEL,
    HTTP_FIELDS,
    MODE_LABEL,
    WAYPOINT_ANNOTATION,
    ZONE_LABEL,
    Key,
    Object,
)
from meshapi import discovery_pb2 as pb

HTTP_APP_PROTOCOLS: Final = frozenset({"http", "http2", "h2c", "grpc", "grpc-web", "kubernetes.io/h2c", "kubernetes.io/ws"})
DEFAULT_RETRIES: Final = 1  # HTTPRouteRetry.attempts left out: "implementation-specific"
DEFAULT_DENY: Final = "(default-deny)"
"""Name of the policy that stands for meshagent.io/default-policy: deny; no object can have it."""
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


@dataclass(slots=True)
class _World:
    """Indexes over the objects, made once per compilation."""

    objects: Mapping[Key, Object]
    services: dict[str, Object] = field(default_factory=dict)
    workloads: list[Object] = field(default_factory=list)
    enrolled: set[str] = field(default_factory=set)  # workloads in the mesh
    backing: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # service -> workloads
    backed: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # workload -> services
    policies: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # workload -> policies
    service_policies: dict[str, list[Object]] = field(default_factory=lambda: defaultdict(list))  # service -> policies that name it
    routes: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))  # service -> (port or 0, route)

    def of(self, kind: str) -> list[Object]:
        return [self.objects[key] for key in sorted(self.objects) if key.kind == kind]


def compile_model(objects: Mapping[Key, Object]) -> Compiled:
    """Return the workload model of `objects`; the same objects always give the same bytes."""
    world, out = _World(objects), Compiled()
    _index_backing(world)
    _index_policies(world, out)
    for route in world.of("HTTPRoute"):
        _route(world, out, route)
    for name, service in world.services.items():
        message = _service(world, name, service)
        out.entities[f"service/{name}"] = pb.Entity(service=message)
        out.conditions[service.key].append(_accepted())
        if wrong := _not_at_the_waypoint(service, message.ports):
            out.conditions[service.key].append(wrong)
    for workload in world.workloads:
        out.entities[f"workload/{workload.key.qualified}"] = pb.Entity(workload=_workload(world, workload))
        out.conditions[workload.key].append(_accepted())
    for namespace in world.of("Namespace"):
        out.conditions[namespace.key].append(_accepted())
        if namespace.labels.get(DEFAULT_POLICY_LABEL) == "deny":
            name = namespace.key.name
            # An ALLOW policy that matches nothing denies all that no other ALLOW policy allows.
            policy = pb.Policy(namespace=name, name=DEFAULT_DENY, action=pb.Policy.ALLOW)
            out.entities[f"policy/{name}/{DEFAULT_DENY}"] = pb.Entity(policy=policy)
    return out


def _accepted(message: str = "in force") -> Condition:
    return Condition("Accepted", True, "Accepted", message)


def _selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in selector.items())


def _index_backing(world: _World) -> None:
    world.workloads = world.of("Workload")
    by_label: dict[tuple[str, str, str], list[Object]] = defaultdict(list)
    for workload in world.workloads:
        if workload.spec.get("networkNamespace") and _inherited(world, workload, MODE_LABEL) != "none":
            world.enrolled.add(workload.key.qualified)
        for name, value in workload.labels.items():
            by_label[workload.key.namespace, name, value].append(workload)
    for service in world.of("Service"):
        world.services[service.key.qualified] = service
        selector = service.spec.get("selector")
        if not selector:
            continue
        # Only workloads with the rarest of the wanted labels can match: not every service against every workload.
        candidates = min((by_label.get((service.key.namespace, name, value), []) for name, value in selector.items()), key=len)
        for workload in candidates:
            if _selects(selector, workload.labels):
                world.backing[service.key.qualified].append(workload)
                world.backed[workload.key.qualified].append(service)


def _index_policies(world: _World, out: Compiled) -> None:
    for policy in world.of("AuthorizationPolicy"):
        out.entities[f"policy/{policy.key.qualified}"] = pb.Entity(policy=_policy(policy))
        conditions = out.conditions[policy.key]
        protected: dict[str, Object] = {}
        missing = []
        if "targetRefs" in policy.spec:
            for reference in policy.spec["targetRefs"]:
                service = f"{policy.key.namespace}/{reference['name']}"
                if service in world.services:
                    world.service_policies[service].append(policy)
                    protected.update((workload.key.qualified, workload) for workload in world.backing[service])
                else:
                    missing.append(service)
            if missing:
                conditions.append(
                    Condition(
                        "ResolvedRefs", False, "TargetNotFound", f"there is no Service {', '.join(missing)}: nothing is protected there"
                    )
                )
        else:
            labels = policy.spec.get("selector", {}).get("matchLabels", {})
            protected = {
                workload.key.qualified: workload
                for workload in world.workloads
                if workload.key.namespace == policy.key.namespace and _selects(labels, workload.labels)
            }
        for name in protected:
            world.policies[name].append(policy)
        conditions.insert(0, _accepted("in force" if world.enrolled & protected.keys() else "valid"))
        if (protected or not missing) and (wrong := _unenforced(world, protected)):
            conditions.append(wrong)


def _unenforced(world: _World, selected: Collection[str]) -> Condition | None:
    """Say where a policy is not enforced although it is valid: outside the mesh nobody can."""
    if not selected:
        return Condition("Enforced", False, "NothingSelected", "selects no workload of its namespace: nothing is protected")
    outside = sorted(set(selected) - world.enrolled)
    if not outside:
        return None
    names = ", ".join(outside[:_NAMES_SHOWN]) + (f" and {len(outside) - _NAMES_SHOWN} more" if len(outside) > _NAMES_SHOWN else "")
    return Condition(
        "Enforced",
        False,
        "NotEnrolled" if len(outside) == len(selected) else "PartlyEnrolled",
        f"nothing enforces it for {names}: not in the mesh; to enroll them give them spec.networkNamespace and no label {MODE_LABEL}: none",
    )


def _inherited(world: _World, workload: Object, label: str) -> str:
    """Value of a label of the workload or else of its Namespace; "" if neither has it."""
    namespace = world.objects.get(Key("Namespace", "", workload.key.namespace))
    return workload.labels.get(label) or (namespace.labels.get(label, "") if namespace else "")


def _workload(world: _World, workload: Object) -> pb.Workload:
    spec, name = workload.spec, workload.key.qualified
    namespace = world.objects.get(Key("Namespace", "", workload.key.namespace))
    enrolled = name in world.enrolled
    policies = {policy.key.qualified for policy in world.policies[name]}
    if enrolled and namespace and namespace.labels.get(DEFAULT_POLICY_LABEL) == "deny":
        policies.add(f"{workload.key.namespace}/{DEFAULT_DENY}")
    acceleration = _inherited(world, workload, ACCELERATION_LABEL)
    return pb.Workload(
        namespace=workload.key.namespace,
        name=workload.key.name,
        service_account=spec.get("serviceAccount", "default"),
        node=spec["node"],
        labels=dict(workload.labels),
        addresses=workload_addresses(workload),
        network_namespace=spec.get("networkNamespace", ""),
        enrolled=enrolled,
        ready=spec.get("ready", True),
        backing=[_backing(service) for service in world.backed[name]],
        policies=sorted(policies),
        zone=spec.get("zone") or workload.labels.get(ZONE_LABEL, ""),
        weight=spec.get("weight", 1),
        acceleration="" if acceleration == "disabled" else acceleration,
    )


def _backing(service: Object) -> pb.Backing:
    ports = {(port["port"], port.get("protocol", "TCP")): _target(port) for port in service.spec["ports"]}
    return pb.Backing(
        service=service.key.qualified,
        ports=[
            pb.PortMapping(service_port=port, target_port=target, protocol=protocol) for (port, protocol), target in sorted(ports.items())
        ],
    )


def _target(port: Mapping[str, Any]) -> int:
    target: int = port.get("targetPort", port["port"])
    return target


def _service(world: _World, name: str, service: Object) -> pb.Service:
    protecting: dict[str, Object] = {policy.key.qualified: policy for policy in world.service_policies[name]}
    for workload in world.backing[name]:
        protecting.update((policy.key.qualified, policy) for policy in world.policies[workload.key.qualified])
    policies = [protecting[policy] for policy in sorted(protecting)]
    ports = []
    for port in service.spec["ports"]:
        waypoint, reason = _level(world.routes[name], policies, service, port)
        ports.append(
            pb.ServicePort(
                port=port["port"],
                name=port.get("name", ""),
                protocol=port.get("protocol", "TCP"),
                app_protocol=port.get("appProtocol", ""),
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


def _level(routes: Iterable[tuple[int, str]], policies: Iterable[Object], service: Object, port: Mapping[str, Any]) -> tuple[bool, str]:
    """Decide whether a port is L7, and say why in words."""
    if port.get("protocol", "TCP") != "TCP":
        return False, "UDP is never L7"
    app_protocol = port.get("appProtocol", "")
    is_http = app_protocol.lower() in HTTP_APP_PROTOCOLS
    for wanted, route in routes:
        # A route for every port does not turn a port that is declared to speak something else (redis, tls) into HTTP.
        if wanted == port["port"] or (wanted == 0 and (is_http or not app_protocol)):
            return True, f"HTTPRoute {route}"
    for policy in policies:
        if any(_needs_request(operation, _target(port)) for operation in _operations(policy)):
            return True, f"AuthorizationPolicy {policy.key.qualified} has HTTP rules"
    if service.annotations.get(WAYPOINT_ANNOTATION) == "true":
        if is_http:
            return True, f"annotation {WAYPOINT_ANNOTATION} and appProtocol {app_protocol}"
        return False, f"annotation {WAYPOINT_ANNOTATION} has no effect without appProtocol http, h2c or grpc"
    return False, "no L7 feature is used"


def _operations(policy: Object) -> list[Mapping[str, Any]]:
    return [entry["operation"] for rule in policy.spec.get("rules", []) for entry in rule.get("to", [])]


def _needs_request(operation: Mapping[str, Any], target: int) -> bool:
    if not HTTP_FIELDS & set(operation):
        return False
    if "ports" in operation and target not in _ports(operation["ports"]):
        return False
    return target not in _ports(operation.get("notPorts", []))


def _ports(values: Iterable[int | str]) -> list[int]:
    return [int(value) for value in values]


_ACTIONS: Final = {"ALLOW": pb.Policy.ALLOW, "DENY": pb.Policy.DENY, "AUDIT": pb.Policy.AUDIT}


def _policy(policy: Object) -> pb.Policy:
    return pb.Policy(
        namespace=policy.key.namespace,
        name=policy.key.name,
        action=_ACTIONS[policy.spec.get("action", "ALLOW")],
        rules=[
            pb.PolicyRule(
                sources=[_source(entry["source"], policy.key.namespace) for entry in rule.get("from", [])],
                operations=[_operation(entry["operation"]) for entry in rule.get("to", [])],
            )
            for rule in policy.spec.get("rules", [])
        ],
    )


def _source(source: Mapping[str, Any], namespace: str) -> pb.Source:
    def accounts(field_name: str) -> list[str]:
        # https://istio.io/latest/docs/reference/config/security/authorization-policy/#Source: a bare name is in the policy's namespace
        return [name if "/" in name else f"{namespace}/{name}" for name in source.get(field_name, [])]

    return pb.Source(
        principals=source.get("principals", []),
        not_principals=source.get("notPrincipals", []),
        namespaces=source.get("namespaces", []),
        not_namespaces=source.get("notNamespaces", []),
        service_accounts=accounts("serviceAccounts"),
        not_service_accounts=accounts("notServiceAccounts"),
        ip_blocks=_blocks(source.get("ipBlocks", [])),
        not_ip_blocks=_blocks(source.get("notIpBlocks", [])),
        labels=source.get("matchLabels", {}),
    )


def _blocks(texts: Iterable[str]) -> list[str]:
    """One spelling for each block: CIDR, no bits behind the prefix."""
    return list(dict.fromkeys(str(ipaddress.ip_network(text, strict=False)) for text in texts))


def _operation(operation: Mapping[str, Any]) -> pb.Operation:
    return pb.Operation(
        ports=_ports(operation.get("ports", [])),
        not_ports=_ports(operation.get("notPorts", [])),
        methods=operation.get("methods", []),
        not_methods=operation.get("notMethods", []),
        paths=operation.get("paths", []),
        not_paths=operation.get("notPaths", []),
        hosts=operation.get("hosts", []),
        not_hosts=operation.get("notHosts", []),
        protocols=operation.get("protocols", []),
    )


def _route(world: _World, out: Compiled, route: Object) -> None:
    conditions = out.conditions[route.key]
    parents, missing = [], []
    for reference in route.spec["parentRefs"]:
        service, port = f"{route.key.namespace}/{reference['name']}", reference.get("port", 0)
        wrong = _unreachable(world, service, port)
        if wrong:
            missing.append(wrong)
        else:
            parents.append(pb.Parent(service=service, port=port))
            world.routes[service].append((port, route.key.qualified))
    if parents:
        conditions.append(_accepted())
    if missing:
        conditions.append(Condition("Accepted" if not parents else "ParentsResolved", False, "NoMatchingParent", "; ".join(missing)))
    rules = [_rule(world, route, rule) for rule in route.spec.get("rules", [{}])]
    invalid = sorted({backend.invalid for rule in rules for backend in rule.backends if backend.invalid})
    if invalid:
        conditions.append(Condition("ResolvedRefs", False, _reason(invalid), "; ".join(invalid) + ": its share of requests answers 500"))
    else:
        conditions.append(Condition("ResolvedRefs", True, "ResolvedRefs", "every backend is known"))
    if parents:
        created = _unix_seconds(route.metadata.get("creationTimestamp") or "")
        message = pb.Route(
            namespace=route.key.namespace,
            name=route.key.name,
            parents=parents,
            hostnames=route.spec.get("hostnames", []),
            rules=rules,
            created=created,
        )
        out.entities[f"route/{route.key.qualified}"] = pb.Entity(route=message)


def _reason(invalid: list[str]) -> str:
    """Gateway API's reason codes (https://gateway-api.sigs.k8s.io/reference/spec/#routeconditionreason)."""
    if any("ReferenceGrant" in text for text in invalid):
        return "RefNotPermitted"
    return "InvalidKind" if all("kind" in text for text in invalid) else "BackendNotFound"


def _unreachable(world: _World, service: str, port: int) -> str:
    """Return why (service, port) cannot carry HTTP, or nothing; port 0 is every port."""
    found = world.services.get(service)
    if found is None:
        return f"there is no Service {service}"
    tcp = [item["port"] for item in found.spec["ports"] if item.get("protocol", "TCP") == "TCP"]
    if port and port not in tcp:
        return f"Service {service} has no TCP port {port}"
    return "" if tcp else f"Service {service} has no TCP port"


def _rule(world: _World, route: Object, rule: Mapping[str, Any]) -> pb.RouteRule:
    timeouts = rule.get("timeouts", {})
    request, response = _filters(rule.get("filters", []))
    message = pb.RouteRule(
        name=rule.get("name", ""),
        matches=[_match(match) for match in rule.get("matches", [])],
        backends=[_backend(world, route, reference) for reference in rule.get("backendRefs", [])],
        request_timeout_ms=milliseconds(timeouts.get("request", "")),
        backend_request_timeout_ms=milliseconds(timeouts.get("backendRequest", "")),
        request_headers=request,
        response_headers=response,
    )
    if "retry" in rule:
        retry = rule["retry"]
        message.retry.CopyFrom(
            pb.Retry(
                attempts=retry.get("attempts", DEFAULT_RETRIES),
                codes=retry.get("codes", []),
                backoff_ms=milliseconds(retry.get("backoff", "")),
            )
        )
    return message


_PATHS: Final = {"Exact": pb.StringMatch.EXACT, "PathPrefix": pb.StringMatch.PREFIX, "RegularExpression": pb.StringMatch.REGEX}


def _match(match: Mapping[str, Any]) -> pb.RouteMatch:
    def named(items: list[Mapping[str, Any]]) -> list[pb.NamedMatch]:
        return [
            pb.NamedMatch(name=item["name"], value=pb.StringMatch(kind=_PATHS[item.get("type", "Exact")], value=item["value"]))
            for item in items
        ]

    message = pb.RouteMatch(
        method=match.get("method", ""), headers=named(match.get("headers", [])), query=named(match.get("queryParams", []))
    )
    if "path" in match:
        path = match["path"]
        message.path.CopyFrom(pb.StringMatch(kind=_PATHS[path.get("type", "PathPrefix")], value=path.get("value", "/")))
    return message


def _backend(world: _World, route: Object, reference: Mapping[str, Any]) -> pb.Backend:
    namespace = reference.get("namespace", route.key.namespace)
    service, port = f"{namespace}/{reference['name']}", reference.get("port", 0)
    kind, group = reference.get("kind", "Service"), reference.get("group", "")
    if kind != "Service" or group not in {"", "core"}:
        invalid = f"a backend of kind {group + '/' if group else ''}{kind} is not supported yet"
    elif namespace != route.key.namespace:
        invalid = f"backend {service} needs a ReferenceGrant, which is not supported yet"
    else:
        invalid = _unreachable(world, service, port)
    request, response = _filters(reference.get("filters", []))
    return pb.Backend(
        service=service, port=port, weight=reference.get("weight", 1), invalid=invalid, request_headers=request, response_headers=response
    )


def _filters(filters: list[Mapping[str, Any]]) -> tuple[pb.HeaderEdit | None, pb.HeaderEdit | None]:
    edits: dict[str, pb.HeaderEdit] = {}
    for item in filters:
        edit = item["requestHeaderModifier" if item["type"] == "RequestHeaderModifier" else "responseHeaderModifier"]
        edits[item["type"]] = pb.HeaderEdit(
            set={header["name"]: header["value"] for header in edit.get("set", [])},
            add={header["name"]: header["value"] for header in edit.get("add", [])},
            remove=edit.get("remove", []),
        )
    return edits.get("RequestHeaderModifier"), edits.get("ResponseHeaderModifier")


def _unix_seconds(timestamp: str) -> int:
    """Seconds of an RFC 3339 time in UTC, as Kubernetes writes it; 0 for anything else."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", timestamp):
        return 0
    try:
        return calendar.timegm(time.strptime(timestamp, "%Y-%m-%dT%H:%M:%SZ"))
    except ValueError:
        return 0
