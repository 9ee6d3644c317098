"""Kernel tables as a test fills them: the layouts of bpf_src/mesh_types.h without a kernel, on two CPUs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from agent.bpf.manifest import Codec, MapLayout

CPUS = 2


class Table:
    """The part of agent.bpf.maps.Map that readers use."""

    def __init__(self, layout: MapLayout, cpus: int = CPUS) -> None:
        self.layout = layout
        self._cpus = cpus
        self.capacity = 100
        self.fd = 0
        self.rows: dict[bytes, list[bytes]] = {}

    def items(self) -> Iterator[tuple[bytes, list[bytes]]]:
        return iter(self.rows.items())

    def add(self, key: Mapping[str, Any], value: Mapping[str, Any] | None = None, **members: Any) -> bytes:
        """A row that the second CPU has counted."""
        packed = self.layout.key.pack(**key)
        self.rows[packed] = [bytes(self.layout.value.size)] * (self._cpus - 1) + [self.layout.value.pack(**{**(value or {}), **members})]
        return packed

    def get(self, key: bytes) -> list[bytes] | None:
        return self.rows.get(key)

    def remove(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self.rows.pop(key, None)


def _codec(*members: tuple[str, str]) -> Codec:
    sizes = {"B": 1, "H": 2, "I": 4, "Q": 8, "2Q": 16, "5Q": 40, "16Q": 128, "16s": 16}
    fields: list[list[Any]] = []
    at = 0
    for name, form in members:
        fields.append([name, at, form])
        at += sizes[form]
    return Codec(fields, at)


def stats() -> Table:
    """mesh_stats."""
    key = _codec(("source", "I"), ("target", "I"), ("service", "I"), ("port", "H"), ("direction", "B"), ("protocol", "B"))
    plain = [(name, "Q") for name in ("sent_bytes", "received_bytes", "retransmits", "connect_ns", "rtt_ns")]
    return Table(MapLayout(key, _codec(("opened", "Q"), ("closed", "5Q"), *plain, ("connect_bucket", "16Q"), ("rtt_bucket", "16Q"))))


def verdicts() -> Table:
    """mesh_verdicts."""
    words = [(name, "I") for name in ("source", "target", "service", "rule")]
    return Table(MapLayout(_codec(*words, *((name, "B") for name in ("verdict", "direction", "reason", "protocol"))), _codec(("", "Q"))))


def load() -> Table:
    """mesh_load."""
    return Table(MapLayout(_codec(("workload", "I"), ("port", "H"), ("pad", "H")), _codec(("", "Q"))))


def sock() -> Table:
    """mesh_sock: of each kind of member what is read."""
    words = [(name, "I") for name in ("source", "target", "service", "rule")]
    bytes_ = [(name, "B") for name in ("direction", "verdict", "redirected", "protocol", "accelerated", "probe")]
    ports = [(name, "H") for name in ("dialled_port", "origdst_port")]
    return Table(MapLayout(_codec(("", "I")), _codec(("start_ns", "Q"), ("established_ns", "Q"), *words, *ports, *bytes_)))


def joined() -> Table:
    """mesh_joined."""
    return Table(MapLayout(_codec(("", "I")), _codec(("key", "16s"), ("way", "I"), ("pad", "I"))))


def pair() -> Table:
    """mesh_pair, which is not per CPU."""
    key = _codec(("caller", "Q"), ("sequence", "I"), ("end", "I"))
    return Table(MapLayout(key, _codec(("way", "I"), ("ended", "I"), ("bytes", "2Q"))), cpus=1)


def of_sockets() -> dict[str, Any]:
    """What agent.bpf.sockets reads."""
    return {"mesh_sock": sock(), "mesh_joined": joined(), "mesh_pair": pair()}
