"""Ways to hold a large model in little memory: labels without a dict, equal values as one object, a mapping that changes without being copied.

Measured on CPython 3.11, 64 bit (sys.getsizeof): a dict of four strings takes 184 bytes, the read-only view of one 48, a Backing with
its two port mappings 600. With 100,000 workloads every 100 bytes are 10 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, ItemsView, Iterator, Mapping, ValuesView
from itertools import chain
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Labels(Mapping[str, str]):
    """A read-only mapping of a few strings: its names, usually shared with other workloads, and its values in one string."""

    __slots__ = ("_names", "_values")
    SEPARATOR: Final = "\0"

    def __init__(self, names: tuple[str, ...], values: str) -> None:
        """Take the names and, in their order, the values joined by SEPARATOR, which may not be part of a value."""
        self._names = names
        self._values = values

    def _dict(self) -> dict[str, str]:
        return dict(zip(self._names, self._values.split(self.SEPARATOR), strict=True)) if self._names else {}

    def __getitem__(self, name: str) -> str:
        return self._dict()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> ItemsView[str, str]:
        """The pairs, taken apart once and not once for each."""
        return self._dict().items()

    def values(self) -> ValuesView[str]:
        """The values, taken apart once and not once for each."""
        return self._dict().values()

    def __repr__(self) -> str:
        return repr(self._dict())


class Shared(Generic[K, V]):
    """Gives equal keys one and the same value for as long as they are in use, and keeps no more than twice `limit` of them.

    Two generations instead of weak references, which tuples and strings do not have: what was not asked for while `limit` others were is
    forgotten, which costs nothing but the sharing.
    """

    def __init__(self, make: Callable[[K], V], limit: int = 8192) -> None:
        self._make = make
        self._limit = limit
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}

    def __call__(self, key: K) -> V:
        """Return the value of `key`, made now if it is not known."""
        found = self._young.get(key)
        if found is None:
            found = self._old.get(key)
            if found is None:
                found = self._make(key)
            if len(self._young) >= self._limit:
                self._old, self._young = self._young, {}
            self._young[key] = found
        return found


_SHARDS: Final = 256  # a copy of one of them is 400 of 100,000 entries


class Table(Mapping[str, V]):
    """An immutable mapping, in no order, from which a changed one is made in time that depends on the change and not on the size.

    It is split by the hash of the name; a change copies only the parts that it touches, all others are shared.
    """

    __slots__ = ("_length", "_shards")

    def __init__(self) -> None:
        """Make an empty one."""
        self._shards: tuple[dict[str, V], ...] = ({},) * _SHARDS
        self._length = 0

    def changed(self, changes: Mapping[str, V | None]) -> Table[V]:
        """Return a table with other values for some names; None removes a name."""
        if not changes:
            return self
        shards = list(self._shards)
        copied = set()
        length = self._length
        for name, value in changes.items():
            number = hash(name) % _SHARDS
            if number not in copied:
                copied.add(number)
                shards[number] = shards[number].copy()
            # Removed first, so that the key is the string that `changes` brings: the old one goes with the old value.
            length -= shards[number].pop(name, None) is not None
            if value is not None:
                shards[number][name] = value
                length += 1
        result: Table[V] = Table()
        result._shards = tuple(shards)
        result._length = length
        return result

    def __getitem__(self, name: str) -> V:
        return self._shards[hash(name) % _SHARDS][name]

    def __contains__(self, name: object) -> bool:
        return name in self._shards[hash(name) % _SHARDS]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._shards)

    def __len__(self) -> int:
        return self._length

    def items(self) -> ItemsView[str, V]:
        """The pairs, at the speed of dicts."""
        return _Items(self, self._shards)

    def values(self) -> ValuesView[V]:
        """The values, at the speed of dicts."""
        return _Values(self, self._shards)

    def differing(self, other: Table[V]) -> set[str]:
        """Names whose values are not the same objects. Costs what differs: parts that both share are not looked at."""
        return {
            name
            for one, another in zip(self._shards, other._shards, strict=True)
            if one is not another
            for name in one.keys() | another.keys()
            if one.get(name) is not another.get(name)
        }

    def __repr__(self) -> str:
        return repr(dict(self.items()))


def differing(before: Mapping[str, V], after: Mapping[str, V]) -> set[str]:
    """Names whose values are not the same objects."""
    if before is after or not (before or after):
        return set()
    if isinstance(before, Table) and isinstance(after, Table):
        return before.differing(after)
    return {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}


def changed(before: Mapping[str, V], changes: Mapping[str, V]) -> Mapping[str, V]:
    """`before` with other values for some names; of a `Table` that costs what changes."""
    return before.changed(changes) if isinstance(before, Table) else {**before, **changes}


class _Items(ItemsView[str, V]):
    __slots__ = ("_shards",)

    def __init__(self, table: Table[V], shards: tuple[dict[str, V], ...]) -> None:
        super().__init__(table)
        self._shards = shards

    def __iter__(self) -> Iterator[tuple[str, V]]:
        return chain.from_iterable(shard.items() for shard in self._shards)


class _Values(ValuesView[V]):
    __slots__ = ("_shards",)

    def __init__(self, table: Table[V], shards: tuple[dict[str, V], ...]) -> None:
        super().__init__(table)
        self._shards = shards

    def __iter__(self) -> Iterator[V]:
        return chain.from_iterable(shard.values() for shard in self._shards)
