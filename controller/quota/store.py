"""What callers want and have used: in memory, with what is counted through long intervals in a file; `controller.quota.redis` is the same for many controllers.

A store knows no limits and no fairness. Members that are not heard of for a while are forgotten.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from controller.files import write_atomically

_log = logging.getLogger(__name__)

EXPIRY_S: Final = 20.0
"""After this long without a report a caller of a node has no share any more; reports come every 5 s."""
SAVE_S: Final = 2.0
FILE: Final = "quotas.json"


class Member(NamedTuple):
    """A caller on one node."""

    node: str
    caller: str


@dataclass(frozen=True, slots=True)
class News:
    """What a report says of one member. `demand` in requests a second, None: it is gone. `used`: requests to be added to those of the `window`."""

    limit: str
    member: Member
    demand: float | None
    used: int = 0
    window: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """Of one limit: demand by member, and what callers have used in the window."""

    demands: Mapping[Member, float] = field(default_factory=dict)
    used: Mapping[str, int] = field(default_factory=dict)


class Store(Protocol):
    """Keeps members and counts."""

    async def exchange(self, news: Sequence[News], windows: Mapping[str, int]) -> dict[str, State]:
        """Take news in, then return the state of these limits in these windows (0: a rate, nothing is counted)."""

    async def close(self) -> None:
        """Keep what is to be kept."""


class Memory:
    """A store of one controller. `clock` is Unix time, for tests to inject."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        """`path` keeps counts over a restart; up to `SAVE_S` of them are lost if the controller is killed."""
        self._path = path
        self._clock = clock
        self._demands: dict[str, dict[Member, tuple[float, float]]] = defaultdict(dict)
        """Demand and end by member, by limit."""
        self._used: dict[str, tuple[int, dict[str, int]]] = {}
        """Window and counts by caller, by limit."""
        self._unsaved = False
        self._saved_at = 0.0
        self._problem = ""

    def load(self) -> None:
        """Read the file. A damaged one is said and counts for nothing: every caller then has its whole part again."""
        if self._path is None:
            return
        try:
            content = json.loads(self._path.read_bytes())
            self._used = {
                str(limit): (int(window), {str(caller): int(count) for caller, count in counts.items()})
                for limit, (window, counts) in content["used"].items()
            }
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._used = {}
            _log.error(
                "counts of quotas cannot be read: they begin anew; look at the disk", extra={"path": str(self._path), "error": str(error)}
            )

    async def exchange(self, news: Sequence[News], windows: Mapping[str, int]) -> dict[str, State]:
        """See Store."""
        self.take(news)
        await self._save(force=False)
        return {limit: self.state(limit, window) for limit, window in windows.items()}

    async def close(self) -> None:
        """See Store."""
        await self._save(force=True)

    def take(self, news: Iterable[News]) -> None:
        """Take news in."""
        end = self._clock() + EXPIRY_S
        for item in news:
            if item.demand is None:
                self._demands[item.limit].pop(item.member, None)
            else:
                self._demands[item.limit][item.member] = (item.demand, end)
            if item.used and item.window:
                window, counts = self._used.get(item.limit, (0, {}))
                if window < item.window:
                    counts = {}
                    self._used[item.limit] = (item.window, counts)
                if window <= item.window:  # a late report of an interval that is over is nobody's business
                    counts[item.member.caller] = counts.get(item.member.caller, 0) + item.used
                    self._unsaved = True

    def adopt(self, states: Mapping[str, State], windows: Mapping[str, int]) -> None:
        """Hold what another store holds, to go on from there without it."""
        end = self._clock() + EXPIRY_S
        for limit, state in states.items():
            self._demands[limit] = {member: (demand, end) for member, demand in state.demands.items()}
            if windows[limit]:
                self._used[limit] = (windows[limit], dict(state.used))
                self._unsaved = True

    def state(self, limit: str, window: int) -> State:
        """What is held of one limit."""
        now, members = self._clock(), self._demands.get(limit, {})
        for member in [member for member, (_, end) in members.items() if end < now]:
            del members[member]
        held, counts = self._used.get(limit, (0, {}))
        used = dict(counts) if window and held == window else {}
        return State({member: demand for member, (demand, _) in members.items()}, used)

    async def _save(self, *, force: bool) -> None:
        now = self._clock()
        if self._path is None or not self._unsaved or (not force and 0 <= now - self._saved_at < SAVE_S):
            return
        self._saved_at, self._unsaved = now, False
        try:
            await asyncio.to_thread(write_atomically, self._path, json.dumps({"used": self._used}, indent=1) + "\n")
        except OSError as error:
            if str(error) != self._problem:
                _log.error(
                    "counts of quotas cannot be stored; a restart would begin with older ones",
                    extra={"path": str(self._path), "error": str(error)},
                )
            self._unsaved, self._problem = True, str(error)
        else:
            self._problem = ""
