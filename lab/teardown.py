"""Taking a lab down, whole or half-made, from any process. Called by `lab.lab`.

Goes by names (`lab.paths`), not by what some `up` remembers, so that it also cleans up after a crash. Doing it twice is fine.
"""

from __future__ import annotations

import functools
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from lab import cgroup, mesh, mounts, netns, network, paths
from lab.errors import LabError
from lab.state import State

_GRACE_S = 10.0


def run(state: State | None, progress: Callable[[str], None]) -> list[str]:
    """Remove everything; return what did not go as it should (each a line for people), [] if all is well."""
    problems: list[str] = []
    root = paths.cgroup_root()
    nodes = _nodes(state)
    if state is not None:
        _stop_mesh(state, progress, problems)
    for node in nodes:
        _attempt(problems, functools.partial(cgroup.kill, paths.agent_cgroup(node)))  # one that the state does not know
        if paths.agent_pins(node).exists() or paths.agent_run(node).exists():
            progress(f"uninstalling the agent of {node}")
            complaint = mesh.uninstall(node)
            if complaint:
                problems.append(f"meshagent uninstall on {node}: {complaint}")
    progress("stopping pods")
    _attempt(problems, lambda: cgroup.kill(root))
    for node in nodes:
        problems += [f"left behind by the agent of {node}: {leftover}" for leftover in _force(node)]
    progress("removing namespaces and cgroups")
    network.remove_all()
    _attempt(problems, lambda: cgroup.remove(root))
    _remove_files(state)
    return problems


def leftovers() -> list[str]:
    """Return what is left of a lab on this machine, [] if nothing is.

    Pins and sockets are not looked at: an agent that is not the lab's may own them. `run` reports those of the lab's nodes.
    """
    found = [f"namespace {name}" for name in netns.names(f"{paths.PREFIX}-")]
    root = paths.cgroup_root()
    found += [f"cgroup {root}"] if root.exists() else []
    found += [f"directory {paths.RUN}"] if paths.RUN.exists() else []
    found += [f"mount {path}" for path in mounts.below(paths.RUN)]
    return found


def _nodes(state: State | None) -> list[str]:
    """Return the nodes of the lab, from its state or from the cgroup tree."""
    found = {node.name for node in state.topology.nodes} if state is not None else set()
    root = paths.cgroup_root()
    if root.is_dir():
        found |= {path.name for path in root.iterdir() if path.is_dir()} - {"controller", "outside"}
    return sorted(found)


def _stop_mesh(state: State, progress: Callable[[str], None], problems: list[str]) -> None:
    """End agents, then the controller, the polite way first."""
    names = sorted(name for name in state.processes if name == "controller" or name.startswith("agent-"))
    for name in names:
        target = state.processes[name]
        if target.alive():
            progress(f"stopping {name}")
            if not target.stop(_GRACE_S):
                problems.append(f"{name} (pid {target.pid}) did not end within {_GRACE_S:.0f} s of SIGTERM and was killed")


def _force(node: str) -> list[str]:
    """Remove what `meshagent uninstall` should have removed; return what there was."""
    found: list[str] = []
    pins, run_dir, waypoint = paths.agent_pins(node), paths.agent_run(node), paths.node_cgroup(node) / "meshagent-waypoint"
    found += [f"mount {path}" for path in mounts.below(run_dir)]
    mounts.unmount_below(run_dir)
    found += [f"cgroup {waypoint}"] if waypoint.exists() else []
    for directory in (pins, run_dir):
        if directory.exists():
            found += [str(path) for path in directory.rglob("*") if not path.is_dir()]
            shutil.rmtree(directory, ignore_errors=True)
    return found


def _remove_files(state: State | None) -> None:
    """Remove run directories, mounts and the state file, which goes last."""
    _remove_stale_socket(paths.CONTROLLER_SOCKET)
    for directory in (paths.AGENT_RUN, paths.PINS):
        _rmdir(directory)
    if state is not None and state.mounted_bpffs:
        mounts.unmount_bpffs(paths.BPF)
    mounts.unmount_below(paths.RUN)
    shutil.rmtree(paths.RUN, ignore_errors=True)


def _remove_stale_socket(path: Path) -> None:
    """Remove the controller's socket, its lock and the keys that it kept unless somebody (a controller that is not the lab's) still listens there."""
    with socket.socket(socket.AF_UNIX) as client:
        if client.connect_ex(str(path)) != 0:
            for file in (path, path.with_name(path.name + ".lock"), path.with_name("jwks.json")):
                file.unlink(missing_ok=True)


def _rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        return  # not empty: somebody else's


def _attempt(problems: list[str], step: Callable[[], None]) -> None:
    try:
        step()
    except LabError as error:
        problems.append(str(error))
