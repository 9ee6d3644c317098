"""What a schema cannot say about one object: relations between its fields, addresses, patterns. Called by `controller.schema`.

Looks at one object only; conflicts between objects belong to `controller.conflicts`, references that do not resolve to
`controller.compile`. Each check yields (path, message).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from controller import authentication, conditions, externals, gatewaychecks, regexes, routechecks, telemetry, traffic
from controller.documents import Path
from controller.durations import milliseconds
from controller.objects import (
    ACCELERATION_LABEL,
    BALANCING_ANNOTATION,
    DEFAULT_POLICY_LABEL,
    DRY_RUN_ANNOTATION,
    EGRESS_ANNOTATION,
    FAIL_MODE_ANNOTATION,
    HTTP_FIELDS,
    MODE_LABEL,
    WAYPOINT_ANNOTATION,
    is_namespace_wide,
)

Found = tuple[Path, str]


def check(kind: str, namespace: str, value: Mapping[str, Any]) -> Iterator[Found]:
    """Yield what is wrong with an object that obeys its schema."""
    yield from switches(kind, value["metadata"])
    spec = value.get("spec") or {}
    if kind == "Service":
        yield from _service(spec)
    elif kind == "Workload":
        yield from _addresses(("spec", "addresses"), spec["addresses"])
    elif kind in {"HTTPRoute", "GRPCRoute"}:
        yield from _route(spec, namespace, grpc=kind == "GRPCRoute")
    elif kind == "CallerMatch":
        for number, entry in enumerate(spec.get("from", [])):
            yield from _source(("spec", "from", number, "source"), entry["source"])
        yield from routechecks.claims(spec.get("claims", []))
    elif kind == "AuthorizationPolicy":
        yield from _policy(spec)
        yield from _dry_run(value["metadata"], spec)
    elif kind == "PeerAuthentication":
        yield from _peers(spec)
    elif kind == "RequestAuthentication":
        yield from _attachment(spec)
        yield from authentication.check(spec)
    else:
        yield from _elsewhere(kind, spec)


def _elsewhere(kind: str, spec: Mapping[str, Any]) -> Iterator[Found]:
    """Kinds whose checks are in modules of their own."""
    if kind == "TrafficPolicy":
        yield from traffic.check(spec, _regex)
    elif kind == "ExternalService":
        yield from externals.check(spec, _address)
    elif kind == "Gateway":
        yield from gatewaychecks.gateway(spec)
    elif kind == telemetry.KIND:
        yield from telemetry.check(spec)


def switches(kind: str, metadata: Mapping[str, Any]) -> Iterator[Found]:
    """Yield what is wrong with the mesh's own labels and annotations, each with the path of one."""
    for where, kinds, name, choices, words in _SWITCHES:
        if kind not in kinds:
            continue
        value = (metadata.get(where) or {}).get(name)
        if value is not None and value not in choices:
            yield ("metadata", where, name), f'must be {words}, not "{value[:80]}"'
        elsewhere = "annotations" if where == "labels" else "labels"
        if name in (metadata.get(elsewhere) or {}):
            yield ("metadata", elsewhere, name), f"has no effect here: write it under metadata.{where}"


_SWITCHES: Final = (
    ("labels", {"Namespace", "Workload"}, MODE_LABEL, {"mesh", "none"}, '"mesh" (the default) or "none" (not enrolled)'),
    ("labels", {"Pod"}, MODE_LABEL, {"mesh", "none"}, '"mesh" or "none" (not enrolled)'),
    (
        "labels",
        {"Namespace", "Workload", "Pod"},
        ACCELERATION_LABEL,
        {"enabled", "force", "disabled"},
        '"enabled", "force" or "disabled" (the default)',
    ),
    (
        "labels",
        {"Namespace"},
        DEFAULT_POLICY_LABEL,
        {"allow", "deny"},
        '"allow" (the default) or "deny" (what no ALLOW policy allows is denied)',
    ),
    (
        "annotations",
        {"Namespace"},
        EGRESS_ANNOTATION,
        {"allow", "deny"},
        '"allow" or "deny" (its workloads reach services, workloads and ExternalServices only)',
    ),
    ("annotations", {"AuthorizationPolicy"}, DRY_RUN_ANNOTATION, {"true", "false"}, '"true" or "false"'),
    ("annotations", {"Service"}, WAYPOINT_ANNOTATION, {"true", "false"}, '"true" or "false"'),
    (
        "annotations",
        {"Service"},
        FAIL_MODE_ANNOTATION,
        {"closed", "open"},
        '"closed" (the default) or "open" (without a waypoint its L7 ports are served as L4)',
    ),
    ("annotations", {"Service"}, BALANCING_ANNOTATION, {"random", "least-connections"}, '"random" (the default) or "least-connections"'),
)


