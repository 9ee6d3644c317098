"""Waiting for something, but not for ever."""

from __future__ import annotations

import asyncio

import pytest

from agent.patience import Backoff, until_one_ends, within


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


@pytest.mark.parametrize("by", ["an-end", "a-failure", "the-outside"])
def test_when_one_of_several_ends_the_others_are_cancelled_and_have_ended(by: str) -> None:
    async def scenario() -> None:
        ended: list[str] = []

        async def last() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append("last")

        async def first() -> None:
            if by == "the-outside":
                await asyncio.Event().wait()
            await asyncio.sleep(0.01)
            if by == "a-failure":
                raise ValueError("no more")

        running = asyncio.create_task(until_one_ends(first(), last()))
        await asyncio.sleep(0)
        if by == "the-outside":
            await asyncio.sleep(0.01)
            running.cancel()
        (outcome,) = await asyncio.gather(running, return_exceptions=True)
        assert type(outcome) is {"an-end": type(None), "a-failure": ValueError, "the-outside": asyncio.CancelledError}[by]
        assert ended == ["last"]

    asyncio.run(scenario())
