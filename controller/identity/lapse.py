"""When a time has really passed. Steps that cannot be taken back (forgetting a revocation, dropping a root) wait for this, so that a clock which
jumps ahead for a moment undoes nothing. Used by the certificate authority's maintenance."""

from __future__ import annotations

from collections.abc import Callable, Hashable

Clock = Callable[[], float]


class Lapse:
    """Believes that a time has passed once the wall clock has said so for `hold_s` of the monotonic clock without a break."""

    def __init__(self, clock: Clock, monotonic: Clock, hold_s: float) -> None:
        self._clock, self._monotonic, self._hold_s = clock, monotonic, hold_s
        self._since: dict[Hashable, float] = {}

    def passed(self, what: Hashable, at: float) -> bool:
        """True once `at` (Unix seconds) has passed for `what`; ask again and again."""
        if self._clock() < at:
            self._since.pop(what, None)
            return False
        now = self._monotonic()
        return now - self._since.setdefault(what, now) >= self._hold_s

    def forget(self, what: Hashable) -> None:
        """Stop watching `what`."""
        self._since.pop(what, None)
