"""YAML text into plain values with line numbers. Called by `controller.schema`; knows nothing about kinds.

Built on the parser's event stream, not on a constructor: so depth and size are bounded while reading, a duplicate key is seen, an alias
cannot multiply into memory, and no tag can make anything but a JSON value. Scalars follow the core schema of YAML 1.2
(https://yaml.org/spec/1.2.2/#103-core-schema), in which `on` and `no` are strings.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from controller.errors import Problem

MAX_FILE_BYTES: Final = 4 << 20
MAX_DOCUMENT_CHARS: Final = 1 << 20
MAX_DEPTH: Final = 64
MAX_VALUES: Final = 100_000  # per document, aliases counted as often as they are used

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]{1,18}\Z")
_MARKER = re.compile(r"^(?:---|\.\.\.)(?=[ \t\r\n]|\Z)", re.MULTILINE)
_PREFIXED = re.compile(r"(0o[0-7]{1,20}|0x[0-9a-fA-F]{1,16})\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?\Z")
_PREFIX = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: its value, the line it starts on and the line of every value in it (1-based, by path)."""

    value: dict[str, Any]
    line: int
    lines: Mapping[Path, int]

    def line_of(self, path: Path) -> int:
        """Line of the value at `path`, or of its nearest ancestor that exists."""
        return nearest_line(self.lines, path, self.line)


def nearest_line(lines: Mapping[Path, int], path: Path, default: int) -> int:
    """Line of `path` or of its nearest recorded ancestor."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, default) if path else default


def path_text(path: Path) -> str:
    """Spell a path as people write it: spec.rules[0].name; a key that is no plain word stands in brackets."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z0-9_-]+", part):
            text += f".{part}" if text else part
        else:
            text += f"[{part[:80]!r}]"
    return text


