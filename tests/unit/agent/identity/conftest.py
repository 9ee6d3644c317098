"""Directories in memory, where keys may be written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import netns
from agent.identity import service

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  the one tmpfs that every machine has


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A run directory on tmpfs, with a short name: unix sockets have room for 107 bytes."""
    if netns.file_system(SHARED_MEMORY) not in {"tmpfs", "ramfs"}:
        pytest.skip(f"{SHARED_MEMORY} is no tmpfs")
    directory = Path(tempfile.mkdtemp(prefix="mesh-", dir=SHARED_MEMORY))
    try:
        yield directory / "run"
    finally:
        shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def dumpable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test process stays as it is; tests/unit/agent/identity/test_keys.py protects a process of its own."""
    monkeypatch.setattr(service, "protect_memory", lambda: None)
