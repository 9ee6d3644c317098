"""How much memory Envoy may use, and how many connections that is: what sizes its overload manager. Called by `agent.l7.envoy`; reads files only."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import NamedTuple

MEMINFO = Path("/proc/meminfo")
PER_CONNECTION = 64 << 10
"""Bytes of Envoy's heap that a proxied connection takes, both halves, with little in its buffers: an estimate, from above."""
FEWEST_CONNECTIONS = 4096


class Room(NamedTuple):
    """What there is for the Envoy of a node."""

    heap: int
    """Bytes."""
    connections: int
    """Of all callers together."""


def room(cgroup: Path) -> Room:
    """Measure the room of a process in this cgroup, or in its parent if it does not exist yet."""
    heap = limit(cgroup)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = heap // PER_CONNECTION
    if files != resource.RLIM_INFINITY:
        most = min(most, files // 4)  # two files each, and as many again to spare
    return Room(heap, max(FEWEST_CONNECTIONS, most))


def limit(cgroup: Path) -> int:
    """Return in bytes the smallest memory.max of the cgroup and of those around it; without any, half of the machine's memory.

    A container's limit stands at its own cgroup, and what is below has none (Documentation/admin-guide/cgroup-v2.rst, "memory.max").
    """
    found = []
    for place in (cgroup, *cgroup.parents):
        try:
            text = (place / "memory.max").read_text().strip()
        except OSError:
            continue  # the root of the hierarchy has none, nor has what is outside of it
        if text.isdigit():
            found.append(int(text))
    return min(found) if found else _machine() // 2


def _machine() -> int:
    for line in MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemTotal":
            return int(rest.split()[0]) << 10
    raise ValueError(f"{MEMINFO} does not say MemTotal")  # every Linux does: proc(5)
