"""Waiting for something, but not for ever."""

from __future__ import annotations

import asyncio

import pytest

from agent.patience import Backoff, within


def test_what_comes_in_time_is_returned_and_what_does_not_is_cancelled() -> None:
    async def scenario() -> None:
        assert await within(asyncio.sleep(0, "there"), 5) == "there"
        never = asyncio.get_running_loop().create_future()
        with pytest.raises(asyncio.TimeoutError):
            await within(never, 0.01)
        assert never.cancelled()

    asyncio.run(scenario())


def test_what_fails_fails_here() -> None:
    async def fails() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        asyncio.run(within(fails(), 5))


def test_who_is_cancelled_ends_also_in_the_moment_in_which_it_has_waited_long_enough() -> None:
    async def scenario() -> None:
        news = asyncio.Event()

        async def forever() -> None:
            while True:
                await within(news.wait(), 5)
                news.clear()

        task = asyncio.create_task(forever())
        await asyncio.sleep(0.01)
        news.set()
        await asyncio.sleep(0)  # what was waited for is done, and who waited does not run yet
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled()

    asyncio.run(scenario())


@pytest.mark.parametrize("random", [0.0, 1.0])
def test_pauses_double_up_to_a_limit_and_begin_anew(random: float) -> None:
    backoff = Backoff(1, 5, lambda: random)
    whole = 0.5 + random / 2
    assert [backoff.pause() for _ in range(5)] == [whole * n for n in (1, 2, 4, 5, 5)]
    backoff.reset()
    assert backoff.pause() == whole
