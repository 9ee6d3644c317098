"""`make bench-agent`: how long an agent of the shop takes from its start until it is ready, and how much memory it holds.

Cold: nothing of it is on the node (`meshagent uninstall` came before), so the loader compiles and loads the programs and Envoy is started.
Warm: it was killed, as in a crash or an upgrade; programs, maps, links and Envoy are there and are taken over. Time runs from the start of
the process, the interpreter's included, until /readyz answers 200. Memory is the resident set (VmRSS) of the agent's process once the shop
has settled; what it shares with other processes is counted in full. The loader is a child and has ended by then.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench.main import run
from bench.result import LEAST_ROUNDS, Result, Target
from lab import mesh, topology
from lab.cli import SHOP
from lab.errors import LabError
from lab.lab import Lab

NODE = "node-1"
START_S = 3.0
RSS_MB = 90.0
WITHIN = Target(1.0, at_least=False)
SETUP = f"the shop of lab/shop, two nodes; agent of {NODE}; no load, no pinning"


def measure(progress: Callable[[str], None]) -> list[Result]:
    """Bring the shop up and restart one of its agents again and again."""
    cold, warm, memory = [], [], []
    with Lab(topology.load(SHOP / "lab.yaml"), progress=progress) as lab:
        lab.apply(SHOP / "mesh")
        lab.settle()
        for i in range(LEAST_ROUNDS):
            progress(f"round {i + 1} of {LEAST_ROUNDS}")
            lab.stop_agent(NODE)
            if complaint := mesh.uninstall(NODE):
                raise LabError(f"meshagent uninstall on {NODE}: {complaint}")
            cold.append(lab.start_agent(NODE))
            lab.settle()
            lab.kill_agent(NODE)
            warm.append(lab.start_agent(NODE))
            lab.settle()
            memory.append(resident_mb(Path(f"/proc/{lab.agent_pid(NODE)}/status").read_text()))
    return [
        Result("agent-start-cold", "s", "target", tuple((value, START_S) for value in cold), SETUP, WITHIN),
        Result("agent-start-warm", "s", "target", tuple((value, START_S) for value in warm), SETUP, WITHIN),
        Result("agent-rss", "MB", "target", tuple((value, RSS_MB) for value in memory), SETUP, WITHIN),
    ]


def resident_mb(status: str) -> float:
    """Read VmRSS from the text of /proc/PID/status: kibibytes there, megabytes (10^6 bytes) here."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise LabError("the agent has no resident memory: it ended")
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(run(measure))
