"""One kind of the API server's objects, followed for ever: a list, then a watch from where it ended. Used by `controller.kubernetes.source`.

https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes. A watch goes on from the last resource version that was seen,
bookmarks included; when the server remembers that no more (410), everything is listed again. Until a list is complete the store stays as it was, so an API
server that is away for an hour changes nothing. Events that lie are seen through: one that is not newer than what was last said of its
object changes nothing, so that neither duplicates nor the late end of an object that was made again meanwhile do
(versions are numbers that grow: https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions).
Before an object is believed to be gone the definition of its kind is looked at (`controller.kubernetes.definition`): if that goes, or has gone meanwhile, the
object stays, as an orphan, until one of its name is made again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import msgspec

from controller.errors import Problem
from controller.kubernetes.api import Api, ApiError, TooLarge, Unreachable
from controller.kubernetes.definition import GOING, Definition
from controller.kubernetes.shapes import ORIGIN, Kind, Seen, newer
from controller.objects import Key

_log = logging.getLogger(__name__)

PAGE: Final = 500
WATCH_S: Final = 300
"""How long a watch is asked for, at least; at most twice as long, so that watches of many controllers do not end together."""
SILENCE_S: Final = 30.0
"""How much longer than that it may say nothing."""
FIRST_BACKOFF_S: Final = 0.8  # client-go's
MAX_BACKOFF_S: Final = 30.0
STEADY_S: Final = 120.0
"""After so long without a failure the next one is the first again."""
SHORTEST_S: Final = 1.0
"""A watch that ends sooner is a failure, whoever ended it."""
REMEMBERED: Final = 4096
"""Objects that are gone, by which an event that comes too late is known."""
MANY: Final = 5
"""Failures in a row, where one alone is nothing that an operator needs to hear of."""
ABSENT_S: Final = 30.0
"""How often a kind that the API server does not know is asked for again: its CRD may come."""


class _ListMeta(msgspec.Struct):
    resource_version: str = msgspec.field(name="resourceVersion", default="")
    next_page: str | None = msgspec.field(name="continue", default=None)


class _Page(msgspec.Struct):
    metadata: _ListMeta
    kind: str = ""
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    reason: str = ""
    message: str = ""


class _Bookmark(msgspec.Struct):
    metadata: _ListMeta


_page = msgspec.json.Decoder(_Page)
_event = msgspec.json.Decoder(_Event)
_status = msgspec.json.Decoder(_Status)
_bookmark = msgspec.json.Decoder(_Bookmark)


class Reflector:
    """See the module. `store` is only changed on the event loop, and by whole assignments or single items: `dict(store)` is a copy at any time."""

    def __init__(self, api: Api, kind: Kind, changed: Callable[[], None]) -> None:
        """`changed` is called after every change of `store` or `problem`."""
        self._api, self.kind, self._changed = api, kind, changed
        self.store: dict[Key, Seen] = {}
        self.synced = False
        """Has there been a whole list, or the word that there is no such kind?"""
        self.problem: Problem | None = None
        """Why nothing newer is known."""
        self.absent = False
        """The API server does not know this kind."""
        self.denied = False
        """The controller may not read it (403)."""
        self.definition = Definition(api, kind, changed)
        self.lossy = False
        """Somebody knows that objects are given without fields that they have, beyond what `store` says of it."""
        self.lists = 0
        self.events = 0
        self.ignored = 0
        """Events that were duplicates, came too late, or were about somebody else."""
        self._failures = 0
        self._version = ""
        self._gone: OrderedDict[Key, Seen] = OrderedDict()

    async def run(self) -> None:
        """Follow for ever."""
        version = ""
        while True:
            began = time.monotonic()
            try:
                version = await self._once(version, began)
            except ApiError as error:
                version = "" if error.code in {400, 404, 410} else version
                await self._refused(error)
            except (Unreachable, TooLarge, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                version = version if isinstance(error, Unreachable) else ""
                self._fail(f"no news of it: {str(error)[:300] or type(error).__name__}; what was known stays in force")
                await self._pause()
            if time.monotonic() - began > STEADY_S:
                self._failures = 0

    async def _once(self, version: str, began: float) -> str:
        """List if nothing is known, then watch until the server ends that; return the version to go on from, "" to list again."""
        if not version:
            version = await self._list()
        before, version = version, await self._watch(version)
        if before == version and await self._went_back(version):
            return ""
        if self.lossy or any(seen.pruned for seen in self.store.values()):
            version = ""  # a definition that was mended ends watches, and shows again what it hid
        if time.monotonic() - began >= SHORTEST_S:
            self._failures = 0
            return version
        if self._failures >= MANY:
            self._fail("watches of it end at once, again and again: is there a proxy before the API server? what was known stays in force")
        await self._pause()
        return version

    async def _refused(self, error: ApiError) -> None:
        if error.code == 404:
            # Also the answer for a kind that is there and not served, so what is known stays; and of our own kinds, all of which belong to an
            # installation, none is ever taken not to be there.
            self.absent = True
            if self.kind.required or (self.synced and not all(seen.orphan for seen in self.store.values())):
                self._fail(
                    "the API server does not know it: is its CustomResourceDefinition, and this version of it, served? what was known stays in force"
                )
            else:
                self._synced("")
            await asyncio.sleep(ABSENT_S)
            return
        if error.code in {401, 403}:
            self.denied = error.code == 403
            self._fail(f"the API server does not let the controller read it ({error}): {self.kind.rights}; what was known stays in force")
        elif error.code != 410 or self._failures >= MANY:  # too old once: it has been long, and nothing is wrong
            self._fail(f"no news of it: {error}; what was known stays in force")
        await self._pause()

    async def _went_back(self, version: str) -> bool:
        """Has the server been restored from a backup? A watch from a version that it has not reached yet is silent, and no error."""
        page = _page.decode(await self._api.get(self.kind.path, {**self.kind.selector, "limit": "1"}))
        return newer(version, page.metadata.resource_version)

    async def _pause(self) -> None:
        self._failures += 1
        longest = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(self._failures - 1, 10))
        await asyncio.sleep(longest * (0.5 + random.random() / 2))  # noqa: S311 - spreads load, keeps no secret

    async def _list(self) -> str:
        """Replace the store by what there is; return the version of the whole."""
        definition = await self.definition.uid()
        found, version = await self._pages()
        if definition != await self.definition.uid():
            raise Unreachable("its CustomResourceDefinition is being replaced")
        if (
            definition == GOING and not self.synced and self.kind.required
        ):  # a part is no beginning; a kind that may be missing is no reason to wait
            raise Unreachable("its CustomResourceDefinition is being deleted")
        went = self.definition.differs(definition)
        self.definition.used = definition or self.definition.used
        orphans = {key: replace(seen, orphan=True) for key, seen in self.store.items() if key not in found and (went or seen.orphan)}
        self.lists += 1
        self._gone.clear()
        self.absent = False
        self.store = {key: self._settled(self.store.get(key), seen) for key, seen in found.items()} | orphans
        self._synced(version)
        return version

    async def _pages(self) -> tuple[dict[Key, Seen], str]:
        """List everything; return it with its version."""
        found: dict[Key, Seen] = {}
        tokens: set[str] = set()
        size, params = PAGE, dict(self.kind.selector)
        while True:
            try:
                page = _page.decode(await self._api.get(self.kind.path, {**params, "limit": str(size)}))
            except TooLarge:
                if size == 1:
                    raise
                size = max(1, size // 8)
                continue
            if page.kind != f"{self.kind.kind}List":
                raise Unreachable(f"a list that is none: its kind is {page.kind[:80]!r}")
            for raw in page.items or ():
                if (seen := self.kind.read(bytes(raw))) is not None:
                    found[seen.key] = seen
            if not page.metadata.next_page:
                break
            params["continue"] = page.metadata.next_page
            if page.metadata.next_page in tokens:
                raise Unreachable("a list that begins again and again")
            tokens.add(page.metadata.next_page)
        if not page.metadata.resource_version:
            raise Unreachable("a list without a version")
        return found, page.metadata.resource_version

    def _settled(self, before: Seen | None, seen: Seen) -> Seen:
        """What is kept of an object that was read. One that is as it was stays the same in memory, which makes two states quick to compare."""
        if self.kind.definition:
            seen = seen.without_loss(before)
        return replace(seen, object=before.object) if before is not None and before.same(seen) else seen

    async def _orphaned(self, event: _Event) -> bool:
        """Is this the end of an object whose definition goes?"""
        if event.type != "DELETED":
            return False
        definition = await self.definition.uid()
        if definition != GOING and self.definition.differs(definition):
            raise ApiError(410, "Replaced", "its CustomResourceDefinition is another one now")  # which a list tells apart
        return definition == GOING

    def adopt(self, orphan: Seen) -> None:
        """Take an orphan that another controller has, unless there is one of its name or it was seen to go."""
        if orphan.key not in self.store and orphan.key not in self._gone:
            self.store[orphan.key] = orphan

    def _synced(self, version: str) -> None:
        if not self.synced or self.problem is not None:
            _log.info(
                "following the API server",
                extra={"kind": self.kind.kind, "which": self.kind.name, "objects": len(self.store), "version": version},
            )
        self.synced, self.denied, self.problem = True, False, None
        self._changed()

    async def _watch(self, version: str) -> str:
        """Take events until the server ends the watch; return the version to go on from."""
        seconds = WATCH_S * (1 + random.random())  # noqa: S311 - as above
        params = {**self.kind.selector, "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": str(int(seconds))}
        self._version = version
        try:
            async with self._api.watch(self.kind.path, params, seconds + SILENCE_S) as lines:
                self._working()
                async for line in lines:
                    event = _event.decode(line)
                    self._take(event, orphaned=await self._orphaned(event))
        except Unreachable:
            if self._version == version:
                raise
            _log.info("a watch broke off", extra={"kind": self.kind.kind})  # it had said something: go on from there at once
        return self._version

    def _working(self) -> None:
        if self.problem is not None:
            _log.info("the API server answers again", extra={"kind": self.kind.kind})
            self.denied, self.problem = False, None
            self._changed()

    def _take(self, event: _Event, *, orphaned: bool) -> None:
        if event.type == "ERROR":
            status = _status.decode(event.object)
            raise ApiError(status.code, status.reason[:80], status.message[:400])
        if event.type == "BOOKMARK":
            self._version = _bookmark.decode(event.object).metadata.resource_version or self._version
            return
        self.events += 1
        seen = self.kind.read(bytes(event.object))
        if seen is None:
            return
        held = self.store.get(seen.key)
        known = held or self._gone.get(seen.key)
        if event.type not in {"ADDED", "MODIFIED", "DELETED"} or (known is not None and not seen.after(known)):
            self.ignored += 1
            return
        self._version = seen.version or self._version
        if self._end(held, seen, orphaned=orphaned) if event.type == "DELETED" else self._keep(held, seen):
            self._changed()

    def _keep(self, held: Seen | None, seen: Seen) -> bool:
        """Keep a version; return whether it says something new: somebody may have written its status."""
        seen = self.store[seen.key] = self._settled(held, seen)
        self._gone.pop(seen.key, None)
        return held is None or held.orphan or not held.same(seen)

    def _end(self, held: Seen | None, seen: Seen, *, orphaned: bool) -> bool:
        """Take an object out, or keep it as an orphan; return whether that is news."""
        if orphaned:
            if held is not None:
                self.store[seen.key] = replace(held, version=seen.version, orphan=True)
            return held is not None
        self._gone[seen.key] = seen
        if len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)
        return self.store.pop(seen.key, None) is not None

    def _fail(self, message: str) -> None:
        problem = Problem(ORIGIN, 0, message, self.kind.kind, self.kind.name)
        if problem != self.problem:
            self.problem = problem
            self._changed()
