"""Numbers for names: what the kernel tables, counters and events carry instead of text.

A number is never given to another name within one boot. The table lives on tmpfs beside the pins, so both end together.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path

from agent import files


class Ids:
    """One numbering for every kind of name. Numbers start at 1; 0 means "none" or "unknown" everywhere. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Continue the numbering stored at `path`, if there is one."""
        self._path = path
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}
        self._next = 1
        self._dirty = False
        if path.exists():
            stored = json.loads(path.read_text())
            self._numbers, self._next = stored["numbers"], stored["next"]
        self._names = {number: name for name, number in self._numbers.items()}

    def start_above(self, number: int) -> None:
        """Give no number up to this one to a new name: the kernel still holds it, and the file that said what it means may be lost."""
        with self._lock:
            self._next = max(self._next, number + 1)

    def number(self, kind: str, name: str) -> int:
        """The number of a name, which gets one if it has none."""
        key = f"{kind}:{name}"
        with self._lock:
            found = self._numbers.get(key)
            if found is None:
                found = self._next
                self._next += 1
                self._numbers[key] = found
                self._names[found] = key
                self._dirty = True
            return found

    def name(self, number: int) -> str:
        """The name of a number; "" for 0 and for numbers of names that were forgotten."""
        return self._names.get(number, "").partition(":")[2]

    def keep(self, kind: str, names: Iterable[str]) -> None:
        """Forget the names of a kind that are not listed. Their numbers are not used again."""
        wanted = {f"{kind}:{name}" for name in names}
        with self._lock:
            for key in [k for k in self._numbers if k.startswith(f"{kind}:") and k not in wanted]:
                del self._names[self._numbers.pop(key)]
                self._dirty = True

    def save(self) -> None:
        """Store the numbering if it changed; call it before the numbers reach the kernel."""
        with self._lock:
            if self._dirty:
                files.write(self._path, json.dumps({"next": self._next, "numbers": self._numbers}).encode())
                self._dirty = False
