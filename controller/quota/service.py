"""The Quotas service: reports of agents in, shares of global limits out. Served beside discovery by `controller.server`, which also runs its task.

A node is believed about its own callers only, and only that they used what they had been given: whatever an agent says, others keep their fair shares.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from controller import metrics
from controller.peers import NotAllowed, require
from controller.quota.catalogue import Catalogue, Limit
from controller.quota.fair import HORIZON_S, UNKNOWN, Want, left, shares, steady
from controller.quota.store import Member, News, State, Store
from controller.waiting import heard
from meshapi import discovery_pb2, quota_pb2, quota_pb2_grpc
from meshapi.quotas import MOST_USAGES

_log = logging.getLogger(__name__)

TICK_S: Final = 1.0
"""Shares are computed anew this often, for what other controllers and the clock change, and at once for what is reported here."""
SETTLE_S: Final = 0.02
MOST_REFUSED: Final = 20
"""That a report is told of."""
MOST_METRICS: Final = 1000
_SHORTEST_S: Final = 1.0
"""A rate measured over less says nothing."""
_RAISE: Final = 1.05
"""A share grows if it grows by more than 5 %: in Envoy each new share begins with its burst."""
_UNTOLD: Final = 0.02
"""Part of a counted limit that a caller may at most have used while no controller ran."""
_MOST_BURST: Final = (1 << 32) - 1
_MOST_RATE: Final = 4_000_000.0
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class _Held:
    """What a node was last told of one of its callers, and what is known of it."""

    millis: int = -1
    burst: int = 0
    demand: float = UNKNOWN
    credit: float = 1.0
    """Requests that it may have made by `marked_at` and has not reported."""
    marked_at: float = 0.0

    def mark(self, now: float) -> None:
        """Bring the credit to a later time."""
        self.credit += max(self.millis, 0) / 1000 * max(0.0, now - self.marked_at)
        self.marked_at = now

    def give(self, millis: int, burst: int, now: float) -> None:
        """Note another share; in Envoy it begins with a full bucket."""
        self.mark(now)
        self.millis, self.burst, self.credit = millis, burst, self.credit + (burst if millis else 0)

    def spend(self, reported: int, now: float) -> int:
        """How much of what is reported it can have had."""
        self.mark(now)
        used = int(min(reported, self.credit))
        self.credit = min(self.credit - used, self.burst + 1.0)
        return used


@dataclass(slots=True)
class _Connection:
    """One agent's stream."""

    node: str
    out: asyncio.Queue[quota_pb2.QuotaAssignment | None]
    """What is to be told; None ends it."""
    held: dict[tuple[str, Member], _Held] = field(default_factory=dict)


