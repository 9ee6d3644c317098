"""The real receiver's program, run by the kernel on a connection that a test makes up (BPF_PROG_TEST_RUN, since Linux 5.13 for sk_lookup)."""

from __future__ import annotations

import ctypes as ct
import ipaddress
import os
import socket
import struct
from pathlib import Path

from agent.bpf import libbpf

PASS = 1  # include/uapi/linux/bpf.h, enum sk_action: SK_PASS; SK_DROP is 0


class _Options(ct.Structure):
    """struct bpf_test_run_opts (https://github.com/libbpf/libbpf/blob/v1.1.0/src/bpf.h)."""

    _fields_ = (
        ("sz", ct.c_size_t),
        ("data_in", ct.c_void_p),
        ("data_out", ct.c_void_p),
        ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32),
        ("ctx_in", ct.c_void_p),
        ("ctx_out", ct.c_void_p),
        ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32),
        ("retval", ct.c_uint32),
        ("repeat", ct.c_int),
        ("duration", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("cpu", ct.c_uint32),
        ("batch_size", ct.c_uint32),
    )


def receive(program: int, protocol: int, remote: tuple[str, int], local: tuple[str, int]) -> bool:
    """Does this sk_lookup program (a descriptor) let in what comes from `remote` to `local`?"""
    far, near = ipaddress.ip_address(remote[0]), ipaddress.ip_address(local[0])
    four = far.version == 4
    context = struct.pack(
        "=QII4s16s2sH4s16sI8x",
        0,
        socket.AF_INET if four else socket.AF_INET6,
        protocol,
        far.packed if four else bytes(4),
        bytes(16) if four else far.packed,
        struct.pack("!H", remote[1]),
        0,
        near.packed if four else bytes(4),
        bytes(16) if four else near.packed,
        local[1],
    )
    buffer = ct.create_string_buffer(context, len(context))
    options = _Options(sz=ct.sizeof(_Options), ctx_in=ct.cast(buffer, ct.c_void_p), ctx_size_in=len(context), repeat=1)
    if libbpf._lib().bpf_prog_test_run_opts(program, ct.byref(options)):
        code = ct.get_errno()
        raise OSError(code, f"run sk_lookup program: {os.strerror(code)}")
    return bool(options.retval == PASS)


def open_program(directory: Path, name: str) -> int:
    """Descriptor of a pinned program."""
    return libbpf.open_pin(directory / name)
