"""Finds a Kubernetes pod of this node by its UID: its cgroup, in that its sandbox process, and so its network namespace.

Called by `agent.enrolment`. It reads the cgroup tree and /proc, asks neither the kubelet nor a container runtime, and changes nothing.

Where a pod's cgroup is, is the kubelet's choice (pkg/kubelet/cm: pod_container_manager_linux.go, qos_container_manager_linux.go and, for the names that
systemd wants, ToSystemd in cgroup_manager_linux.go): a directory `kubepods`, below what --cgroup-root says, in it one for each class of service, in
that the pods; guaranteed ones are in `kubepods` itself. Which class a pod has is not asked: there are three places, and it is in one of them. A UID is
never searched for. Only `kubepods` is, on the highest level that has one: a user or container to whom a part of the tree was given might make another
below it, with the UID of somebody else's pod.

The sandbox is what the runtime starts first, so it is the oldest process of the pod's cgroup: containers of a privileged pod may make further namespaces.
A runtime without a sandbox process (CRI-O without pod infrastructure containers) starts the first container in the pod's namespace.
"""

from __future__ import annotations

import functools
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from agent import netns

KUBEPODS = re.compile(r"kubepods|(?:.+-)?kubepods\.slice")
"""What the kubelet calls the cgroup above all pods, as a systemd slice with its parents' names before it."""
SEARCH_S = 5.0
"""How often a directory that is nowhere to be found has `kubepods` looked for."""
_CLASSES = ("burstable", "besteffort")
_LEVELS = 5
"""How deep below the agent's cgroup `kubepods` may be: in kind without a cgroup namespace it is the fourth."""
_MONITORS = "crio-conmon-"
"""What CRI-O calls the cgroups of conmon, which is older than the sandbox and stays in the node's namespace (internal/config/cgmgr)."""
_DIGITS = 10
"""No number of a process has more."""


@dataclass(frozen=True, slots=True)
class Pod:
    """What was found of a pod. One without a `reason` has a sandbox in a network namespace of its own."""

    directory: str = ""
    """Its cgroup; "" if there is none."""
    pid: int = 0
    """Its sandbox; 0 if there is none."""
    started: int = 0
    """When that started, in clock ticks since boot: with the number it means one process and no other."""
    mark: tuple[int, int] = netns.GONE
    """Of the namespace that the sandbox was in (`agent.netns.mark`)."""
    reason: str = ""
    """Why it cannot be enrolled, for operators."""

    @property
    def path(self) -> str:
        """The sandbox's network namespace."""
        return f"/proc/{self.pid}/ns/net"

    @property
    def events(self) -> str:
        """The file that changes when the first process comes and when the last one goes (Documentation/admin-guide/cgroup-v2.rst, cgroup.events)."""
        return f"{self.directory}/cgroup.events"

    def lives(self) -> bool:
        """Is the sandbox that was found still the process of this number?"""
        return self.pid != 0 and birth(self.pid) == self.started

    def open(self) -> int:
        """A descriptor of the sandbox (pidfd_open(2)), which is readable when it has ended. Raises FileNotFoundError if it already has."""
        try:
            process = os.pidfd_open(self.pid)
        except ProcessLookupError:
            process = -1
        if process >= 0 and self.lives():  # it had the number before and after: it is no other's descriptor
            return process
        if process >= 0:
            os.close(process)
        raise FileNotFoundError(f"process {self.pid}, the sandbox of the pod in {self.directory}, ended while it was being looked at")


NOT_FOUND = Pod()


def places(kubepods: str, uid: str) -> tuple[str, ...]:
    """Where the cgroup of a pod is below `kubepods`, one path for each class of service."""
    parent = os.path.basename(kubepods)  # noqa: PTH119  as below: for each pod, often
    if not parent.endswith(".slice"):
        return (*(f"{kubepods}/{each}/pod{uid}" for each in _CLASSES), f"{kubepods}/pod{uid}")
    prefix, name = parent.removesuffix(".slice"), f"pod{uid.replace('-', '_')}.slice"
    return (*(f"{kubepods}/{prefix}-{each}.slice/{prefix}-{each}-{name}" for each in _CLASSES), f"{kubepods}/{prefix}-{name}")


def parents(kubepods: str) -> tuple[str, ...]:
    """The directories in which cgroups of pods are: `kubepods` and those of the classes of service below it."""
    return tuple(dict.fromkeys((kubepods, *(os.path.dirname(place) for place in places(kubepods, "")))))  # noqa: PTH120


