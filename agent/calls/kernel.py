"""Connections since the last look, from what the kernel counts anyway (mesh_stats, mesh_verdicts). Blocks: not for the event loop."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from agent import flows, kubelet, probe
from agent.bpf.manifest import Direction, Reason, Verdict
from agent.bpf.maps import Map
from agent.bpf.sockets import Sockets
from agent.calls.ring import Outcome, Seen
from agent.ids import Ids
from agent.policy import TCP, UDP

_OPENED = flows.counter(flows.OPENED)
_PROTOCOLS = {int(socket.IPPROTO_TCP): TCP, int(socket.IPPROTO_UDP): UDP}


class Grown(NamedTuple):
    """So many connections came, and so many live."""

    came: int
    alive: int


class Kernel:
    """Remembers what was counted at the last look; the first one tells of connections that live only."""

    def __init__(self, maps: Mapping[str, Map], ids: Ids, enrolled: Callable[[str], bool]) -> None:
        """`enrolled` says by its name whether a workload is in the mesh: who is not is a stranger."""
        self._flows = flows.Flows(maps["mesh_stats"], Sockets(maps))
        self._verdicts = maps["mesh_verdicts"]
        self._ids = ids
        self._enrolled = enrolled
        self._before: dict[bytes, int] | None = None
        self._denied: dict[bytes, int] = {}

    def look(self, namespaces: Iterable[Path]) -> dict[Seen, Grown]:
        """What has grown, and what lives in these network namespaces. What others than the policies refuse is left out."""
        found = self._flows.read(namespaces)
        opened = {key: _OPENED(flow.counts) for key, flow in found.items()}
        denied = {key: count for key, count in self._read_verdicts() if count}
        first, before = self._before is None, self._before or {}
        result: dict[Seen, Grown] = {}
        for key, count in opened.items():
            new = 0 if first else max(count - before.get(key, 0), 0)
            if (new or found[key].active) and (seen := self._opened(key)):
                came, alive = result.get(seen, Grown(0, 0))
                result[seen] = Grown(came + new, alive + found[key].active)
        if not first:
            for key, count in denied.items():
                if (new := count - self._denied.get(key, 0)) > 0 and (seen := self._refused(key)):
                    result[seen] = Grown(result.get(seen, Grown(0, 0)).came + new, 0)
        self._before, self._denied = opened, denied
        return result

    def _read_verdicts(self) -> Iterator[tuple[bytes, int]]:
        number = self._verdicts.layout.value.unpacker("")
        verdict = self._verdicts.layout.key.unpacker("verdict", "reason")
        for key, values in self._verdicts.items():
            if verdict(key) == (Verdict.DENY, Reason.POLICY):
                yield key, sum(number(value)[0] for value in values)

    def _opened(self, key: bytes) -> Seen | None:
        pair = self._flows.pair(key)
        if not any(pair):
            return None  # what found no room
        return self._seen(pair.direction, pair.source, pair.target, pair.service, pair.port, pair.protocol, Outcome.SERVED)

    def _refused(self, key: bytes) -> Seen | None:
        source, target, service, direction, protocol = self._verdicts.layout.key.unpacker(
            "source", "target", "service", "direction", "protocol"
        )(key)
        return self._seen(direction, source, target, service, 0, protocol, Outcome.DENIED)

    def _seen(self, direction: int, source: int, target: int, service: int, port: int, protocol: int, outcome: Outcome) -> Seen | None:
        """A call, told once: by its caller, and by the receiver of a caller that nobody knows."""
        caller, receiver = self._ids.name(source), self._ids.name(target)
        if caller.startswith(f"{kubelet.NAMESPACE}/") or probe.NAME in {caller, receiver}:
            return None  # a kubelet's probe, which no policy decides about, or the agent's own
        name, _, dialled = self._ids.name(service).rpartition(":")
        inbound = direction == Direction.INBOUND
        if inbound:
            name, dialled = "", ""
            caller = caller if self._enrolled(caller) else ""
        if protocol not in _PROTOCOLS or direction not in {Direction.OUTBOUND, Direction.INBOUND} or inbound == bool(caller):
            return None
        number = dialled.partition("/")[0]
        if not (name or receiver):
            return None  # somewhere outside the mesh
        return Seen(inbound, caller, receiver, name, int(number) if number.isdigit() else port, _PROTOCOLS[protocol], outcome)
