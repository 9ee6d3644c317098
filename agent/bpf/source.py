"""The C source of the programs: where it is, one text of it, and the names that its content gives to pin directories."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.errors import EnvironmentUnfit

BPF_SRC = Path(__file__).resolve().parents[2] / "bpf_src"
LARGEST_CAPACITY = 1 << 24
"""Rows. More is a slip of the hand: a connection's row takes about 100 bytes, so this is 1.6 GB of memory that cannot be swapped."""
_DECLARATIONS = ("mesh_types.h", "mesh_maps.h", "mesh_accelerate.h")
"""Headers with records and maps and nothing else; the layout is what they say."""
_SYSTEM = re.compile(r"#include <.*")
_INCLUDE = re.compile(r'#include "(mesh_\w+\.[ch])"')
_ENUM = re.compile(r"enum (mesh_\w+) \{(.*?)\};", re.DOTALL)
_ENUMERATOR = re.compile(r"(MESH_\w+) = (\d+),")
# Both ways to declare a map: what stands before the number of rows, the map's name, and that number.
_MACRO = re.compile(r'(^MESH_MAP\("\w+", [\w ]+, [\w ]+, (mesh_\w+), )(\d+)(?=,)', re.MULTILINE)
_BY_HAND = re.compile(r"(^struct mesh_\w+_table_t (mesh_\w+) = \{ \.max_entries = )(\d+(?: << \d+)?)(?= )", re.MULTILINE)
_RECORDS = re.compile(r'^MESH_MAP\("(\w+)", ([\w ]+), ([\w ]+), (mesh_\w+), ', re.MULTILINE)
_MIN_RING = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """`text` for bcc; `layout` and `programs` are hashes that name the pin directories of maps and programs."""

    text: str
    declarations: str
    """The part that declares records and maps, without programs: what tells a compiler every layout in a third of the time."""
    layout: str
    programs: str
    enums: dict[str, dict[str, int]]
    records: dict[str, tuple[str, str, str]]
    """By map, those declared with MESH_MAP: its kind, and the C types of its key and its value."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the loader child is told: where things go, and what is in force now."""

    maps: str
    programs: str
    bridge: str
    """Directory for the programs that serve while links change over (agent.bpf.bridge); not made if they are not needed."""
    manifest: str
    flags: list[str]
    capacities: dict[str, int]
    before_maps: str = ""
    """Directory of the maps in force; "" = none, or `maps` is there already."""
    before_manifest: str = ""
    source: str = str(BPF_SRC)


def read(directory: Path = BPF_SRC, flags: tuple[str, ...] = (), capacities: Mapping[str, int] | None = None) -> Source:
    """Read the source; `flags` are compiler flags that change the programs, `capacities` rows of maps that shall have others than declared.

    bcc rewrites map accesses only in the main file, so the mesh_* includes are put in place here, with #line directives that keep messages true.
    Raises EnvironmentUnfit for a capacity that cannot be.
    """
    wanted = dict(capacities or {})
    known = default_capacities(directory)
    for name, number in wanted.items():
        check_capacity(name, number, known)
    text = _resize(_flatten(directory, "mesh.c"), wanted)
    parts = [_resize(_flatten(directory, name), wanted) for name in _DECLARATIONS if f'#line 1 "{name}"' in text]
    system = _SYSTEM.findall((directory / "mesh.c").read_text())
    enums = _enums((directory / "mesh_types.h").read_text())
    records = {name: (kind, key, value) for kind, key, value, name in _RECORDS.findall("\n".join(parts))}
    return Source(text, "\n".join([*system, *parts]), _hash(*parts), _hash(text, *flags), enums, records)


def default_capacities(directory: Path = BPF_SRC) -> dict[str, int]:
    """How many rows (bytes for the ring buffer) each map has that can have more or fewer."""
    found = {}
    for name in _DECLARATIONS:
        if (directory / name).exists():
            text = (directory / name).read_text()
            for pattern in (_MACRO, _BY_HAND):
                for match in pattern.finditer(text):
                    number, _, shift = match[3].partition(" << ")
                    found[match[2]] = int(number) << int(shift or 0)
    return {name: number for name, number in found.items() if number > 1}


def check_capacity(name: str, number: int, known: Mapping[str, int]) -> None:
    """Raise EnvironmentUnfit if a map cannot have that many rows."""
    if name not in known:
        raise EnvironmentUnfit(
            f"--map-capacity {name}={number}: there is no such map, or it has a fixed size; those with a capacity: {', '.join(sorted(known))}"
        )
    if not 0 < number <= LARGEST_CAPACITY:
        raise EnvironmentUnfit(
            f"--map-capacity {name}={number}: a map has 1 to {LARGEST_CAPACITY} rows; by default this one has {known[name]}"
        )
    if name == "mesh_events" and (number < _MIN_RING or number & (number - 1)):
        raise EnvironmentUnfit(f"--map-capacity {name}={number}: a ring buffer has a power of two of bytes, {_MIN_RING} or more")


def _resize(text: str, capacities: Mapping[str, int]) -> str:
    for pattern in (_MACRO, _BY_HAND):
        text = pattern.sub(lambda match: f"{match[1]}{capacities.get(match[2], match[3])}", text)
    return text


def _flatten(directory: Path, name: str) -> str:
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((directory / name).read_text().splitlines(), 1):
        if match := _INCLUDE.match(line):
            lines += [_flatten(directory, match[1]), f'#line {number + 1} "{name}"']
        else:
            lines.append("" if line == "#pragma once" else line)
    return "\n".join(lines)


def _enums(header: str) -> dict[str, dict[str, int]]:
    """Every enumerator has an explicit number: it stands in logs, so the reader of the header must see it."""
    return {name: {n: int(v) for n, v in _ENUMERATOR.findall(body)} for name, body in _ENUM.findall(header)}


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
