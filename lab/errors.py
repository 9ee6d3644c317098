"""Failures of the lab that a person can act on. Each message is one line in lower case: what, where, the next step."""

from __future__ import annotations


class LabError(Exception):
    """Base of every failure that is shown as one line instead of a traceback."""


class TopologyError(LabError):
    """A topology says something that cannot be built; the message is "FILE: FIELD: WHAT"."""

    def __init__(self, origin: str, field: str, what: str) -> None:
        super().__init__(f"{origin}: {field}: {what}")
        self.origin = origin
        self.field = field
        self.what = what


class StartFailed(LabError):
    """A program that the lab started died or did not become ready; `log` is the end of what it wrote."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log
