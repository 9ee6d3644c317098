"""`when` of an AuthorizationPolicy: conditions by key. Called by `controller.checks` and `controller.compile`.

Keys and meaning are Istio's (https://istio.io/latest/docs/reference/config/security/conditions/): any of `values`, none of `notValues`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from controller.authentication import HEADER_NAME
from controller.documents import Path
from meshapi import discovery_pb2 as pb

_HEADER: Final = re.compile(r"request\.headers\[([^\[\]]*)\]")
_CLAIMS: Final = re.compile(r"request\.auth\.claims((?:\[[^\[\]]*\])+)")
_FIXED_CLAIMS: Final[Mapping[str, tuple[str, ...]]] = {"request.auth.audiences": ("aud",), "request.auth.presenter": ("azp",)}
_SOURCES: Final[Mapping[str, tuple[str, str]]] = {  # key -> fields of a source
    "source.ip": ("ipBlocks", "notIpBlocks"),
    "source.namespace": ("namespaces", "notNamespaces"),
    "source.principal": ("principals", "notPrincipals"),
    "source.serviceAccount": ("serviceAccounts", "notServiceAccounts"),
    "request.auth.principal": ("requestPrincipals", "notRequestPrincipals"),
}
_PORT: Final = "destination.port"
KEYS: Final = (*_SOURCES, _PORT, *_FIXED_CLAIMS, "request.headers[NAME]", "request.auth.claims[NAME]")
_ELSEWHERE: Final = re.compile(r"(remote\.ip|destination\.ip|connection\.sni|experimental\..*)")
_REQUEST: Final = ("request.",)
_REMOVED: Final = ("x-envoy-", "x-meshagent-")  # agent.l7.hygiene.RESERVED

Checks = Callable[[Path, Mapping[str, Any]], Iterator[tuple[Path, str]]]


def is_about_requests(condition: Mapping[str, Any]) -> bool:
    """Can only a request answer it?"""
    return str(condition["key"]).startswith(_REQUEST)


def source_of(condition: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The condition as a `source` of a policy; None if it is about something else."""
    fields = _SOURCES.get(condition["key"])
    if fields is None:
        return None
    given = (condition.get("values"), condition.get("notValues"))
    return {name: values for name, values in zip(fields, given, strict=True) if values}


def operation_of(condition: Mapping[str, Any]) -> pb.Operation | None:
    """The condition as an operation; None if it is about the source."""
    key, values, unwanted = condition["key"], condition.get("values", []), condition.get("notValues", [])
    if key == _PORT:
        return pb.Operation(ports=[int(value) for value in values], not_ports=[int(value) for value in unwanted])
    if match := _HEADER.fullmatch(key):
        return pb.Operation(headers=[pb.HeaderCondition(name=match[1].lower(), values=values, not_values=unwanted)])
    path = _claim_path(key)
    return pb.Operation(claims=[pb.ClaimCondition(path=path, values=values, not_values=unwanted)]) if path else None


def ports_of(conditions: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Conditions on the target port, as the fields of an operation."""
    for condition in conditions:
        if condition["key"] == _PORT:
            given = {"ports": condition.get("values"), "notPorts": condition.get("notValues")}
            yield {name: values for name, values in given.items() if values}


def _claim_path(key: str) -> tuple[str, ...]:
    if key in _FIXED_CLAIMS:
        return _FIXED_CLAIMS[key]
    match = _CLAIMS.fullmatch(key)
    return tuple(match[1][1:-1].split("][")) if match else ()


def check(path: Path, condition: Mapping[str, Any], source: Checks, operation: Checks) -> Iterator[tuple[Path, str]]:
    """Yield what is wrong with one. `source` and `operation` check values as they do in `from` and `to`."""
    key = condition["key"]
    if "values" not in condition and "notValues" not in condition:
        yield (*path, "values"), "is required, or notValues: a condition without them says nothing"
        return
    header = _HEADER.fullmatch(key)
    if header:
        yield from _check_header((*path, "key"), header[1])
    elif key not in _SOURCES and key != _PORT and not all(_claim_path(key) or ("",)):
        again = "is not supported" if _ELSEWHERE.fullmatch(key) else f"is unknown; known are {', '.join(KEYS)}"
        yield (*path, "key"), f'"{key[:120]}" {again}'
        return
    if key == _PORT:
        inner = operation(path, {"ports": condition.get("values", []), "notPorts": condition.get("notValues", [])})
    elif found := source_of(condition):
        inner = source(path, found)
    else:  # any text: the same form as a host
        inner = operation(path, {"hosts": condition.get("values", []), "notHosts": condition.get("notValues", [])})
    for where, message in inner:
        yield _back(path, where, found=message)


def _back(path: Path, where: Path, *, found: str) -> tuple[Path, str]:
    """Name the field of the condition instead of the field that it stands for."""
    rest = where[len(path) :]
    return (*path, "notValues" if str(rest[0]).startswith("not") else "values", *rest[1:]), found


def never_arrives(path: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Yield that nothing can be asked of a header of a request because the waypoint removes it first (`agent.l7.hygiene`)."""
    if name.lower().startswith(_REMOVED):
        yield path, f'"{name[:80]}" never arrives: the waypoint removes it from every request'


def _check_header(path: Path, name: str) -> Iterator[tuple[Path, str]]:
    if name.lower() in {"host", ":authority"}:
        yield path, "hosts are compared without case, port and final dot: write to.operation.hosts"
    elif name.lower().startswith(_REMOVED):
        yield from never_arrives(path, name)
    elif not HEADER_NAME.fullmatch(name):
        yield path, f'"{name[:80]}" is no name of a header'