class QuotaService(quota_pb2_grpc.QuotasServicer):
    """See the module. Belongs to the event loop. `entities` is the compiled model, `clock` Unix time."""

    def __init__(
        self,
        entities: Callable[[], Mapping[str, discovery_pb2.Entity]],
        store: Store,
        trust_domain: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._entities = entities
        self._store = store
        self._trust_domain = trust_domain
        self._clock = clock
        self._model: Mapping[str, discovery_pb2.Entity] | None = None
        self._catalogue = Catalogue()
        self._connections: dict[str, _Connection] = {}
        self._news: list[News] = []
        self._due = asyncio.Event()
        self._shown: set[str] = set()
        self._met: set[tuple[str, Member]] = set()
        """Members that this controller has heard of since it started."""

    async def Share(self, _requests: Any, context: Context) -> None:  # type: ignore[override,unused-ignore]  # noqa: N802
        """Serve one agent. A second stream of a node takes the place of the first."""
        first = await context.read()
        if not isinstance(first, quota_pb2.QuotaReport):
            return
        node = first.node
        if not node:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "node: the first report must name the node")
        try:
            require(context, f"spiffe://{self._trust_domain}/meshagent/node/{node}")
        except NotAllowed as error:
            _log.warning("quota reports refused", extra={"node": node, "peer": context.peer(), "error": str(error)})
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"node {node} is not yours: {error}")
        connection = self.connected(node)
        connection.out.put_nowait(quota_pb2.QuotaAssignment())  # the agent may rely on this controller now
        writer = asyncio.ensure_future(self._write(connection, context))
        try:
            report: object = first
            while isinstance(report, quota_pb2.QuotaReport):
                if len(report.usages) > MOST_USAGES:
                    await context.abort(
                        grpc.StatusCode.INVALID_ARGUMENT, f"usages: {len(report.usages)} in one report, at most {MOST_USAGES} are taken"
                    )
                self.take(connection, report)
                report = await context.read()
            # Who says no more may still listen. A write that was cancelled would leave the call open.
            await connection.out.put(None)
            await asyncio.gather(writer, return_exceptions=True)
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            if self._connections.get(node) is connection:
                del self._connections[node]

    @staticmethod
    async def _write(connection: _Connection, context: Context) -> None:
        while (message := await connection.out.get()) is not None:
            await context.write(message)

    def connected(self, node: str) -> _Connection:
        """A connection without a stream."""
        connection = self._connections[node] = _Connection(node, asyncio.Queue(maxsize=100))
        return connection

    def take(self, connection: _Connection, report: quota_pb2.QuotaReport) -> None:
        """Note what an agent says. What it may not say is left out, counted and told."""
        catalogue, refused = self.catalogue(), []
        for usage in report.usages:
            if objection := catalogue.objection(connection.node, usage.limit, usage.caller):
                metrics.QUOTA_REFUSED.inc()
                refused.append(objection)
                continue
            self._news.append(self._heard(connection, catalogue.limits[usage.limit], usage))
        if refused:
            _log.warning("parts of a quota report refused", extra={"node": connection.node, "count": len(refused), "first": refused[0]})
            with contextlib.suppress(asyncio.QueueFull):
                connection.out.put_nowait(quota_pb2.QuotaAssignment(refused=refused[:MOST_REFUSED]))
        self._due.set()

    def _heard(self, connection: _Connection, limit: Limit, usage: quota_pb2.QuotaUsage) -> News:
        """One member's news. Used is at most what it was given since it was last heard of: nobody can use up what others have."""
        member, now = Member(connection.node, usage.caller), self._clock()
        key = (limit.name, member)
        held = connection.held.setdefault(key, _Held(marked_at=now))
        if key not in self._met:  # what was used since another controller, or this one before its restart, was told
            self._met.add(key)
            held.credit += limit.requests * _UNTOLD
        used = held.spend(usage.allowed, now)
        if usage.gone:
            del connection.held[key]
            return News(limit.name, member, None, used, limit.window(now))
        elapsed = usage.elapsed_ms / 1000
        if elapsed >= _SHORTEST_S:
            measured = min((usage.allowed + usage.denied) / elapsed, _MOST_RATE)
            held.demand = steady(measured, held.demand)
        elif not usage.elapsed_ms:
            held.demand, held.millis, held.burst = UNKNOWN, -1, 0  # it has nothing yet, whatever it had before
        return News(limit.name, member, held.demand, used, limit.window(now))

    def catalogue(self) -> Catalogue:
        """The limits in force."""
        model = self._entities()
        if model is not self._model:
            before, self._model, self._catalogue = self._catalogue.limits, model, Catalogue.of(model)
            self._forget_callers({name for name in before if name not in self._catalogue.limits})
            self._due.set()
        return self._catalogue

    def _forget_callers(self, gone: AbstractSet[str]) -> None:
        """Forget who called under limits that have gone: if one of this name comes again, a part kept for who does not call any more is lost to the rest."""
        for connection in self._connections.values():
            for key in [key for key in connection.held if key[0] in gone]:
                del connection.held[key]
                self._news.append(News(*key, None))

    async def run(self) -> None:
        """Share out for ever."""
        while True:
            await heard(self._due, TICK_S)
            await asyncio.sleep(SETTLE_S)
            self._due.clear()
            await self.turn()

    async def turn(self) -> None:
        """Store what was reported, share out, tell the agents what differs."""
        catalogue, now = self.catalogue(), self._clock()
        self._due.clear()
        news, self._news = self._news, []
        mine = {limit for connection in self._connections.values() for limit, _ in connection.held} & catalogue.limits.keys()
        windows = {limit: catalogue.limits[limit].window(now) for limit in sorted(mine)}
        states = await self._store.exchange(news, windows) if news or windows else {}
        told: dict[str, quota_pb2.QuotaAssignment] = {}
        for name, state in states.items():
            given = allot(catalogue.limits[name], state, now)
            self._show(catalogue.limits[name], state, given, now)
            for member, rate in given.items():
                connection = self._connections.get(member.node)
                held = connection.held.get((name, member)) if connection else None
                if held is not None and (share := _changed(catalogue.limits[name], held, rate)):
                    held.give(*share, now)
                    told.setdefault(member.node, quota_pb2.QuotaAssignment()).shares.add(
                        limit=name, caller=member.caller, millis=held.millis, burst=held.burst
                    )
        self._forget(catalogue.limits.keys(), states)
        for node, message in told.items():
            self._tell(node, message)

    def _tell(self, node: str, message: quota_pb2.QuotaAssignment) -> None:
        connection = self._connections.get(node)
        if connection is None:
            return
        try:
            connection.out.put_nowait(message)
        except asyncio.QueueFull:
            for share in message.shares:  # to be told again: the agent does not read
                connection.held[share.limit, Member(node, share.caller)].millis = -1

    def _forget(self, known: Iterable[str], states: Mapping[str, State]) -> None:
        names = set(known)
        pending = {(item.limit, item.member) for item in self._news}  # came in meanwhile
        self._met = {key for key in self._met if key[0] in names}
        for connection in self._connections.values():
            for key in [
                key
                for key in connection.held.keys() - pending
                if key[0] not in names or (key[0] in states and key[1] not in states[key[0]].demands)
            ]:
                del connection.held[key]
        for name in self._shown - states.keys():
            for gauge in (metrics.QUOTA_LIMIT, metrics.QUOTA_DEMAND, metrics.QUOTA_GRANTED):
                gauge.remove(name)
        self._shown &= states.keys()

    def _show(self, limit: Limit, state: State, given: Mapping[Member, float], now: float) -> None:
        if limit.name not in self._shown and len(self._shown) >= MOST_METRICS:
            return
        self._shown.add(limit.name)
        metrics.QUOTA_LIMIT.labels(limit.name).set(allowed(limit, state, now))
        metrics.QUOTA_DEMAND.labels(limit.name).set(math.fsum(one for one in state.demands.values() if one != UNKNOWN))
        metrics.QUOTA_GRANTED.labels(limit.name).set(math.fsum(given.values()))

    async def close(self) -> None:
        """Store what was reported and not stored yet."""
        if self._news:
            await self._store.exchange(self._news, {})
            self._news = []
        await self._store.close()


