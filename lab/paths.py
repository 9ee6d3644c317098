"""Where a lab keeps things: the one place that knows its names in /run, in the cgroup tree, in /run/netns and in the BPF file system.

Called by everything in the lab. There is one lab a machine, so these are functions of names alone: `lab down` finds everything without
knowing what `lab up` had in mind.
"""

from __future__ import annotations

from pathlib import Path

from lab import cgroup, netns
from lab.topology import Node, Outside, Place, Pod

PREFIX = "meshlab"
RUN = Path("/run/meshagent-lab")
"""The lab's own directory: state, logs, keys. Always on a tmpfs, so that no private key reaches a disk."""
STATE = RUN / "state.json"
LOGS = RUN / "logs"
PKI = RUN / "pki"
CA = RUN / "ca"
"""State of the controller's certificate authority."""
PAGE_SOCKET = RUN / "page.sock"
"""The controller's page: `curl --unix-socket`, or from a browser elsewhere `ssh -L 8080:/run/meshagent-lab/page.sock`."""
HOSTS = RUN / "hosts"
RESOURCES = RUN / "resources"
"""What the controller reads: `meshagent apply` stores its documents there."""
AGENT_STATE = RUN / "state"
AGENT_RUN = Path("/run/meshagent")
CONTROLLER_SOCKET = AGENT_RUN / "controller.sock"
BPF = Path("/sys/fs/bpf")
PINS = BPF / "meshagent"
WIRE_NETNS = f"{PREFIX}-wire"
CONTROLLER_NETNS = f"{PREFIX}-controller"


def cgroup_root() -> Path:
    """Return the cgroup that holds the whole lab."""
    return cgroup.mount_point() / PREFIX


def node_cgroup(node: str) -> Path:
    """Return the cgroup that an agent serves."""
    return cgroup_root() / node


def agent_cgroup(node: str) -> Path:
    """Return the cgroup of the agent itself."""
    return node_cgroup(node) / "agent"


def controller_cgroup() -> Path:
    """Return the controller's cgroup."""
    return cgroup_root() / "controller"


def place_cgroup(place: Place) -> Path:
    """Return the cgroup that the processes of a pod, of a host outside, or a shell on a node run in."""
    if isinstance(place, Pod):
        return node_cgroup(place.node) / "pods" / f"{place.namespace}_{place.name}"
    if isinstance(place, Outside):
        return cgroup_root() / "outside" / place.name
    return node_cgroup(place.name) / "shell"


def place_netns(place: Place) -> str:
    """Return the name of a place's network namespace. No DNS label contains "_", so pods and others never meet."""
    if isinstance(place, Pod):
        return f"{PREFIX}-{place.namespace}_{place.name}"
    return f"{PREFIX}-{place.name}"


def place_hosts(place: Place) -> Path:
    """Return the file that a place sees as /etc/hosts."""
    return HOSTS / place_netns(place)


def agent_run(node: str) -> Path:
    """Return an agent's run directory."""
    return AGENT_RUN / node


def agent_pins(node: str) -> Path:
    """Return an agent's pin directory."""
    return PINS / node


def agent_state(node: str) -> Path:
    """Return an agent's state directory."""
    return AGENT_STATE / node


def log(name: str) -> Path:
    """Return the log file of a program: "controller", "agent-NODE" or "NAMESPACE_POD"."""
    return LOGS / f"{name}.log"


def node_netns(node: Node) -> Path:
    """Return the path of a node's network namespace."""
    return netns.path(place_netns(node))
