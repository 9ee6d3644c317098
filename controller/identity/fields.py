"""Strict reading of the state files: JSON objects whose fields are all known and have the right type. Used by everything that reads the CA directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from controller.errors import ControllerError

T = TypeVar("T", str, int, bool)
_END_OF_TIME: Final = 253_402_300_800  # year 10000, which no date can have


class BadState(ValueError):
    """A state file does not hold what it should; the text says what."""


def parse(content: bytes) -> Mapping[str, Any]:
    """Return the JSON object in `content`. Raises BadState."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadState("it is no JSON: cut off or overwritten") from error
    if not isinstance(found, dict):
        raise BadState("it is no JSON object")
    return found


def only(record: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """Return `record` as a mapping with exactly these fields. Raises BadState."""
    if not isinstance(record, dict) or set(record) != set(names):
        raise BadState(f"an entry does not have exactly the fields {', '.join(names)}")
    return record


def field(record: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """Return one field. Raises BadState if it is missing or of another type; numbers must not be negative, and be times if they were Unix seconds."""
    found = record.get(name)
    if type(found) is not kind or (isinstance(found, int) and not 0 <= found < _END_OF_TIME):
        raise BadState(f"{name} is missing or not a {'number' if kind is int else kind.__name__}")
    return found


def listed(record: Mapping[str, Any], name: str) -> Sequence[Any]:
    """Return a field that is a list. Raises BadState."""
    found = record.get(name)
    if not isinstance(found, list):
        raise BadState(f"{name} is missing or not a list")
    return found


def refuse(place: object, error: BadState, loss: str) -> ControllerError:
    """Make the message about a state file that cannot be believed. `place`: where it is; `loss`: what it would mean to delete it."""
    return ControllerError(
        f"{place} cannot be used: {error}. Probably the disk was full, or somebody edited it; it is left as it is. Restore it from a backup; {loss}"
    )
