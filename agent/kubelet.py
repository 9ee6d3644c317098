"""Finds this node's kubelet among its processes, by what the kernel says of them, and follows it when it is started anew.

The kubelet calls pods of its node to learn how they are, and it has no certificate. So the kernel programs have to know its calls (bpf_src/mesh_connect.c,
mesh_is_kubelet): by the network namespace, the cgroup and the process in which connect() runs. None of them can be chosen by a pod. What the process is
called is only how it is found; a process counts if, besides, all of this holds:

- it is in the network, PID and user namespaces of the agent, which are the node's (hostNetwork, hostPID);
- none of its cgroups, in whatever hierarchy, is that of a pod: so no pod's process does, whether hostNetwork or not;
- it has CAP_SYS_ADMIN: who has that on the node may enter every pod anyway, and wins nothing by posing as the kubelet.

Its cgroup alone would be too much where others are in it (k3s keeps containerd there, a kubelet without systemd is in the root): the number of the process
belongs to it. That is what the kernel calls it only in the first PID namespace. In another one (a node that is a container, as in kind) the kubelet must have
its cgroup to itself. Where neither helps an operator names a cgroup (--kubelet-cgroup), and vouches for all that is in it.

Owned by the supervisor. Reads /proc and the cgroup tree, changes nothing; that is said to the kernel by `agent.bpf.datapath`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent import cgroups, netns
from agent.errors import MeshError
from agent.model import Workload
from agent.patience import within
from agent.pods import KUBEPODS, birth
from agent.watch import Watch

_log = logging.getLogger(__name__)

NAMES: Final = frozenset({"kubelet", "kubelite", "k3s-server", "k3s-agent"})
"""Of the process (proc(5), /proc/PID/comm): by itself, in MicroK8s, in k3s."""
NAMESPACE: Final = "(kubelet)"
"""Of whom its calls are counted under, with the node for a name. No object can have it, so no policy takes it for somebody."""
ANY: Final = -1
"""In place of a process: whoever is in the cgroup."""
RECHECK_S: Final = 5.0
"""How often it is looked at although nothing has happened: a kubelet may move itself to another cgroup (its option --kubelet-cgroups)."""
SOON_S: Final = 0.25
SOON_FOR_S: Final = 30.0
"""How often, and how long, another one is looked for after one has ended."""
_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC  # include/linux/proc_ns.h, PROC_PID_INIT_INO
_CAP_SYS_ADMIN: Final = 1 << 21  # include/uapi/linux/capability.h
_MOST_REASONS: Final = 3
_SHARED: Final = ("net", "pid", "user")


@dataclass(frozen=True, slots=True)
class Kubelet:
    """What was found. One with a `cgroup` is recognised; the others say why not."""

    process: int = 0
    """Its number or, if all in the cgroup count, ANY."""
    cgroup: int = 0
    """Inode of its cgroup: the id by which programs know it."""
    netns_cookie: int = 0
    pid: int = 0
    """Of the process that was found; 0 if none was looked for."""
    started: int = 0
    """When that started: with the number it means one process and no other."""
    directory: str = ""
    reason: str = ""


NOBODY: Final = Kubelet()


def caller(node: str) -> str:
    """Under which name of a workload the calls of a node's kubelet are counted."""
    return f"{NAMESPACE}/{node}"


