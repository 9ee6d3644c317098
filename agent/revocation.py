"""Closes living connections that a changed policy or mTLS mode forbids: what the kernel would refuse now must not go on because it began earlier.

Every connection of the enrolled namespaces is decided again as `agent.policy` says, at the caller and at the receiver. Where the request decides (WAYPOINT),
those end that go past whoever reads it: applications that have been connected since before a policy asked for that. They are closed at once.
A waypoint may have such a connection in a pool that well-behaved callers use. Envoy is told to let go of it (`agent.l7.clusters`), and has LET_GO_S for that:
the receiver's node closes what is left then, whatever the caller's node does, without asking anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from agent import addresses, netns
from agent.bpf.datapath import DataPath
from agent.bpf.manifest import Direction, Redirect
from agent.bpf.manifest import Verdict as Row
from agent.bpf.sockets import LiveSocket, Sockets
from agent.config import HBONE_PORT, UNREAD_MARK, Config
from agent.enrolment import Enrolled
from agent.errors import KernelRefused
from agent.ids import Ids
from agent.l7 import rbac
from agent.model import Action, LocalWorkload, Mtls, Snapshot, Workload
from agent.patience import Backoff, within
from agent.policy import Caller, Decision, Verdict, decide, protecting

_log = logging.getLogger(__name__)

SETTLE_S = 3.0
"""How long after the first look a second one follows: a handshake that was under way was decided by the old policy and had no connection yet."""
PAUSE_S = 0.5
"""Between two looks, however quickly changes follow: a look takes about 10 us a connection."""
LOOK_S = 300.0
"""How often everything is looked at in any case: bounds what no change led to."""
AGAIN_S, LATER_S = 4.0, 60.0
"""How long after a look that failed in a namespace one follows there, at first and at most."""
LET_GO_S = 10.0
"""What a waypoint has to let go of connections in its pools: requests that are under way then fail."""
EPHEMERAL = 32768
"""The lowest port that Linux gives to who calls (Documentation/networking/ip-sysctl.rst, ip_local_port_range)."""
_UNREAD = "it needs the requests, and this connection goes past whoever reads them"
_NAMED = 20
"""Connections that are named in the log; of the others only their number."""


class Forbidden(NamedTuple):
    """A living connection that may not be opened any more."""

    socket: LiveSocket
    source: str
    destination: str
    rule: str
    pooled: bool = False
    """A waypoint may still send requests over it that are allowed."""


class Rules(NamedTuple):
    """What connections are decided by."""

    snapshot: Snapshot
    enrolled: Enrolled
    enforce_inbound: frozenset[str] = frozenset()
    """Workloads of this node that read the requests of its waypoint, too."""


class Judge:
    """Decides living connections. Pure, but for `who`."""

    def __init__(self, rules: Rules, config: Config, ids: Ids, who: Callable[[bytes], str], waypoint: int = 0) -> None:
        """`who` names the workload that the kernel knows at an address; "" for nobody. `waypoint` is the inode of Envoy's cgroup."""
        snapshot, enrolled = rules.snapshot, rules.enrolled
        self._snapshot = snapshot
        self._local = {local.workload.name: local.workload for local in enrolled.local}
        self._config = config
        self._ids = ids
        self._who = who
        self._waypoint = waypoint
        self._enforce_inbound = rules.enforce_inbound
        self._decided: dict[tuple[str, Caller, int], Decision] = {}

    def forbidden(self, found: LiveSocket, local: LocalWorkload) -> Forbidden | None:
        """What is wrong with a connection of the workload `local`; None if it may stay."""
        record, (here, there) = found.record, found.ends
        read = pooled = False
        if record.direction == Direction.INBOUND:
            name = self._ids.name(record.source)
            if here[1] == HBONE_PORT or record.probe:
                # A tunnel is decided by connection, in Envoy when it is opened and at the caller while it lives; a probe of the kubelet by no policy.
                return None
            if local.workload.mtls_of(here[1]) is Mtls.STRICT and name not in self._local:
                return Forbidden(found, name or addresses.text(there[0]), local.workload.name, "STRICT: plaintext from outside this node")
            known = self._snapshot.workloads.get(name or self._remote(there[0]))
            source, destination = name or addresses.text(there[0]), local.workload.name
            caller, port = self._caller(known, there[0]), here[1]
            pooled = known is not None and known.enrolled
            read = (self._waypoint and found.cgroup == self._waypoint) or (name in self._local and destination not in self._enforce_inbound)
        elif record.direction == Direction.FROM_WAYPOINT and found.mark == UNREAD_MARK:
            return self._unread(found, local.workload, there[1])
        elif record.direction == Direction.FROM_WAYPOINT or record.redirected == Redirect.WAYPOINT or record.verdict == Row.DENY:
            return None  # decided by request; or a kernel thread's, which the caller's end never refuses (bpf_src/mesh_connect.c)
        elif record.redirected == Redirect.TUNNEL:
            source, destination = local.workload.name, self._ids.name(record.target)
            caller, port = self._caller(local.workload, there[0]), record.origdst_port
        else:
            source, destination = local.workload.name, self._who(there[0])
            caller, port = self._caller(local.workload, there[0]), there[1]
        target = self._snapshot.workloads.get(destination)
        if target is None or source == destination:  # nobody protects it; a pod may reach itself
            return None
        rule, pooled = self._ruled(target, caller, port, read=read, pooled=pooled)
        return Forbidden(found, source, destination, rule, pooled) if rule else None

    def older(self, found: LiveSocket, local: LocalWorkload, *, inbound: bool) -> Forbidden | None:
        """The same for one that began before its workload was in the mesh: nobody has vouched for who it is from but the network."""
        here, there = found.ends
        read = pooled = False
        if _loopback(found):
            return None
        other = self._snapshot.workloads.get(self._who(there[0]))
        name = other.name if other is not None else addresses.text(there[0])
        if inbound:
            source, target, caller, port = name, local.workload, self._caller(other, there[0]), here[1]
            if target.mtls_of(port) is Mtls.STRICT and name not in self._local:
                return Forbidden(found, source, target.name, "STRICT: plaintext from outside this node")
            read, pooled = name in self._local and target.name not in self._enforce_inbound, other is not None and other.enrolled
        elif other is None or not other.enrolled or there[1] >= EPHEMERAL:  # it is not a caller, but a server that has stopped listening
            return None
        else:
            source, target, caller, port = local.workload.name, other, self._caller(local.workload, there[0]), there[1]
        if source == target.name:
            return None
        rule, pooled = self._ruled(target, caller, port, read=read, pooled=pooled)
        return Forbidden(found, source, target.name, rule, pooled) if rule else None

    def _ruled(self, target: Workload, caller: Caller, port: int, *, read: bool, pooled: bool) -> tuple[str, bool]:
        """Why a connection may not be, "" if it may; and, of one that a waypoint has `pooled`, whether it is only that nobody has `read` its requests."""
        decision = self._decide(target, caller, port)
        rules = {Verdict.DENY: decision.rule, Verdict.WAYPOINT: "" if read else f"{decision.rule}: {_UNREAD}"}
        return rules.get(decision.verdict, ""), pooled and decision.verdict is Verdict.WAYPOINT

    def _unread(self, found: LiveSocket, workload: Workload, port: int) -> Forbidden | None:
        """What the waypoint hands on from a tunnel to an application without reading it. Who is at the far end is not known here."""
        policies = [policy for policy in protecting(workload, self._snapshot) if policy.action is not Action.AUDIT]
        ports = rbac.request_ports(policies)
        if ports is not None and port not in ports:
            return None
        rule = ", ".join(policy.name for policy in policies if rbac.needs_request(policy))
        return Forbidden(found, "a tunnel", workload.name, f"{rule}: {_UNREAD}", pooled=True)

    def _remote(self, address: bytes) -> str:
        """Who a caller without a name is, by its address: never a workload of this node, for which its namespace vouches."""
        name = self._who(address)
        return "" if name in self._local else name

    def _caller(self, workload: Workload | None, address: bytes) -> Caller:
        if workload is None:
            return Caller(addresses=(addresses.text(address),))
        if workload.node == self._config.node and workload.name not in self._local:  # as in agent.bpf.tables: nobody vouches for it
            return Caller(addresses=workload.addresses)
        return Caller.of(self._local.get(workload.name, workload), self._config.trust_domain)

    def _decide(self, target: Workload, caller: Caller, port: int) -> Decision:
        key = (target.name, caller, port)
        if key not in self._decided:
            self._decided[key] = decide(protecting(target, self._snapshot), caller, port)
        return self._decided[key]


