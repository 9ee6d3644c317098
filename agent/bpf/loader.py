"""The loader child: compiles the programs, loads and pins them and their maps, writes the manifest, and ends.

Started by `agent.bpf.datapath` as `python -m agent.bpf.loader`; the only module that imports bcc, which keeps 70 to 140 MB in a process that lives
for a few seconds. It attaches nothing: the agent fills the maps first.

Input: a `source.Job` as JSON, and the pid of the agent, with which this ends: the next agent starts a loader of its own. Output: the manifest file; on
failure one line on standard error and exit code 1. Everything is made under names that end in "-new" and gets its own name at the end: a verifier refusal
leaves the previous complete set in force, and nothing else.

A map that is the same to the programs in force is pinned once more in the new directory, where bcc finds and uses it. Maps that are there already, of an
agent that did not get further or of one that is to come back, are used as they are.
"""

from __future__ import annotations

import ctypes as ct
import errno
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import files
from agent.bpf import bridge, libbpf, migrate, shim, source
from agent.bpf.manifest import FORMAT, PROGRAMS
from agent.bpf.migrate import Fate
from agent.errors import MeshError

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q"}
_PIN = re.compile(r':" MESH_PIN "/(?:" #_name|\w+")')
_NOTHING = "\nint mesh_nothing(void *ctx) { return 0; }\n"  # without a program bcc loads no BTF, which socket storage needs


def main(arguments: list[str]) -> int:
    """Do the job in the first argument for the process in the second."""
    try:
        _end_with(int(arguments[1]))
        load(source.Job(**json.loads(arguments[0])))
    except (MeshError, OSError) as error:
        sys.stderr.write(f"loader: {error}\n")
        return 1
    return 0


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends: an agent's main one (prctl(2))."""
    if ct.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ct.get_errno(), "prctl")
    if os.getppid() != parent:
        raise MeshError(f"the agent that started this, pid {parent}, has ended")


def load(job: source.Job) -> None:
    """Compile, load, pin."""
    code = source.read(Path(job.source), tuple(job.flags), job.capacities)
    with tempfile.TemporaryDirectory(prefix="meshagent-shim-") as tree:
        shim.build(Path(tree))
        os.environ["BCC_KERNEL_SOURCE"] = tree
        work = _Work(job, code)
        try:
            work.maps()
            work.programs()
            work.finish()
        finally:
            work.clean()