class Finder:
    """Looks for it. Not thread-safe."""

    def __init__(self, cgroup: Path, given: Path | None = None, node: Path = Path("/proc/self")) -> None:
        """`cgroup` is what the programs are attached to, `given` an operator's word; `node` is a process in the node's own namespaces."""
        self._cgroup = cgroup
        self._given = given
        self._node = node

    def find(self, last: Kubelet = NOBODY) -> Kubelet:
        """The kubelet as it is now; `last` stays it as long as it may, and then nobody else is looked at."""
        try:
            cookie = netns.cookie(self._node / "ns/net")
            if self._given is not None:
                return self._named(self._given, cookie)
            if last.cgroup and birth(last.pid) == last.started and _name(last.pid) in NAMES:
                found = self._look(last.pid, last.started, cookie)
                if found.cgroup:
                    return found
            return self._search(cookie)
        except OSError as error:
            return Kubelet(reason=f"the node's processes cannot be looked at: {error}")

    def _named(self, given: Path, cookie: int) -> Kubelet:
        directory = given.resolve()
        if wrong := self._unfit(directory):
            return Kubelet(directory=str(directory), reason=f"--kubelet-cgroup {given} {wrong}")
        return Kubelet(ANY, directory.stat().st_ino, cookie, directory=str(directory))

    def _unfit(self, directory: Path) -> str:
        """Why a cgroup cannot be the kubelet's own; "" if it can."""
        if directory == self._cgroup or directory in self._cgroup.parents:
            return f"holds whatever nobody put elsewhere: it has to be a cgroup below {self._cgroup} that is the kubelet's own"
        if self._cgroup not in directory.parents:
            return f"is not below {self._cgroup}, where the programs are attached: name one there, or give a --cgroup that is above both"
        if _is_pods(str(directory)):
            return "is that of pods: any of them could call the others then"
        return "" if directory.is_dir() else "does not exist: the kubelet does not run, or in another cgroup"

    def _search(self, cookie: int) -> Kubelet:
        refused = []
        candidates = sorted((since, pid) for pid in _called() if (since := birth(pid)) is not None)
        for since, pid in candidates:
            found = self._look(pid, since, cookie)
            if found.cgroup:
                return found
            refused.append(found.reason)
        return Kubelet(
            reason="; ".join(refused[:_MOST_REASONS])
            or f"no process of this node is called {', '.join(sorted(NAMES))}; --kubelet-cgroup names its cgroup"
        )

    def _look(self, pid: int, since: int, cookie: int) -> Kubelet:
        """What a process is that is called like one."""
        directory = cgroups.Tree(self._cgroup).of(pid)
        wrong = self._wrong(pid, directory)
        if wrong or directory is None:
            return Kubelet(reason=f"process {pid} is called {_name(pid)}, but {wrong}")
        if birth(pid) != since:
            return Kubelet(reason=f"process {pid} ended while it was being looked at")
        return Kubelet(pid if self._counts else ANY, directory.stat().st_ino, cookie, pid, since, str(directory))

    @property
    def _counts(self) -> bool:
        """Does the kernel count processes as we do?"""
        return _inode(self._node / "ns/pid") == _FIRST_PID_NAMESPACE

    def _wrong(self, pid: int, directory: Path | None) -> str:
        """Why a process cannot be the kubelet, or not be recognised; "" if it can. `directory` is its cgroup, if that can be seen."""
        other = [kind for kind in _SHARED if _inode(Path(f"/proc/{pid}/ns/{kind}")) != _inode(self._node / "ns" / kind)]
        if other:
            return f"is not in the agent's {other[0]} namespace, which has to be the node's, or CAP_SYS_PTRACE is missing to see it"
        if not int(_status(pid, "CapEff") or "0", 16) & _CAP_SYS_ADMIN:
            return "lacks CAP_SYS_ADMIN, without which no kubelet works"
        if _is_pods(_read(f"/proc/{pid}/cgroup")):
            return "is a pod's"
        if directory is None or (directory != self._cgroup and self._cgroup not in directory.parents):
            return f"is not below {self._cgroup}, where the programs are attached: give a --cgroup that is above it"
        if not self._counts and (self._unfit(directory) or _strangers(directory, pid)):
            return f"shares its cgroup {directory} with others, all of whom --kubelet-cgroup would vouch for"
        return ""


