"""Looking at pins that an agent takes away meanwhile: stand-ins for them are files, and links to files that are gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.bpf import attached, libbpf, sets
from agent.bpf.manifest import HOOKED
from agent.config import Config

PROGRAM = 11


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A node on which one link, and one pin of a program, goes between the moment it is listed and the moment it is opened."""
    made = Config(node="", controller="", pin_dir=tmp_path / "pins", run_dir=tmp_path / "run", cgroup=tmp_path)
    first, second = (program.name for program in HOOKED[:2])
    for directory in (made.pin_dir / "links", made.pin_dir / "programs-1"):
        directory.mkdir(parents=True)
        (directory / first).symlink_to(tmp_path / "gone")
        (directory / second).touch()
    monkeypatch.setattr(libbpf, "open_pin", lambda path: os.open(path, os.O_RDONLY))
    monkeypatch.setattr(libbpf, "link_target", lambda _: 7)
    monkeypatch.setattr(libbpf, "link_program_id", lambda _: PROGRAM)
    monkeypatch.setattr(libbpf, "object_id", lambda _: PROGRAM)
    return made


def test_a_link_that_goes_while_it_is_looked_at_runs_nothing(config: Config) -> None:
    assert sets.linked(config) == {PROGRAM: 1}


def test_a_pin_that_goes_while_it_is_looked_at_is_none(config: Config) -> None:
    assert sets.pinned(config.pin_dir / "programs-1") == {HOOKED[1].name: PROGRAM}


def test_a_link_that_is_gone_is_said_to_be(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached, "_loaded", lambda _: {HOOKED[0].name})
    (one,) = attached.drifted(config)
    assert (one.name, one.why) == (HOOKED[0].name, f"its link {config.pin_dir / 'links' / HOOKED[0].name} is gone: somebody removed it")
