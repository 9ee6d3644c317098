"""How the parts of the daemon live and die together."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from agent.config import Config
from agent.errors import EnvironmentUnfit
from agent.supervisor import Supervisor, run_forever

FOREVER_S = 30.0


async def forever() -> None:
    await asyncio.sleep(FOREVER_S)


async def returns() -> None:
    await asyncio.sleep(0)


async def fails() -> None:
    await asyncio.sleep(0)
    raise EnvironmentUnfit("a part failed")


class Part:
    """A part that notes how it ended."""

    ended = ""

    async def run(self) -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # a part may take its time to clean up
            self.ended = "cancelled"
            raise


def test_a_part_that_returns_is_an_error_and_ends_the_others() -> None:
    other = Part()
    with pytest.raises(RuntimeError, match="part discovery ended, but should run for ever"):
        asyncio.run(run_forever({"other": other.run(), "discovery": returns()}))
    assert other.ended == "cancelled"


def test_a_part_that_fails_ends_the_others_with_its_own_error() -> None:
    other = Part()
    with pytest.raises(EnvironmentUnfit, match="a part failed"):
        asyncio.run(run_forever({"other": other.run(), "envoy": fails()}))
    assert other.ended == "cancelled"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_every_part_and_is_no_error(number: signal.Signals) -> None:
    parts = [Part(), Part()]

    async def scenario() -> None:
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
        await run_forever({str(n): part.run() for n, part in enumerate(parts)})

    asyncio.run(scenario())
    assert [part.ended for part in parts] == ["cancelled"] * 2


def test_a_part_that_does_not_end_cannot_hold_up_the_rest_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    real = asyncio.wait_for
    monkeypatch.setattr(asyncio, "wait_for", lambda work, _: real(work, 0.2))
    released = asyncio.Event()

    async def stubborn() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            await released.wait()

    async def scenario() -> float:
        started = time.monotonic()
        with pytest.raises(EnvironmentUnfit):
            await run_forever({"stubborn": stubborn(), "envoy": fails()})
        took = time.monotonic() - started
        released.set()
        return took

    assert asyncio.run(scenario()) < 2


def test_an_agent_checks_the_machine_before_it_touches_anything(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(EnvironmentUnfit, match="this needs root"):
        asyncio.run(Supervisor(Config(node="n", controller="unix:x")).run())
