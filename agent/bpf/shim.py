"""A tree that looks enough like kernel headers for bcc, made of UAPI headers only.

bcc wants `BCC_KERNEL_SOURCE`. Given this instead of distribution headers it needs no such package, compiles in a third of the time, and no program
can come to depend on a kernel-internal struct: the same source loads on every supported kernel. Used by the loader child.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from pathlib import Path

from agent.errors import EnvironmentUnfit

_ARCH = {"x86_64": "x86", "aarch64": "arm64", "ppc64le": "powerpc", "s390x": "s390", "riscv64": "riscv"}

_TYPES = """\
#include <uapi/linux/types.h>
#include <uapi/linux/stddef.h>
typedef __u8 u8; typedef __u16 u16; typedef __u32 u32; typedef __u64 u64;
typedef __s8 s8; typedef __s16 s16; typedef __s32 s32; typedef __s64 s64;
typedef _Bool bool; typedef unsigned long size_t; typedef unsigned long uintptr_t;
#define true 1
#define false 0
#define NULL ((void *)0)
"""


def build(directory: Path, uapi: Path = Path("/usr/include")) -> None:
    """Fill an empty directory; `uapi` is where linux-libc-dev puts its headers."""
    arch = _ARCH.get(platform.machine())
    if arch is None:
        raise EnvironmentUnfit(f"processor {platform.machine()} is not supported: only {', '.join(_ARCH)}")
    machine_headers = uapi / str(sysconfig.get_config_var("MULTIARCH")) / "asm"
    if not (uapi / "linux/bpf.h").exists() or not machine_headers.exists():
        raise EnvironmentUnfit(f"no UAPI headers below {uapi}: install Debian's linux-libc-dev")
    for path, text in {
        "include/linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
        "include/linux/log2.h": "",
        "include/linux/types.h": _TYPES,
        "include/uapi/linux/bpf.h": "",  # bcc brings its own copy
        f"arch/{arch}/include/asm/page.h": "",
    }.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for entry in os.scandir(uapi / "linux"):
        if entry.name != "bpf.h":
            (directory / "include/uapi/linux" / entry.name).symlink_to(entry.path)
    (directory / "include/asm-generic").symlink_to(uapi / "asm-generic")
    (directory / f"arch/{arch}/include/uapi").mkdir(parents=True)
    (directory / f"arch/{arch}/include/uapi/asm").symlink_to(machine_headers)
