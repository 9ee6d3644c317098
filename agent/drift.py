"""Whether the kernel does for each pod what the agent believes: found by looking at the pods' processes and at the hooks that really run for them.

Called by the supervisor in a worker thread now and then; changes nothing. What is checked of a workload: each of its processes lives below the cgroup
that the programs are attached to, the kernel's list of effective programs of that cgroup holds all of ours, and the receiver's check runs for its
namespace. A connection is judged by the cgroup that its socket was made in (kernel/cgroup/cgroup.c, cgroup_sk_alloc), so that a process that was moved
may have older sockets that behave otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from agent.bpf.datapath import DataPath, Foreign
from agent.config import Config
from agent.model import LocalWorkload


@dataclass(frozen=True, slots=True)
class Drift:
    """What a scan found."""

    reasons: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Why a workload's connections are not all redirected, by its name; those that are as they should be are not in it."""
    unlinked: frozenset[int] = frozenset()
    """Cookies of the namespaces for which the receiver's check does not run."""
    foreign: tuple[Foreign, ...] = ()


def scan(config: Config, datapath: DataPath, local: Iterable[LocalWorkload]) -> Drift:
    """Look at every process of the machine once: about 6 us each."""
    owners: dict[int, str] = {}
    reasons: dict[str, list[str]] = {}
    unlinked = set()
    for workload in local:
        try:
            owners[os.stat(workload.netns_path).st_ino] = workload.workload.name  # noqa: PTH116  as below
        except OSError:
            continue  # ended meanwhile
        if not datapath.receives(Path(workload.netns_path)):
            unlinked.add(workload.netns_cookie)
            reasons.setdefault(workload.workload.name, []).append(
                "the receiver's check is not linked to its network namespace, so that policy does not hold for what arrives there: "
                "somebody removed the link; the agent links it again"
            )
    tree = _Tree(config.cgroup)
    lacking: dict[Path, list[str]] = {}
    for pid, name in _processes(owners):
        cgroup = tree.of(pid)
        if cgroup is None:
            continue
        if cgroup != config.cgroup and config.cgroup not in cgroup.parents:
            reason = (
                f"process {pid} runs in cgroup {cgroup}, outside of --cgroup {config.cgroup}, and its connections are not redirected: "
                "move it below that cgroup, or start the agent with a --cgroup that is above both"
            )
        else:
            if cgroup not in lacking:
                lacking[cgroup] = datapath.lacking(cgroup)
            if not lacking[cgroup]:
                continue
            reason = (
                f"{', '.join(lacking[cgroup])} does not run for cgroup {cgroup} (process {pid}): its link was removed, or the cgroup was made anew; "
                "restart the agent"
            )
        if not any(_alike(reason, other) for other in reasons.get(name, ())):
            reasons.setdefault(name, []).append(reason)
    foreign = datapath.foreign([config.cgroup, config.waypoint_cgroup, *sorted(lacking)])
    return Drift(MappingProxyType({name: "; ".join(found) for name, found in reasons.items()}), frozenset(unlinked), tuple(foreign))


def _alike(reason: str, other: str) -> bool:
    """The same but for the process: one of a cgroup is enough to say."""
    return "cgroup" in reason and reason.partition("cgroup ")[2].partition(" ")[0] == other.partition("cgroup ")[2].partition(" ")[0]


def _processes(owners: Mapping[int, str]) -> Iterator[tuple[int, str]]:
    """(pid, workload) of each process whose main thread is in one of the namespaces, known by inode."""
    if not owners:
        return
    for entry in os.listdir("/proc"):  # noqa: PTH208  no Path for each of thousands of processes
        if entry.isdigit():
            try:
                owner = owners.get(os.stat(f"/proc/{entry}/ns/net").st_ino)  # noqa: PTH116
            except OSError:
                continue  # ended, or a zombie: it has no namespaces any more
            if owner is not None:
                yield int(entry), owner


class _Tree:
    """Directories of cgroups, below the mount that holds `cgroup`."""

    def __init__(self, cgroup: Path) -> None:
        self._mount, self._root = _mount_of(cgroup)

    def of(self, pid: int) -> Path | None:
        """The cgroup of a process; None if it has ended or its cgroup cannot be seen from here."""
        try:
            lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        except OSError:
            return None
        path = next((line[3:] for line in lines if line.startswith("0::")), "")
        if not path or path.endswith(" (deleted)"):
            return None
        return self._directory(path)

    def _directory(self, path: str) -> Path | None:
        """Both the mount's root and a process's path are seen from this process's cgroup namespace and may begin with "/.." (cgroup_namespaces(7))."""
        parts, root = _parts(path), _parts(self._root)
        if parts[: len(root)] != root or ".." in parts[len(root) :]:
            return None
        return self._mount.joinpath(*parts[len(root) :])


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _mount_of(cgroup: Path) -> tuple[Path, str]:
    """Mount point and root of the cgroup2 mount that holds a directory (proc(5), /proc/PID/mountinfo)."""
    best, root = Path("/"), "/"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 "):
            point = Path(fields.split()[4].encode().decode("unicode_escape"))
            if (point == cgroup or point in cgroup.parents) and len(point.parts) >= len(best.parts):
                best, root = point, fields.split()[3]
    return best, root
