"""Pods that have no sockets until they are in the mesh: bpf_src/mesh_hold.c holds them back, and this lets go of them.

Owned by `agent.enrolment`. The programs refuse such a pod its sandbox as long as nobody writes here that there is an agent; they are in force without one, too.
A pod that is held and of which the controller has not said whether it is in the mesh stays held: it waits, as it would for an agent.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from agent.bpf.maps import Map
from agent.pods import Pods, parents

_log = logging.getLogger(__name__)

SOON_S = 2.0
"""A pod that was bound may be held a moment later: its sandbox is prepared, and then it starts."""
LONG_S = 10.0
"""A pod that is held for longer is reported."""
_ID = struct.Struct("=Q")
_ENDED = _ID.pack(0)


class Holding:
    """See the module. `beat` and the others may be called by two threads."""

    def __init__(self, maps: Mapping[str, Map], cgroup: Path) -> None:
        """`cgroup` has those of the pods below it."""
        self._held, self._kubepods, self._alive = (maps[f"mesh_{name}"] for name in ("held", "kubepods", "alive"))
        self._pods = Pods(cgroup)
        self._until = 0.0
        self._reported: set[int] = set()

    @property
    def attentive(self) -> bool:
        """Is somebody held, or may be in a moment?"""
        return time.monotonic() < self._until

    def expect(self) -> None:
        """Pods have come into the mesh."""
        self._until = time.monotonic() + SOON_S

    def let_go(self, pods: Iterable[str]) -> None:
        """Let go of the pods with these cgroups. `pods` is not looked at while nobody is held."""
        held = self._read()
        if held:
            self._release(number for path in pods if (number := _number(path)) in held)
            self.expect()

    def beat(self, outside: Iterable[str]) -> None:
        """Say that the agent is here, and look after who is held; once a second. `outside`: UIDs of pods of this node that are not in the mesh."""
        if not self._pods.kubepods or not all(map(os.path.isdir, self._pods.kubepods)):
            self._pods.search_again()
        directories = [path for kubepods in self._pods.kubepods for path in parents(kubepods)]
        known = {_ID.pack(number): path for path in directories if (number := _number(path))}
        self._kubepods.prune(known.keys())
        for key in known:
            self._kubepods.put(key, bytes(4))
        if known:
            self._alive.put(bytes(4), _ID.pack(time.monotonic_ns()))
        if not self._read():
            return
        self._release(_number(path) for uid in outside for path in self._pods.directories(uid))
        present = {entry.inode(): entry.name for path in known.values() for entry in _entries(path)}
        self._release(number for number in self._read() if number not in present)
        self._report(present)

    def end(self) -> None:
        """Say that there is no agent from now on."""
        self._alive.put(bytes(4), _ENDED)

    def _read(self) -> dict[int, int]:
        """Since when, nanoseconds of CLOCK_MONOTONIC, by the number of the cgroup."""
        return {_ID.unpack(key)[0]: _ID.unpack(value[0])[0] for key, value in self._held.items()}

    def _release(self, numbers: Iterable[int]) -> None:
        self._held.remove(map(_ID.pack, numbers))

    def _report(self, present: Mapping[int, str]) -> None:
        held = self._read()
        self._reported &= held.keys()
        for number, since in held.items():
            if number not in self._reported and time.monotonic_ns() - since > LONG_S * 1e9:
                self._reported.add(number)
                _log.warning(
                    "a pod is held back, without sockets: it is to be in the mesh, and the controller has not said so, or it cannot be enrolled;"
                    " 'meshagent status' knows the reason of the latter, the controller's log of the former",
                    extra={"cgroup": present.get(number, "")},
                )


def _number(path: str) -> int:
    """The id of a cgroup, as programs see it: its inode (fs/kernfs, kernfs_ino); 0 if it is gone."""
    try:
        return os.stat(path).st_ino  # noqa: PTH116
    except OSError:
        return 0


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []
