"""The model again after a change. Called by `controller.mesh`, for what is published; whoever only asks what a model would be uses `controller.compile`.

Of a large cluster it is pods that come, go and become ready, all the time. What follows from some of them is compiled anew, and everything else is taken as it
was; after any other change everything is compiled. Both ways give the same: `tests/unit/controller/test_recompile.py` compares them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Final

from controller.compile import Compiled, World, compile_world, enter, leave, tell_externals, tell_policy, tell_service, tell_workload
from controller.conflicts import workload_addresses
from controller.gateways import Known
from controller.jwks import Fetched
from controller.objects import Key, Object, differing

MOST: Final = 0.1
"""Of all workloads: when more of them have changed, to compile everything is as quick."""
_Change = tuple[Object | None, Object | None]
"""An object before and after."""


class Compiler:
    """See the module. Not for two threads at once."""

    def __init__(self, *, authority: bool, egress: str) -> None:
        """As for `compile_model`."""
        self._authority, self._egress = authority, egress
        self._world: World | None = None
        self._known = Known()
        self._compiled = Compiled()
        self.partly = 0
        """How often only a part was compiled."""

    def compile(self, objects: Mapping[Key, Object], *, keys: Mapping[str, Fetched], known: Known) -> Compiled:
        """Return the model of `objects`, which is new: what was returned before stays as it is."""
        world, self._world = self._world, None  # one that fails half way is not used again
        if world is None or (pods := self._pods(world, objects, keys, known)) is None:
            world = World(objects, self._authority, keys=keys, egress=self._egress)
            self._compiled = compile_world(world, None, known)
        else:
            world.objects = objects
            self._compiled = _again(world, self._compiled, pods)
            self.partly += 1
        self._world, self._known = world, known
        return self._compiled

    def _pods(self, world: World, objects: Mapping[Key, Object], keys: Mapping[str, Fetched], known: Known) -> list[_Change] | None:
        """Return the pods that have changed, if nothing else has and nothing else follows from them than `_again` looks at."""
        if keys != world.keys or known.refused != self._known.refused or self._certificates_change():
            return None
        changed = differing(world.objects, objects)
        changes = [(world.objects.get(key), objects.get(key)) for key in changed]
        if not changes or len(changes) > max(1, MOST * len(world.workloads)) or any(key.kind != "Pod" for key in changed):
            return None
        return changes if all(_alone(world, objects, change) for change in changes) else None

    def _certificates_change(self) -> bool:
        """Does one of a gateway begin to hold, or run out?"""
        ends = [pair.ends.timestamp() for pair in self._compiled.pairs.values()]
        return min([*ends, *self._compiled.awaited], default=float("inf")) < time.time()


def _alone(world: World, objects: Mapping[Key, Object], change: _Change) -> bool:
    """Does a pod's change concern nobody but itself, its services and its policies?"""
    addresses: set[str] = set()
    for pod in change:
        if pod is None:
            continue
        if pod.spec.get("hostNetwork") or Key("Workload", pod.key.namespace, pod.key.name) in objects or world.ingress.lends(pod):
            return False
        addresses.update(workload_addresses(pod))
    return world.shared.isdisjoint(addresses)


def _again(world: World, before: Compiled, changes: Iterable[_Change]) -> Compiled:
    out = Compiled(before.entities.copy(), before.conditions.copy(), before.status, before.certificates, before.pairs, before.awaited)
    services: set[str] = set()
    policies: set[Key] = set()
    guards: set[str] = set()
    there: list[str] = []
    for old, new in changes:
        if old is not None:
            name = old.key.qualified
            guards.update(guard for guard in (world.guards.get(name),) if guard is not None)
            stood, chosen = leave(world, old)
            services |= stood
            policies |= chosen
            del world.workloads[name], out.entities[f"workload/{name}"], out.conditions[old.key]
        if new is not None:
            name = new.key.qualified
            world.workloads[name] = new
            enter(world, new)
            there.append(name)
            services.update(world.backed.get(name, ()))
            policies.update(key for key, selected in world.selected.items() if name in selected)
    for name in there:
        tell_workload(world, out, name)
    for guard in guards.difference(world.guards.values()):
        out.entities.pop(guard, None)
    for name in services:
        tell_service(world, out, name)
    for key in policies:
        tell_policy(world, out, world.objects[key])
    tell_externals(world, out)
    return out
