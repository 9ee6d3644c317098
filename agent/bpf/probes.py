"""Whether this kernel takes what the programs are made of, tried piece by piece: program types, helpers, map types. Attaches nothing, and nothing stays.

Called by `meshagent check`. A whole set of programs that the verifier refuses says only what came first; these say all that is missing by its name, and
for what it is needed. No kernel version is looked at: distributions carry features back and leave others out. There are no kfuncs among what is needed.

bpf(2) is called as it is: libbpf's own probes know only the words in which verifiers up to Linux 6.9 say that a helper may not be called.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import platform
import struct
from dataclasses import dataclass
from typing import Final

from agent.bpf.libbpf import ATTACH_TYPES
from agent.bpf.manifest import PROGRAMS
from agent.errors import EnvironmentUnfit

_SYSCALL: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}  # asm/unistd.h, __NR_bpf
_MAP_CREATE, _PROG_LOAD, _BTF_LOAD = 0, 5, 18  # include/uapi/linux/bpf.h, enum bpf_cmd
_ATTRIBUTES: Final = 128
"""Bytes of union bpf_attr: kernels take a longer one than theirs if what they do not know is zero."""
_CALL, _EXIT, _MOV_IMM = 0x85, 0x95, 0xB7
_RETURN: Final = struct.pack("=BBhi", _MOV_IMM, 0, 0, 1)
_NOT_ALLOWED: Final = ("unknown func", "invalid func", "program of this type cannot use helper")
"""What the verifier says of a helper that does not exist, or not for this type (kernel/bpf/verifier.c, check_helper_call)."""
_NO_PREALLOC: Final = 1  # BPF_F_NO_PREALLOC

HELPERS: Final = {  # enum bpf_func_id; by what uses them in bpf_src
    "cgroup_sock_addr": {
        "ktime_get_ns": 5,
        "get_prandom_u32": 7,
        "get_current_pid_tgid": 14,
        "get_current_comm": 16,
        "get_socket_cookie": 46,
        "bind": 64,
        "get_current_cgroup_id": 80,
        "sk_lookup_tcp": 84,
        "sk_release": 86,
        "sk_storage_get": 107,
        "sk_storage_delete": 108,
        "get_netns_cookie": 122,
        "ringbuf_reserve": 131,
        "ringbuf_submit": 132,
        "set_retval": 187,
    },
    "sock_ops": {
        "get_socket_cookie": 46,
        "sock_ops_cb_flags_set": 59,
        "sock_hash_update": 70,
        "sk_storage_get": 107,
        "get_netns_cookie": 122,
        "ringbuf_reserve": 131,
    },
    "cgroup_sockopt": {"sk_storage_get": 107, "get_netns_cookie": 122},
    "cgroup_sysctl": {
        "ktime_get_ns": 5,
        "sysctl_get_name": 101,
        "sysctl_get_new_value": 103,
        "get_current_ancestor_cgroup_id": 123,
        "ringbuf_reserve": 131,
    },
    "cgroup_sock": {"get_current_ancestor_cgroup_id": 123},
    "sk_msg": {"sk_storage_get": 107, "msg_redirect_hash": 71},
    "sk_lookup": {"ktime_get_ns": 5, "sk_release": 86, "sk_assign": 124, "ringbuf_reserve": 131},
}
OPTIONAL: Final = {
    ("helper", "cgroup_sock_addr", "set_retval"): "refused connections fail with EPERM instead of ECONNREFUSED",
    (
        "helper",
        "cgroup_sysctl",
        "get_current_ancestor_cgroup_id",
    ): "pods wait for an agent that is away, and are not held until they are in the mesh",
    ("program", "sk_msg", "sk_msg_verdict"): "no workload can be accelerated",
    ("helper", "sk_msg", "msg_redirect_hash"): "no workload can be accelerated",
    ("helper", "sk_msg", "sk_storage_get"): "no workload can be accelerated",
}
"""What is done without, and what that means."""
MAPS: Final = {  # enum bpf_map_type, with sizes of key and value that each kind takes
    "hash": (1, 4, 4),
    "array": (2, 4, 4),
    "percpu_hash": (5, 4, 8),
    "percpu_array": (6, 4, 8),
    "lru_hash": (9, 4, 4),
    "lpm_trie": (11, 8, 4),
    "sockhash": (18, 4, 8),
    "sk_storage": (24, 4, 4),
    "ringbuf": (27, 0, 0),
}


@dataclass(frozen=True, slots=True)
class Lack:
    """One piece that the kernel does not take. `kind`: "program", "helper" or "map"; `of`: the program type that would call a helper."""

    kind: str
    of: str
    name: str
    said: str

    @property
    def loss(self) -> str:
        """What goes on without it, "" if nothing does."""
        return OPTIONAL.get((self.kind, self.of, self.name), "")


def lacking() -> list[Lack]:
    """Try everything once: about 50 calls of bpf(2), some milliseconds. Raises EnvironmentUnfit if nothing can be tried."""
    if platform.machine() not in _SYSCALL:
        raise EnvironmentUnfit(f"the number of bpf(2) on {platform.machine()} is not known (agent/bpf/probes.py)")
    found = []
    types = {program.kind: program.type_number for program in PROGRAMS}
    first = PROGRAMS[0]
    if _load(first.type_number, first.attach_type, _RETURN) == (errno.EPERM, ""):
        raise EnvironmentUnfit("the kernel does not let this process use bpf(2): CAP_BPF is missing, or the kernel is locked down")
    for kind, attach in sorted({(program.kind, program.attach_type) for program in PROGRAMS}):
        if said := program(types[kind], attach):
            found.append(Lack("program", kind, attach, said))
    refused = {lack.of for lack in found}
    for kind, helpers in HELPERS.items():
        if kind not in refused:
            attach = next(p.attach_type for p in PROGRAMS if p.kind == kind)
            found += [Lack("helper", kind, name, said) for name, number in helpers.items() if (said := helper(types[kind], attach, number))]
    found += [Lack("map", "", name, said) for name in MAPS if (said := table(name))]
    return found


def program(kind: int, attach_type: str) -> str:
    """Why the kernel takes no program of this type for this hook, "" if it does."""
    code, log = _load(kind, attach_type, _RETURN)
    return "" if not code else _words(code, log)


def helper(kind: int, attach_type: str, number: int) -> str:
    """Why programs of this type may not call this helper, "" if they may. What else is wrong with the call does not matter."""
    code, log = _load(kind, attach_type, struct.pack("=BBhi", _CALL, 0, 0, number))
    return _words(code, log) if code and (not log or any(words in log for words in _NOT_ALLOWED)) else ""


def table(name: str) -> str:
    """Why the kernel makes no map of this type, "" if it does."""
    number, key, value = MAPS[name]
    btf = -1
    try:
        rows = 4096 if name == "ringbuf" else 0 if name == "sk_storage" else 1
        flags = _NO_PREALLOC if name in {"lpm_trie", "sk_storage"} else 0
        types = b""
        if name == "sk_storage":  # whose key and value must be described
            btf = _btf()
            types = struct.pack("=28xIII", btf, 1, 1)
        os.close(_bpf(_MAP_CREATE, struct.pack("=IIIII", number, key, value, rows, flags) + types))
    except OSError as error:
        return _words(error.errno or 0, "")
    finally:
        if btf >= 0:
            os.close(btf)
    return ""


def _load(kind: int, attach_type: str, instruction: bytes) -> tuple[int, str]:
    """(errno, what the verifier said) of loading one instruction and an exit; (0, "") if it is taken."""
    code = ct.create_string_buffer(instruction + struct.pack("=BBhi", _EXIT, 0, 0, 0), 16)
    licence, log = ct.create_string_buffer(b"GPL"), ct.create_string_buffer(8192)
    expected = 0 if attach_type == "cgroup_sock_ops" else ATTACH_TYPES[attach_type]
    request = struct.pack(
        "=IIQQIIQII16sII",
        *(kind, 2, ct.addressof(code), ct.addressof(licence), 1, len(log), ct.addressof(log), 0, 0, b"", 0, expected),
    )
    try:
        os.close(_bpf(_PROG_LOAD, request))
    except OSError as error:
        return error.errno or errno.EINVAL, log.value.decode(errors="replace")
    return 0, ""


def _btf() -> int:
    """Descriptor of types that know one: int (Documentation/bpf/btf.rst)."""
    types = struct.pack("=IIII", 1, 1 << 24, 4, 1 << 24 | 32)  # BTF_KIND_INT, 4 bytes, signed, 32 bits
    names = b"\0int\0"
    blob = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names)) + types + names
    held = ct.create_string_buffer(blob, len(blob))
    return _bpf(_BTF_LOAD, struct.pack("=QQIII", ct.addressof(held), 0, len(blob), 0, 0))


def _bpf(command: int, request: bytes) -> int:
    held = ct.create_string_buffer(request, _ATTRIBUTES)
    result = ct.CDLL(None, use_errno=True).syscall(_SYSCALL[platform.machine()], command, held, _ATTRIBUTES)
    if result < 0:
        code = ct.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def _words(code: int, log: str) -> str:
    said = next((line for line in log.splitlines() if any(words in line for words in _NOT_ALLOWED)), "")
    return said or os.strerror(code)
