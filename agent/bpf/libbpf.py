"""The few libbpf calls that the agent needs, as Python functions on ints and bytes.

Owned by `agent.bpf`; nothing else may import it. Every failure is an OSError with the kernel's errno. Source of the prototypes:
https://github.com/libbpf/libbpf/blob/v1.1.0/src/bpf.h and libbpf.h (the same in 0.5, which Ubuntu 22.04 has).
"""

from __future__ import annotations

import ctypes as ct
import ctypes.util
import errno
import functools
import os
import platform
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.errors import EnvironmentUnfit

BPF_ANY = 0
BPF_NOEXIST = 1
BPF_F_QUERY_EFFECTIVE = 1
BPF_F_ALLOW_MULTI = 2
_BATCH_BYTES = 4 << 20

_LINK_NETNS = 5  # include/uapi/linux/bpf.h, enum bpf_link_type

ATTACH_TYPES = {  # include/uapi/linux/bpf.h, enum bpf_attach_type
    "cgroup_inet_sock_create": 2,
    "cgroup_sock_ops": 3,
    "sk_msg_verdict": 7,
    "cgroup_inet4_connect": 10,
    "cgroup_inet6_connect": 11,
    "cgroup_udp4_sendmsg": 14,
    "cgroup_udp6_sendmsg": 15,
    "cgroup_sysctl": 18,
    "cgroup_udp4_recvmsg": 19,
    "cgroup_udp6_recvmsg": 20,
    "cgroup_getsockopt": 21,
    "cgroup_setsockopt": 22,
    "cgroup_inet4_getpeername": 29,
    "cgroup_inet6_getpeername": 30,
    "sk_lookup": 36,
}


@functools.cache
def _lib() -> ct.CDLL:
    for name in ("libbpf.so.1", "libbpf.so.0"):
        try:
            return ct.CDLL(name, use_errno=True)
        except OSError:
            continue
    raise EnvironmentUnfit("libbpf is not installed: install Debian's libbpf1 (Ubuntu 22.04: libbpf0)")


def _checked(result: int, what: str) -> int:
    """libbpf 1 returns -errno and sets errno, libbpf 0 returns -1 and sets errno."""
    if result < 0:
        code = ct.get_errno() or -result
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356}  # asm/unistd.h, __NR_membarrier
_MEMBARRIER_GLOBAL = 1  # include/uapi/linux/membarrier.h


def wait_for_programs() -> None:
    """Return when every program that runs now has ended; takes some milliseconds.

    membarrier(2) with MEMBARRIER_CMD_GLOBAL waits for an RCU grace period (kernel/sched/membarrier.c, synchronize_rcu), and these programs run within
    RCU read-side sections (kernel/bpf/cgroup.c, bpf_prog_run_array_cg). Where the kernel refuses it (nohz_full), or does nothing because there is one CPU
    only, a pause has to do.
    """
    number = _MEMBARRIER.get(platform.machine())
    if number is None or os.sysconf("SC_NPROCESSORS_ONLN") == 1 or ct.CDLL(None, use_errno=True).syscall(number, _MEMBARRIER_GLOBAL, 0, 0):
        time.sleep(0.05)


def open_pin(path: Path) -> int:
    """File descriptor of the map, program or link pinned at `path`."""
    return _checked(_lib().bpf_obj_get(os.fsencode(path)), f"open pin {path}")


def pin(fd: int, path: Path) -> None:
    """Pin an object, so that it outlives this process."""
    _checked(_lib().bpf_obj_pin(fd, os.fsencode(path)), f"pin {path}")


def link_create(program: int, target: int, attach_type: str) -> int:
    """Attach a program to a cgroup or network namespace through a bpf_link; other people's programs stay attached."""
    return _checked(_lib().bpf_link_create(program, target, ATTACH_TYPES[attach_type], None), f"attach {attach_type}")


def program_attach(program: int, target: int, attach_type: str) -> None:
    """Attach without a link, for what has none: a program on a map of sockets. Replaces the one before."""
    _checked(_lib().bpf_prog_attach(program, target, ATTACH_TYPES[attach_type], 0), f"attach {attach_type}")


def link_update(link: int, program: int) -> None:
    """Replace a link's program atomically: there is no moment without one."""
    _checked(_lib().bpf_link_update(link, program, None), "replace program")


