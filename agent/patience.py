"""Waiting for something, but not for ever. Used by whoever runs as a task that others cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

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