class Revocation:
    """See the module. `changed` and `run` belong to the event loop; the looking is done in a worker thread."""

    on_taken: Callable[[Rules, set[int] | None], None] | None = None
    """Called when Envoy has taken rules that may forbid connections, with the namespaces where, by cookie; None: all."""

    def __init__(self, config: Config, datapath: DataPath, ids: Ids) -> None:
        """Look at nothing yet."""
        self._config = config
        self._ids = ids
        self._addresses = datapath.maps["mesh_address"]
        self._sockets = Sockets(datapath.maps)
        self._wanted = asyncio.Event()
        self._rules: Rules | None = None
        self._pooled: dict[int, float] = {}
        """Connections that a waypoint may have in a pool, by the socket's cookie: when they were first found (time.monotonic)."""
        self._fresh: dict[int, float] = {}
        """Namespaces that may have connections older than their workload's place in the mesh, by cookie: since when they are there (time.monotonic)."""
        self._where: set[int] | None = set()
        """Namespaces whose connections are to be looked at, by cookie; None: all."""
        self._untaken: set[int] | None = set()
        """The same of changes that Envoy has not taken yet: until then it may make connections that they forbid."""
        self._all_at = time.monotonic() + LOOK_S
        """When everything is looked at next, whatever changes (time.monotonic)."""
        self.closed = 0
        """Connections closed since the agent started."""
        self._failed: dict[int, str] = {}
        """Namespaces in which the last look failed, by cookie, and why; "" while the namespace seems to be going away."""
        self._again = Backoff(AGAIN_S, LATER_S)

    @property
    def problem(self) -> str:
        """Why connections that are forbidden may go on, for people; "" if they do not."""
        rules, failed = self._rules, self._failed
        if rules is None or not failed or not _may_forbid(rules):
            return ""
        names = {local.workload.name: reason for local in rules.enrolled.local if (reason := failed.get(local.netns_cookie))}
        if not names:
            return ""
        named, more = sorted(names)[:_NAMED], max(len(names) - _NAMED, 0)
        whose = ", ".join(named) + (f" and {more} more" if more else "")
        why = "; ".join(sorted(set(names.values())))
        return f"living connections that a policy forbids may go on at {whose}: {why}: the agent tries again; if it goes on failing, restart their pods"

    def changed(self, rules: Rules) -> None:
        """Say what is in force in the kernel now. Cheap: connections are looked at only if this may forbid one."""
        before, self._rules = self._rules, rules
        known, readers = (before.snapshot, before.enforce_inbound) if before else (None, frozenset[str]())
        fresh = _cookies(rules) - (_cookies(before) if before else set())
        now = time.monotonic()
        self._fresh = {c: self._fresh.get(c, now) for c in _cookies(rules) if c in fresh or c in self._fresh}
        if self._config.keep_connections:
            return
        begun = rules.enforce_inbound - readers
        everywhere = affects(known, rules.snapshot, _bound(before, rules) if before else {})
        if before is not None and _places(before) - _places(rules):  # who was there is a stranger now, and may live on
            everywhere = everywhere or _may_forbid(rules)
        # Whoever begins to read requests says nothing about what others receive.
        reading = {local.netns_cookie for local in rules.enrolled.local if local.workload.name in begun}
        if everywhere or begun:
            self._untaken = _both(self._untaken, None if everywhere else reading)
        if everywhere or begun or fresh:
            self._look(None if everywhere else fresh | reading)

    def _look(self, where: set[int] | None) -> None:
        self._where = _both(self._where, where)
        self._wanted.set()

    def taken(self) -> None:
        """Say that Envoy has taken all that it was told: until then it may have made connections that go past what is in force."""
        if self._untaken != set():
            where, self._untaken = self._untaken, set()
            self._look(where)
            if self.on_taken is not None and self._rules is not None:
                self.on_taken(self._rules, where)

    async def run(self) -> None:
        """Close what is forbidden after each change, and now and then."""
        if self._config.keep_connections:
            await asyncio.Event().wait()  # for ever: nothing is to be closed
        while True:
            await self._due()
            self._wanted.clear()
            await asyncio.to_thread(self.close_forbidden, self._where)
            settled = False
            while not settled or self._pooled:
                await asyncio.sleep(PAUSE_S)
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(self._wanted.wait(), SETTLE_S)
                    break  # and all of it is looked at twice
                await asyncio.to_thread(self.close_forbidden, self._where)
                settled = True
            else:
                if not self._wanted.is_set():  # else something changed during the last look
                    self._where = set()

    async def _due(self) -> None:
        """Return after a change, or when it is time to look at everything, or once more where a look has failed."""
        if not self._failed:
            self._again.reset()
        pause = self._again.pause() if self._failed else LOOK_S
        with contextlib.suppress(asyncio.TimeoutError):
            await within(self._wanted.wait(), min(pause, max(self._all_at - time.monotonic(), 0)))
        if time.monotonic() >= self._all_at:
            self._all_at = time.monotonic() + LOOK_S
            if self._rules is not None and _may_forbid(self._rules):
                self._look(None)

    def close_forbidden(self, where: set[int] | None = None) -> int:
        """Look once at every connection, or at those in the namespaces `where`; returns how many were closed."""
        rules = self._rules
        if rules is None:
            return 0
        now = time.monotonic()
        waypoint = _inode(self._config.waypoint_cgroup)
        judge = Judge(rules, self._config, self._ids, self.who, waypoint)
        pooled: dict[int, float] = {}
        seen: set[frozenset[tuple[bytes, int]]] = set()
        problem = self.problem
        here = _cookies(rules)
        failed = {cookie: reason for cookie, reason in self._failed.items() if cookie in here}
        for local in self._within(where, rules):
            namespace = Path(local.netns_path)
            try:
                found = self._forbidden(judge, local, waypoint)
                since = {f.socket.cookie: self._pooled.get(f.socket.cookie, now) for f in found if f.pooled}
                spared = {cookie: first for cookie, first in since.items() if now - first < LET_GO_S}
                pooled |= spared
                for _, one in self._sockets.destroy(namespace, [(f.socket, f) for f in found if f.socket.cookie not in spared]):
                    ends = frozenset(one.socket.ends)
                    if ends in seen:  # the other end, which a reset has not reached yet
                        continue
                    seen.add(ends)
                    if len(seen) <= _NAMED:
                        _log.warning(
                            "a connection was closed: a policy forbids it now",
                            extra={"source": one.source, "destination": one.destination, "connection": str(one.socket), "rule": one.rule},
                        )
                failed.pop(local.netns_cookie, None)
            except (KernelRefused, OSError) as error:
                # The mount of a namespace that leaves the mesh goes first, and `changed` says so a moment later.
                leaving = local.netns_cookie not in failed and not netns.is_namespace(namespace)
                failed[local.netns_cookie] = "" if leaving else str(error)
                pooled |= {cookie: first for cookie, first in self._pooled.items() if now - first < 2 * LET_GO_S}  # their time goes on
        self._pooled, self._failed = pooled, failed
        if self.problem not in {"", problem}:
            _log.error(self.problem)
        if len(seen) > _NAMED:
            _log.warning(
                "more connections were closed: a policy forbids them now", extra={"all": len(seen), "not_named": len(seen) - _NAMED}
            )
        self.closed += len(seen)
        return len(seen)

    def _within(self, where: set[int] | None, rules: Rules) -> list[LocalWorkload]:
        """Those in the namespaces `where`, or where the last look failed; all while some connections are spared: each look says anew which."""
        if where is None or self._pooled:
            return list(rules.enrolled.local)
        where = where | self._failed.keys()
        return [one for one in rules.enrolled.local if one.netns_cookie in where]

    def _forbidden(self, judge: Judge, local: LocalWorkload, waypoint: int) -> list[Forbidden]:
        namespace = Path(local.netns_path)
        found = [f for s in self._sockets.dump(namespace) if (f := judge.forbidden(s, local))]
        since = self._fresh.get(local.netns_cookie)
        older = [o for o in self._sockets.older(namespace, waypoint) if not _loopback(o[0])] if since is not None else []
        if not netns.is_namespace(namespace):  # nobody was looked at; if only the mount is gone, what is there goes on
            raise FileNotFoundError(f"no network namespace is at {namespace}")
        # Sooner a handshake may be under way; and a later policy may forbid what lives on.
        if since is not None and not older and time.monotonic() - since > SETTLE_S:
            self._fresh.pop(local.netns_cookie, None)
        return found + [f for s, inbound in older if (f := judge.older(s, local, inbound=inbound))]

    @property
    def rules(self) -> Rules | None:
        """The newest, whether Envoy has taken them or not."""
        return self._rules

    def who(self, address: bytes) -> str:
        """The workload that the kernel knows at an address; "" for nobody."""
        rows = self._addresses.get(address)
        return self._ids.name(self._addresses.layout.value.unpack(rows[0])["id"]) if rows else ""


