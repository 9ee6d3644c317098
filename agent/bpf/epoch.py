"""Rows with two slots, of which one is in force everywhere: how a change of policies takes effect in all rows at once.

bpf_src/mesh_types.h says why. A turn has three steps: rows get what will hold in the slot that is not in force, the epoch turns, rows get it in the other
slot too, so that the next turn finds both the same. A crash between any two of them leaves a consistent state in force.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from agent.bpf import libbpf
from agent.bpf import manifest as m
from agent.bpf.maps import Map, Mirror
from agent.bpf.rows import Known, Layouts, Rows

T = TypeVar("T")


@dataclass(slots=True)
class _Change:
    """Rows of one map to write before the turn, if there is one, and after it."""

    turning: Rows = field(default_factory=dict)
    """Rows that mean something else from the turn on."""
    passing: Rows = field(default_factory=dict)
    """Rows that begin or end with the turn: on the other side of it they say what would hold without them."""
    after: Rows = field(default_factory=dict)
    stale: set[bytes] = field(default_factory=set)


class _Strangers:
    """Who an address is by the blocks alone."""

    def __init__(self, blocks: Mapping[tuple[int, int], int]) -> None:
        """`blocks`: identity by (length in bits, address)."""
        self._by_length: dict[int, dict[int, int]] = {}
        for (bits, address), identity in sorted(blocks.items(), reverse=True):
            self._by_length.setdefault(bits, {})[address >> (128 - bits)] = identity

    def of(self, address: int, shorter_than: int = 129) -> int:
        """The identity of the longest block that holds the address, and is shorter than so many bits."""
        for bits, identities in self._by_length.items():
            found = identities.get(address >> (128 - bits))
            if found is not None and bits < shorter_than:
                return found
        return m.IDENTITY_UNKNOWN


class Epoch:
    """mesh_epoch, and the maps whose rows have two slots."""

    def __init__(self, table: Map, mirrors: Mapping[str, Mirror], layouts: Layouts) -> None:
        """Find out which slot is in force."""
        self._table = table
        self._mirrors = mirrors
        self._layouts = layouts
        self.current = int(table.layout.value.unpack((table.get(bytes(4)) or [bytes(4)])[0])[""]) & 1

    def _slots(self, now: T, later: T) -> tuple[T, T]:
        """Both, each in its slot, for the time before the turn."""
        return (now, later) if self.current == 0 else (later, now)

    def bring(
        self, blocks: Mapping[bytes, int], address: Mapping[bytes, Known], workload: Mapping[bytes, Known], switching: Callable[[], None]
    ) -> tuple[dict[str, set[bytes]], int]:
        """Bring identities and policies into force in all rows at once; returns the keys that are not wanted any more, and how many rows were written.

        `switching` is called right before the first of them is. Raises KernelRefused before that if there is no room for old and new rows.
        """
        held = {key: self._layouts.block_identity(row, self.current) for key, row in self._mirrors["mesh_block"].read().items()}
        now, later = (_Strangers({self._layouts.block_of(key): identity for key, identity in of.items()}) for of in (held, blocks))
        changes = {
            "mesh_block": self._blocks(held, blocks, now, later),
            "mesh_address": self._known("mesh_address", address, now, later),
            "mesh_workload": self._known("mesh_workload", workload, now, later),
        }
        switching()
        if any(change.turning for change in changes.values()):
            for name, change in changes.items():
                self._mirrors[name].write({**change.passing, **change.turning})
            self.current = 1 - self.current
            self._table.put(bytes(4), self._table.layout.value.pack(**{"": self.current}))
            libbpf.wait_for_programs()  # those that read the old epoch still use the slot that is written next
        written = sum(self._mirrors[name].write(change.after) for name, change in changes.items())
        return {name: change.stale for name, change in changes.items()}, written

    def _known(self, name: str, wanted: Mapping[bytes, Known], now: _Strangers, later: _Strangers) -> _Change:
        held = self._mirrors[name].read()
        self._mirrors[name].check(len(held.keys() | wanted.keys()))
        change = _Change(stale=held.keys() - wanted.keys())
        for key, known in wanted.items():
            row, before = self._layouts.known(key, known), held.get(key)
            if before == row:
                continue
            change.after[key] = row
            if before is None:
                change.passing[key] = self._layouts.known(key, *self._slots(_without(key, known, now), known))
                continue
            old = self._layouts.known_at(before, self.current)
            before_turn = known._replace(identity=old.identity, policy=old.policy)
            if before_turn != known:
                change.turning[key] = self._layouts.known(key, *self._slots(before_turn, known))
        for key in change.stale:
            old = self._layouts.known_at(held[key], self.current)
            change.passing[key] = self._layouts.known(key, *self._slots(old, _without(key, old, later)))
        return change

    def _blocks(self, held: Mapping[bytes, int], wanted: Mapping[bytes, int], now: _Strangers, later: _Strangers) -> _Change:
        """A block that comes or goes changes who its addresses are, as a row of a workload does that changes."""
        change = _Change(stale=set(held.keys() - wanted.keys()))
        rows = self._mirrors["mesh_block"].read()
        self._mirrors["mesh_block"].check(len(rows.keys() | wanted.keys()))
        for key in held.keys() | wanted.keys():
            bits, address = self._layouts.block_of(key)
            current = held[key] if key in held else now.of(address, bits)
            coming = wanted[key] if key in wanted else later.of(address, bits)
            row = self._layouts.block(coming, coming)
            if rows.get(key) != row:
                change.after[key] = row
            if current != coming:
                change.turning[key] = self._layouts.block(*self._slots(current, coming))
        return change


def _without(key: bytes, known: Known, strangers: _Strangers) -> Known:
    """What holds where the row of `key` does not. Of an enrolled namespace nothing can be said then: it is closed, and so is what it calls."""
    if known.cookie:
        return known._replace(identity=m.IDENTITY_NOBODY, policy=m.POLICY_CLOSED)
    return known._replace(identity=strangers.of(int.from_bytes(key, "big")), policy=0)