def link_detach(link: int) -> None:
    """Take a link's program off before this returns. Where only the pin goes it is a moment later (kernel/bpf/syscall.c, bpf_link_put)."""
    _checked(_lib().bpf_link_detach(link), "detach program")


def object_info(fd: int, size: int = 256) -> bytes:
    """Raw struct bpf_map_info, bpf_prog_info or bpf_link_info; each begins with two __u32: type and id."""
    info = ct.create_string_buffer(size)
    length = ct.c_uint32(size)
    _checked(_lib().bpf_obj_get_info_by_fd(fd, info, ct.byref(length)), "object info")
    return info.raw[: length.value]


def program_tag(fd: int) -> bytes:
    """The kernel's hash of a program's instructions, the same for the same ones whatever maps they use (struct bpf_prog_info: type, id, tag)."""
    return object_info(fd)[8:16]


def object_id(fd: int) -> int:
    """Kernel id of a map, program or link; no other object of its kind gets the same within a boot."""
    return int(struct.unpack_from("=II", object_info(fd))[1])


def map_flags(fd: int) -> int:
    """BPF_F_* that a map was made with (struct bpf_map_info)."""
    return int(struct.unpack_from("=I", object_info(fd), 20)[0])


def map_info(fd: int) -> tuple[int, int, int, int]:
    """Type, key size, value size in bytes, and capacity of a map (struct bpf_map_info)."""
    kind, _, key_size, value_size, max_entries = struct.unpack_from("=IIIII", object_info(fd))
    return kind, key_size, value_size, max_entries


def link_program_id(fd: int) -> int:
    """Kernel id of the program that a link runs now (struct bpf_link_info: type, id, prog_id)."""
    return int(struct.unpack_from("=III", object_info(fd))[2])


def link_target(fd: int) -> int:
    """What a link is attached to: the cgroup's id or the network namespace's inode, 0 if that is gone (struct bpf_link_info, cgroup and netns)."""
    info = object_info(fd)
    kind = struct.unpack_from("=I", info)[0]
    return int(struct.unpack_from("=I" if kind == _LINK_NETNS else "=Q", info, 16)[0])


def effective_programs(cgroup: int, attach_type: str) -> list[int]:
    """Ids of the programs that run for a cgroup, inherited ones included, in the order in which they run."""
    return _query(cgroup, attach_type, BPF_F_QUERY_EFFECTIVE)[0]


def attached_programs(cgroup: int, attach_type: str) -> tuple[list[int], int]:
    """Ids of the programs that are attached to this very cgroup, and how (BPF_F_ALLOW_*, 0 if none is)."""
    return _query(cgroup, attach_type, 0)


def namespace_programs(netns: int, attach_type: str) -> list[int]:
    """Ids of the programs that run for a network namespace (kernel/bpf/net_namespace.c, netns_bpf_prog_query: links are included)."""
    return _query(netns, attach_type, 0)[0]


def program_name(number: int) -> str:
    """Name of a program by id, at most 15 characters; "" if it has none or is gone (struct bpf_prog_info, name)."""
    fd = _lib().bpf_prog_get_fd_by_id(ct.c_uint32(number))
    if fd < 0:
        return ""
    try:
        return object_info(fd)[64:80].split(b"\0", 1)[0].decode(errors="replace")
    finally:
        os.close(fd)


def _query(target: int, attach_type: str, query_flags: int) -> tuple[list[int], int]:
    ids = (ct.c_uint32 * 64)()
    count = ct.c_uint32(64)
    flags = ct.c_uint32(0)
    _checked(
        _lib().bpf_prog_query(target, ATTACH_TYPES[attach_type], query_flags, ct.byref(flags), ids, ct.byref(count)),
        f"query {attach_type} programs",
    )
    return list(ids[: count.value]), flags.value


@functools.cache
def possible_cpus() -> int:
    """Number of values that a per-CPU element has."""
    return _checked(_lib().libbpf_num_possible_cpus(), "count CPUs")


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """One element, or None. `value_size` counts all CPUs of a per-CPU map."""
    value = ct.create_string_buffer(value_size)
    if _lib().bpf_map_lookup_elem(fd, key, value) < 0:
        if ct.get_errno() == errno.ENOENT:
            return None
        _checked(-1, "look up map element")
    return value.raw


def update(fd: int, key: bytes, value: bytes) -> None:
    """Write one element."""
    _checked(_lib().bpf_map_update_elem(fd, key, value, ct.c_uint64(BPF_ANY)), "write map element")


