"""One agent for one node."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent import lock
from agent.errors import AlreadyRunning


def test_a_second_agent_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    held = lock.acquire(tmp_path / "agent.lock")
    with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"):
        lock.acquire(tmp_path / "agent.lock")
    assert lock.holder(tmp_path / "agent.lock") == os.getpid()
    os.close(held)


def test_the_lock_of_an_agent_that_died_is_free(tmp_path: Path) -> None:
    os.close(lock.acquire(tmp_path / "agent.lock"))
    assert lock.holder(tmp_path / "agent.lock") is None
    os.close(lock.acquire(tmp_path / "agent.lock"))
