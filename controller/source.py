"""A directory of YAML files as the source of objects: what each file says, what is refused, and what stays in force regardless.

Called by `controller.mesh`, in a thread: everything here blocks. It reads and, for `stage`, only pretends; the admin service writes files.
Rules: an object that does not validate keeps its last good version; a file that cannot be read as YAML keeps all its former objects, and so
does every file in a folder that cannot be read; the rest of the directory applies; what is gone from the disk is gone, but objects that vanish
from within a file only when nobody has written to it for a moment (an editor may have emptied it to fill it again). The last good versions
survive a restart in `DIR/.meshagent-last-good.yaml`: otherwise a policy broken on disk would vanish with the process, and access would widen.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from watchfiles import Change, awatch

from controller.conflicts import resolve
from controller.documents import MAX_FILE_BYTES
from controller.errors import ControllerError, Problem
from controller.files import write_atomically
from controller.objects import Key, Object
from controller.schema import Checked, read_or_problems

SUFFIXES: Final = frozenset({".yaml", ".yml"})
LAST_GOOD: Final = ".meshagent-last-good.yaml"
APPLIED: Final = "applied"
LONGEST: Final = 250
"""Characters of a file's name without its suffix (NAME_MAX, include/uapi/linux/limits.h); names of objects are ASCII."""
SETTLED_NS: Final = 1_000_000_000  # a file that shrank is believed when it is this old
NAMES_SHOWN: Final = 10
RESCAN_MS: Final = 5000  # for what inotify does not tell: network file systems, targets of links
DEBOUNCE_MS: Final = 50  # an editor's burst of writes is one change

Signature = tuple[int, int, int]
# In place of a signature, where there is none: never equal to that of a file that can be read.
_NO_STATUS: Final[Signature] = (-1, -1, -1)
_NO_FOLDER: Final[Signature] = (-2, -2, -2)
_UNSETTLED: Final[Signature] = (-3, -3, -3)


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


def _relevant(_change: Change, path: str) -> bool:
    """Ignore our own and editors' temporary files; `..data` is how a mounted ConfigMap changes."""
    name = Path(path).name
    return name.startswith("..") or not (name.startswith((".", "#")) or name.endswith(("~", ".tmp", ".swp")))


def is_resource_file(path: Path) -> bool:
    """True for *.yaml and *.yml that no editor or tool hides or backs up."""
    return path.suffix in SUFFIXES and not path.name.startswith((".", "#", "~"))


class Origin(Protocol):
    """What `controller.mesh` needs of a source: `Source`, or `controller.kubernetes.source.KubernetesSource`. All but `follow` and `close` may block."""

    state: State
    unsettled: bool
    """Load again soon."""

    @property
    def ready(self) -> bool:
        """Is the state something that was read? Before that nothing is published."""

    def start(self) -> State:
        """Read what there is to read at once. Raises ControllerError."""

    def load(self) -> State:
        """Return the state that follows from what there is now. Raises ControllerError."""

    def follow(self) -> AsyncGenerator[None, None]:
        """Yield, for ever, whenever `load` may have something new to say."""

    async def close(self) -> None:
        """Give up what it holds."""