def _address(text: str) -> str:
    """Return the reason why `text` is no address that a connection can go to, or nothing."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return f'"{text[:80]}" is not an IPv4 or IPv6 address'
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return f"{text} is an IPv4 address in IPv6 spelling: write {address.ipv4_mapped}"
    if address.is_unspecified or address.is_multicast or "%" in text:
        return f"{text} is not the address of one host"
    if address.is_loopback or address.is_link_local:
        what = "loopback" if address.is_loopback else "link-local"
        return f"{text} is a {what} address, which means another host wherever it is used"
    return ""


def _addresses(path: Path, addresses: list[str]) -> Iterator[Found]:
    seen: set[str] = set()
    for index, text in enumerate(addresses):
        if wrong := _address(text):
            yield (*path, index), wrong
            continue
        canonical = str(ipaddress.ip_address(text))
        if canonical in seen:
            yield (*path, index), f"{text} is listed twice"
        seen.add(canonical)


def _service(spec: Mapping[str, Any]) -> Iterator[Found]:
    single, several = spec.get("clusterIP"), spec.get("clusterIPs")
    if single is None and several is None:
        yield (
            ("spec", "clusterIP"),
            'is required: this source allocates no addresses; give a free address, or "None" for a headless service',
        )
    elif single is not None and several is not None and several[0] != single:
        yield ("spec", "clusterIPs", 0), "must be the same as spec.clusterIP"
    elif several is not None and several != ["None"]:
        yield from _addresses(("spec", "clusterIPs"), several)
    elif several is None and single != "None" and (wrong := _address(str(single))):
        yield ("spec", "clusterIP"), wrong
    if "sessionAffinityConfig" in spec and spec.get("sessionAffinity", "None") == "None":
        yield (
            ("spec", "sessionAffinityConfig"),
            'belongs to spec.sessionAffinity: ClientIP, and spec.sessionAffinity is "None" (the default)',
        )
    yield from _service_ports(spec["ports"])


def _service_ports(ports: list[Mapping[str, Any]]) -> Iterator[Found]:
    numbers: dict[tuple[str, int], int] = {}
    names: set[str] = set()
    for index, port in enumerate(ports):
        path: Path = ("spec", "ports", index)
        target = port.get("targetPort", port["port"])
        if isinstance(target, str):
            if target.isascii() and target.isdigit():
                yield (*path, "targetPort"), f"must be a whole number: write {target} without quotes"
            else:
                yield (*path, "targetPort"), f'named ports ("{target[:63]}") are not supported: give the number'
            continue
        slot = (port.get("protocol", "TCP"), port["port"])
        if slot in numbers:
            yield (*path, "port"), f"{slot[0]} port {slot[1]} is already spec.ports[{numbers[slot]}]"
        numbers.setdefault(slot, index)
        name = port.get("name", "")
        if len(ports) > 1 and not name:
            yield (*path, "name"), "is required when there are several ports"
        elif name and name in names:
            yield (*path, "name"), f'"{name}" is used twice'
        names.add(name)


def _route(spec: Mapping[str, Any], namespace: str, *, grpc: bool) -> Iterator[Found]:
    seen: set[tuple[str, str, str, int, str]] = set()
    for index, parent in enumerate(spec["parentRefs"]):
        path: Path = ("spec", "parentRefs", index)
        yield from gatewaychecks.parent(path, parent)
        slot = (
            gatewaychecks.kind_of(parent),
            parent.get("namespace", namespace),
            parent["name"],
            parent.get("port", 0),
            parent.get("sectionName", ""),
        )
        if slot in seen:
            yield path, f"{slot[0].lower()} {parent['name']} is listed twice with the same port"
        seen.add(slot)
    names: set[str] = set()
    for index, rule in enumerate(spec.get("rules", [])):
        path = ("spec", "rules", index)
        if rule.get("name") in names:
            yield (*path, "name"), f'"{rule["name"]}" is used twice'
        if "name" in rule:
            names.add(rule["name"])
        yield from _route_rule(path, rule, grpc=grpc)
    yield from routechecks.rules(spec)


def _route_rule(path: Path, rule: Mapping[str, Any], *, grpc: bool) -> Iterator[Found]:
    for index, match in enumerate(rule.get("matches", [])):
        here = (*path, "matches", index)
        if "path" in match:
            yield from _path_match((*here, "path"), match["path"])
        if grpc:
            yield from routechecks.grpc_method((*here, "method"), match)
        for field in ("headers", "queryParams"):
            yield from _named((*here, field), match.get(field, []), fold=field == "headers")
    yield from _filters((*path, "filters"), rule.get("filters", []))
    for index, backend in enumerate(rule.get("backendRefs", [])):
        here = (*path, "backendRefs", index)
        if backend.get("kind", "Service") == "Service" and backend.get("group", "") in {"", "core"} and "port" not in backend:
            yield (*here, "port"), "is required for a Service"
        yield from _filters((*here, "filters"), backend.get("filters", []))
    timeouts = rule.get("timeouts", {})
    request, each = milliseconds(timeouts.get("request", "")), milliseconds(timeouts.get("backendRequest", ""))
    if request and each > request:
        yield (*path, "timeouts", "backendRequest"), f"must not be longer than timeouts.request ({timeouts['request']})"


def _path_match(path: Path, match: Mapping[str, Any]) -> Iterator[Found]:
    value = match.get("value", "/")
    if match.get("type", "PathPrefix") == "RegularExpression":
        yield from _regex((*path, "value"), value)
    elif not value.startswith("/"):
        yield (*path, "value"), f'must start with "/", not "{value[:80]}"'
    elif re.search(r"//|/\.\.?(/|$)|[#?]|%2[fF]", value):
        yield (*path, "value"), 'must not hold "//", "/./", "/../", "%2f", "#" or "?" (Gateway API, HTTPPathMatch)'


def _regex(path: Path, text: str) -> Iterator[Found]:
    if wrong := regexes.problem(text):
        yield path, wrong


def _named(path: Path, items: list[Mapping[str, Any]], *, fold: bool) -> Iterator[Found]:
    seen: set[str] = set()
    for index, item in enumerate(items):
        name = item["name"].lower() if fold else item["name"]
        if name in seen:
            yield (*path, index, "name"), f'"{item["name"]}" is listed twice'
        seen.add(name)
        if item.get("type", "Exact") == "RegularExpression":
            yield from _regex((*path, index, "value"), item["value"])


def _filters(path: Path, filters: list[Mapping[str, Any]]) -> Iterator[Found]:
    seen: set[str] = set()
    for index, item in enumerate(filters):
        here = (*path, index)
        kind = item["type"]
        if kind in seen and kind not in routechecks.REPEATABLE:
            yield (*here, "type"), f'"{kind}" may be there only once'
        seen.add(kind)
        field = routechecks.FIELDS[kind]
        if field not in item:
            yield (*here, field), f'is required for type "{kind}"'
            continue
        for other in set(routechecks.FIELDS.values()) & set(item) - {field}:
            yield (*here, other), f'does not belong to type "{kind}"'
        edit = item[field] if field.endswith("HeaderModifier") else {}
        for part in ("set", "add"):
            yield from _named((*here, field, part), edit.get(part, []), fold=True)
            for number, header in enumerate(edit.get(part, [])):
                if header["name"].lower() in {"host", "content-length", "transfer-encoding", "connection"}:
                    yield (*here, field, part, number, "name"), f'"{header["name"]}" belongs to the proxy and cannot be edited'
                if re.search(r"[\x00-\x1f\x7f]", header["value"]):
                    yield (*here, field, part, number, "value"), "must not hold control characters"


def _attachment(spec: Mapping[str, Any]) -> Iterator[Found]:
    if "targetRefs" in spec and "selector" in spec:
        yield ("spec", "selector"), "cannot be combined with spec.targetRefs: choose one"


def _peers(spec: Mapping[str, Any]) -> Iterator[Found]:
    yield from _attachment(spec)
    ports = spec.get("portLevelMtls", {})
    # https://istio.io/latest/docs/reference/config/security/peer_authentication/: ports are those of selected workloads.
    if ports and is_namespace_wide(spec):
        yield ("spec", "portLevelMtls"), "needs spec.targetRefs or labels in spec.selector: ports belong to workloads"
    for port in ports:
        if not _is_port(port) or port.startswith("0"):  # "080" and "80" would be one port with two modes
            yield ("spec", "portLevelMtls", port), "is not a port from 1 to 65535"


def _policy(spec: Mapping[str, Any]) -> Iterator[Found]:
    yield from _attachment(spec)
    for index, reference in enumerate(spec.get("targetRefs", [])):
        if (reference.get("group", "") == "meshagent.io") is not (reference["kind"] == externals.KIND):
            group = "meshagent.io" if reference["kind"] == externals.KIND else '""'
            yield ("spec", "targetRefs", index, "group"), f"must be {group} for kind {reference['kind']}"
    for index, rule in enumerate(spec.get("rules", [])):
        for number, entry in enumerate(rule.get("from", [])):
            yield from _source(("spec", "rules", index, "from", number, "source"), entry["source"])
        for number, entry in enumerate(rule.get("to", [])):
            yield from _operation(("spec", "rules", index, "to", number, "operation"), entry["operation"])
        for number, condition in enumerate(rule.get("when", [])):
            yield from conditions.check(("spec", "rules", index, "when", number), condition, _source, _operation)


def _dry_run(metadata: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[Found]:
    path = ("metadata", "annotations", DRY_RUN_ANNOTATION)
    if (metadata.get("annotations") or {}).get(DRY_RUN_ANNOTATION) == "true" and spec.get("action", "ALLOW") == "ALLOW":
        yield path, "is for DENY: what an ALLOW would deny is what it does not name; write that as a DENY with notPaths and so on"


def _wildcards(path: Path, text: str) -> Iterator[Found]:
    """Istio's string match: exact, one "*" at the start or at the end, or "*" alone."""
    if "*" in text.removeprefix("*").removesuffix("*") or (len(text) > 1 and text.startswith("*") and text.endswith("*")):
        yield path, f'"{text[:80]}": a "*" may stand only at the start or at the end'