class Pods:
    """The pods below one cgroup2 directory. Not thread-safe."""

    def __init__(self, root: Path) -> None:
        """Look at nothing yet."""
        self._root = str(root)
        self._searched_at = -SEARCH_S
        self.kubepods: tuple[str, ...] = ()
        """The directories above all pods, as found last."""

    def names(self, uid: str) -> tuple[str, ...]:
        """Paths that may appear before this pod can be found, or disappear with it."""
        if not self.kubepods:
            return (f"{self._root}/kubepods", f"{self._root}/kubepods.slice")
        found = [place for kubepods in self.kubepods for place in places(kubepods, uid)]
        return (*self.kubepods, *(os.path.dirname(place) for place in found), *found)  # noqa: PTH120

    def find(self, uid: str, last: Pod = NOT_FOUND) -> Pod:
        """Where a pod is now; `last` itself if that still holds.

        A namespace in which `last` was is preferred as long as any process of the pod is in it: one that outlives the sandbox cannot take the pod
        elsewhere.
        """
        if last.lives() and netns.mark(last.path) == last.mark:
            return last
        directories = self.directories(uid)
        if not directories and self.search_again():
            directories = self.directories(uid)
        found = [_sandbox(uid, directory, netns.GONE if last.reason else last.mark) for directory in directories]
        if not found:
            return Pod(reason=self._absence(uid))
        return next((pod for pod in found if pod.pid), found[0])

    def directories(self, uid: str) -> list[str]:
        """The cgroups of a pod: one, but for a moment in which the kubelet was told to use another driver."""
        return [place for kubepods in self.kubepods for place in places(kubepods, uid) if os.path.isdir(place)]  # noqa: PTH112

    @staticmethod
    def in_nodes_network(directory: str) -> bool:
        """Is the sandbox of the pod with this cgroup in the node's own network namespace?"""
        return _sandbox("", directory, netns.GONE).mark in _nodes_own()

    def check(self) -> None:
        """Look for `kubepods` at once if it was not there, or is not there any more: something has come or gone."""
        if not self.kubepods or not all(map(os.path.isdir, self.kubepods)):
            self.search()

    def search_again(self) -> bool:
        """Search, if that was not done just now; False if it was."""
        if time.monotonic() < self._searched_at + SEARCH_S:
            return False
        self.search()
        return True

    def search(self) -> None:
        """Look for `kubepods` on each level below the root, until one has it."""
        self._searched_at = time.monotonic()
        owner = _owner(self._root)
        level = [self._root]
        for _ in range(_LEVELS + 1):
            found = sorted(path for path in level if KUBEPODS.fullmatch(os.path.basename(path)) and _owner(path) == owner)  # noqa: PTH119
            if found or not level:
                break
            level = [below for path in level for below in _below(path)]
        self.kubepods = tuple(found)

    def _absence(self, uid: str) -> str:
        if not self.kubepods:
            return (
                f"pod {uid} is not found, because there is no kubepods cgroup below {self._root}: does a kubelet run on this node, and is --cgroup the "
                "node's cgroup2 mount? In a container that is the node's /sys/fs/cgroup, mounted at the same place"
            )
        return (
            f"there is no cgroup of pod {uid} below {' or '.join(self.kubepods)}: the kubelet has not begun with the pod, or the pod has ended; "
            "kubectl describe pod tells which"
        )


def _sandbox(uid: str, directory: str, preferred: tuple[int, int]) -> Pod:
    """The oldest process of the pod whose cgroup is `directory` or, if there is one, the oldest one in the namespace with the mark `preferred`."""
    known, unknown = _processes(directory)
    chosen: Pod | None = None
    for started, pid in sorted((started, pid) for pid in known if (started := birth(pid)) is not None):
        mark = netns.mark(f"/proc/{pid}/ns/net")
        if mark != netns.GONE and (chosen is None or mark == preferred):
            chosen = Pod(directory, pid, started, mark)
            if preferred in {netns.GONE, mark}:
                break
    if chosen is not None:
        if chosen.mark not in _nodes_own():
            return chosen
        return Pod(
            directory, chosen.pid, chosen.started, chosen.mark,
            f"pod {uid} is in the node's own network namespace (process {chosen.pid} in {directory}): it has spec.hostNetwork, and such a pod cannot be "
            "in the mesh; run it without, or take it out of the mesh",
        )  # fmt: skip
    if unknown and not known:
        return Pod(
            directory,
            reason=f"the processes in {directory} are of another PID namespace than the agent, so that pod {uid} cannot be looked at: "
            "run the agent in the node's (hostPID: true)",
        )
    if any(birth(pid) is not None for pid in known):
        return Pod(
            directory,
            reason=f"the network namespace of the processes in {directory} cannot be seen, so that pod {uid} cannot be enrolled: "
            "the agent needs CAP_SYS_PTRACE, or they are just ending",
        )
    return Pod(
        directory,
        reason=f"there is no process in {directory}: the sandbox of pod {uid} has not started yet, or has ended; kubectl describe pod tells which",
    )


def _processes(directory: str) -> tuple[list[int], bool]:
    """The processes in a cgroup and those below it; True if there are some that have no number here (cgroup.procs then says 0)."""
    found, unknown = [], False
    for place, below, _ in os.walk(directory):
        below[:] = [name for name in below if not name.startswith(_MONITORS)]
        try:
            with open(f"{place}/cgroup.procs", "rb") as procs:  # noqa: PTH123  no Path for each of many
                lines = procs.read().split()
        except OSError:
            continue  # removed meanwhile; or its threads have processes above it (cgroup-v2.rst, "Threads"), which say so
        numbers = [int(line) for line in lines if line.isdigit() and len(line) <= _DIGITS]
        found += [number for number in numbers if number]
        unknown = unknown or 0 in numbers
    return found, unknown


def birth(pid: int) -> int | None:
    """When a process started (proc(5), /proc/PID/stat, field 22); None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123
            fields = stat.read().rpartition(b")")[2].split()  # the second field, a name in brackets, may hold anything
    except OSError:
        return None
    return int(fields[19]) if len(fields) > 19 and fields[0] not in {b"Z", b"X"} else None


@functools.cache
def _nodes_own() -> frozenset[tuple[int, int]]:
    """The namespaces of the machine's first process and of the agent, which is to run in the same."""
    return frozenset({netns.mark("/proc/1/ns/net"), netns.mark("/proc/self/ns/net")} - {netns.GONE})


def _owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid  # noqa: PTH116
    except OSError:
        return None


def _below(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []  # removed meanwhile
