"""What a schema cannot say about one object: relations between its fields, addresses, patterns. Called by `controller.schema`.

Looks at one object only; conflicts between objects belong to `controller.conflicts`, references that do not resolve to
`controller.compile`. Each check yields (path, message).
"""

from __future__ import annotations

import ipaddress
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

from controller.documents import Path
from controller.durations import milliseconds
from controller.objects import (
    ACCELERATION_LABEL,
    BALANCING_ANNOTATION,
    DEFAULT_POLICY_LABEL,
    HTTP_FIELDS,
    MODE_LABEL,
    WAYPOINT_ANNOTATION,
)

Found = tuple[Path, str]

# What Python's `re` accepts and RE2 does not (https://github.com/google/re2/wiki/Syntax): Envoy would refuse the whole configuration.
_NOT_RE2 = re.compile(r"\(\?(?:[=!>(#]|<[=!]|P=)|\\[1-9]|[*+?}]\+")


def check(kind: str, namespace: str, value: Mapping[str, Any]) -> Iterator[Found]:
    """Yield what is wrong with an object that obeys its schema."""
    yield from _labels(kind, value["metadata"])
    spec = value.get("spec") or {}
    if kind == "Service":
        yield from _service(spec)
    elif kind == "Workload":
        yield from _addresses(("spec", "addresses"), spec["addresses"])
    elif kind == "HTTPRoute":
        yield from _route(spec, namespace)
    elif kind == "AuthorizationPolicy":
        yield from _policy(spec)


def _labels(kind: str, metadata: Mapping[str, Any]) -> Iterator[Found]:
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
    (
        "labels",
        {"Namespace", "Workload"},
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
    ("annotations", {"Service"}, WAYPOINT_ANNOTATION, {"true", "false"}, '"true" or "false"'),
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
                yield (*path, "targetPort"), f'named ports ("{target[:63]}") are not supported yet: give the number'
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


def _route(spec: Mapping[str, Any], namespace: str) -> Iterator[Found]:
    seen: set[tuple[str, int]] = set()
    for index, parent in enumerate(spec["parentRefs"]):
        path: Path = ("spec", "parentRefs", index)
        if parent.get("namespace", namespace) != namespace:
            yield (*path, "namespace"), f'must be the route\'s own namespace "{namespace}": consumer routes are not supported yet'
        slot = (parent["name"], parent.get("port", 0))
        if slot in seen:
            yield path, f"service {parent['name']} is listed twice with the same port"
        seen.add(slot)
    names: set[str] = set()
    for index, rule in enumerate(spec.get("rules", [])):
        path = ("spec", "rules", index)
        if rule.get("name") in names:
            yield (*path, "name"), f'"{rule["name"]}" is used twice'
        if "name" in rule:
            names.add(rule["name"])
        yield from _route_rule(path, rule)


def _route_rule(path: Path, rule: Mapping[str, Any]) -> Iterator[Found]:
    for index, match in enumerate(rule.get("matches", [])):
        here = (*path, "matches", index)
        if "path" in match:
            yield from _path_match((*here, "path"), match["path"])
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's doubts about its own future syntax do not concern RE2
            re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        yield path, f"not a regular expression: {error}"
        return
    if _NOT_RE2.search(text):
        yield path, "look-around, back references and possessive quantifiers do not exist in RE2, which Envoy uses"


def _named(path: Path, items: list[Mapping[str, Any]], *, fold: bool) -> Iterator[Found]:
    seen: set[str] = set()
    for index, item in enumerate(items):
        name = item["name"].lower() if fold else item["name"]
        if name in seen:
            yield (*path, index, "name"), f'"{item["name"]}" is listed twice'
        seen.add(name)
        if item.get("type", "Exact") == "RegularExpression":
            yield from _regex((*path, index, "value"), item["value"])


_FILTER_FIELD = {"RequestHeaderModifier": "requestHeaderModifier", "ResponseHeaderModifier": "responseHeaderModifier"}


def _filters(path: Path, filters: list[Mapping[str, Any]]) -> Iterator[Found]:
    seen: set[str] = set()
    for index, item in enumerate(filters):
        here = (*path, index)
        kind = item["type"]
        if kind in seen:
            yield (*here, "type"), f'"{kind}" may be there only once'
        seen.add(kind)
        field = _FILTER_FIELD[kind]
        if field not in item:
            yield (*here, field), f'is required for type "{kind}"'
            continue
        for other in set(_FILTER_FIELD.values()) & set(item) - {field}:
            yield (*here, other), f'does not belong to type "{kind}"'
        edit = item[field]
        for part in ("set", "add"):
            yield from _named((*here, field, part), edit.get(part, []), fold=True)
            for number, header in enumerate(edit.get(part, [])):
                if header["name"].lower() in {"host", "content-length", "transfer-encoding", "connection"}:
                    yield (*here, field, part, number, "name"), f'"{header["name"]}" belongs to the proxy and cannot be edited'
                if re.search(r"[\x00-\x1f\x7f]", header["value"]):
                    yield (*here, field, part, number, "value"), "must not hold control characters"


def _policy(spec: Mapping[str, Any]) -> Iterator[Found]:
    if "targetRefs" in spec and "selector" in spec:
        yield ("spec", "selector"), "cannot be combined with spec.targetRefs: choose one"
    for index, rule in enumerate(spec.get("rules", [])):
        for number, entry in enumerate(rule.get("from", [])):
            yield from _source(("spec", "rules", index, "from", number, "source"), entry["source"])
        for number, entry in enumerate(rule.get("to", [])):
            yield from _operation(("spec", "rules", index, "to", number, "operation"), entry["operation"])


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
                if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
                    yield here, f'"{text[:80]}" is not a port from 1 to 65535'
                continue
            if field in {"paths", "notPaths"} and "{" in value:
                yield here, "path templates ({*}, {**}) are not supported yet"
            elif field in {"paths", "notPaths"} and not value.startswith(("/", "*")):
                yield here, f'must start with "/" or "*", not "{value[:80]}"'
            elif field in {"methods", "notMethods"} and value != value.upper():
                yield here, f'methods are compared exactly: did you mean "{value.upper()[:80]}"?'
            yield from _wildcards(here, value)
