"""Paths of requests, folded so that there are few of them, and what a pattern of a policy says of a folded one. Pure.

A folded path ("template") is as the path was, but `{}` stands for one segment that is an identifier or is spelled in a way that can be read twice, and `*`
at its end for whatever follows. `ANY` is a path of which nothing is known. What a template does not say nobody may claim to know: `fits` then says None.
Patterns are read as Envoy compares them (`agent.l7.spelling`): on segments of unreserved characters alone every reading is the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from agent.l7.spelling import plain
from agent.policy import matches

ANY = "*"
"""Nothing is known: perhaps there is no path at all (CONNECT)."""
ROOTED = "/*"
"""It begins with a slash, and may be read as any other one."""
HOLE = "{}"
MOST_SEGMENTS, MOST_CHARACTERS = 12, 256
_PLAIN = re.compile(r"[A-Za-z0-9._~-]{0,64}")
_IDENTIFIER = re.compile(
    r"[0-9]+|(?=.*[0-9])[0-9a-fA-F]{8,}|[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9_-]{16,}"
)
_ONE, _MANY, _REST = "one of a segment", "more of a segment", "whatever follows"
"""Tokens of a template besides characters."""


def template(path: str) -> str:
    """Fold the path of a request as it stands in the log: without its query, identifiers as `{}`."""
    path = re.split("[?#]", path, maxsplit=1)[0]
    if not path.startswith("/"):
        return ANY
    if ";" in path or "%3b" in path.lower() or {".", ".."} & set(path.split("/")):
        return ROOTED  # servers disagree about what is a parameter
    segments = [_folded(segment) for segment in path[1:].split("/")]
    folded = "/" + "/".join(segments)
    return folded if len(segments) <= MOST_SEGMENTS and len(folded) <= MOST_CHARACTERS else coarse(folded)


def _folded(segment: str) -> str:
    return segment if _PLAIN.fullmatch(segment) and not _IDENTIFIER.fullmatch(segment) else HOLE


def coarse(folded: str) -> str:
    """The first segment of a template alone: for callers that use too many."""
    first, slash, _ = folded[1:].partition("/")
    return f"/{first}/*" if folded.startswith("/") and slash and first != HOLE else ROOTED if folded.startswith("/") else ANY


def is_exact(folded: str) -> bool:
    """Does the template stand for one path?"""
    return HOLE not in folded and not folded.endswith("*")


def fits(pattern: str, folded: str) -> bool | None:
    """Does a pattern of a policy match every path of a template (True) or none (False)? None: that depends on the path, or on how it is read."""
    pattern = plain(pattern)
    if folded != ANY and pattern in {"*", "/*"}:
        return True
    if folded in {ANY, ROOTED}:
        return None
    if is_exact(folded):
        return matches(pattern, folded)
    tokens = _tokens(folded)
    if pattern.endswith("*"):
        return _affix(pattern[:-1], tokens)
    if pattern.startswith("*"):
        # What follows matches nothing or something: read from behind it is skipped as well as read.
        return _affix(pattern[:0:-1], _backwards(tokens))
    return None if len(tokens) in _reached(pattern, tokens) else False


def _affix(text: str, tokens: Sequence[str]) -> bool | None:
    """Do strings of these tokens begin with a text: all, none or some?"""
    if list(text) == list(tokens[: len(text)]):
        return True
    return None if _reached(text, tokens) else False


def _tokens(folded: str) -> list[str]:
    found: list[str] = []
    for number, segment in enumerate(folded.split("/")):
        if number:
            found.append("/")
        found += (_ONE, _MANY) if segment == HOLE else (_REST,) if segment == "*" else segment
    return found


def _backwards(tokens: Sequence[str]) -> list[str]:
    """The same strings, read from behind: of a hole the one that must be there comes first again, which is the same."""
    turned = list(reversed(tokens))
    for place, token in enumerate(turned[:-1]):
        if token == _MANY:
            turned[place], turned[place + 1] = _ONE, _MANY
    return turned


def _reached(text: str, tokens: Sequence[str]) -> set[int]:
    """Places among the tokens where one may be after a text."""
    places = _skipping({0}, tokens)
    for character in text:
        after = set()
        for place in places:
            if place == len(tokens):
                continue
            token = tokens[place]
            if token == _REST or (token == _MANY and character != "/"):
                after.add(place)
            elif token == character or (token == _ONE and character != "/"):
                after.add(place + 1)
        places = _skipping(after, tokens)
    return places


def _skipping(places: Iterable[int], tokens: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for place in places:
        last = place
        while last < len(tokens) and tokens[last] in {_MANY, _REST}:
            last += 1
        found.update(range(place, last + 1))
    return found


def pattern_of(folded: str) -> str:
    """The narrowest pattern of a policy that matches every path of a template; "" if only no condition at all does."""
    if folded in {ANY, ROOTED}:
        return "" if folded == ANY else "*"
    return folded if is_exact(folded) else folded.partition(HOLE)[0].removesuffix("*") + "*"
