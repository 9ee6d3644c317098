"""What a service that stands for hosts outside the mesh says: frozen dataclasses, decoded once. Part of the model (`agent.model`).

The field meanings are those of meshapi/discovery.proto, message External; such a service is called NAMESPACE/HOST.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from meshapi import discovery_pb2 as pb

_STREAMS = frozenset({"tls", "tcp"})


class _Port(Protocol):
    @property
    def app_protocol(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address or a DNS name outside; `ports` map service port to port there."""

    address: str
    weight: int
    ports: Mapping[int, int]

    @property
    def is_name(self) -> bool:
        """Must it be resolved?"""
        try:
            ipaddress.ip_address(self.address)
        except ValueError:
            return True
        return False


@dataclass(frozen=True, slots=True)
class Origination:
    """How the waypoint speaks TLS: which name it asks for, which of `names` the certificate must have, and who may vouch ("": the node's system; PEM)."""

    sni: str
    names: tuple[str, ...]
    roots: str


@dataclass(frozen=True, slots=True)
class External:
    """See the module."""

    resource: str
    hosts: tuple[str, ...]
    fixed: bool
    dns: bool
    endpoints: tuple[Endpoint, ...]
    tls: Origination | None = None
    policies: tuple[str, ...] = ()
    private: bool = False

    @staticmethod
    def is_stream(port: _Port) -> bool:
        """Is a port of it not HTTP?"""
        return port.app_protocol in _STREAMS

    @staticmethod
    def of(m: pb.External) -> External:
        """Decode it. Raises ValueError for one that nobody could be led to safely: without hosts, or TLS that would verify nothing."""
        if not m.hosts:
            raise ValueError("an external service without hosts")
        tls = None
        if m.HasField("tls"):
            tls = Origination(m.tls.sni, tuple(m.tls.names), m.tls.roots)
            if not tls.sni or not tls.names or not all(tls.names):
                raise ValueError("TLS to the outside without a name to verify")
        endpoints = tuple(Endpoint(e.address, e.weight or 1, MappingProxyType(dict(e.ports))) for e in m.endpoints)
        return External(m.resource, tuple(m.hosts), m.fixed, m.dns, endpoints, tls, tuple(m.policies), m.private)
