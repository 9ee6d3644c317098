"""Coroutines are tests here, by anyio's plugin, which the HTTP client brings."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """asyncio, as everywhere."""
    return "asyncio"
