"""What is told of names and files by inotify, on real directories; network namespaces and cgroups are in tests/kernel."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.watch import Watch


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    made.close()


def told(watch: Watch) -> bool:
    """Is there news, and of a name or file that was asked for?"""
    if not select.select([watch.fileno()], [], [], 0)[0]:
        return False
    watch.drain()
    return watch.take_named()


def test_only_the_names_that_were_asked_for_are_told(tmp_path: Path, watch: Watch) -> None:
    watch.follow([f"{tmp_path}/wanted"])
    (tmp_path / "other").mkdir()
    assert not told(watch)
    (tmp_path / "wanted").mkdir()
    assert told(watch)
    assert watch.eager
    (tmp_path / "wanted").rmdir()
    assert told(watch)
    assert not told(watch)


def test_a_change_of_a_file_is_told(tmp_path: Path, watch: Watch) -> None:
    file, other = tmp_path / "cgroup.events", tmp_path / "other"
    file.touch()
    other.touch()
    watch.follow([], [str(file)])
    assert watch.complete
    other.write_text("x")
    assert not told(watch)
    file.write_text("populated 1")
    assert told(watch)
    assert watch.eager
    watch.follow([])
    told(watch)  # that nobody watches it any more
    file.write_text("populated 0")
    assert not told(watch)


def test_what_does_not_exist_yet_is_tried_again(tmp_path: Path, watch: Watch) -> None:
    watch.follow([f"{tmp_path}/later/name"], [f"{tmp_path}/later/file"])
    assert not watch.complete
    (tmp_path / "later").mkdir()
    (tmp_path / "later/file").touch()
    watch.retry()
    assert watch.complete
    (tmp_path / "later/name").touch()
    assert told(watch)


def test_what_was_replaced_is_watched_anew(tmp_path: Path, watch: Watch) -> None:
    """Not by the old inode: a cgroup that is removed has none of the events that other directories have."""
    (tmp_path / "parent").mkdir()
    watch.follow([f"{tmp_path}/parent/name"])
    (tmp_path / "parent").rename(tmp_path / "old")
    (tmp_path / "parent").mkdir()
    watch.follow([f"{tmp_path}/parent/name"])
    told(watch)
    (tmp_path / "old/name").touch()
    assert not told(watch)
    (tmp_path / "parent/name").touch()
    assert told(watch)
    assert watches(watch) == 1


def watches(watch: Watch) -> int:
    """How many the kernel keeps (proc(5), /proc/PID/fdinfo/FD)."""
    return Path(f"/proc/self/fdinfo/{watch._inotify}").read_text().count("inotify wd:")


def test_the_end_of_a_process_is_told_once_as_a_change_of_its_namespace(watch: Watch) -> None:
    before = descriptors()
    with subprocess.Popen(["sleep", "1000"]) as process:
        watch.add(7, os.eventfd(0, os.EFD_NONBLOCK), os.pidfd_open(process.pid))
        assert watch.take_changed() == set()
        process.kill()
        assert select.select([watch.fileno()], [], [], 1)[0]
        watch.drain()
        assert watch.news
        assert watch.take_changed() == {7}
        assert not select.select([watch.fileno()], [], [], 0)[0]
    watch.keep(set())
    assert descriptors() == before


def test_processes_of_namespaces_that_go_or_are_added_again_are_let_go_of(watch: Watch) -> None:
    before = descriptors()
    for _ in range(3):
        watch.add(7, os.eventfd(0, os.EFD_NONBLOCK), os.pidfd_open(os.getpid()))
    assert descriptors() == before + 2
    watch.keep({7})
    assert descriptors() == before + 2
    watch.keep(set())
    assert descriptors() == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208
