"""Where a process's cgroup is on this file system, whatever the cgroup namespace it is seen from; the rest is in tests/kernel/test_enrolment.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.cgroups import Tree


@pytest.mark.parametrize(
    ("root", "path", "directory"),
    [
        pytest.param("/", "/kubepods/a", "/mnt/kubepods/a", id="host"),
        pytest.param("/", "/", "/mnt", id="the-root"),
        pytest.param("/node-1", "/node-1/pods/a", "/mnt/pods/a", id="part-of-the-tree-mounted"),
        pytest.param("/../..", "/../../kubepods/a", "/mnt/kubepods/a", id="the-hosts-tree-in-a-container"),
        pytest.param("/", "/../kubepods/a", None, id="above-what-is-mounted"),
        pytest.param("/node-1", "/node-2/a", None, id="beside-what-is-mounted"),
    ],
)
def test_a_cgroup_is_found_below_the_mount(root: str, path: str, directory: str | None) -> None:
    tree = Tree.__new__(Tree)
    tree._mount, tree._root = Path("/mnt"), root
    assert tree._directory(path) == (Path(directory) if directory else None)
