"""How long Envoy is asked about the streams that are open in it: its configuration says what it is to speak of, and its logs answer.

Used by agent.streams and agent.distrust, who ask, take the answers, and have Envoy be silent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Final

from agent.l7.peer_log import EVERY_S

ASK_S: Final = 2.0 * EVERY_S + 1
"""How long Envoy is asked: each open stream is spoken of once a `EVERY_S`, late when Envoy is busy."""
LOOK_S: Final = 0.05
PATIENCE_S: Final = 10.0
"""How long Envoy has to hear the question."""


async def rounds(asked: Callable[[], bool]) -> AsyncIterator[bool]:
    """Now and then, until Envoy has had its time to answer: has it heard the question, as `asked` says? Ends if it has not within PATIENCE_S."""
    loop = asyncio.get_running_loop()
    heard, until = False, loop.time() + PATIENCE_S
    while loop.time() < until:
        await asyncio.sleep(LOOK_S)
        if not heard and asked():
            heard, until = True, loop.time() + ASK_S
        yield heard
