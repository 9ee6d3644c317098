"""Text that people read."""

from __future__ import annotations

import pytest

from meshapi.text import counted


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (0, ("error",), "0 errors"),
        (1, ("error",), "1 error"),
        (2, ("error",), "2 errors"),
        (1, ("is", "are"), "1 is"),
        (7, ("is", "are"), "7 are"),
    ],
)
def test_a_number_has_the_right_form_of_its_word(number: int, words: tuple[str, ...], said: str) -> None:
    assert counted(number, *words) == said
