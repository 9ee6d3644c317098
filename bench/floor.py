"""Programs that do the least: what nobody's connect() hook can go below on this machine. Used by `bench.hooks`.

Written as instructions and BTF by hand, because only the loader child may import bcc (include/uapi/linux/bpf.h, include/uapi/linux/btf.h).
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.bpf import libbpf
from agent.bpf.manifest import PROGRAMS
from lab.errors import LabError

EMPTY = "empty"
"""Allows."""
RECORD = "record"
"""Makes a socket storage and allows: the record that ends with its socket, on which the mesh counts, closes and explains a connection."""
_ATTACH_TYPE = "cgroup_inet4_connect"
_SK_STORAGE, _NO_PREALLOC = 24, 1  # BPF_MAP_TYPE_SK_STORAGE, BPF_F_NO_PREALLOC
_GET, _CREATE = 107, 1  # BPF_FUNC_sk_storage_get, BPF_SK_STORAGE_GET_F_CREATE
_SK = 64  # offset of sk in struct bpf_sock_addr


class _LoadOptions(ct.Structure):
    """The beginning of struct bpf_prog_load_opts (tools/lib/bpf/bpf.h)."""

    _fields_ = (("sz", ct.c_size_t), ("attempts", ct.c_int), ("expected_attach_type", ct.c_int))


class _MapOptions(ct.Structure):
    """The beginning of struct bpf_map_create_opts (tools/lib/bpf/bpf.h)."""

    _fields_ = (
        ("sz", ct.c_size_t),
        *((name, ct.c_uint32) for name in ("btf_fd", "btf_key_type_id", "btf_value_type_id", "vmlinux_value_type_id", "inner_map_fd")),
        *((name, ct.c_uint32) for name in ("map_flags",)),
    )


@contextmanager
def attached(place: Path, record_bytes: int) -> Iterator[dict[str, int]]:
    """Attach both below a cgroup; yields their descriptors by name. Nothing pins them: they go with the last descriptor."""
    library = ct.CDLL("libbpf.so.1", use_errno=True)
    with contextlib.ExitStack() as stack:

        def kept(descriptor: int, what: str) -> int:
            if descriptor < 0:
                raise LabError(f"the kernel refuses {what}: {os.strerror(ct.get_errno())}")
            stack.callback(os.close, descriptor)
            return descriptor

        text = _btf(record_bytes)
        btf = kept(library.bpf_btf_load(text, ct.c_size_t(len(text)), None), "types")
        made = _MapOptions(ct.sizeof(_MapOptions), btf, 1, 2, 0, 0, _NO_PREALLOC)
        storage = kept(library.bpf_map_create(_SK_STORAGE, b"floor", 4, record_bytes, 0, ct.byref(made)), "a socket storage")
        directory = kept(os.open(place, os.O_RDONLY | os.O_CLOEXEC), "the cgroup")
        kind = next(program.type_number for program in PROGRAMS if program.attach_type == _ATTACH_TYPE)
        options = _LoadOptions(ct.sizeof(_LoadOptions), 0, libbpf.ATTACH_TYPES[_ATTACH_TYPE])
        found = {}
        for name, code in {EMPTY: _ALLOW, RECORD: _make(storage) + _ALLOW}.items():
            loaded = library.bpf_prog_load(kind, name.encode(), b"GPL", code, ct.c_size_t(len(code) // 8), ct.byref(options))
            found[name] = kept(loaded, f"the program {name}")
            kept(libbpf.link_create(found[name], directory, _ATTACH_TYPE), "a link")
        yield found


def _instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, number: int = 0) -> bytes:
    """One struct bpf_insn of a little-endian machine."""
    return struct.pack("<BBhi", code, source << 4 | target, offset, number)


_ALLOW = _instruction(0xB7, 0, number=1) + _instruction(0x95)  # r0 = 1; exit


def _make(storage: int) -> bytes:
    """`bpf_sk_storage_get(&storage, ctx->sk, NULL, CREATE)`, if there is a socket."""
    return b"".join(
        [
            _instruction(0x79, 2, 1, _SK),  # r2 = ctx->sk
            _instruction(0x15, 2, offset=5),  # without one: past the call
            _instruction(0x18, 1, 1, number=storage),  # r1 = map; two instructions long
            _instruction(0),
            _instruction(0xB7, 3),
            _instruction(0xB7, 4, number=_CREATE),
            _instruction(0x85, number=_GET),
        ]
    )


def _btf(record_bytes: int) -> bytes:
    """Type 1: int, the key. Type 2: an array of them, the record."""
    names = b"\0int\0"
    types = struct.pack("=IIII", 1, 1 << 24, 4, 1 << 24 | 32) + struct.pack("=IIIIII", 0, 3 << 24, 0, 1, 1, record_bytes // 4)
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names)) + types + names
