"""Waiting for something, but not for ever, and for the first of several. Used by whoever runs as a task that others cancel."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def within(awaitable: Awaitable[_T], seconds: float) -> _T:
    """Return what comes of `awaitable`. Raises asyncio.TimeoutError, after it was cancelled, if nothing does within `seconds`.

    As asyncio.wait_for, whose caller is not cancelled before Python 3.12 if that happens in the moment in which the awaitable is done: its loop went on,
    and whoever waited for its end did so for ever (https://github.com/python/cpython/issues/86296).
    """
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if task.done():
            return task.result()
        raise asyncio.TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until_one_ends(*work: Coroutine[Any, Any, object]) -> None:
    """Run all until one ends, then cancel the others; what the first one raised is raised.

    Also for one alone that makes a call of grpc.aio: whoever waits for this and is cancelled ends, whatever becomes of the work. A call that ends just then
    takes a cancellation of whoever reads from it for its own (grpc.aio, StreamStreamCall._prepare_rpc), and who tries again after that never ends.
    """
    tasks = [asyncio.create_task(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        if not task.cancelled():
            task.result()


class Backoff:
    """Pauses that double, from `first` seconds to at most `longest`, shortened at random by up to a half so that many do not try again together."""

    def __init__(self, first: float, longest: float, jitter: Callable[[], float] = random.random) -> None:
        """`jitter`: 0 to 1."""
        self._first, self._longest, self._jitter = first, longest, jitter
        self._next = first

    def pause(self) -> float:
        """The next pause, seconds."""
        pause, self._next = self._next, min(self._next * 2, self._longest)
        return pause * (0.5 + self._jitter() / 2)

    def reset(self) -> None:
        """It worked: the next failure is the first."""
        self._next = self._first
