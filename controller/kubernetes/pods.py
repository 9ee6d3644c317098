"""What is in force after nothing but pods has changed: of a large cluster that is nearly every change. Used by `controller.kubernetes.source`; pure.

A pod that is refused, or has an address that somebody else asks for or asked for, is nothing for here: then everything is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from controller.conflicts import claimed
from controller.errors import Problem
from controller.kubernetes.shapes import Seen
from controller.objects import Key, Object, differing


class Pods:
    """Pods as they were looked at last, and which addresses objects of all kinds asked for then."""

    def __init__(self, store: Mapping[Key, Seen] | None = None, problem: Problem | None = None, asking: Iterable[Object] = ()) -> None:
        """`problem`: why nothing newer was known of them. `asking`: all that is in force, or would be if nothing was in its way."""
        self._store: Mapping[Key, Seen] = store or {}
        self._problem = problem
        self._owners: dict[str, Key | None] = {}
        """By address; None: several."""
        for item in asking:
            for address in claimed(item):
                self._owners[address] = item.key if self._owners.get(address, item.key) == item.key else None

    def again(self, objects: Mapping[Key, Object], store: Mapping[Key, Seen], problem: Problem | None) -> Mapping[Key, Object] | None:
        """Return what is in force now instead of `objects`; None: that does not follow from pods alone."""
        if problem != self._problem:
            return None
        changed = differing(self._store, store)
        if not all(self._is_plain(key, objects.get(key), self._store.get(key), store.get(key)) for key in changed):
            return None
        freed = {address for key in changed if key in objects for address in claimed(objects[key])}
        taken: dict[str, Key] = {}
        made = {key: item for key in changed if (seen := store.get(key)) is not None and (item := seen.object) is not None}
        for key, item in made.items():
            for address in claimed(item):
                if (address in self._owners and address not in freed) or address in taken:
                    return None
                taken[address] = key
        for address in freed:
            del self._owners[address]
        self._owners.update(taken)
        self._store = store
        found = dict(objects)
        for key in changed:
            found.pop(key, None)
        return found | made

    def _is_plain(self, key: Key, held: Object | None, before: Seen | None, after: Seen | None) -> bool:
        """Was it in force as it was read, with addresses of its own, and is nothing wrong with it now?"""
        if held is not (before.object if before is not None else None):
            return False
        if any(seen is not None and seen.problems for seen in (before, after)):
            return False
        return held is None or all(self._owners.get(address) == key for address in claimed(held))
