"""What several controllers remember together, in the API server: ControllerStates in their own namespace, read by a watch, written against a version.

One object is one group of documents: `authority` is the group "", each node has its own. A kind of our own, and not a ConfigMap: rights to it are rights to
nothing else of the namespace, and the roles that let people edit ConfigMaps do not let them take a revocation back. Who writes names the version that it read;
if somebody was faster (409) it reads again and does its work again, so nothing that anybody wrote is lost
(https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions). It has a thread with an event loop of its own, for callers that block.
A watch that is open and says nothing looks like one that has nothing to say: so `authority` is also asked for now and then, past the watch.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, Final, TypeVar

import msgspec

from controller import metrics
from controller.errors import ControllerError
from controller.kubernetes import lastgood, states
from controller.kubernetes.api import Api, ApiError, TooLarge, Unreachable
from controller.kubernetes.reflector import Reflector
from controller.kubernetes.shapes import Kind, Seen, stored
from controller.objects import Key
from controller.store import LAST, Documents

_log = logging.getLogger(__name__)

T = TypeVar("T")
AUTHORITY: Final = "authority"
"""Name of the object of the group ""."""
MOST: Final = states.MOST
RESERVE: Final = 384 << 10
"""How much more there may be if it is `controller.store.LAST` that grows."""
FULL: Final = 0.75
"""Of MOST: from there on an operator hears of it."""
CHANGE_S: Final = 30.0
"""How long others may be faster, or the API server be busy, before a change is given up."""
PAUSE_S: Final = 0.02
LONGEST_PAUSE_S: Final = 0.5
STALE_S: Final = 20.0
"""After so long without news this controller says that it is not ready: it may not know what was revoked since."""
LOOK_S: Final = 10.0
"""How often it is asked past the watch what stands there."""
AGAIN_S: Final = 1.0
"""The same after a question that was not answered."""
END_S: Final = 5.0
"""How long what was being asked may take to end."""
_UNKNOWN: Final = "it is not known whether it was written there"
_BUSY: Final = frozenset({429, 503})


class ClusterStore:
    """See the module. `start` and `close` once; everything else blocks and may be called by any thread but its own."""

    alone: Final = False

    def __init__(self, connect: Callable[[], Api], namespace: str) -> None:
        """`connect` makes the connection; called in this store's thread."""
        self._connect, self._namespace = connect, namespace
        self._path = states.path(namespace)
        self._told: list[Callable[[], object]] = []
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        """Changes of one object by this process follow one another: they would only be in each other's way."""
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._asking = threading.Lock()
        """Held while the loop is given work: after `close` has ended what there is, nothing comes that nobody would ever answer."""
        self._closing = False
        self._api: Api
        self._reflector: Reflector
        self._reading: asyncio.Task[None]
        self._stale_since: float | None = None
        self._measured: Seen | None = None
        self._filling = False
        """Is `authority` nearly full?"""
        self._looked = 0.0
        """When the API server has answered last (monotonic clock)."""
        self._ended: Future[None] = Future()
        """Fails if what others change is not read any more."""

    # Start and end.

    def start(self) -> None:
        """Begin to read. Raises ControllerError if there is nothing to connect to."""
        self._api = self._connect()
        self._reflector = Reflector(self._api, Kind(states.KIND, self._path, stored), self._changed)
        self._thread = threading.Thread(target=self._loop.run_forever, name="state", daemon=True)
        self._thread.start()
        self._call(self._follow())

    def close(self) -> None:
        """Stop reading; changes that are being made fail."""
        with self._asking:
            if self._thread is None or self._closing:
                return
            self._closing = True
            ended = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        ended.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._thread = None
        self._loop.close()

    async def ended(self) -> None:
        """Wait for ever, on any event loop. Raises ControllerError when what others change is not read any more, which nothing but a bug can bring about."""
        await asyncio.wrap_future(self._ended)

    def waiting(self) -> str:
        """Why what others have changed may not be known here; "" if it is."""
        if self._thread is None or (self._ended.done() and not self._ended.cancelled()):
            return "what the certificate authority must remember is not being read"
        problem, since, now = self._reflector.problem, self._stale_since, time.monotonic()
        if self._reflector.synced:
            if problem is not None and since is not None and now - since >= STALE_S:
                return f"what the certificate authority must remember is not known: {problem.message}"
            if (silent := now - self._looked) < LOOK_S + STALE_S:
                return ""
            return f"what the certificate authority must remember is not known: the API server has not answered for {silent:.0f} s"
        return (
            f"what the certificate authority must remember is not known: {problem.message if problem else 'the API server is being asked'}"
        )

    @property
    def problem(self) -> str:
        """Why nothing newer is known; "" if nothing is wrong."""
        return self._reflector.problem.message if self._thread is not None and self._reflector.problem is not None else ""

    @property
    def synced(self) -> bool:
        """Has everything been read once?"""
        return self._thread is not None and self._reflector.synced and not self._reflector.absent

    def listen(self, told: Callable[[], object]) -> None:
        """Have `told` called after each change, by this store's thread."""
        self._told.append(told)

    # Documents.

    def where(self, name: str) -> str:
        """Return where a document is, for people."""
        group, _, document = name.rpartition("/")
        return f"ControllerState {self._namespace}/{group or AUTHORITY}, {document}"

    def groups(self) -> dict[str, object]:
        """Return the groups other than "", each with its version."""
        held = self._reflector.store.copy().items()
        return {key.name: (seen.uid, seen.version) for key, seen in held if key.name not in {AUTHORITY, lastgood.NAME}}

    def read(self, name: str, group: str = "") -> bytes | None:
        """Return a document as this controller knows it; None if there is none."""
        text = self.signature(name, group)
        return None if text is None else text.encode()

    def signature(self, name: str, group: str = "") -> str | None:
        """Return what tells one version of a document from another: all of it."""
        return _documents(self._reflector.store.get(self._key(group))).get(name)

    def change(self, work: Callable[[Documents], T], group: str = "", *, known: bool = False) -> T:
        """Let `work` read and replace documents of a group. Raises ControllerError; then nothing was changed, unless it says that it is not known."""
        key = self._key(group)
        with self._locks[key.name]:
            deadline, pause = time.monotonic() + CHANGE_S, PAUSE_S
            while True:
                try:
                    held = self._reflector.store.get(key) if known else self._call(self._get(key), "nothing was written")
                    found = _Changes(_documents(held))
                    result = work(found)
                    if found.changed:
                        self._check(key, _documents(held), found.documents)
                        self._call(self._store(key, held, found.documents), _UNKNOWN)
                except ApiError as error:
                    busy = error.code in _BUSY
                    if not busy and error.code not in {404, 409}:
                        raise self._refusal(key, error) from error
                    if time.monotonic() > deadline:
                        why = f"the API server is busy ({error})" if busy else "others change it all the time"
                        raise ControllerError(f"{self.where(f'{group}/')[:-2]} cannot be changed: {why}; nothing was, try again") from error
                    known = False
                    time.sleep(pause * (0.5 + random.random()))  # noqa: S311 - spreads load, keeps no secret
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                else:
                    return result

    # Below here: the store's own thread.

    async def _follow(self) -> None:
        self._looked = time.monotonic()
        self._reading = asyncio.create_task(self._read_on())
        self._reading.add_done_callback(self._over)

    def _over(self, reading: asyncio.Task[None]) -> None:
        if not reading.cancelled() and not self._ended.done():
            problem = f"what other controllers change is not read any more ({reading.exception()!r}): this is a bug, please report it"
            self._ended.set_exception(ControllerError(problem))

    async def _end(self) -> None:
        """End all that this loop does; who waits for it hears of it."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=END_S)
        await asyncio.wait({asyncio.ensure_future(self._api.close())}, timeout=END_S)

    async def _read_on(self) -> None:
        """Follow the API server for ever, from a new list on whenever a watch has kept something back."""
        while True:
            following = asyncio.ensure_future(self._reflector.run())
            try:
                await self._kept_back(following)
            finally:
                following.cancel()
                await asyncio.wait({following}, timeout=END_S)
            _log.error("a watch of what other controllers change is open and has not told of a change: it begins anew")

    async def _kept_back(self, following: asyncio.Task[None]) -> None:
        """Return when something was changed that the watch has not told of a look later. Raises what `following` raises."""
        due: tuple[int, int] | None = None
        key, pause = self._key(""), LOOK_S
        while not (await asyncio.wait({following}, timeout=pause))[0]:
            if not self._reflector.synced:
                self._looked = time.monotonic()
                continue
            told = (self._reflector.events, self._reflector.lists)
            if due == told:
                return
            held, due = self._reflector.store.get(key), None
            try:
                found = await self._get(key)
            except (ApiError, Unreachable, TooLarge):  # `waiting` says so if it lasts
                pause = AGAIN_S
                continue
            self._looked, pause = time.monotonic(), LOOK_S
            if (held and held.version) != (found and found.version):
                due = told
        following.result()
        raise ControllerError("the reader has ended by itself")

    def _changed(self) -> None:
        problem = self._reflector.problem
        if problem is None:
            self._stale_since = None
        elif self._stale_since is None:
            self._stale_since = time.monotonic()
            _log.error("what other controllers change is not known", extra={"error": problem.message})
        self._measure(self._reflector.store.get(self._key("")))
        for told in self._told.copy():
            told()

    def _measure(self, seen: Seen | None) -> None:
        """Say so, once, while there still is room."""
        if seen is self._measured:
            return
        self._measured, documents = seen, _documents(seen)
        size, before = states.size(documents), self._filling
        metrics.SHARED_STATE.set(size)
        self._filling = size >= FULL * MOST
        if self._filling and not before:
            largest = sorted(documents, key=lambda name: -len(documents[name]))[:3]
            said = ", ".join(f"{name} {len(documents[name]) >> 10} KiB" for name in largest)
            extra = {"object": AUTHORITY, "kib": size >> 10, "of": MOST >> 10, "largest": said}
            _log.error(
                "what controllers share is nearly full; when it is, no node joins with a token. docs/kubernetes.md says what to remove",
                extra=extra,
            )

    async def _get(self, key: Key) -> Seen | None:
        """Ask for an object as it is now: a get without a version is answered by a quorum."""
        try:
            return self._take(await self._api.get(f"{self._path}/{key.name}", {}))
        except ApiError as error:
            if error.code != 404 or await self._absent():
                raise
            return None

    async def _absent(self) -> bool:
        """Is it the kind that the API server does not know, and not the object?"""
        try:
            await self._api.get(self._path, {"limit": "1"})
        except ApiError as error:
            if error.code == 404:
                raise ApiError(
                    0, "NoKind", "the API server does not know ControllerStates: install their CustomResourceDefinition"
                ) from error
            raise
        return False

    async def _store(self, key: Key, held: Seen | None, documents: dict[str, str]) -> None:
        """Bring an object from the version that was read to these documents; one without any has nothing to say, and goes."""
        if documents:
            self._take(json.dumps(await states.put(self._api, key, held, documents)).encode())
        elif held is not None:
            await self._api.send(
                "DELETE", f"{self._path}/{key.name}", {"preconditions": {"uid": held.uid, "resourceVersion": held.version}}
            )

    def _take(self, answer: bytes) -> Seen:
        """Know at once what was read or written here, and not only when the watch says so."""
        try:
            seen = stored(answer)
        except msgspec.MsgspecError as error:
            raise Unreachable("an answer that is no ControllerState") from error
        if seen is None:
            raise Unreachable("an answer about another object")
        before = self._reflector.store.get(seen.key)
        if before is None or seen.after(before):
            self._reflector.store[seen.key] = seen
            self._changed()  # the watch will not tell of it any more
        return seen

    # Any thread.

    def _call(self, work: Coroutine[Any, Any, T], consequence: str = "") -> T:
        with self._asking:
            if self._closing or self._thread is None or threading.current_thread() is self._thread:
                work.close()
                why = "the controller is ending" if self._closing else "it is not open: this is a bug, please report it"
                raise ControllerError(f"the state of the certificate authority cannot be asked for or changed: {why}")
            asked = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return asked.result()
        except CancelledError as error:
            raise ControllerError(f"the controller is ending: {consequence}") from error
        except (Unreachable, TooLarge) as error:
            raise ControllerError(f"the API server has not answered ({error}): {consequence}; do it again when it does") from error

    def _check(self, key: Key, before: dict[str, str], after: dict[str, str]) -> None:
        """Raise ControllerError if there is no room for what is to be written; who takes something away is never told so."""
        grown = {name for name, text in after.items() if len(text) > len(before.get(name, ""))}
        size, most = states.size(after), MOST + (RESERVE if grown <= LAST else 0)
        if size > most and size > states.size(before):
            raise ControllerError(
                f"ControllerState {self._namespace}/{key.name} has no room for more than {most >> 10} KiB, this would be {size >> 10}: nothing was written. "
                "docs/kubernetes.md says what to remove. Of what was revoked or issued much goes when its certificates run out; a shorter --svid-lifetime "
                "makes that sooner"
            )

    def _refusal(self, key: Key, error: ApiError) -> ControllerError:
        hint = "see the Role of whoever does this: get, list, watch, create, update and delete of controllerstates.meshagent.io"
        hint = hint if error.code in {401, 403} else "nothing was written"
        return ControllerError(f"the API server refuses ControllerState {self._namespace}/{key.name}: {error}; {hint}")

    def _key(self, group: str) -> Key:
        return Key(states.KIND, self._namespace, group or AUTHORITY)


class _Changes:
    """Documents of one object, and what is to become of them."""

    def __init__(self, documents: dict[str, str]) -> None:
        self.documents = dict(documents)
        self.changed = False

    def read(self, name: str) -> bytes | None:
        """Return a document; None if there is none."""
        text = self.documents.get(name)
        return None if text is None else text.encode()

    def write(self, name: str, text: str) -> None:
        """Replace it; "" removes it."""
        self.changed |= self.documents.get(name, "") != text
        self.documents[name] = text
        if not text:
            del self.documents[name]


def _documents(seen: Seen | None) -> dict[str, str]:
    return dict(seen.object.spec) if seen is not None and seen.object is not None else {}
