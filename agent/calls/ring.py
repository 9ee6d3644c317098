"""What was called lately, in memory only and bounded. Fed by `agent.calls.part`; belongs to the event loop.

Counts are kept by the minute for an hour. When there are too many rows the one that was not seen for the longest time goes; a pair of caller and receiver
that uses too many paths has them folded (`agent.calls.paths.coarse`), and when those are too many as well there is one row for all other paths.
"""

from __future__ import annotations

import enum
import time
from array import array
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from agent.calls import paths

MINUTES = 60
MOST_ROWS = 10_000
MOST_PATHS = 50
"""Of one pair; as many folded ones come on top, and one for the rest."""


class Outcome(enum.Enum):
    """What became of a call."""

    SERVED = "served"
    DENIED = "denied"  # by an AuthorizationPolicy
    UNAUTHORIZED = "unauthorized"  # 401 or 403 by the receiver, or by a RequestAuthentication
    UNANSWERED = "unanswered"


class Seen(NamedTuple):
    """One kind of call. Names are "NAMESPACE/NAME", "" where they are not known."""

    inbound: bool
    """Seen at the receiver, because nobody knows the caller."""
    source: str
    """Workload."""
    target: str
    """Workload; "" if no endpoint was chosen."""
    service: str
    port: int
    """Of the service if there is one, else that the target listens on; 0 = not known."""
    protocol: str
    """TCP or UDP."""
    outcome: Outcome
    method: str = ""
    path: str = ""
    """A template; "" for connections."""
    dialled: str = ""
    """NAMESPACE/NAME:PORT of the service that a request was for; `service` is the one that its route chose."""

    @property
    def owner(self) -> str:
        """The workload at whose end it was seen."""
        return self.target if self.inbound else self.source


_Pair = tuple[bool, str, str, str, int]


@dataclass(slots=True)
class _Row:
    minute: int
    """Of the newest slot."""
    last_seen: float = 0.0
    slots: array[int] = field(default_factory=lambda: array("Q", bytes(8 * MINUTES)))
    alive: int = 0
    """Connections that live, as of the last look."""

    def turn(self, minute: int) -> None:
        """Empty the slots of the minutes in which nothing came."""
        for passed in range(self.minute + 1, min(minute, self.minute + MINUTES) + 1):
            self.slots[passed % MINUTES] = 0
        self.minute = max(self.minute, minute)

    def sum(self, minutes: int) -> int:
        """Of the last so many minutes, the one that is under way included."""
        end = self.minute % MINUTES + 1
        begin = end - minutes
        return sum(self.slots[begin:end]) if begin >= 0 else sum(self.slots[:end]) + sum(self.slots[begin:])


class Recorded(NamedTuple):
    """A row: how often it was seen in the time that was asked for, and when last, Unix time."""

    seen: Seen
    calls: int
    last_seen: float


class Ring:
    """See the module."""

    def __init__(self, most: int = MOST_ROWS, now: Callable[[], float] = time.time) -> None:
        """`now` is Unix time, seconds."""
        self._most, self._now = most, now
        self._rows: OrderedDict[Seen, _Row] = OrderedDict()
        self._paths: dict[_Pair, Counter[str]] = defaultdict(Counter)
        self.forgotten = 0
        """Rows that went before their hour was over."""

    def add(self, seen: Seen, count: int = 1, alive: int | None = None) -> None:
        """Add calls; `alive` connections live now (None: not known)."""
        now = self._now()
        minute = int(now // 60)
        seen = self._with_room(seen)
        row = self._rows.get(seen)
        if row is None:
            self._expire(now)
            if len(self._rows) >= self._most:
                self._drop()
                self.forgotten += 1
            row = self._rows[seen] = _Row(minute)
            if seen.path:
                self._paths[_pair(seen)][seen.path] += 1
        row.turn(minute)
        row.slots[minute % MINUTES] += count
        row.last_seen = now
        if alive is not None:
            row.alive = alive
        self._rows.move_to_end(seen)

    def still(self, seen: Seen) -> None:
        """Say that no connection of a row lives any more, without that being a call."""
        if (row := self._rows.get(seen)) is not None:
            row.alive = 0

    def read(self, since_s: float) -> Iterator[Recorded]:
        """Rows that were seen in the last `since_s` seconds, at most an hour. Counts are of whole minutes; living connections are counted as well."""
        now = self._now()
        minute = int(now // 60)
        minutes = min(MINUTES, minute - int((now - since_s) // 60) + 1)
        self._expire(now)
        for seen, row in self._rows.items():
            if row.last_seen < now - since_s:
                continue
            row.turn(minute)
            if calls := max(row.sum(minutes), row.alive):
                yield Recorded(seen, calls, row.last_seen)

    def _with_room(self, seen: Seen) -> Seen:
        if not seen.path or seen in self._rows:
            return seen
        known = self._paths.get(_pair(seen))
        if known is None or seen.path in known or len(known) < MOST_PATHS:
            return seen
        folded = paths.coarse(seen.path)
        return seen._replace(path=folded if folded in known or len(known) < 2 * MOST_PATHS else paths.ANY)

    def _expire(self, now: float) -> None:
        while self._rows and next(iter(self._rows.values())).last_seen < now - MINUTES * 60:
            self._drop()

    def _drop(self) -> None:
        seen, _ = self._rows.popitem(last=False)
        if seen.path:
            known = self._paths[_pair(seen)]
            known[seen.path] -= 1
            if not known[seen.path]:
                del known[seen.path]
            if not known:
                del self._paths[_pair(seen)]


def _pair(seen: Seen) -> _Pair:
    return seen.inbound, seen.source, seen.target, seen.service, seen.port
