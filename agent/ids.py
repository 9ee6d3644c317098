"""Numbers for names: what the kernel tables, counters and events carry instead of text.

A number is never given to another name within one boot. The numbering lives on tmpfs beside the pins, so both end together: a file of lines, one for each
change, so that a new name costs one line however many there are.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from agent import files

_SLACK = 4096


class Ids:
    """One numbering for every kind of name. Numbers start at 1; 0 means "none" or "unknown" everywhere. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Continue the numbering stored at `path`, if there is one. A last line that was not written to its end is ignored: nothing has used it yet."""
        self._path = path
        self._lock = threading.Lock()
        self._numbers: dict[str, dict[str, int]] = defaultdict(dict)
        self._names: dict[int, str] = {}
        self._next = 1
        self._unsaved: list[int] = []
        if path.exists():
            for line in path.read_text().rpartition("\n")[0].splitlines():
                number, _, rest = line.partition(" ")
                kind, _, name = rest.partition(":")
                if name:
                    self._remember(int(number), kind, name)
                else:
                    self._forget(int(number))
                self._next = max(self._next, int(number) + 1)
        self._rewrite()

    def _remember(self, number: int, kind: str, name: str) -> None:
        self._numbers[kind][name] = number
        self._names[number] = name

    def _forget(self, number: int) -> None:
        name = self._names.pop(number, "")
        for numbers in self._numbers.values():
            if numbers.get(name) == number:
                del numbers[name]

    def start_above(self, number: int) -> None:
        """Give no number up to this one to a new name: the kernel still holds it, and the file that said what it means may be lost."""
        with self._lock:
            self._next = max(self._next, number + 1)

    def number(self, kind: str, name: str) -> int:
        """The number of a name, which gets one if it has none. `kind` has no colon, `name` no line break."""
        found = self._numbers[kind].get(name)
        if found is not None:
            return found
        with self._lock:
            found = self._numbers[kind].get(name)
            if found is None:
                found = self._next
                self._next += 1
                self._remember(found, kind, name)
                self._unsaved.append(found)
            return found

    def name(self, number: int) -> str:
        """The name of a number; "" for 0 and for numbers of names that were forgotten."""
        return self._names.get(number, "")

    def names(self, kind: str) -> tuple[str, ...]:
        """Every name of a kind that has a number."""
        with self._lock:
            return tuple(self._numbers[kind])

    def forget(self, kind: str, names: Iterable[str]) -> None:
        """Forget names. Their numbers are not used again."""
        with self._lock:
            for name in names:
                number = self._numbers[kind].get(name)
                if number is not None:
                    self._forget(number)
                    self._unsaved.append(number)

    def keep(self, kind: str, names: Iterable[str]) -> None:
        """Forget the names of a kind that are not listed."""
        self.forget(kind, set(self.names(kind)) - set(names))

    def save(self) -> None:
        """Store what changed; call it before new numbers reach the kernel."""
        with self._lock:
            if not self._unsaved:
                return
            self._lines += len(self._unsaved)
            if self._lines > 2 * len(self._names) + _SLACK:
                self._rewrite()
                return
            with self._path.open("a") as file:
                file.writelines(map(self._line, self._unsaved))
            self._unsaved.clear()

    def _line(self, number: int) -> str:
        """What the file says of a number; one that was forgotten stands alone."""
        name = self._names.get(number, "")
        kind = next((kind for kind, numbers in self._numbers.items() if numbers.get(name) == number), "")
        return f"{number} {kind}:{name}\n" if kind else f"{number}\n"

    def _rewrite(self) -> None:
        lines = [f"{number} {kind}:{name}\n" for kind, numbers in self._numbers.items() for name, number in numbers.items()]
        # The highest number stays known although its name is forgotten.
        files.write(self._path, "".join([*lines, f"{self._next - 1}\n" if self._next - 1 not in self._names else ""]).encode())
        self._lines = len(lines)
        self._unsaved.clear()
