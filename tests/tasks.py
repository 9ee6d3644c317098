"""Tasks in tests: one that runs beside a scenario, and waiting for what no event announces."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """`work` runs as a task within the block, must not end by itself, and is cancelled after it."""
    task = asyncio.create_task(work)
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def run_beside(work: Coroutine[Any, Any, object], scenario: Callable[[], Awaitable[None]]) -> None:
    """Run `scenario` on an event loop of its own while `work` runs there too."""

    async def both() -> None:
        async with beside(work):
            await scenario()

    asyncio.run(both())


async def until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    """Wait for what has no event to await; AssertionError if it does not come true in time."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not true within {limit_s} s"
        await asyncio.sleep(0.005)
