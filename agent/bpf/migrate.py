"""What becomes of the pinned maps when other programs take over: which are used again, which rows go to a new map, which start anew.

A map is used again if its kind, capacity, key and value are the same to the old and to the new programs. Records are compared as the compiler laid
them out, not as text; members named `pad...` or `spare...` are room that others may take. All else here is about maps that changed:

- configuration (`CONFIG`): all of it is used again or none, and then filled from the last good snapshot while the old programs go on with the old
  maps, so that neither set of programs ever sees half of it;
- state of connections: while the links change over, programs of a third set (`agent.bpf.bridge`) look into both maps; rows nobody asked for are
  carried over by `Migration.carry`, member by member;
- counters: `Migration.add` takes them out of the old map and adds them to the new one, so that it can be done twice, or again after a crash;
- sockets, socket storage and the ring buffer cannot be copied and start empty.
"""

from __future__ import annotations

import enum
import errno
import logging
import struct
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from agent.bpf import libbpf
from agent.bpf.manifest import Codec, MapLayout
from agent.bpf.maps import Map

_log = logging.getLogger(__name__)

CONFIG = frozenset(
    {
        *("mesh_config", "mesh_epoch", "mesh_workload", "mesh_address", "mesh_service", "mesh_backend", "mesh_member", "mesh_block"),
        *("mesh_mtls", "mesh_resolver", "mesh_policy", "mesh_trace"),
    }
)
"""Written by the agent."""
ACCELERATION = frozenset({"mesh_offer", "mesh_pair", "mesh_peers", "mesh_joined"})
"""Two ends of a connection agree through all of these: they stay together."""
_TOGETHER = (CONFIG, ACCELERATION)
_COPIED_CONFIG = frozenset({"mesh_resolver"})
"""Not part of a snapshot: found out in the namespaces, some time after the start."""
_WORTHLESS = frozenset({"mesh_budget", "mesh_blank", "mesh_kubelet", "mesh_alive", "mesh_kubepods"})
"""Found out anew before the programs are attached, or without meaning."""
# include/uapi/linux/bpf.h, enum bpf_map_type
PERCPU_ARRAY, RINGBUF, SOCKHASH, SK_STORAGE = 6, 27, 18, 24
_PERCPU = frozenset({5, PERCPU_ARRAY})
_OPAQUE = frozenset({RINGBUF, SOCKHASH, SK_STORAGE})
_ROOM = ("pad", "spare")


class Fate(str, enum.Enum):
    """What becomes of a map."""

    KEPT = "kept"
    REFILLED = "refilled"  # from the last good snapshot
    CARRIED = "carried"  # its rows are copied
    ADDED = "added"  # its counters are added to those of the new map
    ANEW = "anew"
    NEW = "new"  # the old programs had none


def fates(old: Mapping[str, Any], new: Mapping[str, Any], shared: AbstractSet[str] | None = None) -> dict[str, Fate]:
    """By name of each map of the new programs. `old` and `new` are what two manifests say of maps, `shared` those that both have; None: as many as can be."""
    kept = _reusable(old, new) if shared is None else shared
    return {name: Fate.KEPT if name in kept else _fate(name, old.get(name), document) for name, document in new.items()}


