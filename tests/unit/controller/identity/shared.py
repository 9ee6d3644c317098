"""What several controllers share, in memory: as `controller.kubernetes.store` has it of an API server, but a replica hears of others only when a test says so.

The real one is in tests/kubernetes. Here a replica can lag for as long as a test needs, and at the moment that it needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from controller.errors import ControllerError
from controller.identity.ca import CaSettings, CertificateAuthority
from controller.identity.operator import Intermediate
from controller.store import Documents
from tests.unit.controller.identity.authorities import Held, make
from tests.unit.controller.identity.harness import DOMAIN, STARTED, Clock

T = TypeVar("T")
Group = tuple[int, dict[str, str]]
"""A version, and documents."""


@dataclass
class State:
    """What stands there."""

    groups: dict[str, Group] = field(default_factory=dict)
    version: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)


@dataclass
class Changes:
    """Documents of one group in a change."""

    documents: dict[str, str]

    def read(self, name: str) -> bytes | None:
        text = self.documents.get(name)
        return None if text is None else text.encode()

    def write(self, name: str, text: str) -> None:
        self.documents[name] = text
        if not text:
            del self.documents[name]


class Replica:
    """A `SharedStore`. `lags`: it knows what it has read or written itself, and of nothing else."""

    alone = False

    def __init__(self, state: State, *, lags: bool = False) -> None:
        self.state, self.lags = state, lags
        self._known: dict[str, Group] = {}

    def where(self, name: str) -> str:
        return f"shared {name}"

    def _all(self) -> dict[str, Group]:
        if not self.lags:
            with self.state.lock:
                self._known = dict(self.state.groups)
        return self._known

    def groups(self) -> dict[str, object]:
        return {group: version for group, (version, _) in self._all().items() if group}

    def read(self, name: str, group: str = "") -> bytes | None:
        return Changes(self._all().get(group, (0, {}))[1]).read(name)

    def signature(self, name: str, group: str = "") -> str | None:
        return self._all().get(group, (0, {}))[1].get(name)

    def change(self, work: Callable[[Documents], T], group: str = "", *, known: bool = False) -> T:
        with self.state.lock:
            current = self.state.groups.get(group, (0, {}))
            if known and (held := self._all().get(group, (0, {}))) != current:
                work(Changes(dict(held[1])))  # refused: what was known is not what stands there
            changed = Changes(dict(current[1]))
            result = work(changed)
            if changed.documents != current[1]:
                self.state.version += 1
                current = (self.state.version, changed.documents)
                self.state.groups[group] = current
            if current[1]:
                self._known[group] = current
            else:
                self.state.groups.pop(group, None)
                self._known.pop(group, None)
            return result

    def listen(self, told: Callable[[], object]) -> None:  # noqa: ARG002 - the protocol names it
        raise ControllerError("nobody maintains anything here")

    def waiting(self) -> str:
        return ""


@dataclass
class Mesh:
    """An operator's intermediate, and the authorities that sign with it."""

    path: Path
    clock: Clock = field(default_factory=Clock)
    state: State = field(default_factory=State)
    root: Held = field(default_factory=lambda: make("root", lifetime_s=10**7))
    middle: Held = field(init=False)

    def __post_init__(self) -> None:
        self.root.write(self.path, "root")
        self.replace("middle")

    def replace(self, name: str) -> Held:
        """Have another intermediate sign, from the next tick of each authority on."""
        self.middle = make(name, self.root, lifetime_s=10**7)
        self.middle.write(self.path, "middle")
        return self.middle

    def authority(self, name: str, *, lags: bool = False, **settings: Any) -> tuple[CertificateAuthority, Replica]:
        """Start one; with the directory that an earlier one of this name had."""
        replica = Replica(self.state)
        files = Intermediate(self.path / "middle.pem", self.path / "middle.key")
        own = CaSettings(self.path / name, files, roots=self.path / "root.pem", **{"hold_s": 0.0, **settings})
        found = CertificateAuthority(own, DOMAIN, self.clock, shared=replica)
        STARTED.append(found)
        found.start()
        replica.lags = lags
        return found, replica
