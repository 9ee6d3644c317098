"""What the kernel has counted about connections, by who talks to whom: those that ended (mesh_stats) and those that live (agent.bpf.sockets)."""

from __future__ import annotations

import logging
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from operator import add, gt, sub
from pathlib import Path
from typing import NamedTuple

from agent.bpf.manifest import BUCKETS, STATS_TUNNELLED, Close, Direction, Redirect
from agent.bpf.maps import Map
from agent.bpf.sockets import LiveSocket, Sockets
from agent.config import HBONE_PORT

_log = logging.getLogger(__name__)

_MEMBERS = (
    "opened", "closed", "sent_bytes", "received_bytes", "retransmits", "connect_ns", "rtt_ns", "connect_bucket", "rtt_bucket",
)  # fmt: skip
OPENED, CLOSED = 0, 1
"""Places of 64-bit counters in `Flow.counts`, in the order of struct mesh_stats; closed connections are at CLOSED + `Close`."""
SENT = CLOSED + Close.MAX
RECEIVED, RETRANSMITS, CONNECT_NS, RTT_NS, CONNECT_BUCKET = SENT + 1, SENT + 2, SENT + 3, SENT + 4, SENT + 5
RTT_BUCKET = CONNECT_BUCKET + BUCKETS
_ALL = struct.Struct(f"={RTT_BUCKET + BUCKETS}Q")
_GROWING = struct.Struct(f"={SENT * 8}xQQQ")
"""What a living connection adds to."""


_NONE = (0, 0, 0)
_NOTHING = bytes(_ALL.size)


def counter(place: int) -> Callable[[bytes], int]:
    """Reads the counter at a place."""
    unpack = struct.Struct(f"={place * 8}xQ").unpack_from
    return lambda counts: unpack(counts)[0]


def buckets(place: int) -> Callable[[bytes], tuple[int, ...]]:
    """Reads the histogram that begins at a place."""
    return struct.Struct(f"={place * 8}x{BUCKETS}Q").unpack_from


def added(one: bytes, other: bytes) -> bytes:
    """Counters of two pairs together."""
    return _ALL.pack(*map(add, _ALL.unpack(one), _ALL.unpack(other)))


def grown(before: bytes, now: bytes) -> bytes:
    """What has been added to a pair's counters; all of them, if the pair was forgotten meanwhile and has come back."""
    old, new = _ALL.unpack(before), _ALL.unpack(now)
    return now if any(map(gt, old, new)) else _ALL.pack(*map(sub, new, old))


class Pair(NamedTuple):
    """Who talks to whom: members of struct mesh_stats_key, in its order."""

    source: int
    target: int
    service: int
    port: int
    way: int
    """`direction`, and whether it takes a tunnel."""
    protocol: int

    @property
    def direction(self) -> Direction:
        """At which end it was seen."""
        return Direction(self.way & ~STATS_TUNNELLED)

    @property
    def mutual_tls(self) -> bool:
        """Is it in a tunnel to another node, or one?"""
        return bool(self.way & STATS_TUNNELLED) or (self.port == HBONE_PORT and self.direction is not Direction.OUTBOUND)


class Flow(NamedTuple):
    """`counts` are bytes, read with `counter` and `buckets`: 10,000 lists of numbers would keep the garbage collector busy for half of the time.

    Those of living connections, of which there are `active`, are among them.
    """

    counts: bytes
    active: int


class Flows:
    """Reads them. Thread-safe."""

    def __init__(self, stats: Map, sockets: Sockets) -> None:
        """`stats` is mesh_stats."""
        self._stats = stats
        self._sockets = sockets
        members = [name if name != "way" else "direction" for name in Pair._fields]
        self._pair = stats.layout.key.unpacker(*members)
        self._key = stats.layout.key.packer(*members)
        self._counts = stats.layout.value.unpacker(*_MEMBERS)
        self._zero = bytes(stats.layout.value.size)
        self._lock = threading.Lock()
        self._floor: dict[bytes, tuple[int, ...]] = {}
        """What was said last of pairs with living connections."""

    def pair(self, key: bytes) -> Pair:
        """Who stands behind a key."""
        return Pair._make(self._pair(key))

    def read(self, namespaces: Iterable[Path]) -> dict[bytes, Flow]:
        """Every pair that the kernel counts, by its key, with what lives in `namespaces`. No counter is ever less than it was at the last call.

        The map comes first: a connection that ends between the two looks is missing in both, not counted twice. What it adds is made up for by what was
        said before, until the next look finds it in the map.
        """
        with self._lock:
            rows = {key: self._sum(values) for key, values in self._stats.items()}
            active = self._add_living(rows, namespaces)
            return {key: Flow(counts, active.get(key, 0)) for key, counts in rows.items()}

    def _sum(self, values: list[bytes]) -> bytes:
        """The counters over all CPUs: a pair is busy on a few of them only."""
        zero = self._zero
        total: Iterable[int] = ()
        for value in values:
            if value != zero:
                counts = self._counts(value)
                total = map(add, total, counts) if total else counts
        return _ALL.pack(*total) if total else _NOTHING

    def _add_living(self, rows: dict[bytes, bytes], namespaces: Iterable[Path]) -> Counter[bytes]:
        full = len(rows) >= self._stats.capacity
        other = bytes(self._stats.layout.key.size)  # the pair of what found no room
        active: Counter[bytes] = Counter()
        living: dict[bytes, tuple[int, ...]] = {}
        for found in self._living(namespaces):
            record = found.record
            way = record.direction | (STATS_TUNNELLED if record.redirected == Redirect.TUNNEL else 0)
            key = self._key(record.source, record.target, record.service, record.dialled_port, way, record.protocol)
            if key not in rows:
                if not full:
                    continue  # new since the look at the map
                key = other
            active[key] += found.established
            sent, received, retransmits = living.get(key, (0, 0, 0))
            living[key] = (sent + found.sent_bytes, received + found.received_bytes, retransmits + found.retransmits)
        floor, self._floor = self._floor, {}
        for key in (living | floor).keys() & rows.keys():
            ended = _GROWING.unpack_from(rows[key])
            now = tuple(map(add, ended, living.get(key, _NONE)))
            said = tuple(map(max, now, floor.get(key, _NONE)))
            if said != ended:
                row = bytearray(rows[key])
                struct.pack_into("=QQQ", row, SENT * 8, *said)
                rows[key] = bytes(row)
                self._floor[key] = said
        return active

    def _living(self, namespaces: Iterable[Path]) -> Iterator[LiveSocket]:
        failed = []
        for namespace in namespaces:
            try:
                yield from self._sockets.dump(namespace)
            except OSError as error:  # what lives elsewhere is counted
                failed.append(f"{namespace}: {error}")
        if failed:
            _log.warning("living connections of some namespaces are not counted", extra={"namespaces": len(failed), "reason": failed[0]})
