"""The store that several controllers share, and what happens without it. Keys and their types:

`meshagent:quota:demand:LIMIT`: hash, "NODE CALLER" -> "DEMAND END" (requests a second; end in Unix seconds by Redis' own clock);
`meshagent:quota:used:LIMIT:WINDOW`: hash, CALLER -> requests. Both expire by themselves. One exchange is one transaction (MULTI), two round trips.
The address is never logged: it may hold a password (https://redis.io/docs/latest/develop/clients/redis-py/connect/).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from controller import metrics
from controller.errors import ControllerError
from controller.quota.store import EXPIRY_S, Member, Memory, News, State

_log = logging.getLogger(__name__)

PATIENCE_S: Final = 1.0
RETRY_S: Final = 2.0
KEPT_S: Final = 2 * 24 * 3600
"""Longer than any interval."""
_DEMAND: Final = "meshagent:quota:demand:"
_USED: Final = "meshagent:quota:used:"
_SCHEMES: Final = ("redis", "rediss", "unix")


def client(url: str) -> Redis:
    """Make a client that has not connected yet. Raises ControllerError, which does not show the address, because it may hold a password."""
    if urlsplit(url).scheme not in _SCHEMES:
        raise ControllerError(f"--quota-redis must begin with {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
    try:
        return Redis.from_url(
            url,
            socket_timeout=PATIENCE_S,
            socket_connect_timeout=PATIENCE_S,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            health_check_interval=0,
        )
    except (ValueError, RedisError) as error:
        raise ControllerError("--quota-redis is no address that redis-py understands: redis[s]://[USER:PASSWORD@]HOST:PORT/DB") from error


class Shared:
    """A store in Redis. Raises RedisError or OSError while it is away."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def exchange(self, news: Sequence[News], windows: Mapping[str, int]) -> dict[str, State]:
        """See `controller.quota.store.Store`."""
        seconds, micros = await self._redis.time()
        now = int(seconds) + int(micros) / 1e6
        async with self._redis.pipeline(transaction=True) as pipe:
            for item in news:
                self._add(pipe, item, now)
            for limit, window in windows.items():
                pipe.hgetall(_DEMAND + limit)
                if window:
                    pipe.hgetall(f"{_USED}{limit}:{window}")
            answers = await pipe.execute()
        return await self._read(iter(answers[-_replies(windows) :] if windows else ()), windows, now)

    @staticmethod
    def _add(pipe: Any, item: News, now: float) -> None:
        name, key = f"{item.member.node} {item.member.caller}", _DEMAND + item.limit
        if item.demand is None:
            pipe.hdel(key, name)
        else:
            pipe.hset(key, name, f"{item.demand!r} {now + EXPIRY_S!r}")
            pipe.expire(key, int(3 * EXPIRY_S))
        if item.used and item.window:
            counts = f"{_USED}{item.limit}:{item.window}"
            pipe.hincrby(counts, item.member.caller, item.used)
            pipe.expire(counts, KEPT_S)

    async def _read(self, answers: Any, windows: Mapping[str, int], now: float) -> dict[str, State]:
        result: dict[str, State] = {}
        old: dict[str, list[bytes]] = {}
        for limit, window in windows.items():
            demands: dict[Member, float] = {}
            for name, value in next(answers).items():
                node, _, caller = name.decode().partition(" ")
                demand, _, end = value.decode().partition(" ")
                if float(end) < now or math.isnan(float(demand)):
                    old.setdefault(limit, []).append(name)
                else:
                    demands[Member(node, caller)] = float(demand)
            counts = next(answers) if window else {}
            result[limit] = State(demands, {caller.decode(): int(count) for caller, count in counts.items()})
        if old:
            async with self._redis.pipeline(transaction=False) as pipe:
                for limit, names in old.items():
                    pipe.hdel(_DEMAND + limit, *names)
                await pipe.execute()
        return result

    async def close(self) -> None:
        """End the connections."""
        await self._redis.aclose()


def _replies(windows: Mapping[str, int]) -> int:
    return sum(2 if window else 1 for window in windows.values())


class WithFallback:
    """The shared store; while that is away, memory, which begins with what was last known. What was used meanwhile is added when it is back."""

    def __init__(self, shared: Shared, memory: Memory, clock: Callable[[], float] = time.monotonic) -> None:
        self._shared = shared
        self._memory = memory
        self._clock = clock
        self._again = 0.0
        self._owed: dict[tuple[str, int, Member], int] = {}
        self._away = False

    async def exchange(self, news: Sequence[News], windows: Mapping[str, int]) -> dict[str, State]:
        """See `controller.quota.store.Store`."""
        if self._clock() >= self._again:
            owed = [News(limit, member, None, used, window) for (limit, window, member), used in self._owed.items()]
            try:
                states = await asyncio.wait_for(self._shared.exchange([*owed, *news], windows), 2 * PATIENCE_S)
            except (RedisError, OSError, asyncio.TimeoutError, ValueError) as error:
                self._lost(error)
            else:
                self._found()
                self._memory.adopt(states, windows)
                return states
        for item in news:
            if item.used and item.window:
                key = (item.limit, item.window, item.member)
                self._owed[key] = self._owed.get(key, 0) + item.used
        return await self._memory.exchange(news, windows)

    def _lost(self, error: Exception) -> None:
        self._again = self._clock() + RETRY_S
        metrics.QUOTA_REDIS.set(0)
        if not self._away:
            self._away = True
            _log.error(
                "Redis is away: this controller shares global limits out by itself, each controller the whole; see that it runs and is reachable",
                extra={"error": type(error).__name__},
            )

    def _found(self) -> None:
        self._owed.clear()
        metrics.QUOTA_REDIS.set(1)
        if self._away:
            self._away = False
            _log.info("Redis is back: global limits are shared with other controllers again")

    async def close(self) -> None:
        """Keep what memory has, end the connections."""
        await self._memory.close()
        await self._shared.close()
