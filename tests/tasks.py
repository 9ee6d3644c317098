"""Tasks in tests: one that runs beside a scenario, and waiting for what no event announces."""

from __future__ import annotations

import asyncio
import contextlib
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


async def until(condition: Callable[[], object]) -> None:
    """Wait for what has no event to await; fails after 20 s."""
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen within 20 s")
