"""Programs by themselves: ours, loaded and attached to nothing; the receiver's, run by the kernel on a connection that a test makes up; somebody else's.

The kernel runs one by itself with BPF_PROG_TEST_RUN, since Linux 5.13 for sk_lookup.
"""

from __future__ import annotations

import asyncio
import ctypes as ct
import ipaddress
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agent import files
from agent.bpf import libbpf
from agent.bpf.datapath import DataPath
from agent.config import Config
from lab import mounts, paths

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


@contextmanager
def loaded(root: Path) -> Iterator[tuple[Config, DataPath]]:
    """A data path that is attached to nothing; its files are below `root`."""
    mounted = mounts.mount_bpffs(paths.BPF)
    config = Config(node="here", controller="unix:none", pin_dir=paths.BPF / f"meshagent-{root.name}", run_dir=root / "run", state_dir=root)
    for directory in (config.pin_dir, config.run_dir):
        directory.mkdir()
    datapath = DataPath(config)
    try:
        asyncio.run(datapath.load())
        yield config, datapath
    finally:
        for table in datapath.maps.values():
            table.close()
        shutil.rmtree(config.pin_dir)
        if mounted:
            assert mounts.unmount_bpffs(paths.BPF)


def ids(directory: Path, question: Callable[[int], int] = libbpf.object_id) -> dict[str, int]:
    """What the kernel answers about each object that is pinned in a directory, by its name: its id, or that of the program that a link runs."""
    found = {}
    for pin in sorted(directory.iterdir()):
        with files.closing(libbpf.open_pin(pin)) as descriptor:
            found[pin.name] = question(descriptor)
    return found


def pinned(pins: Path) -> list[int]:
    """Ids of the programs that a node has pinned, in a stable order."""
    return [number for directory in sorted(pins.glob("programs-*")) for number in ids(directory).values()]


def running(pins: Path) -> dict[str, int]:
    """Ids of the programs that a node's links run."""
    return ids(pins / "links", libbpf.link_program_id)


_FOREIGN = """
import os, pathlib, sys, tempfile
sys.path.append("/usr/lib/python3/dist-packages")
from bcc import BPF
from agent.bpf import libbpf, shim
place, pin = os.open(sys.argv[1], os.O_RDONLY), pathlib.Path(sys.argv[2])
with tempfile.TemporaryDirectory() as headers:
    shim.build(pathlib.Path(headers))
    os.environ["BCC_KERNEL_SOURCE"] = headers
    module = BPF(text="int foreign(struct bpf_sock_addr *ctx) { return 1; }")
program = module.load_func("foreign", 18, attach_type=10)  # BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_CONNECT
if sys.argv[3] == "linked":
    libbpf.pin(libbpf.link_create(program.fd, place, "cgroup_inet4_connect"), pin)
else:
    libbpf.pin(program.fd, pin)
    BPF.attach_func(program, place, 10, 2 if sys.argv[3] == "attached" else 0)  # BPF_F_ALLOW_MULTI, or nobody beside it
print(libbpf.object_id(program.fd))
"""


@contextmanager
def foreign(cgroup: Path, *, linked: bool, alone: bool = False) -> Iterator[int]:
    """The id of somebody else's connect program, attached to a cgroup: by a link, until the end of the block, or without, as long as the cgroup lives;
    `alone`: so that no other may be beside it.
    """
    pin = paths.BPF / "foreign"
    argv = [sys.executable, "-c", _FOREIGN, str(cgroup), str(pin), "linked" if linked else "alone" if alone else "attached"]
    try:
        yield int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    finally:
        pin.unlink(missing_ok=True)