class Source:
    """Holds the parsed files and the state that follows from them."""

    ready: Final = True

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = State()
        self.unsettled = False  # a file seems to be half written: load again soon
        self._files: dict[Path, ParsedFile] = {}
        self._index: dict[Key, list[Path]] = {}
        self._remembered = ""

    def start(self) -> State:
        """Read everything for the first time. Raises ControllerError if the directory is not there or not readable."""
        self._restore()
        return self.load()

    def load(self) -> State:
        """Read what changed on disk and return the new state. Raises ControllerError if the directory is not readable."""
        found, closed = self._scan()
        self.unsettled = False
        held = self._held()
        files = {path: self._read(path, signature, held.get(path, 0)) for path, signature in found.items()}
        for folder, problem in closed.items():
            within = {path for path in {*self._files, *held} if folder in path.parents}
            files.update(dict.fromkeys({folder, *within} - set(found), ParsedFile(_NO_FOLDER, (), problem)))
        self._files = dict(sorted(files.items()))
        self._index = {}
        for path, parsed in self._files.items():
            for key in {checked.key for checked in parsed.documents if checked.key is not None}:
                self._index.setdefault(key, []).append(path)
        self.state = self._evaluate(self._files)
        self._remember()
        return self.state

    async def follow(self) -> AsyncGenerator[None, None]:
        """Follow the directory for ever; yields when `load` may have something new to say. Raises ControllerError if it cannot be watched."""
        yield  # what changed between start and the first event
        try:
            async for _ in awatch(
                self.directory,
                watch_filter=_relevant,
                debounce=DEBOUNCE_MS,
                step=10,
                rust_timeout=RESCAN_MS,
                yield_on_timeout=True,
                recursive=True,
                ignore_permission_denied=True,
            ):
                yield
        except OSError as error:
            raise ControllerError(f"cannot watch {self.directory}: {error}; raise fs.inotify.max_user_watches or check the path") from error

    async def close(self) -> None:
        """There is nothing to give up."""

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
        """Where the admin service keeps an object: `applied/NAMESPACE_KIND_NAME.yaml`; what is too long for the name of a file ends in a digest."""
        stem = f"{key.namespace}_{key.kind.lower()}_{key.name}"
        if len(stem) > LONGEST:
            digest = hashlib.sha256(stem.encode()).hexdigest()[:32]
            stem = f"{stem[: LONGEST - len(digest) - 1]}~{digest}"  # which no name has in it
        return self.directory / APPLIED / f"{stem}.yaml"

    def _held(self) -> dict[Path, int]:
        """Return how many objects that are in force came from each file."""
        return {Path(file): count for file, count in Counter(item.file for item in self.state.objects.values()).items()}

    def _scan(self) -> tuple[dict[Path, Signature], dict[Path, Problem]]:
        """Return every resource file, and every folder that is there but cannot be read."""
        closed: dict[Path, Problem] = {}

        def fail(error: OSError) -> None:
            folder = Path(error.filename or self.directory)
            if folder == self.directory:
                raise ControllerError(f"cannot read the directory {self.directory}: {error.strerror}; check --directory") from error
            if not isinstance(error, FileNotFoundError | NotADirectoryError):  # those: deleted since it was listed
                closed[folder] = Problem(
                    str(folder), 1, f"this folder cannot be read: {error.strerror}; what its files said stays in force"
                )

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
                        found[path] = _NO_STATUS
                        continue
                    found[path] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return found, closed

    def _read(self, path: Path, signature: Signature, held: int) -> ParsedFile:
        known = self._files.get(path)
        if known is not None and known.signature == signature:
            return known
        try:
            if not path.is_file():
                return ParsedFile(signature, (), Problem(str(path), 1, "not a regular file"))
            with path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1)
                status = os.fstat(file.fileno())
        except OSError as error:
            return ParsedFile(_NO_STATUS, (), Problem(str(path), 1, f"cannot be read: {error.strerror}"))
        documents, unreadable = read_or_problems(text, str(path))
        parsed = ParsedFile(signature, tuple(documents), unreadable)
        if _half_written(known, parsed, held, status):
            self.unsettled = True
            return known or ParsedFile(_UNSETTLED, (), Problem(str(path), 1, "is being written; what it said stays in force"))
        return parsed

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
        return State(objects, {key: tuple(items) for key, items in refused.items()}, tuple(sorted(set(problems))))

    def _remember(self) -> None:
        """Store the versions in force that the files no longer hold, so that a restart has them too."""
        current = {key: checked.object.data for key, checked in _first_of_each(self._files)[0].items() if checked.object}
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
        except OSError as error:  # for example a read-only directory: then last good versions end with the process
            if kept:
                names = ", ".join(str(item.key) for item in kept[:NAMES_SHOWN])
                more = f" and {len(kept) - NAMES_SHOWN} more" if len(kept) > NAMES_SHOWN else ""
                message = (
                    f"cannot be written: {error.strerror or error}; a restart would lose the last good version of {names}{more}: "
                    "make the directory writable or repair the files"
                )
                self.state = replace(self.state, problems=tuple(sorted({*self.state.problems, Problem(str(target), 1, message)})))
            return
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


def _half_written(known: ParsedFile | None, parsed: ParsedFile, held: int, status: os.stat_result) -> bool:
    """True if a file lost objects in place a moment ago: whoever emptied it may be about to fill it. A renamed file is complete."""
    if parsed.unreadable or any(checked.key is None for checked in parsed.documents):
        return False  # its former objects stay anyway
    if known is not None and known.signature[2] >= 0 and known.signature[2] != status.st_ino:
        return False
    if len(parsed.documents) >= max(held, len(known.documents) if known else 0):
        return False
    return abs(time.time_ns() - status.st_mtime_ns) < SETTLED_NS  # a time in the future must not delay for ever


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
