"""The loader child: compiles the programs, loads and pins them and their maps, writes the manifest, and ends.

Started by `agent.bpf.datapath` as `python -m agent.bpf.loader`; the only module that imports bcc, which keeps 70 to 140 MB in a process that lives
for a second. It attaches nothing: the agent fills the maps first.

Input: arguments. Output: the manifest file; on failure one line on standard error and exit code 1. All programs are loaded before any is pinned,
so a verifier refusal leaves the previous complete set in force.
"""

from __future__ import annotations

import ctypes as ct
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from agent import files
from agent.bpf import libbpf, shim, source
from agent.bpf.manifest import PROGRAMS
from agent.errors import MeshError

_FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q"}


def main(arguments: list[str]) -> int:
    """Arguments: directory for maps, directory for programs, manifest file, then compiler flags."""
    maps_dir, programs_dir, manifest = (Path(a) for a in arguments[:3])
    try:
        load(maps_dir, programs_dir, manifest, tuple(arguments[3:]))
    except (MeshError, OSError) as error:
        sys.stderr.write(f"loader: {error}\n")
        return 1
    return 0


def load(maps_dir: Path, programs_dir: Path, manifest: Path, flags: tuple[str, ...]) -> None:
    """Compile, load, pin; `maps_dir` may hold maps of an earlier run with the same layout, which are used again."""
    code = source.read(flags=flags)
    with tempfile.TemporaryDirectory(prefix="meshagent-shim-") as tree:
        shim.build(Path(tree))
        os.environ["BCC_KERNEL_SOURCE"] = tree
        from bcc import BPF  # noqa: PLC0415  needs the variable, and only this child may pay for it

        maps_dir.mkdir(parents=True, exist_ok=True)
        # helpers.h of bcc and the UAPI headers both define a few macros
        cflags = [f'-DMESH_PIN="{maps_dir}"', "-Wno-macro-redefined", "-Werror=implicit-function-declaration", *flags]
        try:
            module = BPF(text=code.text.encode(), cflags=cflags)
        except Exception as error:
            raise MeshError(f"the programs do not compile, or a map could not be made in {maps_dir}: {error}") from error
    functions = {}
    for program in PROGRAMS:
        try:
            attach = {} if program.kind in {"sock_ops", "sk_msg"} else {"attach_type": libbpf.ATTACH_TYPES[program.attach_type]}
            functions[program.name] = module.load_func(program.name.encode(), program.type_number, **attach)
        except Exception as error:
            raise MeshError(f"the kernel refuses {program.name}: {error}") from error
    # a BPF file system allows no dots in names
    staging = programs_dir.with_name(programs_dir.name + "-new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name, function in functions.items():
        libbpf.pin(function.fd, staging / name)
    document = {
        "layout": code.layout,
        "programs": code.programs,
        "enums": code.enums,
        "maps": {pin.name: _map(module, pin.name) for pin in maps_dir.iterdir()},
    }
    files.write(manifest, json.dumps(document, indent=1).encode())
    shutil.rmtree(programs_dir, ignore_errors=True)
    staging.rename(programs_dir)


def _map(module: Any, name: str) -> dict[str, Any]:
    if name in {"mesh_sock", "mesh_joined"}:  # bcc has no table of this kind in Python, but it knows the record
        key: Any = ct.c_int
        value = _storage(module, name)
    elif name in {"mesh_listener", "mesh_peers"}:  # sockets: no records that user space reads
        return {"key": [], "value": [], "key_size": 0, "value_size": 0}
    else:
        table = module[name.encode()]
        key, value = table.Key, getattr(table, "sLeaf", table.Leaf)  # of one CPU
    return {"key": _fields(key), "value": _fields(value), "key_size": ct.sizeof(key), "value_size": ct.sizeof(value)}


def _storage(module: Any, name: str) -> Any:
    """The record of a socket storage map as a ctypes class, made as `BPF.get_table` makes those of other maps."""
    from bcc import lib  # noqa: PLC0415  see `load`

    description = lib.bpf_table_leaf_desc(module.module, name.encode())
    return module._decode_table_type(json.loads(description))  # noqa: SLF001  has no public name


def _fields(record: Any) -> list[list[Any]]:
    """[name, offset in bytes, struct format] of each member, as the compiler laid them out; a scalar is one member without a name."""
    if not hasattr(record, "_fields_"):
        return [["", 0, _FORMATS[ct.sizeof(record)]]]
    return [[name, getattr(record, name).offset, _format(kind)] for name, kind, *_ in record._fields_]


def _format(kind: Any) -> str:
    if issubclass(kind, ct.Array):
        if kind._type_ is ct.c_char:
            return f"{ct.sizeof(kind)}s"
        return f"{kind._length_}{_FORMATS[ct.sizeof(kind._type_)]}"
    if issubclass(kind, ct.Structure):  # a mesh_addr: bytes in network order
        return f"{ct.sizeof(kind)}s"
    return _FORMATS[ct.sizeof(kind)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
