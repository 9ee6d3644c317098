"""The C source of the programs: where it is, one text of it, and the names that its content gives to pin directories."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

BPF_SRC = Path(__file__).resolve().parents[2] / "bpf_src"
_INCLUDE = re.compile(r'#include "(mesh_\w+\.[ch])"')
_ENUM = re.compile(r"enum (mesh_\w+) \{(.*?)\};", re.DOTALL)
_ENUMERATOR = re.compile(r"(MESH_\w+) = (\d+),")


@dataclass(frozen=True, slots=True)
class Source:
    """`text` for bcc; `layout` and `programs` are hashes that name the pin directories of maps and programs."""

    text: str
    layout: str
    programs: str
    enums: dict[str, dict[str, int]]


def read(directory: Path = BPF_SRC, flags: tuple[str, ...] = ()) -> Source:
    """Read the source; `flags` are compiler flags that change the programs.

    bcc rewrites map accesses only in the main file, so the mesh_* includes are put in place here, with #line directives that keep messages true.
    """
    text = _flatten(directory, "mesh.c")
    layout = _hash(*((directory / name).read_text() for name in ("mesh_types.h", "mesh_maps.h", "mesh_accelerate.h")))
    return Source(text, layout, _hash(text, *flags), _enums((directory / "mesh_types.h").read_text()))


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
