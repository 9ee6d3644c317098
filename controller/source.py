"""A directory of YAML files as the source of objects: what each file says, what is refused, and what stays in force regardless.

Called by `controller.mesh`, in a thread: everything here blocks. It reads and, for `stage`, only pretends; the admin service writes files.
Rules: an object that does not validate keeps its last good version; a file that cannot be read as YAML keeps all its former objects; the rest
of the directory applies; what is gone from the disk is gone. The last good versions survive a restart in `DIR/.meshagent-last-good.yaml`:
otherwise a policy broken on disk would vanish with the process, and access would widen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from controller.conflicts import resolve
from controller.documents import MAX_FILE_BYTES
from controller.errors import ControllerError, Problem
from controller.files import write_atomically
from controller.objects import Key, Object
from controller.schema import Checked, read_or_problems

SUFFIXES: Final = frozenset({".yaml", ".yml"})
LAST_GOOD: Final = ".meshagent-last-good.yaml"
APPLIED: Final = "applied"

Signature = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class ParsedFile:
    """What one file said when it was last read; `unreadable` if nothing in it counts."""

    signature: Signature
    documents: tuple[Checked, ...]
    unreadable: Problem | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What is in force, and everything that is wrong. `refused` is by object, `problems` is all of it."""

    objects: Mapping[Key, Object] = field(default_factory=dict)
    refused: Mapping[Key, tuple[Problem, ...]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def is_resource_file(path: Path) -> bool:
    """True for *.yaml and *.yml that no editor or tool hides or backs up."""
    return path.suffix in SUFFIXES and not path.name.startswith((".", "#", "~"))


class Source:
    """Holds the parsed files and the state that follows from them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = State()
        self._files: dict[Path, ParsedFile] = {}
        self._index: dict[Key, list[Path]] = {}
        self._remembered = ""

    def start(self) -> State:
        """Read everything for the first time. Raises ControllerError if the directory is not there or not readable."""
        self._restore()
        return self.load()

    def load(self) -> State:
        """Read what changed on disk and return the new state. Raises ControllerError if the directory is not readable."""
        found = self._scan()
        self._files = {path: self._read(path, signature) for path, signature in sorted(found.items())}
        self._index = {}
        for path, parsed in self._files.items():
            for key in {checked.key for checked in parsed.documents if checked.key is not None}:
                self._index.setdefault(key, []).append(path)
        self.state = self._evaluate(self._files)
        self._remember()
        return self.state

    def stage(self, changes: Mapping[Path, str | None]) -> State:
        """Return the state that would follow if these files held these texts (None: did not exist); nothing is changed."""
        files = {path: parsed for path, parsed in self._files.items() if changes.get(path, "") is not None}
        for path, text in changes.items():
            if text is not None:
                documents, unreadable = read_or_problems(text, str(path))
                files[path] = ParsedFile((0, 0, 0), tuple(documents), unreadable)
        return self._evaluate(dict(sorted(files.items())))

    def files_of(self, key: Key) -> list[Path]:
        """Every file that holds a document about `key`, valid or not."""
        return self._index.get(key, [])

    def applied_path(self, key: Key) -> Path:
        """Where the admin service keeps an object: `applied/NAMESPACE_KIND_NAME.yaml`."""
        return self.directory / APPLIED / f"{key.namespace}_{key.kind.lower()}_{key.name}.yaml"

    def _scan(self) -> dict[Path, Signature]:
        def fail(error: OSError) -> None:
            if error.filename == str(self.directory):
                raise ControllerError(f"cannot read the directory {self.directory}: {error.strerror}; check --directory") from error

        found: dict[Path, Signature] = {}
        for folder, folders, names in os.walk(self.directory, onerror=fail):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(folder) / name
                if is_resource_file(path):
                    try:
                        status = path.stat()
                    except FileNotFoundError:
                        continue  # deleted since it was listed
                    except OSError:
                        found[path] = (-1, -1, -1)
                        continue
                    found[path] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return found

    def _read(self, path: Path, signature: Signature) -> ParsedFile:
        known = self._files.get(path)
        if known is not None and known.signature == signature:
            return known
        try:
            if not path.is_file():
                return ParsedFile(signature, (), Problem(str(path), 1, "not a regular file"))
            with path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            return ParsedFile((-1, -1, -1), (), Problem(str(path), 1, f"cannot be read: {error.strerror}"))
        documents, unreadable = read_or_problems(text, str(path))
        return ParsedFile(signature, tuple(documents), unreadable)

    def _evaluate(self, files: Mapping[Path, ParsedFile]) -> State:
        in_force = self.state.objects
        first, problems = _first_of_each(files)
        refused: dict[Key, list[Problem]] = {key: list(checked.problems) for key, checked in first.items() if checked.object is None}
        candidates = {key: found for key, checked in first.items() if (found := checked.object or in_force.get(key)) is not None}
        # Files that may have meant objects which they no longer name.
        keepers = {str(path) for path, parsed in files.items() if parsed.unreadable or any(item.key is None for item in parsed.documents)}
        candidates.update({key: item for key, item in in_force.items() if key not in first and item.file in keepers})
        objects, conflicts = resolve(candidates.values(), in_force)
        for key, problem in conflicts.items():
            refused.setdefault(key, []).append(problem)
            problems.append(problem)
        return State(objects, {key: tuple(items) for key, items in refused.items()}, tuple(sorted(problems)))

    def _remember(self) -> None:
        """Store the versions in force that the files no longer hold, so that a restart has them too."""
        current = {
            checked.object.key: checked.object.data for parsed in self._files.values() for checked in parsed.documents if checked.object
        }
        kept = [item for key, item in sorted(self.state.objects.items()) if current.get(key) != item.data]
        text = "".join(f"---\n{json.dumps({'file': item.file, 'data': item.data}, ensure_ascii=False)}\n" for item in kept)
        if text == self._remembered:
            return
        target = self.directory / LAST_GOOD
        try:
            if text:
                write_atomically(target, text)
            else:
                target.unlink(missing_ok=True)
        except OSError:
            return  # a read-only directory: then last good versions end with the process
        self._remembered = text

    def _restore(self) -> None:
        try:
            text = (self.directory / LAST_GOOD).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return
        objects: dict[Key, Object] = {}
        for line in text.split("\n"):
            if not line.startswith("{"):
                continue
            try:
                record = json.loads(line)
                origin, content = str(record["file"]), json.dumps(record["data"], ensure_ascii=False)
            except (ValueError, KeyError, TypeError):
                continue
            checked, _ = read_or_problems(content, origin)
            objects.update((item.object.key, item.object) for item in checked if item.object is not None)
        self._remembered = text
        self.state = State(objects)


def _first_of_each(files: Mapping[Path, ParsedFile]) -> tuple[dict[Key, Checked], list[Problem]]:
    """Return, for each key, the document that counts (files in sorted order, the first wins), and every problem seen on the way."""
    first: dict[Key, Checked] = {}
    problems: list[Problem] = []
    for path, parsed in files.items():
        if parsed.unreadable:
            problems.append(parsed.unreadable)
        for checked in parsed.documents:
            if checked.key is not None and checked.key in first:
                problems.append(_duplicate(checked.key, checked, first[checked.key], str(path)))
                continue
            problems += checked.problems
            if checked.key is not None:
                first[checked.key] = checked
    return first, problems


def _duplicate(key: Key, checked: Checked, first: Checked, file: str) -> Problem:
    holder = first.object.file if first.object else first.problems[0].file
    line = checked.object.line if checked.object else checked.problems[0].line
    where = "earlier in this file" if holder == file else f"in {holder}"
    return Problem(file, line, f"is already there {where}, which counts; remove one of the two", key.kind, key.name, "metadata.name")
