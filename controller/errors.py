"""Failures of the controller that an operator can act on: lower case, one line, what and what to do next. Imported by everything here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


class ControllerError(Exception):
    """Shown to people as one line instead of a traceback; the process ends with status 1."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing wrong in one place; str() is the line that people see: FILE:LINE KIND/NAME FIELD.PATH: what is wrong. What is in no file has no line."""

    file: str
    line: int
    message: str
    kind: str = ""
    name: str = ""
    field: str = ""
    among: str = dataclasses.field(default="", compare=False)
    """Whom it is about, where that is many who come and go: they change, and it is the same problem."""

    def __str__(self) -> str:
        """Leave out what is not known (a file that is no YAML has no kind)."""
        head = f"{self.file}:{self.line}" if self.line else self.file
        if self.kind:
            head += f" {self.kind}/{self.name or '?'}"
        if self.field:
            head += f" {self.field}"
        return f"{head}: {self.message}" + (f": {self.among}" if self.among else "")