@dataclass
class _Work:
    """The steps of one job."""

    job: source.Job
    code: source.Source
    bridged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with empty directories."""
        self._maps, self._programs, self._bridge = (Path(path) for path in (self.job.maps, self.job.programs, self.job.bridge))
        self._fresh = not self._maps.is_dir()
        self._old: dict[str, Any] = {}
        self.clean()
        for path in (self._maps, self._programs):
            _new(path).mkdir(parents=True)

    def clean(self) -> None:
        """Remove what is not finished."""
        for path in (self._maps, self._programs, self._bridge):
            shutil.rmtree(_new(path), ignore_errors=True)

    def maps(self) -> None:
        """Decide which maps are used again, and pin those where the programs will look for them."""
        if not self.job.before_maps:
            return
        layouts = _layouts(self.code)
        try:
            self._old = json.loads(Path(self.job.before_manifest).read_text())["maps"]
            for name, document in self._old.items():
                document.update(_made(Path(self.job.before_maps) / name))
            fates = migrate.fates(self._old, layouts)
            self.bridged = bridge.bridged(fates, self._old, layouts, self.code.records)
        except (KeyError, ValueError) as error:
            raise MeshError(
                f"{self.job.before_manifest} does not say what maps the programs in force have ({error!r}): start the agent that wrote it, or run"
                " 'meshagent uninstall' and start this one"
            ) from error
        for name, fate in fates.items():
            if fate is Fate.KEPT:
                _pin_again(Path(self.job.before_maps) / name, _new(self._maps) / name)

    def programs(self) -> None:
        """Compile and load all programs, then pin them."""
        pins = _new(self._maps) if self._fresh else self._maps
        module = _compile(self.code.text, pins, self.job.flags)
        functions = _load(module)
        self._layouts = {name: _map(module, name) for name in _names(self.code)}
        if self.bridged:
            for name in self.bridged:
                _pin_again(Path(self.job.before_maps) / name, pins / (name + bridge.SUFFIX))
            text = bridge.weave(self.code.text, self.bridged, self._old, self._layouts, self.code.records)
            between = _load(_compile(text, pins, self.job.flags))
            for name in self.bridged:
                (pins / (name + bridge.SUFFIX)).unlink()
            _new(self._bridge).mkdir()
            _pin(between, _new(self._bridge))
        _pin(functions, _new(self._programs))

    def finish(self) -> None:
        """Write the manifest and give everything its name."""
        document = {
            "format": FORMAT,
            "layout": self.code.layout,
            "programs": self.code.programs,
            "enums": self.code.enums,
            "maps": self._layouts,
        }
        files.write(Path(self.job.manifest), json.dumps(document, indent=1).encode())
        # Programs last: with them the set counts as complete. The bridge belongs to the maps.
        for path in (*((self._bridge, self._maps) if self._fresh else ()), self._programs):
            shutil.rmtree(path, ignore_errors=True)
            if _new(path).is_dir():
                _new(path).rename(path)


def _new(path: Path) -> Path:
    return path.with_name(f"{path.name}-new")  # a BPF file system allows no dots in names


def _pin_again(old: Path, new: Path) -> None:
    descriptor = libbpf.open_pin(old)
    libbpf.pin(descriptor, new)
    os.close(descriptor)


def _made(pin: Path) -> dict[str, int]:
    """Kind, capacity and flags of a pinned map, asked of the kernel; earlier manifests do not have them."""
    descriptor = libbpf.open_pin(pin)
    try:
        return _described(descriptor)
    finally:
        os.close(descriptor)


def _described(descriptor: int) -> dict[str, int]:
    kind, _, _, capacity = libbpf.map_info(descriptor)
    return {"kind": kind, "capacity": capacity, "flags": libbpf.map_flags(descriptor)}


def _module(text: str, flags: list[str]) -> Any:
    from bcc import BPF  # noqa: PLC0415  needs BCC_KERNEL_SOURCE, and only this child may pay for it

    # helpers.h of bcc and the UAPI headers both define a few macros
    return BPF(text=text.encode(), cflags=["-Wno-macro-redefined", "-Werror=implicit-function-declaration", *flags])


def _compile(text: str, pins: Path, flags: list[str]) -> Any:
    try:
        return _module(text, [f'-DMESH_PIN="{pins}"', *flags])
    except Exception as error:
        raise MeshError(f"the programs do not compile, or a map could not be made in {pins}: {error}") from error


def _load(module: Any) -> dict[str, Any]:
    functions = {}
    for program in PROGRAMS:
        try:
            attach = {} if program.kind == "sock_ops" else {"attach_type": libbpf.ATTACH_TYPES[program.attach_type]}
            functions[program.name] = module.load_func(program.name.encode(), program.type_number, **attach)
        except Exception as error:
            hint = "; does it allow BPF (lockdown, CAP_BPF)?" if ct.get_errno() == errno.EPERM else ""
            raise MeshError(f"the kernel refuses {program.name}: {error}{hint}") from error
    return functions


def _pin(functions: Mapping[str, Any], directory: Path) -> None:
    for name, function in functions.items():
        libbpf.pin(function.fd, directory / name)


def _layouts(code: source.Source) -> dict[str, dict[str, Any]]:
    """Every map as the compiler lays it out and the kernel makes it; these are not pinned and vanish."""
    try:
        module = _module(_PIN.sub('"', code.declarations) + _NOTHING, [])
    except Exception as error:
        raise MeshError(f"the maps do not compile, or the kernel refuses one: {error}") from error
    return {name: _map(module, name) for name in _names(code)}


def _names(code: source.Source) -> list[str]:
    return [*code.records, *re.findall(r"^struct \w+_table_t (mesh_\w+) = ", code.declarations, re.MULTILINE)]


def _map(module: Any, name: str) -> dict[str, Any]:
    from bcc import lib  # noqa: PLC0415  see `_module`

    raw = name.encode()
    descriptor = lib.bpf_table_fd(module.module, raw)
    # as BPF.get_table does, which knows neither sockets nor socket storage
    key, value = (
        module._decode_table_type(json.loads(describe(module.module, raw)))  # noqa: SLF001  has no public name
        for describe in (lib.bpf_table_key_desc, lib.bpf_table_leaf_desc)
    )
    try:
        fields = {"key": _fields(key), "value": _fields(value)}
    except KeyError as error:
        raise MeshError(f"map {name} has a member of {error} bytes: a manifest knows integers, text and addresses only") from error
    return {**_described(descriptor), **fields, "key_size": ct.sizeof(key), "value_size": ct.sizeof(value)}


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
