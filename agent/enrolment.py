"""Brings kernel and namespaces to what a snapshot says about this node: who is enrolled, what the tables hold, where the receiver's check is linked.

Owned by the supervisor, which calls it from one worker thread at a time. Nothing here knows Envoy.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

from agent import netns
from agent.bpf.datapath import DataPath
from agent.bpf.tables import Namespace, Tables
from agent.config import Config
from agent.errors import MeshError
from agent.ids import Ids
from agent.model import LocalWorkload, Snapshot, Workload

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What is in force: the workloads in the data path, and why others are not."""

    local: tuple[LocalWorkload, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()
    """(workload, reason) of enrolled workloads of this node that could not be bound to a namespace."""


class Enrolment:
    """See the module."""

    def __init__(self, config: Config, datapath: DataPath, ids: Ids) -> None:
        """Take over the tables as the kernel holds them."""
        self._config = config
        self._datapath = datapath
        self.tables = Tables(datapath.maps, ids, config.trust_domain, config.node)
        self._known: dict[str, tuple[int, int]] = {}
        self._bound: dict[str, Namespace] = {}
        self._retry_at = 0.0

    def enforce(self, snapshot: Snapshot, enforce_inbound: frozenset[str]) -> Enrolled:
        """Make the node decide by `snapshot`. Raises KernelRefused, with the previous state in force, if a table is too small."""
        namespaces, missing = self._bind(snapshot)
        try:
            changed = self.tables.sync(snapshot, namespaces, enforce_inbound)
        except MeshError:
            self._known = {}  # nothing of what was found is in force: look again
            raise
        # Rows first: a namespace that is linked before its address is known is closed to everybody.
        for namespace in namespaces:
            try:
                self._datapath.attach_namespace(namespace.local.netns_cookie, Path(namespace.local.netns_path))
            except MeshError as error:
                missing.append((namespace.local.workload.name, str(error)))
                self._known[namespace.local.workload.name] = _FAILED
        self._bound = {n.local.workload.name: n for n in namespaces}
        current = {n.local.netns_cookie for n in namespaces}
        self._datapath.detach_namespaces(current)
        for mount in netns.held(self._config.netns_dir):
            if int(mount.name) not in current:
                netns.release(mount)
        if changed:
            _log.info("policy in force", extra={"version": snapshot.version, "rows": changed, "workloads": len(namespaces)})
        return Enrolled(tuple(n.local for n in namespaces), tuple(missing))

    def _bind(self, snapshot: Snapshot) -> tuple[list[Namespace], list[tuple[str, str]]]:
        """Bind each workload of this node to the namespace that exists now; one that cannot be looked at keeps the binding it has."""
        bound: dict[int, Namespace] = {}
        missing = []
        self._known = {}
        self._retry_at = time.monotonic() + RETRY_S
        for workload in sorted(self._here(snapshot), key=lambda w: w.name):
            source = netns.resolve(workload.network_namespace)
            mark = _mark(source)
            try:
                cookie, path = netns.hold(source, self._config.netns_dir)
                if cookie in bound:
                    raise FileExistsError(f"network namespace {source} already belongs to workload {bound[cookie].local.workload.name}")
                bound[cookie] = Namespace(LocalWorkload(workload, cookie, str(path)), netns.addresses(path))
                self._known[workload.name] = mark
            except (OSError, MeshError) as error:
                missing.append((workload.name, str(error)))
                # A namespace that is gone is not asked for again until it comes back; any other failure may pass by itself.
                self._known[workload.name] = mark if mark == _GONE else _FAILED
                before = self._bound.get(workload.name)
                if mark != _GONE and before is not None and before.local.netns_cookie not in bound:
                    bound[before.local.netns_cookie] = replace(before, local=replace(before.local, workload=workload))
        return list(bound.values()), missing

    def _here(self, snapshot: Snapshot) -> list[Workload]:
        return [w for w in snapshot.workloads.values() if w.node == self._config.node and w.enrolled and w.network_namespace]

    def namespaces_changed(self, snapshot: Snapshot) -> bool:
        """True if a namespace of this node's workloads came, went or was replaced since `enforce`, or if it is time to try again what failed.

        Polled, because a bind mount raises no inotify event.
        """
        now = {w.name: _mark(netns.resolve(w.network_namespace)) for w in self._here(snapshot)}
        if now.keys() != self._known.keys() or any(self._known[name] not in {mark, _FAILED} for name, mark in now.items()):
            return True
        return _FAILED in self._known.values() and time.monotonic() >= self._retry_at


RETRY_S = 5.0
"""How long after a failure, other than a namespace that is gone, the same is tried again."""
_GONE = (0, 0)
_FAILED = (-1, -1)
"""Differs from every mark: look again."""


def _mark(path: Path) -> tuple[int, int]:
    """Device and inode of a namespace file; zeros if there is none."""
    try:
        found = path.stat()
    except OSError:
        return _GONE
    return found.st_dev, found.st_ino
