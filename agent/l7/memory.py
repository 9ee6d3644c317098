"""How much memory Envoy may use: the limit of its cgroup, and what follows from it for its overload manager. Called by `agent.l7.envoy`."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path
from typing import NamedTuple

MEMINFO = Path("/proc/meminfo")
PER_CONNECTION = 64 << 10
"""Bytes of Envoy's heap that a proxied connection takes, both halves, with little in its buffers: an estimate, from above."""
FEWEST_CONNECTIONS = 4096
HEAP_SHARE = 0.75
"""Of a cgroup's limit: the kernel counts the buffers of its sockets there too, and what Envoy has beside its heap."""
LEAST = 128 << 20
"""Bytes: an Envoy that does nothing has 69 MB."""


class Room(NamedTuple):
    """What there is for the Envoy of a node."""

    heap: int
    """Bytes."""
    connections: int
    """Of all callers together."""


def room(cgroup: Path, wanted: int | None = None) -> Room:
    """Measure the room of a process in this cgroup, or in its parent if it does not exist yet; as if it had the limit that is `wanted` for it, if one is."""
    found = [limit(cgroup)] if wanted is None else [wanted, limit(cgroup.parent)]
    heap = min([machine() // 2, *(int(HEAP_SHARE * one) for one in found if one)])
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = heap // PER_CONNECTION
    if files != resource.RLIM_INFINITY:
        most = min(most, files // 4)  # two files each, and as many again to spare
    return Room(heap, max(FEWEST_CONNECTIONS, most))


def limit(cgroup: Path) -> int:
    """Return in bytes the smallest memory.max of the cgroup and of those around it; 0 if there is none.

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
    return min(found, default=0)


def bound(cgroup: Path, wanted: int) -> str:
    """Give a cgroup this limit in bytes, or none if it is 0; returns why it has not got it, "" if it has."""
    try:
        file = os.open(cgroup / "memory.max", os.O_WRONLY)
        try:
            os.write(file, str(wanted or "max").encode())
        finally:
            os.close(file)
    except FileNotFoundError:
        return "" if not wanted else f"no memory controller is in force there: is memory in {cgroup.parent}/cgroup.subtree_control?"
    except OSError as error:
        return f"memory.max: {error.strerror}"
    return ""


def killed(cgroup: Path) -> int:
    """How many processes of a cgroup the kernel has ended for want of memory (cgroup-v2.rst, "memory.events"); 0 if it does not count them."""
    with contextlib.suppress(OSError):
        for line in (cgroup / "memory.events").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def machine() -> int:
    """Bytes of the whole machine."""
    for line in MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemTotal":
            return int(rest.split()[0]) << 10
    raise ValueError(f"{MEMINFO} does not say MemTotal")  # every Linux does: proc(5)
