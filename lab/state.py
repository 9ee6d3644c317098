"""What a running lab remembers in its state file, so that another process can look at it, add to it and take it down. Used by `lab.lab`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import paths, topology
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
                "processes": [{"name": p.name, "pid": p.pid, "started": p.started, "log": str(p.log)} for p in self.processes.values()],
            },
            indent=1,
        )
        if new:
            try:
                paths.STATE.touch(mode=0o600, exist_ok=False)
            except FileExistsError:
                raise LabError("a lab is up already, or was left half way: `meshagent lab down` takes it down") from None
        temporary = paths.STATE.with_suffix(".new")
        temporary.touch(mode=0o600)
        temporary.write_text(text)
        temporary.replace(paths.STATE)


def load() -> State | None:
    """Read the state file; None if there is no lab, or nothing of it but a name."""
    try:
        text = paths.STATE.read_text()
    except OSError:
        return None
    try:
        values: dict[str, Any] = json.loads(text)
    except ValueError:
        return None  # `up` was killed between claiming the file and writing it
    processes = [Process(p["name"], p["pid"], p["started"], Path(p["log"])) for p in values["processes"]]
    return State(
        topology=topology.parse(values["topology"], str(paths.STATE), Path(values["directory"])),
        mesh=values["mesh"],
        mounted_bpffs=values["mountedBpffs"],
        complete=values["complete"],
        processes={process.name: process for process in processes},
    )
