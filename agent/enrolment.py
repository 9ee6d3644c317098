"""Brings kernel and namespaces to what a snapshot says about this node: who is enrolled, what the tables hold, where the receiver's check is linked.

Owned by the supervisor, which calls it from one worker thread at a time. Nothing here knows Envoy. What has not changed is not looked at: a change that
concerns no namespace of this node costs one stat(2) for each of its workloads, besides the tables.
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
from agent.ids import Ids
from agent.model import NO_DIRECT, Direct, LocalWorkload, Snapshot, Workload
from agent.watch import Watch

_log = logging.getLogger(__name__)

RETRY_S = 5.0
"""How long after a failure, other than a namespace that is gone, the same is tried again."""
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
    path: str
    mark: tuple[int, int] = _FAILED
    bound: Namespace | None = None
    reason: str = ""
    """Why it is missing."""
    loopback: bool = False


class Enrolment:
    """See the module."""

    def __init__(self, config: Config, datapath: DataPath, ids: Ids) -> None:
        """Take over the tables as the kernel holds them."""
        self._config = config
        self._datapath = datapath
        self.tables = Tables(datapath.maps, ids, config.trust_domain, config.node)
        self.acceleration = Acceleration(datapath)
        self.watch = Watch()
        self._base: Snapshot | None = None
        self._local: dict[str, _Local] = {}
        """The enrolled workloads of this node in `_base`, by name."""
        self._linked: set[int] = set()
        self._held: set[int] | None = None
        """Namespaces with a mount or a link; None: not known yet."""
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
        changed = self.tables.sync(snapshot, namespaces, enforce_inbound, accelerated, tunnels, direct)
        # Rows first: a namespace that is linked before its address is known is closed to everybody.
        for namespace in namespaces:
            self._link(namespace.local)
        current = {n.local.netns_cookie for n in namespaces}
        if current != self._held:
            self._release_others(current)
        if changed:
            _log.info("policy in force", extra={"version": snapshot.version, "rows": changed, "workloads": len(namespaces)})
        missing = tuple((name, reason) for name, local in self._sorted() if (reason := local.reason or _deaf(local)))
        self._again = False
        if any(local.mark == _FAILED for local in self._local.values()):
            self._retry_at = time.monotonic() + RETRY_S
        return Enrolled(tuple(n.local for n in namespaces if self._local[n.local.workload.name].loopback), missing)

    def _update(self, snapshot: Snapshot) -> None:
        """Bring `_local` to the workloads of `snapshot`; what was found of a workload stays as long as it names the same place."""
        base, self._base = self._base, snapshot
        if base is snapshot:
            return
        delta = snapshot.delta
        if base is not None and delta is not None and delta.base == base.version:
            touched: Collection[str] = delta.workloads
        else:
            touched = self._local.keys() | {w.name for w in snapshot.workloads.values() if w.node == self._config.node}
        for name in touched:
            workload = snapshot.workloads.get(name)
            if workload is None or workload.node != self._config.node or not workload.enrolled or not workload.network_namespace:
                self._local.pop(name, None)
                continue
            path = str(netns.resolve(workload.network_namespace))
            known = self._local.get(name)
            if known is None or known.path != path:
                self._local[name] = _Local(workload, path)
                continue
            known.workload = workload
            if known.bound is not None and known.bound.local.workload is not workload:
                known.bound = replace(known.bound, local=replace(known.bound.local, workload=workload))
        self.watch.follow(local.path for local in self._local.values())

    def _sorted(self) -> list[tuple[str, _Local]]:
        return sorted(self._local.items())

    def _bind(self) -> list[Namespace]:
        """Bind each workload of this node to the namespace that exists now; one that cannot be looked at keeps the binding it has."""
        self.watch.take_named()
        changed = self.watch.take_changed()
        self._linked -= changed
        bound: dict[int, Namespace] = {}
        # Those that are as they were come first: a newcomer never takes a namespace from the workload that has it.
        fresh = []
        for _, local in self._sorted():
            mark = netns.mark(local.path)
            if local.bound is None or mark != local.mark or local.bound.local.netns_cookie in changed:
                fresh.append((local, mark))
            else:
                bound[local.bound.local.netns_cookie] = local.bound
        for local, mark in fresh:
            self._look(local, mark, bound)
            if local.bound is not None:
                bound[local.bound.local.netns_cookie] = local.bound
        return list(bound.values())

    def _look(self, local: _Local, mark: tuple[int, int], bound: dict[int, Namespace]) -> None:
        source = Path(local.path)
        before, local.reason = local.bound, ""
        if mark == netns.GONE:
            local.bound, local.mark, local.reason = None, mark, _absence(source)
            return
        try:
            seen = netns.look(source)
            try:
                path = self._hold(source, seen.cookie, bound)
            except BaseException:
                os.close(seen.notices)
                raise
            self.watch.add(seen.cookie, seen.notices)
            local.loopback = seen.loopback
            local.bound, local.mark = Namespace(LocalWorkload(local.workload, seen.cookie, str(path)), seen.addresses), mark
            if self._held is not None:
                self._held.add(seen.cookie)
        except (OSError, MeshError) as error:
            local.reason, local.mark = str(error), _FAILED
            # What another workload has meanwhile is not kept.
            local.bound = before if before is not None and before.local.netns_cookie not in bound else None

    def _hold(self, source: Path, cookie: int, bound: dict[int, Namespace]) -> Path:
        if cookie in bound:
            raise FileExistsError(f"network namespace {source} already belongs to workload {bound[cookie].local.workload.name}")
        return netns.hold(source, cookie, self._config.netns_dir)

    def _link(self, local: LocalWorkload) -> None:
        if local.netns_cookie in self._linked:
            return
        try:
            self._datapath.attach_namespace(local.netns_cookie, Path(local.netns_path))
        except MeshError as error:
            self._local[local.workload.name].reason = str(error)
            self._local[local.workload.name].mark = _FAILED
        else:
            self._linked.add(local.netns_cookie)

    def _release_others(self, current: set[int]) -> None:
        self._datapath.detach_namespaces(current)
        for mount in netns.held(self._config.netns_dir):
            if mount.name.isdigit() and int(mount.name) not in current:
                netns.release(mount)
        self.watch.keep(current)
        self._linked &= current
        self._held = set(current)

    def namespaces_changed(self, snapshot: Snapshot) -> bool:
        """True if a namespace of this node's workloads came, went, was replaced or changed its addresses since `enforce`, or if it is time to try again.

        Called when `watch` has news, and now and then in any case: a bind mount raises no event, and /proc/PID/ns cannot be watched.
        """
        if self._again or snapshot is not self._base:
            return True
        self.watch.drain()
        named = self.watch.take_named()
        if named or not self.watch.complete:
            self.watch.follow(local.path for local in self._local.values())
        if self.watch.news:
            return True
        failed = False
        for local in self._local.values():
            if local.mark == _FAILED:
                failed = True
            elif netns.mark(local.path) != local.mark:
                return True
        return failed and time.monotonic() >= self._retry_at

    def doubt(self, cookies: Collection[int]) -> None:
        """Have these namespaces bound and linked anew: what was found in force is not what `enforce` left."""
        self.watch.doubt(cookies)

    def close(self) -> None:
        """Close the descriptors; what is in force stays."""
        self.watch.close()


def _deaf(local: _Local) -> str:
    if local.bound is None or local.loopback:
        return ""
    return f"the loopback interface in {local.path} is down, so that the waypoint cannot listen there: ip link set lo up"


def _absence(source: Path) -> str:
    if source.exists():
        return f"{source} is not a network namespace: has its pod ended, or is the path in spec.networkNamespace wrong?"
    return f"there is no network namespace {source}: the pod has ended or has not started, or spec.networkNamespace is wrong"
