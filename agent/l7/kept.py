"""A memory for builders that run again and again with nearly the same inputs. Used by `agent.l7.snapshot`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Kept:
    """Results of pure functions from one turn to the next: what is asked for again with equal inputs is not made again."""

    def __init__(self) -> None:
        self._last: dict[Hashable, tuple[tuple[Any, ...], Any]] = {}
        self._now: dict[Hashable, tuple[tuple[Any, ...], Any]] = {}

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