def _block(text: str) -> str:
    """Return the reason why `text` is no block of addresses that a peer can have, or nothing."""
    prefix = text.partition("/")[2]
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        network = None
    if network is None or "%" in text or ("/" in text and not prefix.isdigit()):
        return f'"{text[:80]}" is not a CIDR block such as 10.0.0.0/8 or fd00::/8, nor a single address'
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96 and network.network_address.ipv4_mapped is not None:
        return f"{text} are IPv4 addresses in IPv6 spelling: write {network.network_address.ipv4_mapped}/{network.prefixlen - 96}"
    return ""


_LABEL_NAME = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def _match_labels(path: Path, labels: Mapping[str, str]) -> Iterator[Found]:
    """https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set: what else no workload can have."""
    for name, value in labels.items():
        if not _LABEL_NAME.fullmatch(name):
            yield (*path, name), "is not the name of a label"
        elif not _LABEL_VALUE.fullmatch(value):
            yield (*path, name), f'"{value}" is not the value of a label: values are compared exactly, there are no wildcards'


def _source(path: Path, source: Mapping[str, Any]) -> Iterator[Found]:
    yield from _match_labels((*path, "matchLabels"), source.get("matchLabels", {}))
    for field, values in source.items():
        if field == "matchLabels":
            continue
        for index, text in enumerate(values):
            here = (*path, field, index)
            if field in {"principals", "notPrincipals"} and text.startswith("spiffe://"):
                yield here, f'write it without the scheme, as Istio does: "{text[9:200]}"'
            elif field in {"serviceAccounts", "notServiceAccounts"}:
                if not re.fullmatch(r"([a-z0-9]([-a-z0-9]*[a-z0-9])?/)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?", text):
                    yield here, f'"{text[:80]}" is not "NAME" (this namespace) or "NAMESPACE/NAME"; wildcards are not allowed here'
            elif field in {"ipBlocks", "notIpBlocks"}:
                if wrong := _block(text):
                    yield here, wrong
            else:
                yield from _wildcards(here, text)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535


def _operation(path: Path, operation: Mapping[str, Any]) -> Iterator[Found]:
    about_requests = sorted(HTTP_FIELDS & set(operation))
    if about_requests and "TCP" not in operation.get("protocols", ["TCP"]):
        yield (*path, "protocols"), f"datagrams have no requests: add TCP, or remove {', '.join(about_requests)}"
    for field, values in operation.items():
        if field == "protocols":
            continue
        for index, value in enumerate(values):
            here = (*path, field, index)
            if field in {"ports", "notPorts"}:
                text = str(value)
                if not _is_port(text):
                    yield here, f'"{text[:80]}" is not a port from 1 to 65535'
                continue
            if field in {"paths", "notPaths"} and "{" in value:
                yield here, "path templates ({*}, {**}) are not supported"
            elif field in {"paths", "notPaths"} and not value.startswith(("/", "*")):
                yield here, f'must start with "/" or "*", not "{value[:80]}"'
            elif field in {"methods", "notMethods"} and value != value.upper():
                yield here, f'methods are compared exactly: did you mean "{value.upper()[:80]}"?'
            yield from _wildcards(here, value)
