"""One thing that was looked at, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum


class Severity(IntEnum):
    """How bad it is, in that order. OK is said too: what was not looked at must not look like what is good."""

    OK = 0
    WARNING = 1
    """The mesh works, with what is said left out; or nobody can know yet."""
    ERROR = 2
    """The mesh does not start, or does not do what it promises."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`check`: one word, the same in every run. `what`: the fact. `where`: a path, a process, an object. One that is not OK has a `next_step`."""

    severity: Severity
    check: str
    what: str
    where: str = ""
    cause: str = ""
    next_step: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found of one node or cluster."""

    scope: str
    """"node", "cluster", or "agents" if no node could be looked at."""
    name: str
    findings: tuple[Finding, ...] = field(default=())

    @property
    def worst(self) -> Severity:
        """What the exit status says."""
        return max((finding.severity for finding in self.findings), default=Severity.OK)


def ok(check: str, what: str, where: str = "") -> Finding:
    """Nothing to do."""
    return Finding(Severity.OK, check, what, where)


def warning(check: str, what: str, where: str = "", *, cause: str = "", next_step: str) -> Finding:
    """Something is left out."""
    return Finding(Severity.WARNING, check, what, where, cause, next_step)


def error(check: str, what: str, where: str = "", *, cause: str = "", next_step: str) -> Finding:
    """Something does not work."""
    return Finding(Severity.ERROR, check, what, where, cause, next_step)


def some(names: Iterable[str], most: int = 5) -> str:
    """A few of many, for a sentence."""
    found = sorted(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
