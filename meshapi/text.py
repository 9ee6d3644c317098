"""Text of somebody else (another node, a resource, a peer), fit to be shown: on a terminal, in a log, on a page."""

from __future__ import annotations

from typing import Final

LONGEST: Final = 512
"""Characters."""


def shown(text: str, longest: int = LONGEST) -> str:
    """One line of at most so many characters, without control characters: U+FFFD stands for each of them."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:longest])


def counted(number: int, one: str, many: str = "") -> str:
    """Say how many there are, with the right form of the word: "1 error", "2 errors"."""
    return f"{number} {one if number == 1 else many or one + 's'}"
