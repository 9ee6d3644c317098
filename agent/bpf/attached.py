"""What is attached at the hooks of the mesh, asked of the kernel from outside of any agent: others' programs, and links of ours that are in force no more.

Called by `meshagent check`, before there is an agent, beside one that runs, and after one that died. Looks only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent import files
from agent.bpf import libbpf, sets, source
from agent.bpf.manifest import HOOKED, PROGRAMS
from agent.bpf.sets import Set
from agent.config import Config
from agent.features import compile_flags

_HOOKS = tuple(sorted({p.attach_type for p in PROGRAMS if p.where in {"node", "waypoint"}}))
_RECEIVER = next(p for p in PROGRAMS if p.where == "namespace")


@dataclass(frozen=True, slots=True)
class Attached:
    """A program at one place. `alone`: attached so that no other program can be beside or below it (without BPF_F_ALLOW_MULTI)."""

    id: int
    name: str
    attach_type: str
    place: str
    alone: bool = False


def in_cgroups(config: Config) -> list[Attached]:
    """Programs that are not this agent's, attached at our hooks to its cgroup, to one above it or to one below."""
    own = _own(config)
    above = [path for path in config.cgroup.parents if (path / "cgroup.procs").exists()]
    return [found for place in (*above, *_tree(config.cgroup)) for found in _at(place) if found.id not in own]


def in_namespaces(config: Config, namespaces: Iterable[Path]) -> list[Attached]:
    """The same for what is looked up for arriving packets, in each of these network namespaces."""
    own = _own(config)
    found = []
    for path in namespaces:
        try:
            with files.closing(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
                numbers = libbpf.namespace_programs(fd, _RECEIVER.attach_type)
        except OSError:
            continue  # it ended meanwhile
        found += [Attached(n, libbpf.program_name(n), _RECEIVER.attach_type, str(path)) for n in numbers if n not in own]
    return found


@dataclass(frozen=True, slots=True)
class Drifted:
    """A program of ours that should run at a place and does not."""

    name: str
    place: str
    why: str


def drifted(config: Config) -> list[Drifted]:
    """Programs of an agent that is or was in force, which the kernel does not run where they belong. Empty if none ever was."""
    links = config.pin_dir / "links"
    places = {"node": config.cgroup, "waypoint": config.waypoint_cgroup}
    found = []
    loaded = _loaded(config) if links.is_dir() else set()
    for program in HOOKED:
        if program.where == "namespace" or program.name not in loaded:
            continue
        place = places[program.where]
        pin = links / program.name
        try:
            with files.closing(libbpf.open_pin(pin)) as link, files.closing(os.open(place, os.O_RDONLY | os.O_CLOEXEC)) as target:
                if libbpf.link_target(link) != os.fstat(target).st_ino:
                    found.append(
                        Drifted(program.name, str(place), "its link is to a cgroup that is gone: it was detached, or the cgroup made anew")
                    )
                elif libbpf.link_program_id(link) not in libbpf.effective_programs(target, program.attach_type):
                    found.append(Drifted(program.name, str(place), "it is linked, but the kernel does not run it there"))
        except OSError as error:
            why = f"the kernel does not say: {error}" if pin.exists() else f"its link {pin} is gone: somebody removed it"
            found.append(Drifted(program.name, str(place), why))
    return found


def in_force(config: Config) -> str:
    """Whose programs the links run: "none", "same" as this version's, "other", or "mixed", which ends within a second when one takes over."""
    running = sets.linked(config).keys()
    if not running:
        return "none"
    code = source.read(flags=compile_flags(), capacities=config.map_capacities)
    own = set(sets.pinned(Set.of(config, code.programs, code.layout).programs).values())
    return "same" if running <= own else "mixed" if running & own else "other"


def _loaded(config: Config) -> set[str]:
    """Names of the programs that the agent in force has: one of another version may lack some of this one's. Of all that are pinned if no link is left."""
    pinned, running = _pinned(config), sets.linked(config).keys()
    return {name for one in [one for one in pinned if running & set(one.values())] or pinned for name in one}


def _own(config: Config) -> set[int]:
    return {number for one in _pinned(config) for number in one.values()}


def _pinned(config: Config) -> list[dict[str, int]]:
    """Kernel ids of the programs of each set, by name."""
    return [sets.pinned(directory) for directory in config.pin_dir.glob("programs-*")]


def _tree(top: Path) -> Iterator[Path]:
    for directory, _, _ in os.walk(top):
        yield Path(directory)


def _at(place: Path) -> Iterator[Attached]:
    try:
        with files.closing(os.open(place, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            for attach_type in _HOOKS:
                numbers, flags = libbpf.attached_programs(fd, attach_type)
                for number in numbers:
                    yield Attached(number, libbpf.program_name(number), attach_type, str(place), not flags & libbpf.BPF_F_ALLOW_MULTI)
    except OSError:
        return  # it was removed meanwhile
