"""Where processes are in the cgroup2 tree, as directories, and which of these the agent of a node serves. Used by `agent.drift` and `agent.identity`."""

from __future__ import annotations

import contextlib
from pathlib import Path

from agent import files

_SERVED = "cgroup"


class Tree:
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


def note_served(run_dir: Path, cgroup: Path) -> None:
    """Write down which cgroup the agent serves, for commands that do not have its environment."""
    files.write(run_dir / _SERVED, f"{cgroup}\n".encode())


def served(run_dir: Path) -> Path | None:
    """The cgroup of the agent that runs with this `run_dir`, or did; None if nobody wrote that down, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        found = Path((run_dir / _SERVED).read_text().removesuffix("\n"))
        return found if found.is_absolute() else None
    return None
