"""What is in force and the API server does not give any more, kept over restarts: last good versions of what is refused, orphans, and fields that were pruned.

Used by `controller.kubernetes.source`; for a directory `controller.source` keeps the same in a file. A controller that starts would know only what is there,
and a policy that was broken would vanish with the process that knew it whole. It stands in one ControllerState beside those of the authority, which only
controllers can write. The one that holds the Lease writes it, all read it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from controller.documents import Document
from controller.errors import Problem
from controller.kubernetes import states
from controller.kubernetes.api import Api, ApiError, TooLarge, Unreachable
from controller.kubernetes.reflector import Reflector
from controller.kubernetes.shapes import ORIGIN, Kind, Seen, stored
from controller.objects import Key, Object
from controller.schema import validate
from controller.waiting import heard

_log = logging.getLogger(__name__)

NAME: Final = "last-good"
MOST: Final = states.MOST
AGAIN_S: Final = 5.0
MANY: Final = 3
"""Conflicts in a row, where one alone is a controller that wrote before, once more."""
_NAMES_SHOWN: Final = 10
_FIRST: Final = ("AuthorizationPolicy", "Namespace", "PeerAuthentication", "RequestAuthentication")
"""What is kept before all else, should there be no room: without these access would widen."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One version that is in force; `uid` of its object as it is, or was, in the API server."""

    object: Object
    uid: str
    orphan: bool = False
    generation: int = 0
    """Of the object as it is there, if it is there without some fields; else 0."""

    def as_seen(self) -> Seen:
        """Return it as if it had been read."""
        return Seen(self.object.key, self.uid, "", self.generation, self.object, orphan=self.orphan)


class _Row(msgspec.Struct):
    uid: str
    object: dict[str, Any]
    orphan: bool = False
    generation: int = 0


_rows = msgspec.json.Decoder(list[_Row])


class LastGood:
    """See the module. Belongs to the event loop, but for `kept` and `problem`, which any thread may read."""

    def __init__(self, api: Api, namespace: str, changed: Callable[[], None]) -> None:
        """`changed` is called after every change of `kept` or `problem`."""
        self._api, self._changed = api, changed
        self._key = Key(states.KIND, namespace, NAME)
        self._path = states.path(namespace)
        rights = f"see the Role of the controller's service account in namespace {namespace}"
        selector = {"fieldSelector": f"metadata.name={NAME}"}
        kind = Kind(states.KIND, self._path, stored, selector, name=self._key.qualified, rights=rights)
        self.reflector = Reflector(api, kind, self._read)
        self.kept: Mapping[Key, Kept] = {}
        """What is written there."""
        self.problem: Problem | None = None
        """Why a restart would lose something."""
        self._documents: Mapping[str, str] = {}
        self._wanted: Mapping[Key, Kept] | None = None
        self._known: Mapping[Key, Kept] = {}
        self._conflicts = 0
        self._left_out: list[Key] = []
        self._news = asyncio.Event()

    def want(self, kept: Mapping[Key, Kept], known: Mapping[Key, Kept]) -> None:
        """Have this kept from now on, and nothing else; `known`: what `kept` was when that was found. Nothing newer is written away."""
        self._wanted, self._known = kept, known
        self._news.set()

    def turn(self) -> None:
        """It may be this controller's turn to write."""
        self._news.set()

    async def write(self, allowed: Callable[[], bool]) -> None:
        """Write what is wanted, for ever, while it is `allowed`."""
        while True:
            if await heard(self._news, AGAIN_S):
                self._news.clear()
            if self._wanted is None or self._known is not self.kept or not self.reflector.synced or not allowed():
                continue
            documents, left_out = _documents(self._wanted)
            if left_out and left_out != self._left_out:
                _log.error("no room for last good versions", extra={"object": NAME, "objects": [str(key) for key in left_out]})
            self._left_out = left_out
            wrong = await self._put(documents) if documents != self._documents else ""
            self._tell(wrong or _no_room(left_out))

    async def _put(self, documents: Mapping[str, str]) -> str:
        """Write them; return what is wrong with that. Somebody else's version is read before the next try."""
        try:
            try:
                await self._store(documents)
            except ApiError as error:
                if error.code != 409:
                    raise
                self._conflicts += 1
                await self._look()
                return f"somebody else writes it again and again: {error}" if self._conflicts >= MANY else ""
        except (ApiError, Unreachable, TooLarge, msgspec.MsgspecError) as error:
            return f"it cannot be written: {error}"
        self._conflicts = 0
        return ""

    async def _look(self) -> None:
        """Take in what is there now: the watch may be late, or silent."""
        try:
            seen = self.reflector.kind.read(await self._api.get(f"{self._path}/{NAME}", {}))
        except ApiError as error:
            if error.code != 404:
                raise
            self.reflector.store.pop(self._key, None)
        else:
            if seen is not None:
                self.reflector.store[self._key] = seen
        self._read()

    async def _store(self, documents: Mapping[str, str]) -> None:
        answer = await states.put(self._api, self._key, self.reflector.store.get(self._key), documents)
        if (seen := stored(json.dumps(answer).encode())) is not None:
            self.reflector.store[self._key] = seen  # the watch says so later
            self._read()

    def _tell(self, wrong: str) -> None:
        message = (
            f"{wrong}; a restart of all controllers would lose last good versions of refused objects: repair those first" if wrong else ""
        )
        problem = Problem(ORIGIN, 0, message, self._key.kind, self._key.qualified) if message else None
        if problem != self.problem:
            self.problem = problem
            self._changed()

    def _read(self) -> None:
        held = self.reflector.store.get(self._key)
        documents = dict(held.object.spec) if held is not None and held.object is not None else {}
        if documents != self._documents:
            self._documents = documents
            self.kept = {one.object.key: one for name, text in documents.items() for one in _parsed(name, text)}
            self._news.set()
        self._changed()


