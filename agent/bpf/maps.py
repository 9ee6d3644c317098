"""Pinned maps as Python mappings of bytes, and the tables that the agent mirrors into the kernel."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

from agent.bpf import libbpf
from agent.bpf.manifest import MapLayout
from agent.errors import KernelRefused, LayoutMismatch

_RINGBUF = 27  # include/uapi/linux/bpf.h: has neither keys nor values
_HASHES = {1, 5, 9, 11}  # include/uapi/linux/bpf.h: BPF_MAP_TYPE_HASH, PERCPU_HASH, LRU_HASH, LPM_TRIE
_PERCPU = {5, 6, 10}  # include/uapi/linux/bpf.h: BPF_MAP_TYPE_PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH


class Map:
    """One pinned map. Sizes are compared with the manifest when it is opened: a mismatch stops the agent before it attaches anything."""

    def __init__(self, path: Path, layout: MapLayout) -> None:
        """Open the pin at `path`."""
        self.name = path.name
        self.layout = layout
        self.fd = libbpf.open_pin(path)
        self.kind, key_size, value_size, self.capacity = libbpf.map_info(self.fd)
        kind = self.kind
        if layout.value.size and kind != _RINGBUF and (key_size, value_size) != (layout.key.size, layout.value.size):
            raise LayoutMismatch(
                f"map {self.name} has keys of {key_size} and values of {value_size} bytes, the programs say {layout.key.size} and"
                f" {layout.value.size}: remove {path.parent} with 'meshagent uninstall' or start the agent that made it"
            )
        self.counted = kind in _HASHES
        """True if elements come and go; arrays are always full, sockets are not counted."""
        self._cpus = libbpf.possible_cpus() if kind in _PERCPU else 1
        # Values of per-CPU maps are padded to 8 bytes each (kernel/bpf/syscall.c, bpf_map_value_size).
        self._stride = -(-value_size // 8) * 8 if self._cpus > 1 else value_size

    def items(self) -> Iterator[tuple[bytes, list[bytes]]]:
        """Every (key, value on each CPU) of a hash map."""
        size = self.layout.value.size
        for key, value in libbpf.items(self.fd, self.layout.key.size, self._stride * self._cpus):
            yield key, [value[i : i + size] for i in range(0, len(value), self._stride)]

    def count(self) -> int:
        """How many elements there are now, if `counted`."""
        return libbpf.count(self.fd, self.layout.key.size, self._stride * self._cpus)

    def get(self, key: bytes) -> list[bytes] | None:
        """The value on each CPU, or None."""
        value = libbpf.lookup(self.fd, key, self._stride * self._cpus)
        size = self.layout.value.size
        return None if value is None else [value[i : i + size] for i in range(0, len(value), self._stride)]

    def put(self, key: bytes, value: bytes) -> None:
        """Write one element; on a per-CPU map the same value for each CPU."""
        try:
            libbpf.update(self.fd, key, value.ljust(self._stride, b"\0") * self._cpus)
        except OSError as error:
            raise KernelRefused(f"map {self.name} refuses an element: {error}; it holds at most {self.capacity}") from error

    def put_each(self, key: bytes, values: list[bytes]) -> None:
        """Write one element of a per-CPU map, with the value of each CPU. Raises OSError as the kernel gives it."""
        libbpf.update(self.fd, key, b"".join(value.ljust(self._stride, b"\0") for value in values))

    def prune(self, keep: AbstractSet[bytes]) -> None:
        """Remove every element of a hash map that is not in `keep`."""
        self.remove([key for key, _ in self.items() if key not in keep])

    def remove(self, keys: Iterable[bytes]) -> int:
        """Remove elements of a hash map; returns how many there were."""
        return sum(libbpf.delete(self.fd, key) for key in keys)

    def close(self) -> None:
        """Close the descriptor; the pin stays."""
        os.close(self.fd)


class Mirror:
    """A hash map whose content the agent alone decides. Keeps no copy: 100,000 rows would cost more memory than all else that the agent holds."""

    def __init__(self, table: Map) -> None:
        """Start from what the kernel holds: after an agent restart that is the last state."""
        self.map = table
        self.count = len(self.read())
        """Rows in the kernel. `write` does not know which of its rows are new: who calls it adds them."""

    def read(self) -> dict[bytes, bytes]:
        """What the kernel holds now."""
        rows = {key: value[0] for key, value in self.map.items()}
        self.count = len(rows)
        return rows

    def check(self, needed: int) -> None:
        """Raise KernelRefused if that many rows do not fit."""
        if needed > self.map.capacity:
            raise KernelRefused(
                f"map {self.map.name} holds at most {self.map.capacity} rows, {needed} are needed: the previous state stays in force; raise it with"
                f" --map-capacity {self.map.name}=N"
            )

    def room_for(self, rows: Iterable[bytes]) -> int:
        """How many of these keys are new. Raises KernelRefused if they do not fit beside all that is there."""
        fresh = sum(self.map.get(key) is None for key in rows)
        self.check(self.count + fresh)
        return fresh

    def write(self, rows: Mapping[bytes, bytes]) -> int:
        """Write rows, new ones and others; returns how many. Each single row changes atomically. Raises KernelRefused."""
        if not rows:
            return 0
        try:
            if len(rows) == 1:
                libbpf.update(self.map.fd, *next(iter(rows.items())))
            else:
                libbpf.update_batch(self.map.fd, b"".join(rows.keys()), b"".join(rows.values()), len(rows))
        except OSError as error:
            raise KernelRefused(f"map {self.map.name}: {error}") from error
        return len(rows)

    def remove(self, keys: Iterable[bytes]) -> int:
        """Remove rows; returns how many there were."""
        removed = self.map.remove(keys)
        self.count -= removed
        return removed
