"""Puts what other nodes saw of a call into what the caller's node knows of it. Pure, with the time as an argument; one `Joiner` per running trace.

What both ends know of one and the same thing:

- a connection in plaintext: its two addresses and ports;
- an L4 connection in a tunnel: the caller's port, which its CONNECT carries (`agent.l7.tunnel_log`);
- a request: the connection to the backend or, in a tunnel, the backend's address; then X-Request-Id if the application sends one, or else method, path, and
  that the backend's part lies within the caller's, give or take the error of the clocks. Of requests that are alike in all of this any one may be another's.

A connection waits for its other half no longer than `WAIT_S`, and is then shown without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from agent.observation import Clock, Observation
from agent.report import Connection, Hop
from agent.trace import Seen, known

WAIT_S: Final = 0.5
"""Envoy sends its records within 0.05 s; the rest is for the way through the controller."""
_REMEMBERED = 4096
"""Observations: they come from other machines, so there is one bound for all."""
_ALIKE = 512
_SLACK_NS = 5_000_000  # Envoy's clock is read once per turn of its event loop
_SHARED = frozenset({"tunnel", "accept", "handshake"})
"""By the requests of a connection or a tunnel."""
_Key = tuple[str, str]


@dataclass(slots=True, eq=False)
class _Fact:
    observation: Observation
    began_ns: int
    """By the clock of the caller's node."""
    clock: Clock | None
    """None: it is of the caller's node itself."""
    used: bool = False

    @property
    def error_ns(self) -> int:
        """By how much `began_ns` may be wrong."""
        return self.clock.error_ns if self.clock else 0


@dataclass(slots=True, eq=False)
class _Pending:
    seen: Seen
    deadline: float
    done: bool = False