def _reusable(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    same = {name for name, document in new.items() if name in old and not differences(old[name], document)}
    for group in _TOGETHER:
        if not new.keys() & group <= same:
            same -= group
    return same


def _fate(name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> Fate:
    if old is None:
        return Fate.NEW
    if name in CONFIG:
        return Fate.REFILLED
    if name in ACCELERATION or name in _WORTHLESS or new["kind"] in _OPAQUE or not old["value_size"]:
        return Fate.ANEW
    return Fate.ADDED if new["kind"] in _PERCPU else Fate.CARRIED


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why a map cannot be used again, in words; empty if it can."""
    found = [f"{what} {old.get(what)} -> {new[what]}" for what in ("kind", "capacity", "flags") if old.get(what) != new[what]]
    if (old["key"], old["key_size"]) != (new["key"], new["key_size"]):
        found.append(f"key: {_changes(old['key'], new['key'])}")
    if not _exchangeable(old, new):
        found.append(f"value: {_changes(old['value'], new['value'])}")
    return found


def same_key(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """True if rows keep their keys."""
    return bool((old["key"], old["key_size"]) == (new["key"], new["key_size"]))


def _changes(old: list[Any], new: list[Any]) -> str:
    before, after = {tuple(f) for f in old}, {tuple(f) for f in new}
    gone, come = {f[0] for f in before - after}, {f[0] for f in after - before}
    words = [
        f"{verb} {', '.join(sorted(names))}"
        for verb, names in (("new", come - gone), ("without", gone - come), ("moved", come & gone))
        if names
    ]
    return "; ".join(words) or "another size"


def _exchangeable(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Do both read the same from one record, apart from what one of them takes for room?"""
    if old["value_size"] != new["value_size"]:
        return False
    before, after = ({(n, o, f) for n, o, f in record["value"]} for record in (old, new))
    return all(_fits(own - others, others) for own, others in ((before, after), (after, before)))


def _fits(members: set[tuple[str, int, str]], others: set[tuple[str, int, str]]) -> bool:
    """Do these members lie in what the other record calls room?"""
    room = {byte for name, offset, form in others if name.startswith(_ROOM) for byte in range(offset, offset + struct.calcsize(f"={form}"))}
    return all(
        name.startswith(_ROOM) or room.issuperset(range(offset, offset + struct.calcsize(f"={form}"))) for name, offset, form in members
    )


class Converter:
    """Rewrites records of one layout as those of another, member by member; what the old one lacks is zero."""

    def __init__(self, old: Codec, new: Codec) -> None:
        self._old, self._new = old, new
        self._count = {name: _count(form) for name, _, form in new.fields}
        self._text = {name: form.endswith("s") for name, _, form in new.fields}

    def __call__(self, record: bytes) -> bytes | None:
        """The record, or None if a number does not fit."""
        values: dict[str, Any] = {}
        for name, value in self._old.unpack(record).items():
            if name not in self._count or isinstance(value, bytes) != self._text[name]:
                continue
            if isinstance(value, bytes):
                values[name] = value
                continue
            items = (value if isinstance(value, tuple) else (value,))[: self._count[name]]
            values[name] = items + (0,) * (self._count[name] - len(items))
        try:
            return self._new.pack(**values)
        except struct.error:
            return None


def _count(form: str) -> int:
    return 1 if form.endswith("s") else len(struct.unpack(f"={form}", bytes(struct.calcsize(f"={form}"))))


class Migration:
    """The rows of changed maps on their way from the old pins, in `directory`, to the new maps."""

    def __init__(self, directory: Path, old: Mapping[str, MapLayout], maps: Mapping[str, Map], found: Mapping[str, Fate]) -> None:
        """Open what is to be read."""
        self.fates = found
        self._pairs: dict[Fate, list[tuple[Map, Map]]] = {Fate.CARRIED: [], Fate.ADDED: [], Fate.REFILLED: []}
        for name, fate in found.items():
            wanted = fate in self._pairs and (fate is not Fate.REFILLED or name in _COPIED_CONFIG)
            if wanted and name in old and (directory / name).exists():
                self._pairs[fate].append((Map(directory / name, old[name]), maps[name]))

    def prepare(self) -> None:
        """Before the new programs decide anything: copy configuration that no snapshot has."""
        for old, new in self._pairs[Fate.REFILLED]:
            self._carry(old, new, take=False)

    def carry(self, *, take: bool) -> int:
        """Copy state that the new maps lack; `take` removes it from the old ones, which nobody else may write then. Returns the number of rows."""
        return sum(self._carry(old, new, take=take) for old, new in self._pairs[Fate.CARRIED])

    def clear(self) -> int:
        """Remove state from the old maps. Returns 0, which is how many rows have been copied."""
        for old, _ in self._pairs[Fate.CARRIED]:
            for key, _ in list(old.items()):
                libbpf.delete(old.fd, key)
        return 0

    def add(self) -> int:
        """Add counters to the new maps and take them out of the old ones, which nobody may write any more. Returns the number of rows."""
        return sum(_add(old, new) for old, new in self._pairs[Fate.ADDED])

    def close(self) -> None:
        """Close the old maps."""
        for pairs in self._pairs.values():
            for old, _ in pairs:
                old.close()

    @staticmethod
    def _carry(old: Map, new: Map, *, take: bool) -> int:
        key_of, value_of = Converter(old.layout.key, new.layout.key), Converter(old.layout.value, new.layout.value)
        carried = lost = 0
        for key, _ in list(old.items()):
            values = old.get(key)
            if values is None:
                continue  # used up since
            converted, value = key_of(key), value_of(values[0])
            inserted = None if converted is None or value is None else _insert(new, converted, value)
            if inserted is None:
                lost += 1
            else:
                carried += 1
            if take and not libbpf.delete(old.fd, key) and inserted and converted is not None:
                libbpf.delete(new.fd, converted)  # used up while it was copied
        if lost:
            _log.warning("rows of an old map do not fit the new one", extra={"map": new.name, "rows": lost})
        return carried


def _insert(table: Map, key: bytes, value: bytes) -> bool | None:
    """Write a row; False if there was one, which is newer, None if it does not fit."""
    try:
        libbpf.insert(table.fd, key, value)
    except OSError as error:
        if error.errno == errno.EEXIST:
            return False
        if error.errno != errno.E2BIG:
            raise
        return None
    return True


def _rows(table: Map) -> Iterator[tuple[bytes, list[bytes]]]:
    if table.kind != PERCPU_ARRAY:
        yield from list(table.items())
        return
    for index in range(table.capacity):
        key = table.layout.key.pack(**{"": index})
        yield key, table.get(key) or []


def _add(old: Map, new: Map) -> int:
    key_of, value_of = Converter(old.layout.key, new.layout.key), Converter(old.layout.value, new.layout.value)
    moved = lost = 0
    for key, values in _rows(old):
        if not any(map(any, values)):
            continue
        target = key_of(key)
        amounts = [value_of(value) for value in values]
        if target is None or None in amounts or not _add_row(new, target, [a for a in amounts if a is not None]):
            lost += 1
            continue
        moved += 1
        if old.kind == PERCPU_ARRAY:
            old.put(key, bytes(old.layout.value.size))
        else:
            libbpf.delete(old.fd, key)
    if lost:
        _log.warning("counters of an old map do not fit the new one and are lost", extra={"map": new.name, "rows": lost})
    return moved


def _add_row(table: Map, key: bytes, amounts: list[bytes]) -> bool:
    """Add to a row, or to the row that counts what has none (bpf_src/mesh_helpers.h, mesh_stats_for); False if there is room in neither.

    An array has no such row: a counter that it lacks is gone, and its first one counts something else.
    What programs add to the same row between the read and the write, some ten microseconds, is lost: user space cannot add to a per-CPU value.
    """
    codec = table.layout.value
    for candidate in (key,) if table.kind == PERCPU_ARRAY else (key, bytes(len(key))):
        before = table.get(candidate)
        if before is None and candidate != key:
            return False
        total = amounts if before is None else [_sum(codec, a, b) for a, b in zip(before, amounts, strict=True)]
        try:
            table.put_each(candidate, total)
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            continue
        return True
    return False


def _sum(codec: Codec, one: bytes, other: bytes) -> bytes:
    added = codec.unpack(other)
    total = {}
    for name, value in codec.unpack(one).items():
        more = added[name]
        total[name] = tuple(a + b for a, b in zip(value, more, strict=True)) if isinstance(value, tuple) else value + more
    return codec.pack(**total)
