"""How rows of the configuration maps are packed: quick packers made from the layouts that the compiler gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from agent.bpf import manifest as m
from agent.bpf.maps import Map

Rows = dict[bytes, bytes]
_NUMBERED = frozenset({"id", "identity", "policy", "rule", "audit", "list", "workload"})
"""Members of rows that hold a number given by `agent.ids`."""


class Known(NamedTuple):
    """What mesh_address and mesh_workload say of somebody, in one epoch."""

    cookie: int
    number: int
    flags: int
    identity: int
    policy: int


class Layouts:
    """One packer for each kind of row; arguments in the order of the struct."""

    def __init__(self, maps: Mapping[str, Map]) -> None:
        """Raises LayoutMismatch if members are not laid out in the order that is used here."""
        key = {name: table.layout.key.packer for name, table in maps.items()}
        value = {name: table.layout.value.packer for name, table in maps.items()}
        self._maps = maps
        self._known = value["mesh_address"]("netns_cookie", "id", "flags", "identity", "policy")
        self.cookie = key["mesh_workload"]("")
        self.service_key = key["mesh_service"]("address", "port", "protocol")
        self.service = value["mesh_service"]("id", "list", "count", "flags", "affinity_ns")
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

    def known(self, zero: Known, one: Known) -> bytes:
        """A row of mesh_address or mesh_workload that says this in epochs 0 and 1; cookie, number and flags have one slot only."""
        return self._known(*zero[:3], zero.identity, one.identity, zero.policy, one.policy)

    def unpack(self, name: str) -> Callable[[bytes], dict[str, Any]]:
        """Unpacks values of a map."""
        return self._maps[name].layout.value.unpack

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
                    yield from (n for n in (found if isinstance(found, tuple) else (found,)) if n != m.IDENTITY_ANY)