def insert(fd: int, key: bytes, value: bytes) -> None:
    """Write one element; EEXIST if there is one."""
    _checked(_lib().bpf_map_update_elem(fd, key, value, ct.c_uint64(BPF_NOEXIST)), "insert map element")


def update_batch(fd: int, keys: bytes, values: bytes, count: int) -> None:
    """Write `count` elements with one system call."""
    if not count:
        return
    n = ct.c_uint32(count)
    _checked(_lib().bpf_map_update_batch(fd, keys, values, ct.byref(n), None), f"write {count} map elements")


def delete(fd: int, key: bytes) -> bool:
    """Remove one element; false if there was none."""
    if _lib().bpf_map_delete_elem(fd, key) >= 0:
        return True
    if ct.get_errno() != errno.ENOENT:
        _checked(-1, "delete map element")
    return False


def items(fd: int, key_size: int, value_size: int, chunk: int = 4096) -> Iterator[tuple[bytes, bytes]]:
    """Every element of a hash map, read in batches.

    `value_size` counts all CPUs of a per-CPU map. An element that changes meanwhile may be seen before or after the change; with many deletions
    in between one may be seen twice (kernel/bpf/hashtab.c, __htab_map_lookup_and_delete_batch).
    """
    for number, keys, values in _batches(fd, key_size, value_size, chunk):
        raw_keys, raw_values = keys.raw, values.raw
        for i in range(number):
            yield raw_keys[i * key_size : (i + 1) * key_size], raw_values[i * value_size : (i + 1) * value_size]


def count(fd: int, key_size: int, value_size: int) -> int:
    """How many elements a hash map holds: the kernel keeps no number that can be asked for. About 0.1 us each."""
    return sum(number for number, _, _ in _batches(fd, key_size, value_size, 4096))


_Buffer = ct.Array[ct.c_char]


def _batches(fd: int, key_size: int, value_size: int, chunk: int) -> Iterator[tuple[int, _Buffer, _Buffer]]:
    """(number of elements, their keys, their values); the buffers are used again for the next ones."""
    chunk = max(16, min(chunk, _BATCH_BYTES // value_size))  # values of per-CPU maps grow with the machine
    cursor = ct.create_string_buffer(max(key_size, 8))  # an opaque position: a bucket number for hash maps
    started = False
    size, keys, values = 0, ct.create_string_buffer(0), ct.create_string_buffer(0)
    while True:
        if chunk != size:
            size, keys, values = chunk, ct.create_string_buffer(key_size * chunk), ct.create_string_buffer(value_size * chunk)
        number = ct.c_uint32(chunk)
        result = _lib().bpf_map_lookup_batch(fd, cursor if started else None, cursor, keys, values, ct.byref(number), None)
        code = ct.get_errno() if result < 0 else 0
        if code == errno.ENOSPC:  # one bucket holds more than the chunk
            chunk *= 2
            continue
        if code not in (0, errno.ENOENT):
            _checked(-1, "read map")
        yield number.value, keys, values
        if code == errno.ENOENT:
            return
        started = True


_SAMPLE = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_size_t)


class RingBuffer:
    """Reader of one BPF ring buffer; `fileno` becomes readable when records wait."""

    def __init__(self, fd: int, on_record: Callable[[bytes], None]) -> None:
        """`on_record` gets each record's bytes, in order, from within `consume`."""

        def sample(_context: int, data: int, size: int) -> int:
            on_record(ct.string_at(data, size))
            return 0

        self._callback = _SAMPLE(sample)  # the C side keeps only a pointer
        new = _lib().ring_buffer__new
        new.restype = ct.c_void_p
        handle = new(fd, self._callback, None, None)
        if not handle:
            _checked(-1, "open ring buffer")
        self._handle = ct.c_void_p(handle)

    def fileno(self) -> int:
        """An epoll descriptor."""
        return _checked(_lib().ring_buffer__epoll_fd(self._handle), "ring buffer descriptor")

    def consume(self) -> int:
        """Deliver what waits; returns the number of records."""
        return _checked(_lib().ring_buffer__consume(self._handle), "read ring buffer")

    def close(self) -> None:
        """Free the mapping."""
        if self._handle:
            _lib().ring_buffer__free(self._handle)
            self._handle = ct.c_void_p()
