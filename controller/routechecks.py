"""What a schema cannot say about routes and CallerMatches: relations between fields, expressions, sizes. Called by `controller.checks`.

Mostly the rules (CEL) of the standard's CustomResourceDefinitions: https://gateway-api.sigs.k8s.io/reference/spec/. Each check yields (path, message).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from controller import conditions, regexes
from controller.documents import Path
from controller.durations import milliseconds

Found = tuple[Path, str]

MOST_MATCHES: Final = 128  # of all rules of a route together (CEL of HTTPRouteSpec.rules and GRPCRouteSpec.rules)
FIELDS: Final = {
    "RequestHeaderModifier": "requestHeaderModifier",
    "ResponseHeaderModifier": "responseHeaderModifier",
    "RequestMirror": "requestMirror",
    "RequestRedirect": "requestRedirect",
    "URLRewrite": "urlRewrite",
    "CORS": "cors",
    "ExtensionRef": "extensionRef",
}
"""The field of each type of filter."""
REPEATABLE: Final = frozenset({"RequestMirror", "ExtensionRef"})
_AT_BACKENDS: Final = frozenset({"RequestHeaderModifier", "ResponseHeaderModifier", "URLRewrite"})
_PLAIN_PATH = re.compile(r"(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[0-9a-fA-F]{2})*")  # RFC 3986, pchar
_GRPC_SERVICE = re.compile(r"(?i:\.?[a-z_][a-z_0-9]*(\.[a-z_][a-z_0-9]*)*)")  # the standard's own patterns
_GRPC_METHOD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


def rules(spec: Mapping[str, Any]) -> Iterator[Found]:
    """Check what concerns several rules of a route, and headers, filters and sessions of each."""
    count = 0
    for index, rule in enumerate(spec.get("rules", [])):
        path: Path = ("spec", "rules", index)
        count += len(rule.get("matches", []))
        if count > MOST_MATCHES:
            yield (
                (*path, "matches"),
                f"all rules of a route together may have at most {MOST_MATCHES} matches: divide it into several routes",
            )
            return
        yield from _headers((*path, "matches"), rule.get("matches", []))
        yield from _rule(path, rule)


def _headers(path: Path, matches: list[Mapping[str, Any]]) -> Iterator[Found]:
    for index, match in enumerate(matches):
        for number, header in enumerate(match.get("headers", [])):
            yield from conditions.never_arrives((*path, index, "headers", number, "name"), header["name"])


def _rule(path: Path, rule: Mapping[str, Any]) -> Iterator[Found]:
    for index, item in enumerate(rule.get("filters", [])):
        here = (*path, "filters", index)
        if item["type"] == "RequestRedirect" and rule.get("backendRefs"):
            yield here, "a redirect answers by itself: remove it or rules[].backendRefs"
        yield from _filter(here, item, rule)
    if {"RequestRedirect", "URLRewrite"} <= {item["type"] for item in rule.get("filters", [])}:
        yield (*path, "filters"), "RequestRedirect and URLRewrite exclude each other"
    for index, backend in enumerate(rule.get("backendRefs", [])):
        for number, item in enumerate(backend.get("filters", [])):
            here = (*path, "backendRefs", index, "filters", number)
            if item["type"] not in _AT_BACKENDS:
                yield (*here, "type"), f'"{item["type"]}" is not supported for one backend: write it under rules[].filters'
            elif "path" in item.get("urlRewrite", {}):
                yield (*here, "urlRewrite", "path"), "is not supported for one backend: write it under rules[].filters"
            else:
                yield from _filter(here, item, rule)
    if "sessionPersistence" in rule:
        yield from _session((*path, "sessionPersistence"), rule["sessionPersistence"])


def _filter(path: Path, item: Mapping[str, Any], rule: Mapping[str, Any]) -> Iterator[Found]:
    kind = item["type"]
    content = item.get(FIELDS[kind])
    if not isinstance(content, dict):
        return  # `controller.checks` says that it is missing
    here = (*path, FIELDS[kind])
    if kind in {"RequestRedirect", "URLRewrite"} and "path" in content:
        yield from _modifier((*here, "path"), content["path"], rule.get("matches", []))
    elif kind == "RequestMirror":
        yield from _mirror(here, content)
    elif kind == "CORS":
        yield from _cors(here, content)


def _modifier(path: Path, item: Mapping[str, Any], matches: list[Mapping[str, Any]]) -> Iterator[Found]:
    wanted = "replaceFullPath" if item["type"] == "ReplaceFullPath" else "replacePrefixMatch"
    other = "replacePrefixMatch" if wanted == "replaceFullPath" else "replaceFullPath"
    if other in item:
        yield (*path, other), f'does not belong to type "{item["type"]}"'
    if wanted not in item:
        yield (*path, wanted), f'is required for type "{item["type"]}"'
        return
    value = item[wanted]
    if not _PLAIN_PATH.fullmatch(value) or (value and not value.startswith("/")) or (wanted == "replaceFullPath" and not value):
        yield (*path, wanted), f'must start with "/" and hold what a path may hold (no "?", "#", blanks), not "{value[:80]}"'
    if wanted == "replacePrefixMatch" and (len(matches) > 1 or not _is_prefix(matches)):
        yield (*path, wanted), "needs exactly one entry in the rule's matches, with a path of type PathPrefix"


def _is_prefix(matches: list[Mapping[str, Any]]) -> bool:
    """A rule without matches has the prefix "/" (HTTPRouteRule.matches, default), and so has a match without path."""
    return all(match.get("path", {}).get("type", "PathPrefix") == "PathPrefix" for match in matches)


def _mirror(path: Path, item: Mapping[str, Any]) -> Iterator[Found]:
    reference = item["backendRef"]
    if reference.get("kind", "Service") == "Service" and reference.get("group", "") in {"", "core"} and "port" not in reference:
        yield (*path, "backendRef", "port"), "is required for a Service"
    if "percent" in item and "fraction" in item:
        yield (*path, "fraction"), "cannot be combined with percent: choose one"
    fraction = item.get("fraction", {"numerator": 0})
    if fraction["numerator"] > fraction.get("denominator", 100):
        yield (*path, "fraction", "numerator"), f"must be at most the denominator ({fraction.get('denominator', 100)})"


def _cors(path: Path, item: Mapping[str, Any]) -> Iterator[Found]:
    for field in ("allowOrigins", "allowMethods", "allowHeaders", "exposeHeaders"):
        values = item.get(field, [])
        if "*" in values and len(values) > 1:
            yield (*path, field), '"*" means all: it must stand alone'
    if "*" in item.get("exposeHeaders", []) and item.get("allowCredentials"):
        yield (*path, "exposeHeaders"), 'with allowCredentials "*" is only a name: list the headers'
    if "*" in item.get("allowHeaders", []) and item.get("allowCredentials"):
        yield (*path, "allowHeaders"), 'with allowCredentials "*" is only a name: list the headers'
    for index, origin in enumerate(item.get("allowOrigins", [])):
        port = re.search(r":([0-9]+)$", origin)
        if port and not 1 <= int(port[1]) <= 65535:
            yield (*path, "allowOrigins", index), f"{port[1]} is not a port from 1 to 65535"


def _session(path: Path, item: Mapping[str, Any]) -> Iterator[Found]:
    kind = item.get("type", "Cookie")
    wanted, other = ("header", "cookie") if kind == "Header" else ("cookie", "header")
    if other in item:
        yield (*path, other), f'does not belong to type "{kind}"'
    if kind == "Header" and "header" not in item:
        yield (*path, wanted), 'is required for type "Header"'
    yield from conditions.never_arrives((*path, "header", "name"), item.get("header", {}).get("name", ""))
    permanent = item.get("cookie", {}).get("lifetimeType") == "Permanent"
    if permanent and not milliseconds(item.get("absoluteTimeout", "")):
        yield (*path, "absoluteTimeout"), 'is required for cookies of lifetimeType "Permanent"'
    elif "absoluteTimeout" in item and not permanent:
        yield (*path, "absoluteTimeout"), 'is supported for cookies of lifetimeType "Permanent" only'
    cookie_path = item.get("cookie", {}).get("path", "/")
    if not cookie_path.startswith("/") or re.search(r"[\x00-\x20;\x7f]", cookie_path):
        yield (*path, "cookie", "path"), 'must start with "/" and hold no blanks and no ";"'


def grpc_method(path: Path, match: Mapping[str, Any]) -> Iterator[Found]:
    """Check the method of a GRPCRoute's match."""
    method = match.get("method")
    if method is None:
        return
    if "service" not in method and "method" not in method:
        yield path, "one or both of service and method are required"
    for field, pattern in (("service", _GRPC_SERVICE), ("method", _GRPC_METHOD)):
        value = method.get(field, "")
        if method.get("type", "Exact") == "RegularExpression":
            if wrong := regexes.problem(value):
                yield (*path, field), wrong
                return
        elif value and not pattern.fullmatch(value):
            yield (*path, field), f'"{value[:80]}" is not the name of a gRPC {field}'
    if method.get("type") == "RegularExpression" and (
        wrong := regexes.problem(f"(?:{method.get('service', '')})(?:{method.get('method', '')})")
    ):
        yield path, f"service and method together: {wrong}"


def claims(conditions: Sequence[Mapping[str, Any]]) -> Iterator[Found]:
    """Check the claims of a CallerMatch."""
    for number, condition in enumerate(conditions):
        here = ("spec", "claims", number)
        if "values" not in condition and "notValues" not in condition:
            yield here, "needs values, notValues or both"
        for field in ("values", "notValues"):
            for index, value in enumerate(condition.get(field, [])):
                if "*" in value.removeprefix("*").removesuffix("*") or (len(value) > 1 and value[0] == value[-1] == "*"):
                    yield (*here, field, index), f'"{value[:80]}": one "*" is allowed, at the start or at the end'
