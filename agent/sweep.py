"""Removes the counters of workloads, services and policies that are gone, so that neither the kernel's tables nor the numbering grow for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from agent.bpf.maps import Map
from agent.ids import Ids
from agent.model import Snapshot

KEPT_S = 600.0
"""How long counters outlive what they are about: several scrapes, and a rollout that is rolled back."""
_WORKLOAD, _SERVICE, _RULE = "workload", "service", "rule"
_TABLES = {
    "mesh_stats": {"source": _WORKLOAD, "target": _WORKLOAD, "service": _SERVICE},
    "mesh_verdicts": {"source": _WORKLOAD, "target": _WORKLOAD, "service": _SERVICE, "rule": _RULE},
    "mesh_load": {"workload": _WORKLOAD},
}
"""Tables that the kernel fills, and the members of their keys that hold a number of `agent.ids`, by the kind of what it means."""
_Meant = tuple[str, int]


class Sweep:
    """Not thread-safe, and not to run while a snapshot is brought into force: a name that comes back meanwhile must not be forgotten."""

    def __init__(
        self, maps: Mapping[str, Map], ids: Ids, clock: Callable[[], float] = time.monotonic, kept: frozenset[str] = frozenset()
    ) -> None:
        """`clock` is in seconds; `kept` are names of callers that are in no snapshot, and stay."""
        self._tables = {
            name: (maps[name], maps[name].layout.key.unpacker(*kinds), tuple(kinds.values())) for name, kinds in _TABLES.items()
        }
        self._ids = ids
        self._clock = clock
        self._kept = kept
        self._gone: dict[_Meant, float] = {}
        """What is named in the tables but not in the snapshot, and since when."""

    def run(self, snapshot: Snapshot) -> int:
        """Remove what has been gone for KEPT_S; returns the number of rows. Call it every minute with the snapshot in force."""
        now = self._clock()
        found: dict[str, list[tuple[bytes, list[_Meant]]]] = {}
        for name, (table, members, kinds) in self._tables.items():
            found[name] = [(key, [(k, n) for k, n in zip(kinds, members(key), strict=True) if n]) for key, _ in table.items()]
        strangers = {
            name: (_WORKLOAD, self._ids.number(_WORKLOAD, name)) for name in self._ids.names(_WORKLOAD) if not self._stays(name, snapshot)
        }
        meant = {one for rows in found.values() for _, members in rows for one in members} | set(strangers.values())
        self._gone = {one: self._gone.get(one, now) for one in meant if not self._exists(*one, snapshot)}
        old = {one for one, since in self._gone.items() if now - since >= KEPT_S}
        if not old:
            return 0
        self._gone = {one: since for one, since in self._gone.items() if one not in old}
        removed = 0
        for name, rows in found.items():
            keys = [key for key, members in rows if not old.isdisjoint(members)]
            self._tables[name][0].remove(keys)
            removed += len(keys)
        # Only now: a row without names would be counted with those of others.
        self._ids.forget(_WORKLOAD, [name for name, one in strangers.items() if one in old])
        self._ids.save()
        return removed

    def _stays(self, workload: str, snapshot: Snapshot) -> bool:
        return workload in snapshot.workloads or workload in self._kept

    def _exists(self, kind: str, number: int, snapshot: Snapshot) -> bool:
        """Is what the number means in the snapshot?"""
        name = self._ids.name(number)
        if kind == _WORKLOAD:
            return self._stays(name, snapshot)
        if kind == _SERVICE:
            return name.rpartition(":")[0] in snapshot.services
        # As agent.policy writes them: a policy with the index of its rule, policies of which no rule matches, or no policy at all.
        policies = name.partition("[")[0].partition(":")[0]
        return "/" not in policies or any(policy in snapshot.policies for policy in policies.split(", "))
