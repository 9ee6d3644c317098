"""Fixtures of the controller's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "src"
    path.mkdir()
    return path
