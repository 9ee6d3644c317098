"""Rows with two slots, of which one is in force everywhere: how a change of policies takes effect in all rows at once.

bpf_src/mesh_types.h says why. A turn has three steps: rows get what will hold in the slot that is not in force, the epoch turns, rows get it in the other
slot too, so that the next turn finds both the same. A crash between any two of them leaves a consistent state in force.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from agent.bpf import libbpf
from agent.bpf import manifest as m
from agent.bpf.maps import Map, Mirror
from agent.bpf.rows import Known, Layouts, Rows

T = TypeVar("T")


@dataclass(slots=True)
class _Change:
    """Rows of one map to write before and after the turn."""

    before: Rows = field(default_factory=dict)
    after: Rows = field(default_factory=dict)
    stale: set[bytes] = field(default_factory=set)


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
        self, blocks: Mapping[bytes, int], address: Mapping[bytes, Known], workload: Mapping[bytes, Known]
    ) -> tuple[dict[str, set[bytes]], int]:
        """Bring identities and policies into force in all rows at once; returns the keys that are not wanted any more, and how many rows were written."""
        changes = {
            "mesh_block": self._blocks(blocks),
            "mesh_address": self._known("mesh_address", address),
            "mesh_workload": self._known("mesh_workload", workload),
        }
        if any(change.before for change in changes.values()):
            for name, change in changes.items():
                # What is new stands with its final row from the start: nobody else's standing depends on it.
                self._mirrors[name].write({**change.after, **change.before})
            self.current = 1 - self.current
            self._table.put(bytes(4), self._table.layout.value.pack(**{"": self.current}))
            libbpf.wait_for_programs()  # those that read the old epoch still use the slot that is written next
        written = sum(self._mirrors[name].write(change.after) for name, change in changes.items())
        return {name: change.stale for name, change in changes.items()}, written

    def _known(self, name: str, wanted: Mapping[bytes, Known]) -> _Change:
        held = self._mirrors[name].read()
        self._mirrors[name].check(len(held.keys() | wanted.keys()))
        change = _Change(stale=held.keys() - wanted.keys())
        for key, known in wanted.items():
            row, before = self._layouts.known(key, known), held.get(key)
            if before == row:
                continue
            change.after[key] = row
            if before is not None:
                identity, policy = self._layouts.known_at(name, before, self.current)
                now = known._replace(identity=identity, policy=policy)
                if now != known:
                    change.before[key] = self._layouts.known(key, *self._slots(now, known))
        return change

    def _blocks(self, wanted: Mapping[bytes, int]) -> _Change:
        """A block that comes or goes changes who its addresses are, as a row of a workload does that changes."""
        held = self._mirrors["mesh_block"].read()
        unpack = self._layouts.unpack("mesh_block")
        now = {key: int(unpack(row)["identity"][self.current]) for key, row in held.items()}
        change = _Change(stale=held.keys() - wanted.keys())
        for key in held.keys() | wanted.keys():
            current = now[key] if key in now else now.get(self._outer(now, key), m.IDENTITY_UNKNOWN)
            later = wanted[key] if key in wanted else wanted.get(self._outer(wanted, key), m.IDENTITY_UNKNOWN)
            row = self._layouts.block(later, later)
            if held.get(key) != row:
                change.after[key] = row
            if current != later:
                change.before[key] = self._layouts.block(*self._slots(current, later))
        return change

    def _outer(self, blocks: Iterable[bytes], key: bytes) -> bytes:
        """The longest other block that holds the block of this key; b"" if there is none."""
        bits, address = self._layouts.block_of(key)
        best, length = b"", -1
        for other in blocks:
            wide, start = self._layouts.block_of(other)
            if length < wide < bits and start >> (128 - wide) == address >> (128 - wide):
                best, length = other, wide
        return best