@dataclass(slots=True)
class Joiner:
    """What is not complete yet. `places` says of workloads and addresses on which other node they are, if that node is asked."""

    source: str
    destination: str
    places: dict[str, str]
    clocks: dict[str, Clock]
    _facts: dict[_Key, deque[_Fact]] = field(default_factory=dict)
    _kept: deque[tuple[_Key, _Fact]] = field(default_factory=deque)
    """Oldest first; also those that have been used."""
    _waiting: dict[_Key, list[_Pending]] = field(default_factory=dict)
    _order: deque[_Pending] = field(default_factory=deque)
    _touched: list[_Pending] = field(default_factory=list)
    _denials: deque[tuple[float, _Fact]] = field(default_factory=deque)

    def take(self, found: Seen | Observation, now: float) -> None:
        """Take what came; `now` in seconds, of any clock that does not jump."""
        if isinstance(found, Observation):
            self._observe(found, now)
            return
        pending = _Pending(found, now + WAIT_S if self._expects(found) else now)
        self._order.append(pending)
        self._touched.append(pending)
        for key in _keys(found):
            self._waiting.setdefault(key, []).append(pending)

    def forget(self, node: str) -> None:
        """Wait for a node no more: it is away."""
        self.places = {name: place for name, place in self.places.items() if place != node}
        self._touched.extend(self._order)

    def next_deadline(self) -> float | None:
        """When `finished` has something to say at the latest; None: never."""
        due = ([self._order[0].deadline] if self._order else []) + ([self._denials[0][0]] if self._denials else [])
        return min(due, default=None)

    def finished(self, now: float) -> Iterator[tuple[Seen, Connection]]:
        """What is complete, or has waited long enough."""
        touched, self._touched = self._touched, []
        for pending in touched:
            if not pending.done and (pending.deadline <= now or not self._expects(pending.seen) or self._complete(pending.seen)):
                yield self._finish(pending)
        while self._order and (self._order[0].done or self._order[0].deadline <= now):
            pending = self._order.popleft()
            if not pending.done:
                yield self._finish(pending)
        while self._denials and (self._denials[0][1].used or self._denials[0][0] <= now):
            _, fact = self._denials.popleft()
            if not fact.used:
                fact.used = True
                yield self._alone(fact)

    def _observe(self, found: Observation, now: float) -> None:
        clock = self.clocks.get(found.node)
        fact = _Fact(found, found.began_ns - (clock.ahead_ns if clock else 0), clock)
        key = _key(found)
        facts = self._facts.setdefault(key, deque(maxlen=_ALIKE))
        if found.of == "tunnel" and (
            found.caller or not found.outcome
        ):  # the newest says it all; but requests try a tunnel each, until there is one
            for former in [one for one in facts if one.observation.node == found.node and (found.caller or not one.observation.outcome)]:
                facts.remove(former)
        facts.append(fact)
        self._kept.append((key, fact))
        while len(self._kept) > _REMEMBERED:
            self._drop(*self._kept.popleft())
        if found.of == "denied":
            self._denials.append((now + WAIT_S, fact))
        alone = found.of in {"request", "handshake"} and not found.request_id
        self._touched.extend(one for one in self._waiting.get(key, ()) if not alone or _within(fact, one.seen))

    def _drop(self, key: _Key, fact: _Fact) -> None:
        facts = self._facts.get(key, deque())
        with contextlib.suppress(ValueError):  # it is gone already
            facts.remove(fact)
        if not facts:
            self._facts.pop(key, None)

    def _expects(self, seen: Seen) -> bool:
        if seen.tunnelled and (not seen.request or _failed(seen)):
            return True  # at least what this node's end of the tunnel says: of a request, why there was none
        return bool(seen.caller or seen.tunnelled) and (seen.workload in self.places or _address(seen.target) in self.places)

    def _complete(self, seen: Seen) -> bool:
        facts = self._of(seen)
        kinds = {fact.observation.of for fact in facts}
        if seen.request:
            return "handshake" in kinds or ("request" in kinds and (not seen.tunnelled or "tunnel" in kinds))
        if "denied" in kinds:
            return True
        if not seen.tunnelled:
            return kinds >= {"accept", "close"}
        ended = [fact.observation for fact in facts if fact.observation.of == "tunnel" and fact.observation.ended]
        near = [one for one in ended if one.node not in self.clocks]
        return bool(near) and ("handshake" in kinds or any(one.node in self.clocks for one in ended) or seen.workload not in self.places)

    def _of(self, seen: Seen) -> list[_Fact]:
        """What was observed of this, oldest first."""
        found: list[_Fact] = []
        for key in _keys(seen):
            facts = [fact for fact in self._facts.get(key, ()) if not fact.used]
            if key[0] == "request":
                found += _best(seen, facts)
            elif key[0] == "handshake":
                found += [fact for fact in facts if _failed(seen) and _same_place(fact, seen) and _within(fact, seen)][-1:]
            elif key[0] == "tunnel":  # shared by requests: it began before, but one that failed is of this one alone
                found += [fact for fact in facts if not fact.observation.outcome or _within(fact, seen)]
            else:
                found += [
                    fact for fact in facts if fact.began_ns + fact.observation.duration_ns >= seen.began_ns - fact.error_ns - _SLACK_NS
                ]
        return found

    def _finish(self, pending: _Pending) -> tuple[Seen, Connection]:
        pending.done = True
        seen = pending.seen
        for key in _keys(seen):
            waiting = self._waiting.get(key, [])
            if pending in waiting:
                waiting.remove(pending)
            if not waiting:
                self._waiting.pop(key, None)
        facts = self._of(seen)
        for fact in facts:
            fact.used = fact.observation.of not in _SHARED or not seen.request
            if fact.used:
                self._drop(_key(fact.observation), fact)
        return seen, _joined(seen, facts)

    def _alone(self, fact: _Fact) -> tuple[Seen, Connection]:
        """A refusal that no connection of the caller explains: a datagram, or a caller that its node does not watch."""
        observation = fact.observation
        connection = Connection(
            source=self.source,
            destination=self.destination,
            hops=observation.hops,
            outcome=observation.outcome,
            rule=observation.rule,
            next_step=observation.next_step,
            began_ns=fact.began_ns,
            clock_error_ns=fact.error_ns,
        )
        return Seen(connection, fact.began_ns, fact.began_ns), connection


