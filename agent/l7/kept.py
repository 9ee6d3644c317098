"""A memory for builders that run again and again with nearly the same inputs. Used by `agent.l7.snapshot`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

T = TypeVar("T")


_LEAST = 1000


class Kept:
    """Results of pure functions from one turn to the next: what is asked for again with equal inputs is not made again."""

    def __init__(self) -> None:
        self._last: dict[Hashable, tuple[tuple[Any, ...], Any]] = {}
        self._now: dict[Hashable, tuple[tuple[Any, ...], Any]] = {}
        self._room = _LEAST

    def __call__(self, place: Hashable, make: Callable[..., T], *inputs: Any) -> T:
        """What `make` returns for these inputs. It depends on nothing else, and at one place it is always the same function."""
        found = self._now.get(place) or self._last.get(place)
        if found is None or found[0] != inputs:
            found = (inputs, make(*inputs))
        self._now[place] = found
        return cast("T", found[1])

    def turn(self) -> None:
        """Forget what was not asked for since the last turn."""
        self._last, self._now = self._now, {}

    def turn_if_large(self) -> None:
        """Begin a turn when as much was asked for in this one as is worth it: for who does not know when it has asked for everything."""
        if len(self._now) > self._room:
            self.turn()
            self._room = max(_LEAST, 2 * len(self._last))
