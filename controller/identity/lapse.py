"""When a time has really passed. Steps that cannot be taken back (forgetting a revocation, dropping a root) wait for this, so that a clock which
jumps ahead for a moment undoes nothing. Used by the certificate authority's maintenance."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

Clock = Callable[[], float]
UNASKED_S: Final = 3600.0
"""After so long nobody is going to ask any more: another controller has forgotten it, for instance. Who does asks every minute."""


class Lapse:
    """Believes that a time has passed once the wall clock has said so for `hold_s` of the monotonic clock without a break."""

    def __init__(self, clock: Clock, monotonic: Clock, hold_s: float) -> None:
        self._clock, self._monotonic, self._hold_s = clock, monotonic, hold_s
        self._since: dict[Hashable, tuple[float, float]] = {}
        """Since when a time has passed, and when it was asked for last; of the monotonic clock."""
        self._swept = monotonic()

    def passed(self, what: Hashable, at: float) -> bool:
        """True once `at` (Unix seconds) has passed for `what`; ask again and again, within UNASKED_S."""
        if self._clock() < at:
            self._since.pop(what, None)
            return False
        now = self._monotonic()
        since, _ = self._since.get(what, (now, now))
        self._since[what] = since, now
        if now - self._swept >= UNASKED_S:
            self._swept = now
            for other, (_, asked) in list(self._since.items()):  # in one step: other threads ask meanwhile
                if now - asked >= UNASKED_S:
                    self._since.pop(other, None)
        return now - since >= self._hold_s

    def forget(self, what: Hashable) -> None:
        """Stop watching `what`."""
        self._since.pop(what, None)
