"""A Kubernetes API server as the source of objects, in place of a directory: what it says, what is refused, and what stays in force regardless.

Used by `controller.mesh` in the place of `controller.source.Source`, with the same rules: an object that does not validate keeps its last good version, and
what is gone is gone. Nothing is in force before each kind has been listed once: a policy that was not read yet is not a policy that is not there. A Gateway is
taken up when the API server has answered about the Secrets that it names: it would close listeners otherwise that only wait for their certificate.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from controller.conflicts import resolve
from controller.documents import path_text
from controller.errors import ControllerError, Problem
from controller.gateways import Grants, wanted_secrets
from controller.kubernetes.api import Api
from controller.kubernetes.lastgood import Kept, LastGood
from controller.kubernetes.pods import Pods
from controller.kubernetes.reflector import Reflector
from controller.kubernetes.secrets import Secrets
from controller.kubernetes.shapes import ORIGIN, Seen, followed
from controller.objects import Key, Object
from controller.source import State

SETTLE_S: Final = 0.02
"""How long after a change more are waited for: a rollout is many."""
_NAMES_SHOWN: Final = 10
_PODS_SHOWN: Final = 3
"""Of those that are wrong in the same way: usually they are of one Deployment."""
_PLAIN: Final = frozenset({"Node", "Pod", "Service", "EndpointSlice"})
"""Kubernetes' own kinds, of which nothing is remembered: an API server that lets nonsense in does not exist, and the mesh's own labels and annotations
on them are as if they were not there where they are nonsense. Namespaces are remembered, because theirs say what is in the mesh, and what is denied."""
REST: Final = 1.0
"""How long after a change was taken in the next one is, in parts of the time that it took: half of the time is left for everything else."""


@dataclass(slots=True)
class _Read:
    """What one look at everything that was read has found, and what of it was in force before."""

    basis: dict[Key, Seen] = field(default_factory=dict)
    whole: dict[Key, Seen] = field(default_factory=dict)
    """Of `basis`, what has been read without fields that last good versions have, with these."""
    candidates: dict[Key, Object] = field(default_factory=dict)
    refused: dict[Key, list[Problem]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    in_force: dict[Key, Object] = field(default_factory=dict)
    kept: Mapping[Key, Kept] = field(default_factory=dict)
    """Last good versions, as they are written."""


class KubernetesSource:
    """See the module. `run` and `follow` belong to the event loop; `load` may run in a thread beside them."""

    def __init__(self, api: Api, namespace: str = "") -> None:
        """`namespace` is the controller's own, for what it has to know after a restart; "": it keeps nothing."""
        self.state = State()
        self.unsettled = False
        self.basis: Mapping[Key, Seen] = {}
        """What `state` follows from, of kinds whose status is written."""
        self._news = asyncio.Event()
        self._others = 0
        """How often something has changed that is no pod."""
        self.reflectors = {kind.kind: Reflector(api, kind, self._changed if kind.kind == "Pod" else self._other) for kind in followed()}
        self.ready = False
        """Has each kind been listed once, and what `state` says been read?"""
        self._reflector = self.reflectors["Pod"]
        self.secrets = Secrets(api, self._other)
        self._wanted: frozenset[Key] = frozenset()
        """Secrets that Gateways name and may use."""
        self.last_good = LastGood(api, namespace, self._restored) if namespace else None
        self._keep: tuple[Mapping[Key, Kept], Mapping[Key, Kept]] = ({}, {})
        """What a restart has to know, and what was written of that when `load` looked: both at once."""
        self._begun = self.last_good is None
        """Are they known, and orphans taken from there?"""
        self._adopted: tuple[Mapping[Key, Kept], frozenset[str]] = ({}, frozenset())
        """Last good versions that orphans were taken from, and kinds that the API server did not know then."""
        self._api = api
        self._pods = Pods()
        self._seen = -1
        """`_others` when everything was looked at last."""

    def _changed(self) -> None:
        self._news.set()

    def _other(self) -> None:
        self._adopt()
        self._others += 1
        self._changed()

    def _restored(self) -> None:
        """Something was read of the last good versions."""
        self._other()
        self._begun = self._begun or (self.last_good is not None and self.last_good.reflector.synced)

    def _adopt(self) -> None:
        """Take orphans from the last good versions until this controller is ready; those that come later are others', but of a kind that the API server does
        not know: nobody can have deleted one since, and a controller that began without the kind has never seen what it would write away."""
        kept_now = self.last_good.kept if self.last_good is not None else {}
        absent = frozenset(name for name, reflector in self.reflectors.items() if reflector.absent)
        (before, absent_before), self._adopted = self._adopted, (kept_now, absent)
        if kept_now is before and absent <= absent_before:
            return
        for key, kept in kept_now.items():
            reflector = self.reflectors.get(key.kind) if kept.orphan else None
            if reflector is not None and (reflector.absent or not self.ready):
                reflector.adopt(kept.as_seen())

    def start(self) -> State:
        """Nothing is known yet."""
        return self.state

    async def follow(self) -> AsyncGenerator[None, None]:
        """Follow the API server for ever; yields when `load` has something new to say."""
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(one.run(), name=f"follow {name}") for name, one in self._followed()]
        news: asyncio.Task[Any] | None = None
        try:
            while True:
                news = asyncio.create_task(self._news.wait())
                done, _ = await asyncio.wait({*tasks, *self.secrets.tasks, news}, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {news}:
                    task.result()
                    raise ControllerError(f"task {task.get_name()!r} ended by itself: this is a bug, please report it")
                await asyncio.sleep(SETTLE_S)
                self._news.clear()
                began = loop.time()
                yield
                await self.secrets.want(self._wanted)
                if self.last_good is not None and self.ready:
                    self.last_good.want(*self._keep)
                await asyncio.sleep(REST * (loop.time() - began))
        finally:
            await self.secrets.close()
            for task in [*tasks, *([news] if news else [])]:
                task.cancel()
            await asyncio.gather(*tasks, *([news] if news else []), return_exceptions=True)

    async def close(self) -> None:
        """Give up the connection."""
        await self._api.close()

    def load(self) -> State:
        """Return the state that follows from what has been read; before each kind has been listed, what is wrong and nothing else."""
        others = self._others  # before anything is looked at: what comes meanwhile is looked at again
        pods = self._reflector.store.copy()
        if (
            self.ready
            and others == self._seen
            and (again := self._pods.again(self.state.objects, pods, self._reflector.problem)) is not None
        ):
            self.state = replace(self.state, objects=again)
            return self.state
        self._seen = -1
        followed = dict(self._followed()).values()
        if not self._begun or not all(one.synced for one in followed):
            self.state = State(problems=tuple(sorted(one.problem for one in followed if one.problem is not None)))
            return self.state
        read = _Read()
        if self.last_good is not None:
            read.kept = self.last_good.kept
            read.problems += [one for one in (self.last_good.problem, self.last_good.reflector.problem) if one is not None]
        spaces = self.reflectors["Namespace"].store.copy()
        for name, reflector in self.reflectors.items():
            read.problems += [problem for problem in (reflector.problem, reflector.definition.problem) if problem is not None]
            store = pods if name == "Pod" else reflector.store.copy()
            if name in _PLAIN:  # thousands, of which there is nothing to remember
                read.candidates |= {key: seen.object for key, seen in store.items() if seen.object is not None}
                store = {key: seen for key, seen in store.items() if seen.problems}
            read.basis |= store
            for seen in store.values():
                if not seen.orphan or Key("Namespace", "", seen.key.namespace) in spaces:
                    self._take(read, seen)
            reflector.lossy = any(key in read.whole for key in store)
        read.problems += _of_pods(seen for key, seen in read.basis.items() if key.kind == "Pod")
        waiting = self._take_secrets(read)
        if waiting and not self.ready:
            self.state = State(problems=tuple(sorted(set(read.problems))))
            return self.state
        candidates, contested = _one_owner_each(list(read.candidates.values()))
        read.problems += contested
        objects, conflicts = resolve(candidates, read.in_force, oldest_first=True)
        for key, problem in conflicts.items():
            read.refused.setdefault(key, []).append(problem)
            read.problems.append(problem)
        self.basis, self.ready, self._keep = read.basis, True, (_kept(objects, read.basis | read.whole), read.kept)
        self.state = State(objects, {key: tuple(items) for key, items in read.refused.items()}, tuple(sorted(set(read.problems))))
        self._pods, self._seen = Pods(pods, self._reflector.problem, [*read.candidates.values(), *objects.values()]), others
        return self.state

    def _followed(self) -> list[tuple[str, Reflector]]:
        return [*self.reflectors.items(), *([("last good versions", self.last_good.reflector)] if self.last_good is not None else [])]

    def _take(self, read: _Read, seen: Seen) -> None:
        """Take one object as it was read, or if it is refused its last good version."""
        key, held = seen.key, self.state.objects.get(seen.key)
        kept = read.kept.get(key)
        if kept is not None and kept.uid == seen.uid:
            read.in_force[key] = kept.object
            seen = seen.without_loss(kept.as_seen())
            if seen.pruned:
                read.whole[key] = seen
        # Nobody inherits from an object that had its name before; and what a pod was is never what it is.
        if held is not None and key.kind not in _PLAIN and (before := self.basis.get(key)) is not None and before.uid == seen.uid:
            if not before.problems or held is not before.object:  # else it was never whole, and a kept version is
                read.in_force[key] = held
            else:
                read.in_force.setdefault(key, held)
        problems = [*seen.problems, *([_orphaned(key)] if seen.orphan else [])]
        if problems:
            read.refused[key] = problems
            read.problems += problems if key.kind != "Pod" or seen.object is None else []
        before_it = read.in_force.get(key) if seen.problems else None
        item = seen.object or before_it
        if seen.object is not None and before_it is not None:
            item = _as_it_was(seen.object, before_it, {problem.field for problem in seen.problems})
        if item is not None:
            read.candidates[key] = item

    def _take_secrets(self, read: _Read) -> bool:
        """Take the Secrets of Gateways. Return whether there is a Gateway that waits for an answer about one; it stays as it was, or away."""
        grants = Grants(item for key, item in read.candidates.items() if key.kind == "ReferenceGrant")
        wanted: set[Key] = set()
        waiting = False
        for key, gateway in [(key, item) for key, item in read.candidates.items() if key.kind == "Gateway"]:
            named = wanted_secrets(gateway, grants)
            wanted |= named
            if all(map(self.secrets.answered, named)):
                continue
            waiting = True
            if (before := read.in_force.get(key)) is None:
                del read.candidates[key]
            else:
                read.candidates[key] = before
                read.basis[key] = self.basis.get(key, read.basis[key])  # none at the start: it is in force as another controller had it
                wanted |= wanted_secrets(before, grants)
        for key in sorted(wanted):
            if (problem := self.secrets.problem(key)) is not None:
                read.problems.append(problem)
                if self.secrets.withheld(key):
                    read.refused[key] = [problem]
            if (seen := self.secrets.seen(key)) is not None:
                read.basis[key] = seen
                self._take(read, seen)
        self._wanted = frozenset(wanted)
        return waiting

    def seen(self, key: Key) -> Seen | None:
        """What was last read of an object."""
        reflector = self.reflectors.get(key.kind)
        return reflector.store.get(key) if reflector is not None else None


def _as_it_was(made: Object, before: Object, wrong: Container[str]) -> Object:
    """The object with what it said `before` in place of each label and annotation that is nonsense now. Everything else is as it was read."""
    metadata = dict(made.metadata)
    for where, known in (("labels", before.labels), ("annotations", before.annotations)):
        again = {name: value for name, value in known.items() if path_text(("metadata", where, name)) in wrong}
        if again:
            metadata[where] = {**metadata.get(where, {}), **again}
    data = {**made.data, "metadata": metadata}
    return made if data == made.data else before if data == before.data else Object(made.key, data, made.file, made.line)


def _of_pods(found: Iterable[Seen]) -> list[Problem]:
    """Of pods that are in force with a label that is nonsense: one problem for all of a namespace, whatever they say instead and however many they are."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for seen in found:
        for one in seen.problems if seen.object is not None else ():
            rule, _, value = one.message.partition(", not ")
            alike.setdefault((seen.key.namespace, one.field, rule), []).append(f"{seen.key.name} has {value}" if value else seen.key.name)
    problems = []
    for (space, path, rule), pods in alike.items():
        message = f"{rule}; it is as if it were not there, and the Namespace decides"
        more = f" and {len(pods) - _PODS_SHOWN} more" if len(pods) > _PODS_SHOWN else ""
        problems.append(Problem(ORIGIN, 0, message, "Pod", space, path, f"{', '.join(sorted(pods)[:_PODS_SHOWN])}{more}"))
    return problems


def _kept(objects: Mapping[Key, Object], basis: Mapping[Key, Seen]) -> dict[Key, Kept]:
    """What of `objects` the API server would not give again; of Secrets nothing is kept."""
    found = {}
    for key, item in objects.items():
        seen = basis.get(key)
        if seen is not None and key.kind not in {"Secret", *_PLAIN} and (seen.orphan or seen.pruned or seen.object is not item):
            found[key] = Kept(item, seen.uid, seen.orphan, seen.generation if seen.pruned else 0)
    return found


def _orphaned(key: Key) -> Problem:
    message = (
        "is not there any more, because the CustomResourceDefinition of its kind was deleted and took all objects with it: it stays in force; "
        "apply the definition and the object again, and if it is to go, delete it then"
    )
    return Problem(ORIGIN, 0, message, key.kind, key.qualified)


def _one_owner_each(candidates: list[Object]) -> tuple[list[Object], list[Problem]]:
    """Leave each address to one pod: while the end of the last one that had it has not been told, two pods have it.

    One that terminates gives way. Of several others nobody can say who has it now, so that none of them has. Pods with the host's network have their node's
    address, all of them.
    """
    owners: dict[str, list[Object]] = {}
    pods = [item for item in candidates if item.key.kind == "Pod" and not item.spec.get("hostNetwork")]
    for item in pods:
        for address in item.spec["addresses"]:
            owners.setdefault(address, []).append(item)
    shared = {address: items for address, items in owners.items() if len(items) > 1}
    if not shared:
        return candidates, []
    lost: dict[Key, set[str]] = {}
    problems = []
    for address, items in shared.items():
        alive = [item for item in items if not item.spec.get("terminating")]
        if len(alive) != 1:
            names = ", ".join(sorted(item.key.qualified for item in items)[:_NAMES_SHOWN])
            message = f"{address} is said to be the address of {names}: none of them has it until the API server says whose it is"
            problems.append(items[0].problem(("status", "podIPs"), message))
        for item in items:
            if alive != [item]:
                lost.setdefault(item.key, set()).add(address)
    return [_without(item, lost[item.key]) if item.key in lost and item.key.kind == "Pod" else item for item in candidates], problems


def _without(item: Object, addresses: set[str]) -> Object:
    kept = [address for address in item.spec["addresses"] if address not in addresses]
    return replace(item, data={**item.data, "spec": {**item.spec, "addresses": kept}})
