"""Brings kernel and namespaces to what a snapshot says about this node: who is enrolled, what the tables hold, where the receiver's check is linked.

Owned by the supervisor, which calls it from one worker thread at a time. Nothing here knows Envoy. What has not changed is not looked at: a change that
concerns no namespace of this node costs one stat(2) for each of its workloads, besides the tables. A pod of Kubernetes is found by its UID
(`agent.pods`), and then it is bound to the namespace of its sandbox until that process ends: that costs not even a stat(2).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from agent import netns
from agent.accelerate import Acceleration
from agent.bpf.datapath import DataPath
from agent.bpf.tables import NO_TUNNELS, Namespace, Tables
from agent.config import Config
from agent.errors import MeshError
from agent.holding import Holding, number
from agent.ids import Ids
from agent.model import NO_DIRECT, Direct, LocalWorkload, Snapshot, Workload
from agent.pods import NOT_FOUND, Pod, Pods
from agent.watch import Watch

_log = logging.getLogger(__name__)

RETRY_S = 5.0
"""How long after a failure, other than a namespace that is gone, the same is tried again."""
LINGER_S = 5.0
"""How long the mount of a namespace outlives its pod's place in the mesh: Envoy answers requests of kept connections from there, and closes these."""
_FAILED = (-1, -1)
"""Differs from every mark: look again."""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What is in force: the workloads in the data path, and why others are not.

    One whose namespace has no loopback addresses yet is protected already, but nothing can listen there for it: it is missing for now.
    """

    local: tuple[LocalWorkload, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()
    """(workload, reason) of enrolled workloads of this node that could not be bound to a namespace."""


@dataclass(slots=True)
class _Local:
    """A workload of this node: where its namespace should be, and what was found there last."""

    workload: Workload
    place: str
    """The path of its namespace, or the UID of its pod."""
    pod: Pod | None
    """Of a pod of Kubernetes: where it was found last."""
    mark: tuple[int, int] = _FAILED
    bound: Namespace | None = None
    reason: str = ""
    """Why it is missing."""
    loopback: bool = False
    number: int = 0
    """Of a pod that was bound: the id of its cgroup."""

    @property
    def path(self) -> str:
        """Where its namespace is, or was found last."""
        return self.place if self.pod is None else self.pod.path


class Enrolment:
    """See the module."""

    def __init__(self, config: Config, datapath: DataPath, ids: Ids) -> None:
        """Take over the tables as the kernel holds them."""
        self._config = config
        self._datapath = datapath
        self.tables = Tables(datapath.maps, ids, config.trust_domain, config.node)
        self.acceleration = Acceleration(datapath)
        self.watch = Watch()
        self.holding = Holding(datapath.maps, config.cgroup)
        self._pods = Pods(config.cgroup)
        self._followed: object = None
        """What was to be watched when that was said last."""
        self._base: Snapshot | None = None
        self._local: dict[str, _Local] = {}
        """The enrolled workloads of this node in `_base`, by name."""
        self._linked: set[int] = set()
        """Namespaces with a link, by cookie."""
        self._doubted: set[int] = set()
        """Of these, whose link may not be what it was."""
        self._held: set[int] | None = None
        """Namespaces with a mount or a link; None: not known yet."""
        self._left: dict[int, float] = {}
        """Namespaces of pods that have left the mesh and live on, by cookie: until when their mounts stay (time.monotonic)."""
        self._again = True
        self._retry_at = 0.0

    def enforce(
        self,
        snapshot: Snapshot,
        enforce_inbound: frozenset[str],
        tunnels: Mapping[str, int] = NO_TUNNELS,
        direct: Direct = NO_DIRECT,
    ) -> Enrolled:
        """Make the node decide by `snapshot`; `tunnels` is what `agent.tunnels` has that is usable, `direct` says who needs none (`agent.wireguard`).

        Raises KernelRefused, with the previous state in force, if a table is too small.
        """
        self._again = True  # until it is done
        self._update(snapshot)
        namespaces = self._bind()
        accelerated = self.acceleration.choose(n.local.workload for n in namespaces)
        current = {n.local.netns_cookie for n in namespaces}
        leaving = self._linked - current

        def unlink() -> None:
            for cookie in leaving:
                self._linked.discard(cookie)
                self._datapath.detach_namespace(cookie)

        try:
            # A namespace that is linked while its address is not known is closed to everybody: who leaves has its link removed before its rows, and no sooner:
            # a snapshot that does not fit opens nobody.
            changed = self.tables.sync(snapshot, namespaces, enforce_inbound, accelerated, tunnels, direct, switching=unlink)
        except BaseException:  # whatever it is: the previous state stays in force, and they are in it
            self._link_again(leaving - self._linked)
            raise
        for namespace in namespaces:  # and who comes is linked when they are there.
            self._link(namespace.local)
        if current != self._held:
            self._release_others(current)
        self.let_go()
        if changed:
            _log.info("policy in force", extra={"version": snapshot.version, "rows": changed, "workloads": len(namespaces)})
        missing = tuple((name, reason) for name, local in self._sorted() if (reason := local.reason or _deaf(local)))
        self._again = False
        if any(local.mark == _FAILED for local in self._local.values()):
            self._retry_at = time.monotonic() + RETRY_S
        return Enrolled(tuple(n.local for n in namespaces if self._local[n.local.workload.name].loopback), missing)

    def find(self, snapshot: Snapshot) -> tuple[LocalWorkload, ...]:
        """Bind the workloads of `snapshot` to their namespaces. What decides there stays as it is, until the next `enforce`, of whatever snapshot."""
        self._again = True
        self._update(snapshot)
        return tuple(n.local for n in self._bind() if self._local[n.local.workload.name].loopback)

    def _update(self, snapshot: Snapshot) -> None:
        """Bring `_local` to the workloads of `snapshot`; what was found of a workload stays as long as it names the same place."""
        base, self._base = self._base, snapshot
        if base is snapshot:
            return
        for name in snapshot.since(base or Snapshot()).workloads:
            workload = snapshot.workloads.get(name)
            if workload is None or workload.node != self._config.node or not workload.enrolled or not _place(workload):
                gone = self._local.pop(name, None)
                if gone is not None and gone.bound is not None and workload is not None and not workload.enrolled:
                    self._left[gone.bound.local.netns_cookie] = time.monotonic() + LINGER_S
                continue
            place = _place(workload)
            known = self._local.get(name)
            if known is None or known.place != place:
                self._local[name] = _Local(workload, place, NOT_FOUND if workload.pod_uid else None)
                continue
            if known.workload is not workload and known.bound is not None:
                effective = _effective(workload, known.bound.addresses)
                known.bound = replace(known.bound, local=replace(known.bound.local, workload=effective))
            known.workload = workload

    def _follow(self, *, again: bool = False) -> None:
        """Have everything watched that leads to the namespaces; `again`: also if it is what it was, because some of it may have been replaced."""
        leading = [(local.place, local.pod.directory if local.pod is not None else None) for local in self._local.values()]
        wanted = (leading, self._pods.kubepods)
        if wanted == self._followed and not again:
            return
        self._followed = wanted
        names: set[str] = set()
        events = []
        for local in self._local.values():
            if local.pod is None:
                names.add(local.place)
                continue
            names.update(self._pods.names(local.place))
            if local.pod.directory:
                events.append(local.pod.events)
        self.watch.follow(names, events)

    def _take_names(self) -> bool:
        """True after something came or went that leads to a namespace; then what came is watched, too."""
        if not self.watch.take_named():
            return False
        if any(local.pod is not None for local in self._local.values()):
            self._pods.check()
        self._follow(again=True)
        return True

    def _mark(self, local: _Local, changed: set[int]) -> tuple[int, int]:
        """What tells the namespace that is there now from any other; GONE if there is none that may be enrolled."""
        if local.pod is None:
            return netns.mark(local.place)
        if local.bound is not None and local.mark != _FAILED and local.bound.local.netns_cookie not in changed:
            return local.mark  # `watch` would tell of the end of its sandbox
        local.pod = self._pods.find(local.place, local.pod)
        return netns.GONE if local.pod.reason else local.pod.mark

    def _sorted(self) -> list[tuple[str, _Local]]:
        return sorted(self._local.items())

    def _bind(self) -> list[Namespace]:
        """Bind each workload of this node to the namespace that exists now; one that cannot be looked at keeps the binding it has."""
        changed = self.watch.take_changed()
        if not self._take_names():
            self._follow()
        self._doubted |= self._linked & changed
        bound: dict[int, Namespace] = {}
        # Those that are as they were come first: a newcomer never takes a namespace from the workload that has it.
        fresh = []
        for _, local in self._sorted():
            mark = self._mark(local, changed)
            if local.bound is None or mark != local.mark or local.bound.local.netns_cookie in changed:
                fresh.append((local, mark))
            else:
                bound[local.bound.local.netns_cookie] = local.bound
        for local, mark in fresh:
            self._look(local, mark, bound)
            if local.bound is not None:
                bound[local.bound.local.netns_cookie] = local.bound
        self._follow()  # also what pods have that were found just now
        return list(bound.values())

    def _look(self, local: _Local, mark: tuple[int, int], bound: dict[int, Namespace]) -> None:
        source = Path(local.path)
        before, local.reason = local.bound, ""
        if mark == netns.GONE:
            local.bound, local.mark, local.reason = None, mark, _absence(source) if local.pod is None else local.pod.reason
            return
        try:
            seen = netns.look(source)
            try:
                path = self._hold(source, seen.cookie, bound)
                process = local.pod.open() if local.pod is not None else None
            except BaseException:
                os.close(seen.notices)
                raise
            self.watch.add(seen.cookie, seen.notices, process)
            local.loopback = seen.loopback
            local.number = number(local.pod.directory) if local.pod is not None else 0
            effective = _effective(local.workload, seen.addresses)
            local.bound, local.mark = Namespace(LocalWorkload(effective, seen.cookie, str(path)), seen.addresses), mark
        except (OSError, MeshError) as error:
            local.reason, local.mark = str(error), _FAILED
            # What another workload has meanwhile is not kept.
            local.bound = before if before is not None and before.local.netns_cookie not in bound else None

    def _hold(self, source: Path, cookie: int, bound: dict[int, Namespace]) -> Path:
        if cookie in bound:
            raise FileExistsError(f"network namespace {source} already belongs to workload {bound[cookie].local.workload.name}")
        path = netns.hold(source, cookie, self._config.netns_dir)
        self._left.pop(cookie, None)
        if self._held is not None:
            self._held.add(cookie)
        return path

    def _link(self, local: LocalWorkload) -> None:
        if self._links(local.netns_cookie):
            return
        try:
            self._datapath.attach_namespace(local.netns_cookie, Path(local.netns_path))
        except MeshError as error:
            self._local[local.workload.name].reason = str(error)
            self._local[local.workload.name].mark = _FAILED
        else:
            self._linked.add(local.netns_cookie)
            self._doubted.discard(local.netns_cookie)

    def _links(self, cookie: int) -> bool:
        """Is a namespace linked, as far as is known?"""
        return cookie in self._linked and cookie not in self._doubted

    def _link_again(self, cookies: set[int]) -> None:
        """Link namespaces that were to leave, and stay."""
        for cookie in cookies:
            try:
                self._datapath.attach_namespace(cookie, self._config.netns_dir / str(cookie))
            except MeshError as error:  # the next `enforce` tries it again, and says of whom it is
                _log.error("a namespace that was to leave the mesh, and stays, is not linked", extra={"reason": str(error)})
            else:
                self._linked.add(cookie)

    def _release_others(self, current: set[int]) -> None:
        self._datapath.detach_namespaces(current)
        self._unmount_others(current | self._left.keys())
        self.watch.keep(current)
        self._linked &= current
        self._doubted &= current
        self._held = set(current)

    def _unmount_others(self, kept: Collection[int]) -> None:
        for mount in netns.held(self._config.netns_dir):
            if mount.name.isdigit() and int(mount.name) not in kept:
                netns.release(mount)

    def release_left(self) -> None:
        """Let go of the namespaces of pods that left the mesh some time ago."""
        if self._held is not None and any(until < time.monotonic() for until in self._left.values()):
            self._left = {cookie: until for cookie, until in self._left.items() if until >= time.monotonic()}
            self._unmount_others(self._held | self._left.keys())

    def namespaces_changed(self, snapshot: Snapshot) -> bool:
        """True if a namespace of this node's workloads came, went, was replaced or changed its addresses since `enforce`, or if it is time to try again.

        Called when `watch` has news, and now and then in any case: a bind mount raises no event, and /proc/PID/ns cannot be watched. For each path that
        costs one stat(2), for each pod that is enrolled nothing; one that is not found has its few places looked at, not the cgroup tree.
        """
        if self._again or snapshot is not self._base:
            return True
        self.watch.drain()
        if not self._take_names() and not self.watch.complete:
            self.watch.retry()
        if self.watch.news:
            return True
        failed = False
        for local in self._local.values():
            failed = failed or local.mark == _FAILED
            if local.pod is None:
                if local.mark not in {_FAILED, netns.mark(local.place)}:
                    return True
            elif (local.bound is None or local.mark == _FAILED) and self._pods.find(local.place, local.pod) != local.pod:
                return True
        return failed and time.monotonic() >= self._retry_at

    def doubt(self, cookies: Collection[int]) -> None:
        """Have these namespaces bound and linked anew: what was found in force is not what `enforce` left."""
        self.watch.doubt(cookies)

    def let_go(self) -> None:
        """Let pods that are in the mesh have sockets; not those whose sandbox has ended: it may have a successor, which is not."""
        held = self.holding.held()
        if not held or not self._datapath.in_force:
            return
        # `enforce` may change them meanwhile, in its own thread.
        self.holding.let_go(local.number for local in list(self._local.values()) if local.number in held and self._in_force(local))

    def _in_force(self, local: _Local) -> bool:
        """Is a pod in the mesh, and its sandbox still the one that is? Each part is read once: it may be None the next time."""
        pod, bound = local.pod, local.bound
        if pod is None or bound is None:
            return False
        return local.mark == pod.mark and self._links(bound.local.netns_cookie) and pod.lives()

    def close(self) -> None:
        """Close the descriptors; what is in force stays."""
        self.watch.close()


def _place(workload: Workload) -> str:
    """Where its namespace is to be found: the UID of a pod, or a path; "" if nobody said."""
    return workload.pod_uid or (str(netns.resolve(workload.network_namespace)) if workload.network_namespace else "")


def _effective(workload: Workload, addresses: tuple[str, ...]) -> Workload:
    """The workload as its node knows it: a pod runs before the kubelet reports its addresses (status.podIPs), and until then it has those of its namespace."""
    return workload if workload.addresses or not addresses else replace(workload, addresses=addresses)


def _deaf(local: _Local) -> str:
    if local.bound is None or local.loopback:
        return ""
    return f"the loopback interface in {local.path} is down, so that the waypoint cannot listen there: ip link set lo up"


def _absence(source: Path) -> str:
    if source.exists():
        return f"{source} is not a network namespace: has its pod ended, or is the path in spec.networkNamespace wrong?"
    return f"there is no network namespace {source}: the pod has ended or has not started, or spec.networkNamespace is wrong"
