"""ExternalServices: hosts outside the mesh as services with names of their own. Called by `controller.checks` and `controller.compile`; pure.

Each becomes one service of the model for each host, NAMESPACE/HOST, because a connection to an address must say which host is meant; hosts with fixed
addresses in common are one. Names have a dot, so none is that of a Service. Fields follow Istio's ServiceEntry
(https://istio.io/latest/docs/reference/config/networking/service-entry/), whose automatic allocation also uses 240.240.0.0/16.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography import x509

from controller.documents import Path
from controller.gateways import Said
from controller.objects import Key, Object
from meshapi import discovery_pb2 as pb

KIND: Final = "ExternalService"
VIRTUAL4: Final = ipaddress.IPv4Network("240.240.0.0/16")
VIRTUAL6: Final = ipaddress.IPv6Network("fd24:240:240::/64")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)+")
_INSIDE = re.compile(r".*\.svc(\..*)?")
"""What services are called (https://kubernetes.io/docs/concepts/services-networking/dns-pod-service/)."""
_SPOKEN: Final = {"HTTP": "http", "HTTP2": "http2", "GRPC": "http2", "HTTPS": "tls", "TLS": "tls", "TCP": "tcp"}
_HTTP_PORT: Final = 80
_HTTPS_PORT: Final = 443

Found = tuple[Path, str]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _host(text: str) -> str:
    """Return what is wrong with the name of a host, or nothing."""
    if text.startswith("*"):
        return "wildcards are not supported: name each host"
    if _is_address(text):
        return f"{text} is an address: write it under spec.addresses, and a name here"
    if len(text) > 253 or not _NAME.fullmatch(text):
        return f'"{text[:80]}" is not a DNS name with a dot, in lower case and without one at its end'
    if _INSIDE.fullmatch(text):
        return f'"{text[:80]}" is what a service of the mesh is called'
    if text.rpartition(".")[2].isdigit():
        return f'"{text[:80]}" could be taken for an address'
    return "" if text.rpartition(".")[2] != "localhost" else f'"{text[:80]}" always means the caller itself (RFC 6761)'


def check(spec: Mapping[str, Any], address: Callable[[str], str]) -> Iterator[Found]:
    """Yield what a schema cannot say of one object. `address` says what is wrong with one, or nothing."""
    hosts = spec["hosts"]
    for index, host in enumerate(hosts):
        if wrong := _host(host):
            yield ("spec", "hosts", index), wrong
        elif host in hosts[:index]:
            yield ("spec", "hosts", index), f"{host} is listed twice"
    yield from _check_addresses(spec, address)
    yield from _check_ports(spec)
    yield from _check_endpoints(spec, address)
    if "tls" in spec:
        yield from _check_tls(spec)


def _check_addresses(spec: Mapping[str, Any], wrong_with: Callable[[str], str]) -> Iterator[Found]:
    seen: set[str] = set()
    for index, text in enumerate(spec.get("addresses", ())):
        path: Path = ("spec", "addresses", index)
        if wrong := wrong_with(text):
            yield path, wrong
            continue
        address = ipaddress.ip_address(text)
        if is_virtual(text):
            yield path, f"{text} is of {VIRTUAL4 if address.version == 4 else VIRTUAL6}, which the controller gives away itself"
        if str(address) in seen:
            yield path, f"{text} is listed twice"
        seen.add(str(address))
    if "addresses" in spec and len(spec["hosts"]) > 1:
        if "endpoints" not in spec:
            yield ("spec", "endpoints"), "is required: several hosts share spec.addresses, so nobody can tell which one is called"
        if "tls" in spec and "sni" not in spec["tls"]:
            yield ("spec", "tls", "sni"), "is required: several hosts share spec.addresses, so nobody can tell which one is called"


def _check_ports(spec: Mapping[str, Any]) -> Iterator[Found]:
    numbers: set[int] = set()
    names: set[str] = set()
    for index, port in enumerate(spec["ports"]):
        if port["port"] in numbers:
            yield ("spec", "ports", index, "port"), f"port {port['port']} is listed twice"
        if "name" in port and port["name"] in names:
            yield ("spec", "ports", index, "name"), f'"{port["name"]}" is used twice'
        numbers.add(port["port"])
        names.add(port.get("name", ""))


def _check_endpoints(spec: Mapping[str, Any], wrong_with: Callable[[str], str]) -> Iterator[Found]:
    static = spec.get("resolution", "DNS") == "STATIC"
    if static and "endpoints" not in spec and "addresses" not in spec:
        yield ("spec", "endpoints"), "is required for resolution STATIC, if there are no spec.addresses"
    ports = {port["name"] for port in spec["ports"] if "name" in port}
    for index, endpoint in enumerate(spec.get("endpoints", ())):
        path: Path = ("spec", "endpoints", index)
        text = endpoint["address"]
        if _is_address(text) or "%" in text:
            if wrong := wrong_with(text):
                yield (*path, "address"), wrong
            elif is_virtual(text):
                yield (*path, "address"), f"{text} is an address inside the mesh"
        elif static:
            yield (*path, "address"), f'"{text[:80]}" is not an address, and spec.resolution is STATIC'
        elif wrong := _host(text):
            yield (*path, "address"), wrong
        for name in endpoint.get("ports", ()):
            if name not in ports:
                yield (*path, "ports", name), "no port of spec.ports has this name"


def _check_tls(spec: Mapping[str, Any]) -> Iterator[Found]:
    tls = spec["tls"]
    if all(_SPOKEN[port["protocol"]] == "tls" for port in spec["ports"]):
        yield ("spec", "tls"), "has no effect: at HTTPS and TLS ports the caller speaks TLS itself; make the port HTTP"
    if "sni" in tls and not _NAME.fullmatch(tls["sni"]):
        yield ("spec", "tls", "sni"), f'"{tls["sni"][:80]}" is not a DNS name with a dot, in lower case'
    for index, name in enumerate(tls.get("subjectAltNames", ())):
        if not (_is_address(name) or "://" in name or _NAME.fullmatch(name)):
            yield (
                ("spec", "tls", "subjectAltNames", index),
                f'"{name[:80]}" is not a DNS name, an address or a URI; wildcards are not allowed',
            )
    if "caCertificates" in tls:
        try:
            x509.load_pem_x509_certificates(tls["caCertificates"].encode())
        except ValueError:
            yield ("spec", "tls", "caCertificates"), "holds no PEM certificate"


@dataclass(slots=True)
class Known:
    """What the rest of the model has: addresses that are taken, names of services, and whether anything speaks IPv6."""

    addresses: frozenset[str]
    services: Mapping[str, Object]
    ipv6: bool
    policies: Mapping[str, Iterable[Object]]
    """By "NAMESPACE/NAME" of the ExternalService that they name."""


@dataclass(slots=True)
class Compiled:
    """Services by name, and what is to be said of each object: (type, status, reason, message)."""

    services: dict[str, pb.Service] = field(default_factory=dict)
    conditions: dict[Key, list[Said]] = field(default_factory=lambda: defaultdict(list))


def compile_externals(items: Iterable[Object], known: Known, created: Callable[[Object], int]) -> Compiled:
    """Turn ExternalServices into services. Of two that claim one host for the same callers the older counts, by creation and then by name."""
    out = Compiled()
    holders: dict[tuple[str, str], Object] = {}
    taken = set(known.addresses)
    for item in sorted(items, key=lambda item: (created(item), item.key)):
        scope = item.key.namespace if _is_private(item) else "*"
        mine, lost = [], []
        for host in item.spec["hosts"]:
            if called := _service_called(host, known):
                lost.append(f"{host} is the name of Service {called}")
                continue
            # Names of services are NAMESPACE/HOST: within a namespace one of them counts, whomever they are for.
            claims = {(scope, host), (item.key.namespace + "/", host)}
            holder = next((holders[claim] for claim in sorted(claims) if claim in holders), None)
            if holder is None:
                holders.update(dict.fromkeys(claims, item))
                mine.append(host)
            else:
                lost.append(f"{host} is {KIND} {holder.key.qualified}'s")
        told = []
        for service in _services(item, mine, taken, known):
            out.services[f"{service.namespace}/{service.name}"] = service
            told.append(f"{', '.join(service.external.hosts)} = {', '.join(service.addresses)}")
        conditions = out.conditions[item.key]
        if mine:
            conditions.append(Said("Accepted", True, "Accepted", f"in force: {'; '.join(told)}"))
        if lost:
            message = f"spec.hosts: {'; '.join(lost)}; of two the oldest counts, by creationTimestamp (without one it is the oldest), then by name"
            conditions.append(Said("Uncontested" if mine else "Accepted", False, "Conflicted", message))
        if mine and (inside := [wrong for _, wrong in _endpoints(item, known) if wrong]):
            message = f"{'; '.join(inside)}: not used, an ExternalService never leads into the mesh"
            conditions.append(Said("EndpointsUsed", False, "PointsIntoTheMesh", message))
    return out


def claimed(items: Iterable[Object]) -> set[str]:
    """The addresses that ExternalServices name as their own."""
    return {str(ipaddress.ip_address(text)) for item in items for text in item.spec.get("addresses", ())}


def is_virtual(address: str) -> bool:
    """Is it one of those that the controller gives away?"""
    found = ipaddress.ip_address(address)
    return found in VIRTUAL4 or found in VIRTUAL6


def _is_private(item: Object) -> bool:
    return bool(item.spec.get("exportTo", ["*"]) == ["."])


def _service_called(name: str, known: Known) -> str:
    """Return the Service whose short name NAME.NAMESPACE this is, or nothing."""
    leaf, _, namespace = name.partition(".")
    return f"{namespace}/{leaf}" if f"{namespace}/{leaf}" in known.services else ""


def _endpoints(item: Object, known: Known) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield each endpoint that was given, with what is wrong with it: what is the mesh's must not be reached as if it were outside."""
    for index, endpoint in enumerate(item.spec.get("endpoints", ())):
        text, path = endpoint["address"], f"spec.endpoints[{index}].address"
        wrong = ""
        if _is_address(text):
            if str(ipaddress.ip_address(text)) in known.addresses:
                wrong = f"{path}: {text} belongs to a workload or service"
        elif called := _service_called(text, known):
            wrong = f"{path}: {text} is the name of Service {called}"
        yield endpoint, wrong


def _services(item: Object, hosts: list[str], taken: set[str], known: Known) -> Iterator[pb.Service]:
    fixed = [str(ipaddress.ip_address(text)) for text in item.spec.get("addresses", ())]
    groups = [hosts] if fixed and hosts else [[host] for host in hosts]
    for group in groups:
        addresses = fixed or _allot(f"{item.key.qualified}/{group[0]}", taken, ipv6=known.ipv6)
        service = pb.Service(namespace=item.key.namespace, name=group[0], addresses=addresses, external=_external(item, group, known))
        for port in item.spec["ports"]:
            reason = f"{KIND} {item.key.qualified}"
            spoken = _SPOKEN[port["protocol"]]
            service.ports.add(
                port=port["port"], name=port.get("name", ""), protocol="TCP", app_protocol=spoken, waypoint=True, reason=reason
            )
        yield service


def _allot(name: str, taken: set[str], *, ipv6: bool) -> list[str]:
    """Virtual addresses that depend on the name alone, as long as they are free: then the next ones."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    found = []
    for network, bits in ((VIRTUAL4, 16), *(((VIRTUAL6, 64),) if ipv6 else ())):
        room = (1 << bits) - 2  # neither the first nor the last
        for step in range(room):
            address = str(network[(digest + step) % room + 1])
            if address not in taken:
                taken.add(address)
                found.append(address)
                break
    return found


def _external(item: Object, hosts: list[str], known: Known) -> pb.External:
    spec = item.spec
    static = spec.get("resolution", "DNS") == "STATIC"
    default: list[Mapping[str, Any]] = [{"address": text} for text in (spec.get("addresses", ()) if static else hosts)]
    given = [endpoint for endpoint, wrong in _endpoints(item, known) if not wrong] if "endpoints" in spec else default
    result = pb.External(
        resource=item.key.name,
        hosts=hosts,
        fixed="addresses" in spec,
        dns=not static,
        endpoints=[_endpoint(spec, endpoint) for endpoint in given],
        policies=sorted(policy.key.qualified for policy in known.policies.get(item.key.qualified, ())),
        private=_is_private(item),
    )
    if "tls" in spec:
        tls = spec["tls"]
        sni = tls.get("sni", hosts[0])
        result.tls.CopyFrom(pb.ExternalTls(sni=sni, names=tls.get("subjectAltNames", [sni]), roots=tls.get("caCertificates", "")))
    return result


def _endpoint(spec: Mapping[str, Any], endpoint: Mapping[str, Any]) -> pb.ExternalEndpoint:
    address = endpoint["address"]
    named = endpoint.get("ports", {})
    ports = {port["port"]: named.get(port.get("name"), _target(port, originates="tls" in spec)) for port in spec["ports"]}
    text = str(ipaddress.ip_address(address)) if _is_address(address) else address
    return pb.ExternalEndpoint(address=text, weight=endpoint.get("weight", 1), ports=ports)


def _target(port: Mapping[str, Any], *, originates: bool) -> int:
    default = _HTTPS_PORT if originates and port["port"] == _HTTP_PORT and _SPOKEN[port["protocol"]] != "tls" else port["port"]
    target: int = port.get("targetPort", default)
    return target
