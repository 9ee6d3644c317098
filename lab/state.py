"""What a running lab remembers in its state file, so that another process can look at it, add to it and take it down. Used by `lab.lab`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import cgroup, paths, process, topology
from lab.errors import LabError
from lab.process import Process
from lab.topology import Topology


@dataclass(slots=True)
class State:
    """A lab: what was asked for, what was started, what was mounted for it."""

    topology: Topology
    mesh: bool
    mounted_bpffs: bool = False
    complete: bool = False
    """False until `up` has come to its end."""
    owner: Process = field(default_factory=process.current)
    """Who brings it up, or brought it up: a lab without any process is that one's as long as it lives."""
    processes: dict[str, Process] = field(default_factory=dict)
    """By name: "controller", "agent-NODE", or a pod's NAMESPACE_POD."""

    def save(self, *, new: bool = False) -> None:
        """Write the state file, 0600, atomically; with `new`, only if there is none yet."""
        text = json.dumps(
            {
                "topology": topology.document(self.topology),
                "directory": str(self.topology.directory),
                "mesh": self.mesh,
                "mountedBpffs": self.mounted_bpffs,
                "complete": self.complete,
                "owner": _document(self.owner),
                "processes": [_document(p) for p in self.processes.values()],
            },
            indent=1,
        )
        temporary = paths.STATE.with_suffix(f".{os.getpid()}")
        temporary.touch(mode=0o600)
        temporary.write_text(text)
        if not new:
            temporary.replace(paths.STATE)
            return
        try:
            os.link(temporary, paths.STATE)
        except FileExistsError:
            raise LabError("a lab is up already: `meshagent lab down` takes it down") from None
        finally:
            temporary.unlink()

    def dead(self) -> bool:
        """Return whether nobody is left of it: who brought it up is gone, and so is every process in it (the machine's doing, or `kill -9`)."""
        return not self.owner.alive() and cgroup.wait_empty(paths.cgroup_root(), 0)


def load() -> State | None:
    """Read the state file; None if there is no lab."""
    try:
        values: dict[str, Any] = json.loads(paths.STATE.read_text())
    except FileNotFoundError:
        return None
    processes = [_process(p) for p in values["processes"]]
    return State(
        topology=topology.parse(values["topology"], str(paths.STATE), Path(values["directory"])),
        mesh=values["mesh"],
        mounted_bpffs=values["mountedBpffs"],
        complete=values["complete"],
        owner=_process(values["owner"]),
        processes={process.name: process for process in processes},
    )


def _document(target: Process) -> dict[str, Any]:
    return {"name": target.name, "pid": target.pid, "started": target.started, "log": str(target.log)}


def _process(values: dict[str, Any]) -> Process:
    return Process(values["name"], values["pid"], values["started"], Path(values["log"]))
