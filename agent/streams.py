"""Closes living streams of tunnels that policy forbids to whoever is at the far end: at the receiver, whatever the caller's node does.

A tunnel carries streams to several ports, and who opened it only Envoy knows, from the certificate. So, when policy has changed and Envoy has taken it, Envoy
is asked for the open streams of the workloads that have any (`agent.l7.tunnel_log`), and for as long as that takes each one is decided again. What is
forbidden is closed in the kernel, at Envoy's own connection to the application: that ends the stream, and no other one of its tunnel. Where the request
decides, streams are `agent.revocation`'s, which says here what may have changed. Belongs to the event loop; sockets are looked for in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from agent import addresses, asking
from agent.bpf.manifest import Direction
from agent.bpf.sockets import LiveSocket, Sockets
from agent.config import UNREAD_MARK
from agent.errors import KernelRefused
from agent.l7.tunnel_log import TunnelRecord
from agent.model import Snapshot
from agent.policy import Caller, Verdict, decide, protecting
from agent.revocation import Rules

_log = logging.getLogger(__name__)

RETRY_S: Final = 5.0
_SVID = re.compile(r"spiffe://([^/]+)/ns/([^/]+)/sa/([^/]+)")


class Streams:
    """See the module."""

    def __init__(
        self,
        sockets: Sockets,
        who: Callable[[bytes], str],
        newest: Callable[[], Rules | None],
        ask: Callable[[frozenset[str]], None],
        asked: Callable[[], bool],
    ) -> None:
        """`who` names the workload that the kernel knows at an address, "" for nobody. `newest` are rules that Envoy may decide by without having said so.

        `ask` has Envoy speak of the streams of these workloads, and of no others, and `asked` says whether it has heard.
        """
        self._sockets = sockets
        self._who, self._newest, self._ask, self._asked = who, newest, ask, asked
        self._wanted = asyncio.Event()
        self._rules: Rules | None = None
        self._where: set[int] | None = set()
        """Namespaces whose streams are to be looked at, by cookie; None: all."""
        self._told: list[TunnelRecord] = []
        self._asking = False
        self.closed = 0
        """Streams closed since the agent started."""
        self.problem = ""
        """Why streams that are forbidden may go on, for people; "" if they do not."""

    def changed(self, rules: Rules, where: set[int] | None) -> None:
        """Say what Envoy has taken, and in which namespaces it may forbid a connection that lives; None: in all."""
        self._rules = rules
        self._where = None if self._where is None or where is None else self._where | where
        self._wanted.set()

    def on_tunnel(self, record: TunnelRecord) -> None:
        """Take what Envoy says of a stream."""
        if self._asking and record.receiver and record.stream and record.remote and not record.ended:
            self._told.append(record)

    async def run(self) -> None:
        """Look at all streams after each change that may concern one."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            where, self._where, rules = self._where, set(), self._rules
            if rules is None:
                continue
            try:
                reason = "" if await self._look(rules, where) else "Envoy does not answer"
            except (KernelRefused, OSError) as error:
                reason = f"{error}; restart their pods"
            before, self.problem = (
                self.problem,
                f"streams of tunnels that a policy forbids may go on: {reason}: the agent tries again" if reason else "",
            )
            if reason:
                if self.problem != before:
                    _log.error(self.problem)
                await asyncio.sleep(RETRY_S)
                self.changed(self._rules or rules, where)

    async def _look(self, rules: Rules, where: set[int] | None) -> bool:
        """False if Envoy has not heard the question, although it has streams."""
        having = await asyncio.to_thread(self._having, rules, where)
        if not having:
            return True
        decided: dict[tuple[str, str, str, str], str] = {}
        newest, heard = rules, False
        self._told, self._asking = [], True
        self._ask(having)
        try:
            async for heard in asking.rounds(self._asked):  # noqa: B007  used when the rounds are over
                told, self._told = self._told, []
                now = self._rules or rules, self._newest() or rules
                if now[0] is not rules or now[1] is not newest:
                    (rules, newest), decided = now, {}
                if told:
                    await asyncio.to_thread(self._close, rules, newest, told, decided)
            return heard
        finally:
            self._asking = False
            self._ask(frozenset())

    def _having(self, rules: Rules, where: set[int] | None) -> frozenset[str]:
        """Workloads of this node that a policy protects, and to which streams are open that nobody reads."""
        local = [one for one in rules.enrolled.local if where is None or one.netns_cookie in where]
        protected = [one for one in local if protecting(one.workload, rules.snapshot)]
        return frozenset(one.workload.name for one in protected if self._open(Path(one.netns_path)))

    def _open(self, path: Path) -> list[LiveSocket]:
        """What Envoy hands on in a namespace from tunnels to applications, without reading it."""
        return [one for one in self._sockets.dump(path) if one.record.direction == Direction.FROM_WAYPOINT and one.mark == UNREAD_MARK]

    def _close(self, rules: Rules, newest: Rules, told: list[TunnelRecord], decided: dict[tuple[str, str, str, str], str]) -> None:
        """Close what both forbid: by the newest, Envoy may have let it in."""
        paths = {one.workload.name: one.netns_path for one in rules.enrolled.local}
        forbidden: dict[str, dict[tuple[str, str], tuple[TunnelRecord, str]]] = {}
        for one in told:
            key = (one.workload, one.peer, one.remote.rpartition(":")[0], one.target)
            if key not in decided:
                decided[key] = self._forbids(one, newest.snapshot) and self._forbids(one, rules.snapshot)
            if decided[key] and one.workload in paths:
                forbidden.setdefault(paths[one.workload], {})[one.stream, _port(one)] = (one, decided[key])
        for path, streams in forbidden.items():
            self._destroy(Path(path), streams)

    def _forbids(self, one: TunnelRecord, snapshot: Snapshot) -> str:
        """The rule by which a stream may not be opened any more; "" if it may."""
        target, port = snapshot.workloads.get(one.workload), _port(one)
        if target is None or not port.isdecimal():
            return ""
        decision = decide(protecting(target, snapshot), self._caller(one, snapshot), int(port))
        return decision.rule if decision.verdict is Verdict.DENY else ""

    def _caller(self, one: TunnelRecord, snapshot: Snapshot) -> Caller:
        """As `agent.l7.peers` has Envoy see it: the certificate says who it is, its address which labels that one has; a stranger's has none here."""
        address = one.remote.rpartition(":")[0].strip("[]")
        known = snapshot.workloads.get(self._who(addresses.packed(address)))
        labels = tuple(sorted(known.labels.items())) if known is not None else ()
        svid = _SVID.fullmatch(one.peer)
        stranger = Caller(labels=labels, addresses=(address,))
        return replace(stranger, trust_domain=svid[1], namespace=svid[2], service_account=svid[3]) if svid else stranger

    def _destroy(self, path: Path, streams: dict[tuple[str, str], tuple[TunnelRecord, str]]) -> None:
        found = [(one, streams[ends]) for one in self._open(path) if (ends := _ends(one)) in streams]
        for socket, (one, rule) in self._sockets.destroy(path, found):
            self.closed += 1
            _log.warning(
                "a stream of a tunnel was closed: a policy forbids it now",
                extra={"source": one.peer, "destination": one.workload, "connection": str(socket), "rule": rule},
            )


def _port(one: TunnelRecord) -> str:
    return one.target.rpartition(":")[2]


def _ends(one: LiveSocket) -> tuple[str, str]:
    """Envoy's own end, and the application's port: Linux gives one local port to connections to several ports."""
    here, there = one.ends
    return addresses.endpoint(*here), str(there[1])
