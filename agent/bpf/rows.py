"""How rows of the configuration maps are packed: quick packers made from the layouts that the compiler gave.

Numbers that decide stand in one word with the owner of their row (bpf_src/mesh_types.h, struct mesh_workload): made here, and taken apart here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from agent.bpf import manifest as m
from agent.bpf.maps import Map

Rows = dict[bytes, bytes]
_NUMBER = 0xFFFFFFFF
"""The part of a word that is not the owner."""
_RESERVED = frozenset({m.IDENTITY_ANY, m.IDENTITY_NOBODY, m.POLICY_CLOSED})
_COOKIE, _ADDRESS, _PORT = struct.Struct("=Q"), struct.Struct("=4I"), struct.Struct("=HB")
_NUMBERED = frozenset({"id", "identity", "policy", "rule", "audit", "list", "workload"})
"""Members of rows that hold a number given by `agent.ids`."""


class Known(NamedTuple):
    """What mesh_address and mesh_workload say of somebody, in one epoch."""

    cookie: int
    number: int
    flags: int
    tunnel: int
    """Lower 24 bits of the loopback address that stands for its SPIFFE ID, 0: none."""
    identity: int
    policy: int


class Layouts:
    """One packer for each kind of row; arguments in the order of the struct."""

    def __init__(self, maps: Mapping[str, Map]) -> None:
        """Raises LayoutMismatch if members are not laid out in the order that is used here."""
        key = {name: table.layout.key.packer for name, table in maps.items()}
        value = {name: table.layout.value.packer for name, table in maps.items()}
        self._maps = maps
        self._known = value["mesh_address"]("identity", "policy", "netns_cookie", "id", "flags", "tunnel")
        self.cookie = key["mesh_workload"]("")
        self.mtls_key = key["mesh_mtls"]("workload", "port")
        self._mtls = value["mesh_mtls"]("")
        self.service_key = key["mesh_service"]("address", "port", "protocol")
        self._service = value["mesh_service"]("list", "id", "count", "flags", "affinity_ns")
        self.backend_key = key["mesh_backend"]("list", "slot")
        self.backend = value["mesh_backend"]("address", "workload", "port", "threshold", "alias")
        self.member_key = key["mesh_member"]("list", "port", "address")
        self.member = value["mesh_member"]("")
        self.policy_key = key["mesh_policy"]("policy", "identity", "port", "protocol")
        self.policy = value["mesh_policy"]("rule", "audit", "verdict")
        self.block_key = key["mesh_block"]("prefix_length", "address")
        self.block = value["mesh_block"]("identity")
        self.resolver_key = key["mesh_resolver"]("netns_cookie", "address")
        self.resolver = value["mesh_resolver"]("")

    def known(self, key: bytes, zero: Known, one: Known | None = None) -> bytes:
        """The row of `key` in mesh_address or mesh_workload that says this in epochs 0 and 1 (the same if None); the rest has one slot only."""
        one = one or zero
        owner = _owner(key) << 32
        return self._known(owner | zero.identity, owner | one.identity, owner | zero.policy, owner | one.policy, *zero[:4])

    def known_at(self, row: bytes, epoch: int) -> Known:
        """What a row of mesh_address or mesh_workload says in an epoch."""
        found = self.unpack("mesh_address")(row)
        identity, policy = found["identity"][epoch] & _NUMBER, found["policy"][epoch] & _NUMBER
        return Known(found["netns_cookie"], found["id"], found["flags"], found["tunnel"], identity, policy)

    def mtls(self, workload: int, port: int, bits: int) -> bytes:
        """The row of a workload's port in mesh_mtls."""
        return self._mtls(((workload ^ port * 0x27D4EB2F) & _NUMBER) << 32 | bits)  # mesh_mtls_owner in bpf_src/mesh_helpers.h

    def service(self, key: bytes, number: int, listing: int, count: int, flags: int, affinity_ns: int) -> bytes:
        """The row of `key` in mesh_service."""
        return self._service(_owner(key) << 32 | listing, number, count, flags, affinity_ns)

    def unpack(self, name: str) -> Callable[[bytes], dict[str, Any]]:
        """Unpacks values of a map."""
        return self._maps[name].layout.value.unpack

    def block_identity(self, row: bytes, epoch: int) -> int:
        """The identity that a row of mesh_block has in an epoch."""
        return int(self.unpack("mesh_block")(row)["identity"][epoch])

    def block_of(self, key: bytes) -> tuple[int, int]:
        """Length in bits and address, as a number, of a key of mesh_block."""
        members = self._maps["mesh_block"].layout.key.unpack(key)
        return members["prefix_length"], int.from_bytes(members["address"], "big")

    def numbers(self, name: str) -> Iterator[int]:
        """Every number of `agent.ids` that rows of a map carry now."""
        layout = self._maps[name].layout
        for key, values in self._maps[name].items():
            for member, found in (*layout.key.unpack(key).items(), *layout.value.unpack(values[0]).items()):
                if member in _NUMBERED:
                    numbers = (n & _NUMBER for n in (found if isinstance(found, tuple) else (found,)))
                    yield from (n for n in numbers if n not in _RESERVED)


def _owner(key: bytes) -> int:
    """Whose row it is, in 32 bits: mesh_owner in bpf_src/mesh_helpers.h."""
    if len(key) == _COOKIE.size:
        return int(_COOKIE.unpack(key)[0]) & _NUMBER
    zero, one, two, three = _ADDRESS.unpack_from(key)
    port, protocol = _PORT.unpack_from(key, _ADDRESS.size) if len(key) > _ADDRESS.size else (0, 0)
    return int(three ^ two * 0x9E3779B1 ^ one * 0x85EBCA77 ^ zero * 0xC2B2AE3D ^ (port | protocol << 16) * 0x27D4EB2F) & _NUMBER