def _loopback(found: LiveSocket) -> bool:
    return ipaddress.ip_address(addresses.text(found.ends[1][0])).is_loopback


def _cookies(rules: Rules) -> set[int]:
    return {local.netns_cookie for local in rules.enrolled.local}


def _places(rules: Rules) -> set[tuple[int, str]]:
    return {(local.netns_cookie, local.workload.name) for local in rules.enrolled.local}


def _may_forbid(rules: Rules) -> bool:
    """False if nothing that is in force can forbid a connection: no policy, and no workload here that takes no plaintext."""
    return bool(rules.snapshot.policies) or any(_protected(local.workload) for local in rules.enrolled.local)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _both(one: set[int] | None, other: set[int] | None) -> set[int] | None:
    return None if one is None or other is None else one | other


def _bound(before: Rules, after: Rules) -> dict[str, tuple[Workload, Workload]]:
    was = {local.workload.name: local.workload for local in before.enrolled.local}
    return {local.workload.name: (was[local.workload.name], local.workload) for local in after.enrolled.local if local.workload.name in was}


_NOBODY: Final[Mapping[str, tuple[Workload, Workload]]] = {}


def affects(before: Snapshot | None, after: Snapshot, bound: Mapping[str, tuple[Workload, Workload]] = _NOBODY) -> bool:
    """True if a decision about a connection that lives may differ: another policy, or other labels, identities or addresses of a workload.

    `bound`: by name, those that had a namespace of this node and still have, as the node knew and knows them: a pod has the addresses of its namespace before
    the kubelet reports them. One that is new and has no address has no connection but those in its own namespace, which is looked at when it is bound.
    A pod that went away takes its connections with it; a machine or a process lives on, and is a stranger then.
    """
    if before is None:
        return True
    delta = after.since(before)
    if delta.policies:
        return True
    changed, gone = [], False
    for name in delta.workloads:
        now = after.workloads.get(name)
        was, now = bound.get(name) or (before.workloads.get(name), now)
        if now is None:
            gone = gone or (was is not None and not was.pod_uid)
        elif (was is not None or now.addresses) and _standing(was) != _standing(now):
            changed.append(now)
    return bool(after.policies and (changed or gone)) or any(_protected(workload) for workload in changed)


def _protected(workload: Workload) -> bool:
    return bool(workload.policies) or Mtls.STRICT in {workload.mtls, *(mode for _, mode in workload.mtls_ports)}


def _standing(workload: Workload | None) -> object:
    """What policies ask about a workload."""
    if workload is None:
        return None
    return (
        workload.policies,
        workload.labels,
        workload.service_account,
        workload.addresses,
        workload.enrolled,
        workload.network_namespace,
        workload.pod_uid,
        workload.mtls,
        workload.mtls_ports,
    )
