"""The sets of programs and maps that agents have pinned on a node, and which of them are in force.

There is more than one from the moment that another version is loaded until `DataPath.forget_other_versions`: so long each may hold rows and counters
that the others lack, whatever programs the links run, and whoever takes over takes them from all others.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from agent import files
from agent.bpf import libbpf
from agent.bpf.manifest import HOOKED, PROGRAMS, Manifest
from agent.config import Config
from agent.errors import EnvironmentUnfit, LayoutMismatch

SCRATCH = "check-"
"""What `meshagent upgrade-check` loads is below a directory of this name and its pid."""
_MANIFEST = "manifest-"
_NEWER = (
    "programs are in force here that another version of meshagent left, and this one does not understand what it says of them ({}: {}): probably it is newer; "
    "they go on as they are, and this agent does not start; start that version again, or have it give up the node first ('meshagent uninstall')"
)


@dataclass(frozen=True, slots=True)
class Set:
    """Where the programs of one version are: `programs` and `maps` are named by hashes, `bridge` exists while links change (agent.bpf.bridge)."""

    programs: Path
    bridge: Path
    maps: Path
    manifest: Path

    @staticmethod
    def of(config: Config, programs: str, layout: str) -> Set:
        """The one with these hashes, there or not."""
        return Set(
            config.pin_dir / f"programs-{programs}",
            config.pin_dir / f"programs-{programs}-bridge",
            config.pin_dir / f"maps-{layout}",
            config.run_dir / f"{_MANIFEST}{programs}.json",
        )

    @property
    def complete(self) -> bool:
        """True if nothing is left for the loader to do."""
        return self.manifest.exists() and self.maps.is_dir() and all((self.programs / program.name).exists() for program in PROGRAMS)

    def ids(self) -> set[int]:
        """Kernel ids of its programs, those of its bridge too."""
        return {*pinned(self.programs).values(), *pinned(self.bridge).values()}


@dataclass(frozen=True, slots=True)
class Others:
    """The sets besides one that an agent has or wants, those first whose programs most links run."""

    found: tuple[tuple[Set, Manifest], ...] = ()
    in_force: bool = False
    """True if links run programs of the first."""
    unknown: Collection[int] = field(default_factory=frozenset)
    """Ids of programs that links run and that belong to no set: its manifest is lost."""


def others(config: Config, own: Set) -> Others:
    """All but `own`. Raises EnvironmentUnfit if links run one that this version does not understand: to take over could take away what it enforces."""
    found: list[tuple[int, Set, Manifest]] = []
    running = linked(config)
    unknown = running.keys() - own.ids()
    for path in sorted(config.run_dir.glob(f"{_MANIFEST}*.json")):
        try:
            manifest = Manifest.read(path, own=False)
        except (OSError, ValueError, KeyError, TypeError, LayoutMismatch) as error:
            if running.keys() & Set.of(config, path.stem.removeprefix(_MANIFEST), "").ids():
                raise EnvironmentUnfit(_NEWER.format(path, error)) from error
            continue  # what is over and done with
        other = Set.of(config, manifest.programs, manifest.layout)
        if other != own and other.maps.is_dir():
            ids = other.ids()
            found.append((sum(running[number] for number in ids), other, manifest))
            unknown -= ids
    found.sort(key=lambda entry: -entry[0])
    return Others(tuple(entry[1:] for entry in found), bool(found and found[0][0]), unknown)


def linked(config: Config) -> Counter[int]:
    """How many links run each program, by its kernel id; of the links that every node has, not those of acceleration."""
    hooked = {program.name for program in HOOKED}
    found: Counter[int] = Counter()
    for link in config.pin_dir.glob("links/*"):
        if link.name.removesuffix("-new") in hooked or link.name.startswith("netns-"):
            with contextlib.suppress(FileNotFoundError), files.closing(libbpf.open_pin(link)) as fd:  # an agent may unlink it meanwhile
                if libbpf.link_target(fd):  # else its cgroup or namespace is gone
                    found[libbpf.link_program_id(fd)] += 1
    return found


def pinned(directory: Path) -> dict[str, int]:
    """Kernel ids of the programs or maps pinned in a directory, by name; empty if there is none."""
    found = {}
    for pin in directory.glob("mesh_*"):
        with contextlib.suppress(FileNotFoundError), files.closing(libbpf.open_pin(pin)) as fd:  # as above
            found[pin.name] = libbpf.object_id(fd)
    return found


def shared(one: Path, other: Path) -> frozenset[str]:
    """Names of the maps that are one and the same in two directories."""
    return frozenset(name for name, _ in pinned(one).items() & pinned(other).items())


def sweep_checks(config: Config) -> None:
    """Remove what checks left that were killed."""
    for left in config.pin_dir.glob(f"{SCRATCH}*"):
        if not Path("/proc", left.name.removeprefix(SCRATCH)).exists():
            shutil.rmtree(left, ignore_errors=True)
