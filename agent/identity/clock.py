"""When a certificate is renewed: at half of its life, give or take, by two clocks, so that a step of one of them does no harm."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

JITTER: Final = 0.05
"""Renewal is due between 0.45 and 0.55 of a life, so that certificates that began together do not end up together."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The clocks; tests have others."""

    wall: Callable[[], float] = time.time
    """Unix seconds. It decides what has expired, as it does for everybody who is shown a certificate; people and NTP set it."""
    boot: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    """Seconds that never step and go on while the machine sleeps (clock_gettime(2))."""
    random: Callable[[], float] = random.random
    """0 to 1."""


@dataclass(frozen=True, slots=True)
class Due:
    """A moment by both clocks: it has come when it has come by one of them."""

    wall: float
    boot: float

    def come(self, clock: Clock) -> bool:
        """True from then on."""
        return clock.wall() >= self.wall or clock.boot() >= self.boot

    def wait_s(self, clock: Clock) -> float:
        """How long until then; 0 if it has come."""
        return max(0.0, min(self.wall - clock.wall(), self.boot - clock.boot()))


def renewal(not_before: float, not_after: float, clock: Clock, *, fresh: bool) -> Due:
    """When a certificate is to be renewed.

    One that has just come: when half of what is left of it is over, because authorities date certificates back, and with a short life more than half of it
    would be over at once. One that was stored: at half of its life. The other clock never waits longer than that is from now, whatever the wall clock says.
    """
    share, now = 0.5 + JITTER * (2 * clock.random() - 1), clock.wall()
    begin = now if fresh and not_before <= now < not_after else not_before
    half = (not_after - begin) * share
    return Due(begin + half, clock.boot() + min(max(begin + half - now, 0.0), half))