def allowed(limit: Limit, state: State, _now: float) -> float:
    """Requests a second that all callers together may make now."""
    if limit.counted:
        return max(0, limit.requests - sum(state.used.values())) / HORIZON_S
    return limit.requests * 1000 / limit.interval_ms


def allot(limit: Limit, state: State, now: float) -> dict[Member, float]:
    """Share a limit out: between callers, then each caller's between its nodes. Requests a second by member."""
    demands: dict[str, dict[str, float]] = {}
    for member, demand in state.demands.items():
        demands.setdefault(member.caller, {})[member.node] = demand
    weights = {caller: float(limit.weights.get(caller, 1)) for caller in {*demands, *state.used}}
    most: dict[str, float] = {}
    if limit.counted:
        used = {caller: state.used.get(caller, 0) for caller in weights}
        most = {caller: count / HORIZON_S for caller, count in left(limit.requests, used, weights, limit.elapsed(now)).items()}
    wants = {
        caller: Want(math.fsum(nodes.values()), weights[caller], most.get(caller, math.inf)) for caller, nodes in sorted(demands.items())
    }
    result: dict[Member, float] = {}
    for caller, share in shares(allowed(limit, state, now), wants).items():
        nodes = {node: Want(demand) for node, demand in sorted(demands[caller].items())}
        result |= {Member(node, caller): rate for node, rate in shares(share, nodes).items()}
    return result


def _changed(limit: Limit, held: _Held, rate: float) -> tuple[int, int] | None:
    """The new share of a member in thousandths of a request a second, with its burst; None if the one it has may stay."""
    millis = int(min(rate, _MOST_RATE) * 1000)
    if limit.counted and millis * HORIZON_S < 1000:
        millis = 0  # less than one request of what is left
    whole = limit.requests * 1000 / limit.interval_ms
    burst = int(rate / 2) if limit.counted else int(limit.burst * min(1.0, rate / whole))
    burst = min(max(1, burst), _MOST_BURST)
    if held.millis >= 0 and held.millis >= millis / _RAISE and held.millis <= millis:
        return None
    return millis, burst
