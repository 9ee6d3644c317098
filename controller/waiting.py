"""Waiting for an event, but not for ever. Used by whoever runs as a task that others cancel."""

from __future__ import annotations

import asyncio


async def heard(event: asyncio.Event, seconds: float) -> bool:
    """Wait until `event` is set, at most `seconds`; return whether it is.

    Not asyncio.wait_for, which before Python 3.12 loses a cancellation that comes as the event does (https://github.com/python/cpython/issues/86296).
    """
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        waiting.cancel()
    return event.is_set()
