"""From source to publication: reload, compile, encode, publish, one at a time. Run by `controller.main`, called by `controller.admin`.

The only owner of the Source: whoever changes files in the directory does it within `change`, so that what was staged is what is written.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from watchfiles import Change, awatch

from controller import metrics
from controller.compile import Compiled, compile_model
from controller.errors import ControllerError, Problem
from controller.schema import kinds
from controller.snapshot import Publication, Snapshot, encode
from controller.source import Source, State

_log = logging.getLogger(__name__)

RESCAN_MS: Final = 5000  # for what inotify does not tell: network file systems, targets of links
SETTLE_S: Final = 0.25  # how soon a file that seems half written is read again
DEBOUNCE_MS: Final = 50  # an editor's or kubectl's burst of writes is one change


def _relevant(_change: Change, path: str) -> bool:
    """Ignore our own and editors' temporary files; `..data` is how a mounted ConfigMap changes."""
    name = Path(path).name
    return name.startswith("..") or not (name.startswith((".", "#")) or name.endswith(("~", ".tmp", ".swp")))


class Mesh:
    """Holds the state that is in force, its compiled form and its publication."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.publication = Publication()
        self.compiled = Compiled()
        self._lock = asyncio.Lock()
        self._reported: frozenset[Problem] = frozenset()
        self._unreadable = ""
        self._unsettled = asyncio.Event()

    @property
    def state(self) -> State:
        """What is in force."""
        return self.source.state

    async def start(self) -> None:
        """Read and publish the directory for the first time. Raises ControllerError if it cannot be read."""
        async with self._lock:
            await asyncio.to_thread(self.source.start)
            await self._publish(time.time_ns())
        if self.source.unsettled:
            self._unsettled.set()

    async def reload(self) -> None:
        """Bring into force what is on disk now. A directory that cannot be read leaves everything as it is."""
        async with self.change():
            pass

    @asynccontextmanager
    async def change(self) -> AsyncIterator[Source]:
        """Let the caller stage and write files; when it leaves, what is on disk is in force."""
        async with self._lock:
            seen, before = time.time_ns(), self.source.state
            try:
                yield self.source
            finally:
                try:
                    state = await asyncio.to_thread(self.source.load)
                except ControllerError as error:
                    if self._unreadable != str(error):
                        _log.error("source unreadable, the last good state stays in force", extra={"error": str(error)})
                        self._unreadable = str(error)
                else:
                    self._unreadable = ""
                    if self.source.unsettled:
                        self._unsettled.set()
                    if state.objects != before.objects or state.problems != before.problems:
                        await self._publish(seen)

    async def watch(self) -> None:
        """Follow the directory for ever. Raises ControllerError if it cannot be watched."""
        tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._settle())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _settle(self) -> None:
        """Read again what seemed half written: no event says that a file stays as it is."""
        while True:
            await self._unsettled.wait()
            self._unsettled.clear()
            await asyncio.sleep(SETTLE_S)
            await self.reload()

    async def _follow(self) -> None:
        await self.reload()  # what changed between start and the first event
        try:
            async for _ in awatch(
                self.source.directory,
                watch_filter=_relevant,
                debounce=DEBOUNCE_MS,
                step=10,
                rust_timeout=RESCAN_MS,
                yield_on_timeout=True,
                recursive=True,
                ignore_permission_denied=True,
            ):
                await self.reload()
        except OSError as error:
            raise ControllerError(
                f"cannot watch {self.source.directory}: {error}; raise fs.inotify.max_user_watches or check the path"
            ) from error

    async def _publish(self, changed_at_ns: int) -> None:
        started = time.monotonic()
        state = self.source.state
        previous = self.publication.current
        self.compiled, snapshot = await asyncio.to_thread(_compile_and_encode, state, previous, changed_at_ns)
        self._report(state)
        if snapshot.version != previous.version or not previous.serial:
            self.publication.publish(snapshot)
            _log.info("model published", extra={"version": snapshot.version, "resources": len(snapshot.versions)})
        metrics.RELOAD_SECONDS.set(time.monotonic() - started)

    def _report(self, state: State) -> None:
        problems = frozenset(state.problems)
        for problem in sorted(problems - self._reported):
            _log.error("resource refused", extra={"problem": str(problem)})
        for problem in sorted(self._reported - problems):
            _log.info("resource problem solved", extra={"problem": str(problem)})
        self._reported = problems
        metrics.PROBLEMS.set(len(problems))
        counts = Counter(key.kind for key in state.objects)
        for kind in kinds():
            metrics.OBJECTS.labels(kind).set(counts[kind])


def _compile_and_encode(state: State, previous: Snapshot, changed_at_ns: int) -> tuple[Compiled, Snapshot]:
    compiled = compile_model(state.objects)
    return compiled, encode(compiled.entities, previous, changed_at_ns)
