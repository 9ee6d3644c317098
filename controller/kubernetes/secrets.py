"""Secrets of the API server, one by one: those that Gateways name and may use, and no others. Used by `controller.kubernetes.source`.

Each is listed and watched alone, by its name, so that the controller needs rights to these and to nothing else: RBAC lets `resourceNames` list and watch what
asks for one name (https://kubernetes.io/docs/reference/access-authn-authz/rbac/#referring-to-resources). The kubelet follows the Secrets of its pods in the
same way. What they hold stays in this process: it is in no log, no status and no ControllerState.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Collection
from typing import Final

from controller.errors import Problem
from controller.kubernetes.api import Api
from controller.kubernetes.reflector import Reflector
from controller.kubernetes.shapes import ORIGIN, Seen, secret_kind
from controller.objects import Key

MOST: Final = 500
"""Followed at one time, each with a watch of its own."""
PATIENCE_S: Final = 20.0
"""How long after its first failure one that was never read is waited for: one that the API server cannot decrypt closes its listener, and nothing else."""


class Secrets:
    """See the module. Belongs to the event loop, but for `seen`, `answered` and `problem`, which any thread may ask."""

    def __init__(self, api: Api, changed: Callable[[], None]) -> None:
        """`changed` is called after every change of what `seen`, `answered` or `problem` say."""
        self._api, self._changed = api, changed
        self._following: dict[Key, tuple[Reflector, asyncio.Task[None]]] = {}
        self._left_out: frozenset[Key] = frozenset()
        self._failing: dict[Key, asyncio.TimerHandle] = {}
        """Those that were asked for in vain, and the end of the patience with them."""
        self._given_up: set[Key] = set()

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """What runs now, and is never to end by itself."""
        return {task for _, task in self._following.values()}

    async def want(self, keys: Collection[Key]) -> None:
        """Follow these from now on, and forget the others; those that are followed stay before others come."""
        gone = [self._forget(key) for key in self._following.keys() - set(keys)]
        new = sorted(set(keys) - self._following.keys())
        room = MOST - len(self._following)
        for key in new[:room]:
            reflector = Reflector(self._api, secret_kind(key), functools.partial(self._heard, key))
            self._following[key] = reflector, asyncio.create_task(reflector.run(), name=f"follow {key}")
        left_out = frozenset(new[room:])
        if left_out != self._left_out:
            self._left_out = left_out
            self._changed()
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)

    def _forget(self, key: Key) -> asyncio.Task[None]:
        if (timer := self._failing.pop(key, None)) is not None:
            timer.cancel()
        self._given_up.discard(key)
        return self._following.pop(key)[1]

    def _heard(self, key: Key) -> None:
        """Something is new of it: after the first failure time runs."""
        if key in self._following and key not in self._failing and not self.answered(key) and self._following[key][0].problem is not None:
            self._failing[key] = asyncio.get_running_loop().call_later(PATIENCE_S, self._give_up, key)
        self._changed()

    def _give_up(self, key: Key) -> None:
        self._given_up.add(key)
        self._changed()

    async def close(self) -> None:
        """Follow nothing any more."""
        await self.want(())

    def answered(self, key: Key) -> bool:
        """Has the API server said what there is of it, or that it does not say? One that has failed for long counts as answered."""
        if key in self._left_out or key in self._given_up:
            return True
        found = self._following.get(key)
        return found is not None and (found[0].synced or found[0].denied)

    def withheld(self, key: Key) -> bool:
        """Is it not for the controller to read, or was it never read? One that was read is as it was, though nothing newer is known of it."""
        found = self._following.get(key)
        return found is None or found[0].denied or not found[0].synced

    def seen(self, key: Key) -> Seen | None:
        """What was last read of it."""
        found = self._following.get(key)
        return found[0].store.get(key) if found is not None else None

    def problem(self, key: Key) -> Problem | None:
        """Why nothing newer is known of it."""
        if key in self._left_out:
            message = f"is not read: Gateways name more than {MOST} Secrets"
            return Problem(ORIGIN, 0, message, key.kind, key.qualified)
        found = self._following.get(key)
        return found[0].problem if found is not None else None