def _key(found: Observation) -> _Key:
    if found.of == "request":
        return "request", f"{found.caller} {found.target}"
    if found.of == "handshake":
        return "handshake", ""
    return ("caller", found.caller) if found.caller else ("tunnel", found.target)


def _keys(seen: Seen) -> Iterator[_Key]:
    if seen.tunnelled:
        yield "handshake", ""
    if seen.request:
        yield "request", f"{seen.caller} {seen.target}"
        yield ("tunnel", seen.target) if seen.tunnelled else ("caller", seen.caller)
    elif seen.caller:
        yield "caller", seen.caller


def _best(seen: Seen, facts: Iterable[_Fact]) -> list[_Fact]:
    """The one that is this request's other half, if there is one."""
    record = seen.record
    if record is None:
        return []
    known_by_id = [fact for fact in facts if record.request_id and fact.observation.request_id == record.request_id]
    if known_by_id:
        return known_by_id[:1]
    within = [fact for fact in facts if fact.observation.method == record.method and _within(fact, seen)]
    same = [fact for fact in within if fact.observation.path == record.path]
    return same[:1] or (within if len(within) == 1 else [])  # a route may have changed the path


def _failed(seen: Seen) -> bool:
    return seen.record is None or not 0 < seen.record.response_code < 500


def _same_place(fact: _Fact, seen: Seen) -> bool:
    return seen.workload == fact.observation.workload or (bool(seen.target) and _address(seen.target) == _address(fact.observation.target))


def _within(fact: _Fact, seen: Seen) -> bool:
    slack = fact.error_ns + _SLACK_NS
    return seen.began_ns - slack <= fact.began_ns and fact.began_ns + fact.observation.duration_ns <= seen.ended_ns + slack


def _address(endpoint: str) -> str:
    return endpoint.rpartition(":")[0].strip("[]")


def _joined(seen: Seen, facts: list[_Fact]) -> Connection:
    connection = dataclasses.replace(seen.connection, began_ns=seen.began_ns)
    if not facts:
        return connection
    hops: list[Hop] = []
    for fact in sorted(facts, key=lambda one: (one.clock is not None, one.observation.of != "tunnel", one.began_ns)):
        for hop in fact.observation.hops:
            after = max(0, fact.began_ns - seen.began_ns) if fact.clock else 0
            same = next((i for i, one in enumerate(hops) if (one.at, one.node) == (hop.at, hop.node)), None)
            if same is None:
                hops.append(Hop(hop.at, hop.node, hop.duration_ns, {**hop.detail, **known(afterNs=after)}))
            else:  # the request in a tunnel: what the tunnel says of it, and what authorization does
                hops[same] = Hop(hop.at, hop.node, hop.duration_ns, {**hops[same].detail, **hop.detail, **known(afterNs=after)})
    told = [fact for fact in facts if fact.observation.outcome or fact.observation.next_step]
    if told:  # the receiver knows why better than the caller's end of the tunnel
        decisive = max(
            told, key=lambda one: (bool(one.observation.rule), bool(one.observation.next_step), one.clock is not None)
        ).observation
        connection = dataclasses.replace(
            connection,
            outcome=decisive.outcome if decisive.outcome and not seen.request else connection.outcome,
            rule=decisive.rule or connection.rule,
            next_step=decisive.next_step or connection.next_step,
        )
    errors = [fact.clock.error_ns for fact in facts if fact.clock]
    return dataclasses.replace(
        connection, hops=(*connection.hops[:-1], *hops, *connection.hops[-1:]), clock_error_ns=max(errors, default=None)
    )