class BadDocument(Exception):
    """The text is not something that this reader accepts; `problem` says where and why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def parse(text: str | bytes, origin: str) -> list[Document]:
    """Read every document of `text`; empty documents are skipped.

    Raises BadDocument (and nothing else) for the first thing that cannot be read; then no document of the text counts.
    """
    if isinstance(text, bytes):
        text = _decode(text, origin)
    if len(text) > MAX_FILE_BYTES:
        raise BadDocument(Problem(origin, 1, f"larger than {MAX_FILE_BYTES >> 20} MiB: split the file"))
    _bound(text, origin)
    reader = YAML(typ="safe", pure=True)
    try:
        return list(_documents(reader.parse(text), origin))
    except BadDocument:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadDocument(Problem(origin, mark.line + 1 if mark else 1, f"not YAML: {_one_line(error)}")) from error
    except YAMLError as error:
        raise BadDocument(Problem(origin, _bad_character_line(text), f"not YAML: {_one_line(error)}")) from error
    except Exception as error:
        raise BadDocument(Problem(origin, 1, f"not YAML: {type(error).__name__} in the scanner: {_one_line(error)}")) from error


def _bound(text: str, origin: str) -> None:
    """Refuse a document that is too large before the scanner goes through it character by character, which takes seconds a megabyte.

    A line that begins so ends a document wherever it stands, also in quotation marks (YAML 1.2.2, 9.1.2, c-forbidden).
    """
    begins = [0, *(mark.start() for mark in _MARKER.finditer(text)), len(text)]
    for begin, end in itertools.pairwise(begins):
        if end - begin > MAX_DOCUMENT_CHARS:
            line = text.count("\n", 0, begin) + 1
            raise BadDocument(Problem(origin, line, f"document larger than {MAX_DOCUMENT_CHARS >> 20} MiB: split it"))


def _decode(text: bytes, origin: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise BadDocument(Problem(origin, line, f"not UTF-8: byte 0x{text[error.start]:02x}; save the file as UTF-8")) from error


def _one_line(error: Exception) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error) or "unreadable"
    words = " ".join(str(problem).split())[:200]
    if "\\t" in words:
        words += " (a tab: indent with spaces)"
    return words


def _bad_character_line(text: str) -> int:
    bad = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", text)
    return text.count("\n", 0, bad.start()) + 1 if bad else 1


@dataclass(slots=True)
class _Builder:
    """Builds one document out of parser events."""

    origin: str
    start: int
    lines: dict[Path, int] = field(default_factory=dict)
    anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)
    values: int = 0

    def refuse(self, event: Any, message: str) -> BadDocument:
        return BadDocument(Problem(self.origin, event.start_mark.line + 1, message))

    def count(self, event: Any, amount: int) -> None:
        self.values += amount
        if self.values > MAX_VALUES:
            raise self.refuse(event, f"more than {MAX_VALUES} values in one document, aliases counted as often as used")
        if event.start_mark.index - self.start > MAX_DOCUMENT_CHARS:
            raise self.refuse(event, f"document larger than {MAX_DOCUMENT_CHARS >> 20} MiB: split it")

    def node(self, events: Iterator[Any], event: Any, path: Path) -> Any:
        kind = type(event).__name__
        if len(path) > MAX_DEPTH:
            raise self.refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        self.lines.setdefault(path, event.start_mark.line + 1)
        if kind == "AliasEvent":
            if event.anchor not in self.anchors:
                raise self.refuse(event, f"alias *{event.anchor} names no complete value before it")
            value, size = self.anchors[event.anchor]
            self.count(event, size)
            return value
        before = self.values
        self.count(event, 1)
        if kind == "ScalarEvent":
            value = self.scalar(event)
        elif kind == "SequenceStartEvent":
            self.collection_tag(event, "seq")
            value = []
            while type(item := next(events)).__name__ != "SequenceEndEvent":
                value.append(self.node(events, item, (*path, len(value))))
        else:
            self.collection_tag(event, "map")
            value = self.mapping(events, path)
        if event.anchor:
            self.anchors[event.anchor] = (value, self.values - before)
        return value

    def mapping(self, events: Iterator[Any], path: Path) -> dict[str, Any]:
        value: dict[str, Any] = {}
        while type(item := next(events)).__name__ != "MappingEndEvent":
            if type(item).__name__ != "ScalarEvent":
                raise self.refuse(item, "a key must be plain text")
            key: str = item.value
            if key == "<<" and item.style is None:
                raise self.refuse(item, "merge keys (<<) are not supported: write the fields out")
            here = (*path, key)
            if key in value:
                raise self.refuse(item, f"key {key[:80]!r} is there twice, first on line {self.lines[here]}")
            self.lines[here] = item.start_mark.line + 1
            value[key] = self.node(events, next(events), here)
        return value

    def collection_tag(self, event: Any, expected: str) -> None:
        tag = str(event.tag or "")
        if tag and tag not in {_PREFIX + expected, "!"}:
            raise self.refuse(event, f"tag {tag[:80]!r} is not supported")

    def scalar(self, event: Any) -> str | int | float | bool | None:
        tag = str(event.tag or "")
        text: str = event.value
        if tag in {"!", _PREFIX + "str"} or (not tag and event.style is not None):
            return text
        if tag and tag not in {_PREFIX + name for name in ("int", "float", "bool", "null")}:
            raise self.refuse(event, f"tag {tag[:80]!r} is not supported")
        return _plain(text)


_WORDS: Final[Mapping[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def _plain(text: str) -> str | int | float | bool | None:
    """Resolve a plain scalar by the core schema of YAML 1.2."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text):
        return int(text)
    if _PREFIXED.match(text):
        return int(text, 0)
    if _FLOAT.match(text) and math.isfinite(number := float(text)):
        return number
    return text


def _documents(events: Iterator[Any], origin: str) -> Iterator[Document]:
    for event in events:
        if type(event).__name__ != "DocumentStartEvent":
            continue
        builder = _Builder(origin, event.start_mark.index)
        first = next(events)
        value = builder.node(events, first, ())
        if value is None:
            continue
        if not isinstance(value, dict):
            raise builder.refuse(first, "a document must be a mapping with apiVersion, kind and metadata")
        lines = builder.lines
        line = lines.pop(())
        yield Document(value, line, lines)
