from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.controller.identity.harness import STARTED


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """A test that fails midway leaves no CA directory open: a garbage collection would report it, and fail a test that has nothing to do with it."""
    yield
    while STARTED:
        STARTED.pop().stop()