class Follower:
    """Keeps the kernel's idea of the kubelet up to date. Belongs to the event loop."""

    def __init__(self, finder: Finder, recognise: Callable[[Kubelet], None]) -> None:
        """`recognise` is told what was found first, and then whenever that differs; one without a cgroup means that nobody is recognised."""
        self._finder = finder
        self._recognise = recognise
        self._lost_at = float("-inf")
        self._told: Kubelet | None = None
        self.found = NOBODY

    def look(self) -> None:
        """Look once. Blocks for some milliseconds."""
        before = self.found
        now = self._finder.find(before)
        self.found = now
        if before.cgroup and not now.cgroup:
            self._lost_at = time.monotonic()
        if now == self._told:
            return
        try:
            self._recognise(now)
        except (OSError, MeshError) as error:
            _log.error("the kernel cannot be told who the kubelet is; trying again", extra={"reason": str(error)})
            return
        self._told = now
        if now.cgroup:
            _log.info("the kubelet is recognised", extra={"pid": now.pid or None, "cgroup": now.directory})
        elif before.cgroup:
            _log.warning("the kubelet has ended: until another runs nobody's calls are probes", extra={"reason": now.reason})

    def problems(self, residents: Iterable[Workload]) -> list[str]:
        """What an operator should know, whose pods on this node are these; nothing where no pod is probed."""
        if self.found.cgroup or not any(one.enrolled and one.probe_ports for one in residents):
            return []
        return [f"the kubelet is not recognised, and what protects pods refuses its probes: {self.found.reason}"]

    async def run(self) -> None:
        """Follow it for ever."""
        try:
            watch = Watch()
        except OSError as error:
            _log.warning(
                "the kubelet is looked for now and then only: fs.inotify.max_user_instances is used up", extra={"reason": str(error)}
            )
            watch = None
        try:
            while True:
                await asyncio.to_thread(self.look)
                await self._news(watch)
        finally:
            if watch is not None:
                watch.close()

    async def _news(self, watch: Watch | None) -> None:
        """Wait for the end of the process, for its cgroup to come or go, or for some time."""
        found = self.found
        soon = not found.cgroup and time.monotonic() - self._lost_at < SOON_FOR_S
        if found.directory and watch is not None:
            watch.follow([found.directory])  # of one that has ended the last place is kept: there another one is to come
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        process = _open(found)
        if found.pid and found.cgroup and process is None:
            return  # it has just ended
        descriptors = [*([watch.fileno()] if watch is not None else []), *([process] if process is not None else [])]
        for descriptor in descriptors:
            loop.add_reader(descriptor, news.set)
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(news.wait(), SOON_S if soon else RECHECK_S)
            if watch is not None:
                watch.drain()
                if watch.take_named() and not found.cgroup:
                    self._lost_at = time.monotonic()  # its cgroup has come, and it will be there soon
        finally:
            for descriptor in descriptors:
                loop.remove_reader(descriptor)
            if process is not None:
                os.close(process)


def _open(found: Kubelet) -> int | None:
    """A descriptor that is readable when its process has ended (pidfd_open(2)); None if there is no such process."""
    if not found.pid or not found.cgroup:
        return None
    try:
        descriptor = os.pidfd_open(found.pid)
    except ProcessLookupError:
        return None
    if birth(found.pid) == found.started:
        return descriptor
    os.close(descriptor)
    return None


def _called() -> list[int]:
    """Processes that are called as a kubelet is."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _name(int(entry)) in NAMES]  # noqa: PTH208


def _name(pid: int) -> str:
    return _read(f"/proc/{pid}/comm").rstrip("\n")


def _is_pods(path: str) -> bool:
    """Does a line of /proc/PID/cgroup, or a path, lead through a cgroup of pods?"""
    return any(KUBEPODS.fullmatch(part) for line in path.splitlines() for part in line.split("/"))


def _strangers(directory: Path, pid: int) -> bool:
    """Are there processes in a cgroup that are neither this one nor its children?"""
    others = [int(line) for line in _read(str(directory / "cgroup.procs")).split() if int(line) != pid]
    return any(_status(one, "PPid") not in {str(pid), ""} for one in others)


def _status(pid: int, name: str) -> str:
    """A line of /proc/PID/status (proc(5)); "" if the process has ended."""
    return next((line.partition(":")[2].strip() for line in _read(f"/proc/{pid}/status").splitlines() if line.startswith(f"{name}:")), "")


def _inode(path: Path) -> int:
    """Which namespace it is; 0 if that cannot be seen."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _read(path: str) -> str:
    """What a file of /proc says; "" if its process has ended."""
    try:
        with open(path, errors="replace") as file:  # noqa: PTH123  for each process of the node
            return file.read()
    except OSError:
        return ""
