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

from agent import cgroups
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
    tree = cgroups.Tree(config.cgroup)
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