def _documents(kept: Mapping[Key, Kept]) -> tuple[dict[str, str], list[Key]]:
    """Return a document for each kind, and the objects that there is no room for: of one kind the largest, so that none takes the room of many."""
    rows = {
        key: msgspec.json.encode(_Row(one.uid, dict(one.object.data), one.orphan, one.generation)).decode() for key, one in kept.items()
    }
    sizes = {key: states.escaped(row) + 2 for key, row in rows.items()}
    taken: dict[str, list[Key]] = {}
    left_out, size = [], 0
    for key in sorted(rows, key=lambda key: (key.kind not in _FIRST, key.kind, sizes[key], key)):
        more = sizes[key] + (0 if key.kind in taken else states.escaped(f"{key.kind}.json") + states.AROUND)
        if size + more > MOST:
            left_out.append(key)
            continue
        taken.setdefault(key.kind, []).append(key)
        size += more
    return {f"{kind}.json": f"[{','.join(rows[key] for key in sorted(keys))}]" for kind, keys in taken.items()}, left_out


def _no_room(left_out: list[Key]) -> str:
    if not left_out:
        return ""
    more = f" and {len(left_out) - _NAMES_SHOWN} more, which the log names" if len(left_out) > _NAMES_SHOWN else ""
    return f"there is no room for {', '.join(str(key) for key in left_out[:_NAMES_SHOWN])}{more}"


def _parsed(name: str, text: str) -> Iterable[Kept]:
    """Return what a document says; what of it is not valid (another version of the controller may have written it) is left out."""
    found = []
    try:
        for row in _rows.decode(text):
            checked = validate(Document(row.object, 0, {}), ORIGIN).object
            if checked is None:
                _log.error("a last good version is not valid any more", extra={"document": name, "uid": row.uid})
            else:
                found.append(Kept(checked, row.uid, row.orphan, row.generation))
    except (msgspec.MsgspecError, RecursionError):
        _log.error("last good versions cannot be read: who wrote them?", extra={"object": NAME, "document": name})
    return found
