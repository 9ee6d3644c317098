"""Pods that have no sockets until they are in the mesh: bpf_src/mesh_hold.c holds them back, and this lets go of them.

Owned by `agent.enrolment`. The programs refuse such a pod its sandbox as long as nobody writes here that there is an agent; they are in force without one, too.
An agent whose controller is away is none, because it would never hear of a new pod. A pod that is held stays so until the controller has said whether it is
in the mesh: it waits, as it would for an agent.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from agent import features
from agent.bpf.maps import Map
from agent.model import Workload
from agent.pods import Pods, parents

_log = logging.getLogger(__name__)

OUTSIDE_S = 2.0
"""How long a pod is held of which the controller says that it is not in the mesh. The API server thought otherwise when it marked the pod, and the controller
may not have heard yet why: pods and namespaces are two streams."""
LONG_S = 10.0
"""A pod that is held for longer is reported."""
_ID = struct.Struct("=Q")
_ENDED = _ID.pack(0)
_NOWHERE = _ID.pack(0)
"""No cgroup has this id: as a row of mesh_kubepods it says that there are no pods on this machine."""


class Holding:
    """See the module. `beat`, `look_after` and `let_go` may each be called by a thread of its own."""

    def __init__(self, maps: Mapping[str, Map], cgroup: Path) -> None:
        """`cgroup` has those of the pods below it."""
        self._held, self._kubepods, self._alive = (maps[f"mesh_{name}"] for name in ("held", "kubepods", "alive"))
        self._cgroup = cgroup
        self._pods = Pods(cgroup)
        self._known = False
        """Are the directories known that have pods in them?"""
        self._reported: set[int] = set()
        self._problem = ""

    def held(self) -> dict[int, int]:
        """Since when, nanoseconds of CLOCK_MONOTONIC, by the id of the pod's cgroup."""
        return {_ID.unpack(key)[0]: _ID.unpack(value[0])[0] for key, value in self._held.items()}

    def let_go(self, pods: Iterable[int]) -> None:
        """Let go of pods, by the ids of their cgroups."""
        self._held.remove(map(_ID.pack, pods))

    def beat(self, *, served: bool) -> None:
        """Say that the agent is here, once a second: one write, which waits for no walk of the cgroup tree. Raises OSError or MeshError.

        `served`: there is a controller that says which pods are in the mesh. Where they are has to be known, too (`look_after`).
        """
        self._alive.put(bytes(4), _ID.pack(time.monotonic_ns()) if self._known and served else _ENDED)

    def look_after(self, outside: Iterable[str], *, pods: bool) -> None:
        """Find where pods are, and look after who is held; once a second. Blocks for a walk of the cgroup tree. Raises OSError or MeshError.

        `outside`: UIDs of pods of this node that are not in the mesh; `pods`: the controller knows of pods here, so that there are some, found or not.
        """
        self._pods.search_again()
        known, lacking = self._places()
        elsewhere = not self._pods.kubepods and not pods and not features.kubernetes_node()
        self._problem = "" if elsewhere else self._unknown(lacking)
        rows = {_NOWHERE} if elsewhere else known.keys()
        self._kubepods.prune(rows)
        for key in rows:
            self._kubepods.put(key, bytes(4))
        self._known = bool(known)
        held = self.held()
        if held:
            self._release_or_report(held, outside, known)

    def _places(self) -> tuple[dict[bytes, str], list[str]]:
        """The directories that have pods in them, by id. Of a kubelet's all or none: what is below a missing one would be taken for it. And those that miss."""
        found: dict[bytes, str] = {}
        lacking = []
        for kubepods in self._pods.kubepods:
            numbers = {path: number(path) for path in parents(kubepods)}
            if all(numbers.values()):
                found |= {_ID.pack(here): path for path, here in numbers.items()}
            lacking += [path for path, here in numbers.items() if not here]
        return found, lacking

    def _unknown(self, lacking: list[str]) -> str:
        if not self._pods.kubepods:
            return (
                f"where pods are is not known, and those that are to be in the mesh get no sandbox: there is no kubepods cgroup below {self._cgroup}; does a "
                "kubelet run on this node, and is --cgroup the node's cgroup2 mount?"
            )
        if lacking:
            return (
                f"there is no cgroup {', '.join(sorted(lacking))}, so pods beside it are not held before they are in the mesh, or get no sandbox: the kubelet "
                "makes it when it starts (--cgroups-per-qos), restart it; or remove what another cgroup driver left"
            )
        return ""

    def problems(self, residents: Iterable[Workload]) -> list[str]:
        """What an operator should know, whose pods on this node are these: one sentence, or none."""
        return [self._problem] if self._problem and any(one.pod_uid for one in residents) else []

    def _release_or_report(self, held: dict[int, int], outside: Iterable[str], known: Mapping[bytes, str]) -> None:
        now = time.monotonic_ns()
        present = {entry.inode(): entry.path for path in known.values() for entry in _entries(path)}
        settled = {one for one, since in held.items() if now - since > OUTSIDE_S * 1e9}
        named = {number(path) for uid in outside for path in self._pods.directories(uid)}
        gone = {one for one in held if known and (one not in present or _ID.pack(one) in known)}
        self.let_go(gone | settled & named | {one for one in settled & present.keys() if self._pods.in_nodes_network(present[one])})
        self._reported &= held.keys()
        for one, since in self.held().items():
            if one not in self._reported and now - since > LONG_S * 1e9:
                self._reported.add(one)
                _log.warning(
                    "a pod is held back, without sockets: it is to be in the mesh, and the controller has not said so, or it cannot be enrolled;"
                    " 'meshagent status' knows the reason of the latter, the controller's log of the former",
                    extra={"cgroup": present.get(one, "")},
                )

    def end(self) -> None:
        """Say that there is no agent from now on."""
        self._alive.put(bytes(4), _ENDED)


def number(path: str) -> int:
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
