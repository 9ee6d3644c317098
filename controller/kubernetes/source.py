"""A Kubernetes API server as the source of objects, in place of a directory: what it says, what is refused, and what stays in force regardless.

Used by `controller.mesh` in the place of `controller.source.Source`, with the same rules: an object that does not validate keeps its last good version, and
what is gone is gone. Nothing is in force before each kind has been listed once: a policy that was not read yet is not a policy that is not there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, Final

from controller.conflicts import resolve
from controller.errors import ControllerError, Problem
from controller.kubernetes.api import Api
from controller.kubernetes.reflector import Reflector
from controller.kubernetes.shapes import Seen, followed
from controller.objects import Key, Object
from controller.source import State

SETTLE_S: Final = 0.02
"""How long after a change more are waited for: a rollout is many."""
REST: Final = 1.0
"""How long after a change was taken in the next one is, in parts of the time that it took: half of the time is left for everything else."""


class KubernetesSource:
    """See the module. `run` and `follow` belong to the event loop; `load` may run in a thread beside them."""

    def __init__(self, api: Api) -> None:
        self.state = State()
        self.unsettled = False
        self.reflectors = {kind.kind: Reflector(api, kind, self._changed) for kind in followed()}
        self._api = api
        self._news = asyncio.Event()

    @property
    def where(self) -> str:
        """What objects come from, for people."""
        return f"the API server {self._api.url}"

    @property
    def ready(self) -> bool:
        """Has each kind been listed once?"""
        return all(one.synced for one in self.reflectors.values())

    def _changed(self) -> None:
        self._news.set()

    def start(self) -> State:
        """Nothing is known yet."""
        return self.state

    async def follow(self) -> AsyncIterator[None]:
        """Follow the API server for ever; yields when `load` has something new to say."""
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(one.run(), name=f"follow {name}") for name, one in self.reflectors.items()]
        news: asyncio.Task[Any] | None = None
        try:
            while True:
                news = asyncio.create_task(self._news.wait())
                done, _ = await asyncio.wait({*tasks, news}, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {news}:
                    task.result()
                    raise ControllerError(f"task {task.get_name()!r} ended by itself: this is a bug, please report it")
                await asyncio.sleep(SETTLE_S)
                self._news.clear()
                began = loop.time()
                yield
                await asyncio.sleep(REST * (loop.time() - began))
        finally:
            for task in [*tasks, *([news] if news else [])]:
                task.cancel()
            await asyncio.gather(*tasks, *([news] if news else []), return_exceptions=True)

    async def close(self) -> None:
        """Give up the connection."""
        await self._api.close()

    def load(self) -> State:
        """Return the state that follows from what has been read; before each kind has been listed, what is wrong and nothing else."""
        if not self.ready:
            self.state = State(problems=tuple(sorted(one.problem for one in self.reflectors.values() if one.problem is not None)))
            return self.state
        in_force = self.state.objects
        candidates: list[Object] = []
        refused: dict[Key, list[Problem]] = {}
        problems: list[Problem] = []
        for reflector in self.reflectors.values():
            if reflector.problem is not None:
                problems.append(reflector.problem)
            for key, seen in reflector.store.copy().items():
                if seen.problems:
                    refused[key] = list(seen.problems)
                    problems += seen.problems
                if (item := seen.object or (in_force.get(key) if seen.problems else None)) is not None:
                    candidates.append(item)
        objects, conflicts = resolve(_one_owner_each(candidates), in_force)
        for key, problem in conflicts.items():
            refused.setdefault(key, []).append(problem)
            problems.append(problem)
        self.state = State(objects, {key: tuple(items) for key, items in refused.items()}, tuple(sorted(set(problems))))
        return self.state

    def seen(self, key: Key) -> Seen | None:
        """What was last read of an object."""
        reflector = self.reflectors.get(key.kind)
        return reflector.store.get(key) if reflector is not None else None

    def absent(self) -> list[str]:
        """Kinds that the API server does not know."""
        return [name for name, one in self.reflectors.items() if one.absent]


def _one_owner_each(candidates: list[Object]) -> list[Object]:
    """Leave each address to one pod: while the end of the last one that had it has not been told, two pods have it.

    The newest that does not terminate has it. Pods with the host's network have their node's address, all of them.
    """
    owners: dict[str, tuple[tuple[bool, str, str], Key]] = {}
    pods = [item for item in candidates if item.key.kind == "Pod" and not item.spec.get("hostNetwork")]
    for item in pods:
        rank = (not item.spec.get("terminating", False), str(item.metadata.get("creationTimestamp", "")), item.spec["podUid"])
        for address in item.spec["addresses"]:
            if address not in owners or rank > owners[address][0]:
                owners[address] = (rank, item.key)
    lost = {item.key for item in pods if any(owners[address][1] != item.key for address in item.spec["addresses"])}
    if not lost:
        return candidates
    return [_without(item, owners) if item.key in lost else item for item in candidates]


def _without(item: Object, owners: Mapping[str, tuple[Any, Key]]) -> Object:
    kept = [address for address in item.spec["addresses"] if owners[address][1] == item.key]
    return replace(item, data={**item.data, "spec": {**item.spec, "addresses": kept}})
