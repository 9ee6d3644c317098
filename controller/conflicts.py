"""Which objects may be in force together: two services cannot share an address and port, two workloads cannot share an address.

Called by `controller.source` with every candidate; pure. What is in force already has precedence over what changed, and that over what is new,
so that nobody can take over an address by choosing a file name that sorts first. After a restart only the order of files is left.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from controller.documents import Path
from controller.errors import Problem
from controller.objects import WORKLOADS, Key, Object

Claim = tuple[str, str, int]
Claims = dict[Claim, Object]
_PRECEDENCE = {"Pod": 0, "ExternalService": 2}


_IPV4 = re.compile(r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(?:\.(?!\Z)|\Z)){4}")
"""An IPv4 address, which has but one spelling. Of a large cluster every address is looked at, and `ipaddress` takes ten times as long."""


def _canonical(text: str) -> str:
    """Return the one spelling of an address; an agent cannot tell an IPv4-mapped IPv6 address from the IPv4 address in it."""
    if _IPV4.fullmatch(text):
        return text
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def virtual_addresses(service: Object) -> list[str]:
    """Return the canonical virtual addresses of a Service, none if it is headless."""
    spec = service.spec
    addresses = spec.get("clusterIPs") or [spec["clusterIP"]]
    return [] if addresses == ["None"] else [_canonical(address) for address in addresses]


def workload_addresses(workload: Object) -> list[str]:
    """Return the canonical addresses of a Workload or Pod; of a Pod that was not started yet there are none."""
    return [_canonical(address) for address in workload.spec["addresses"]]


def _claims(item: Object) -> Iterator[tuple[Claim, Path, str]]:
    if item.key.kind == "Service":
        field = "clusterIPs" if "clusterIPs" in item.spec else "clusterIP"
        for index, address in enumerate(virtual_addresses(item)):
            path: Path = ("spec", field, index) if field == "clusterIPs" else ("spec", field)
            for port in item.spec["ports"]:
                yield (address, port.get("protocol", "TCP"), port["port"]), path, f"{address} port {port['port']}"
            # A workload at this address could never be reached by its own address.
            yield (address, "host", 0), path, address
    elif item.key.kind in WORKLOADS and not item.spec.get("hostNetwork"):
        for index, address in enumerate(workload_addresses(item)):
            yield (address, "host", 0), ("spec", "addresses", index), address
    elif item.key.kind == "ExternalService":
        for index, text in enumerate(item.spec.get("addresses", ())):
            address = _canonical(text)
            for port in item.spec["ports"]:
                yield (address, "TCP", port["port"]), ("spec", "addresses", index), f"{address} port {port['port']}"
            yield (address, "host", 0), ("spec", "addresses", index), address


def claimed(item: Object) -> set[str]:
    """Return the addresses that an object asks for."""
    return {claim[0] for claim, _, _ in _claims(item)}


def _conflict(item: Object, claims: Claims) -> Problem | None:
    for claim, path, words in _claims(item):
        holder = claims.get(claim)
        if holder is None or holder.key == item.key:
            continue
        if claim[1] == "host" and holder.key.kind == item.key.kind not in WORKLOADS:
            continue
        return item.problem(path, f"{words} already belongs to {holder.key}")
    return None


def resolve(
    candidates: Iterable[Object], in_force: Mapping[Key, Object], *, oldest_first: bool = False
) -> tuple[dict[Key, Object], dict[Key, Problem]]:
    """Return what is in force from now on, and for each refused candidate the conflict that it lost.

    `candidates` hold at most one object per key. A candidate that loses is replaced by its version that is `in_force`, if that has no
    conflict itself. `oldest_first`: the one that was made first wins, whoever is in force, so that several controllers agree; objects need a time for that.
    """

    def rank(item: Object) -> tuple[int, Any]:
        if oldest_first:
            return _PRECEDENCE.get(item.key.kind, 1), (str(item.metadata.get("creationTimestamp", "")), item.key)
        held = in_force.get(item.key)
        # What is in the mesh comes before what somebody says of the outside, whoever was there first; and a pod before what somebody says of its address.
        return _PRECEDENCE.get(item.key.kind, 1), 2 if held is None else 0 if held.data is item.data or held.data == item.data else 1

    accepted: dict[Key, Object] = {}
    problems: dict[Key, Problem] = {}
    claims: Claims = {}
    for item in sorted(candidates, key=rank):
        chosen: Object | None = item
        if problem := _conflict(item, claims):
            problems[item.key] = problem
            chosen = in_force.get(item.key)
            if chosen is not None and _conflict(chosen, claims):
                chosen = None
        if chosen is not None:
            accepted[chosen.key] = chosen
            for claim, _, _ in _claims(chosen):
                claims.setdefault(claim, chosen)
    return accepted, problems
