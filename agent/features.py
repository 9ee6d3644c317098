"""What the agent needs of the machine, checked before anything is touched. Each failure is one line that says what is missing and what to do."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Final

from agent.config import NAMES_ROOT, Config
from agent.errors import EnvironmentUnfit
from agent.netns import file_system

OLDEST_KERNEL = (5, 15)  # bpf_get_netns_cookie in sock_ops
SET_RETVAL_KERNEL = (5, 18)  # bpf_set_retval: lets connect() fail with ECONNREFUSED instead of EPERM
NAMES_CAPABILITIES: Final = {"KILL": 5, "SETGID": 6, "SETUID": 7, "SETPCAP": 8}  # include/uapi/linux/capability.h
SYSCTL_ANCESTOR_KERNEL = (6, 4)  # bpf_get_current_ancestor_cgroup_id in cgroup/sysctl: kernel/bpf/helpers.c, bpf_base_func_proto

_KUBELETS: Final = ("var/lib/kubelet", "etc/kubernetes/kubelet.conf", "var/lib/k0s/kubelet", "var/snap/microk8s")
"""Where a kubelet keeps its state (its option --root-dir) or its configuration: by default, with kubeadm, k0s (docs.k0sproject.io, Directories), MicroK8s."""


def kernel_version(release: str = "") -> tuple[int, int]:
    """Major and minor version of the running kernel, or of `release`."""
    match = re.match(r"(\d+)\.(\d+)", release or platform.release())
    if not match:
        raise EnvironmentUnfit(f"cannot tell the kernel version from {release or platform.release()!r}")
    return int(match[1]), int(match[2])


def check_root() -> None:
    """Loading programs, entering namespaces and mounting need root (CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN)."""
    if os.geteuid() != 0:
        raise EnvironmentUnfit("this needs root: run it with sudo, or as user 0 in a container")


def check(config: Config) -> None:
    """Raise EnvironmentUnfit for the first thing that is missing."""
    check_root()
    version = kernel_version()
    if version < OLDEST_KERNEL:
        raise EnvironmentUnfit(
            f"Linux {platform.release()} is too old: bpf_get_netns_cookie in sock_ops programs needs {OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or newer"
        )
    if file_system(config.cgroup) != "cgroup2":
        found = cgroup2_mount()
        hint = f"pass --cgroup {found}" if found else "mount it: mount -t cgroup2 none /sys/fs/cgroup"
        raise EnvironmentUnfit(f"{config.cgroup} is not in a cgroup2 file system: {hint}")
    if not config.cgroup.is_dir():
        raise EnvironmentUnfit(f"cgroup {config.cgroup} does not exist: create it, or pass another --cgroup")
    if file_system(config.pin_dir) != "bpf":
        raise EnvironmentUnfit(f"{config.pin_dir} is not in a BPF file system: mount it: mount -t bpf bpf /sys/fs/bpf")


def cgroup2_mount() -> Path | None:
    """Where cgroup2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hybrid hosts."""
    for path in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if path.is_dir() and file_system(path) == "cgroup2":
            return path
    return None


def kubernetes_node(root: Path = Path("/")) -> bool:
    """True if this machine, or the container that the agent runs in, belongs to a cluster: that has a DNS of its own."""
    return "KUBERNETES_SERVICE_HOST" in os.environ or any((root / place).exists() for place in _KUBELETS)


def capabilities(status: str) -> int:
    """Those in force, as bits, from the text of /proc/PID/status (proc(5), CapEff)."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return int(match[1], 16) if match else 0


def check_names(status: str) -> None:
    """Raise EnvironmentUnfit if name servers, which run as nobody, cannot be started or ended from a process with this /proc/PID/status."""
    held = capabilities(status)
    if missing := [name for name, number in NAMES_CAPABILITIES.items() if not held >> number & 1]:
        raise EnvironmentUnfit(
            f"--names needs {', '.join(missing)}, which this process lacks: name servers run as nobody, without any capability. Leave --names away, on a "
            f"Kubernetes node the cluster's DNS answers; or add them, and in a container mount the node's {NAMES_ROOT}"
        )


def compile_flags() -> tuple[str, ...]:
    """Compiler flags for what this kernel has beyond the oldest supported one."""
    newer = {"MESH_HAVE_SET_RETVAL": SET_RETVAL_KERNEL, "MESH_HAVE_SYSCTL_ANCESTOR": SYSCTL_ANCESTOR_KERNEL}
    return tuple(f"-D{name}" for name, version in newer.items() if kernel_version() >= version)
