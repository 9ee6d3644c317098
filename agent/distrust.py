"""Closes the tunnels of peers that are no longer believed: a certificate that was revoked, or whose root is trusted no more, must not live on in a connection.

The supervisor says what is trusted (`trusted`) whenever that changes. Then three things happen: Envoy gets configuration in which the revoked open no stream
and callers make their tunnels anew (`Distrusted`, used by the builder); Envoy is asked who is at the other end of its streams (`agent.l7.peer_log`); and the
kernel closes the TCP connections under those that are not believed, with everything in them. Nobody else's tunnels are touched.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from agent import addresses, asking, files
from agent.bpf.sockets import LiveSocket, Sockets
from agent.config import HBONE_PORT, Config
from agent.errors import KernelRefused, MeshError
from agent.l7.peer_log import Distrusted, Shown

_log = logging.getLogger(__name__)

RETRY_S: Final = 5.0
_NAMED: Final = 20
_PROBLEM: Final = "tunnels of peers that are not believed any more may go on"


class Waypoint(NamedTuple):
    """What is needed of Envoy, for whoever is at the event loop."""

    ask: Callable[[bool], None]
    """Have it speak of its tunnels, or be silent again."""
    asked: Callable[[], bool]
    """Has it heard?"""
    configure: Callable[[], Awaitable[None]]
    """Give it what follows from `Distrust.distrusted`; raises MeshError."""


class Reasons(NamedTuple):
    """What makes peers worth another look."""

    revoked: bool = False
    """Serial numbers were revoked."""
    roots: bool = False
    """Roots were forgotten."""

    def __or__(self, other: Reasons) -> Reasons:
        return Reasons(self.revoked or other.revoked, self.roots or other.roots)


class Distrust:
    """See the module. Belongs to the event loop; sockets are looked for in a thread."""

    def __init__(
        self,
        config: Config,
        sockets: Sockets,
        waypoint: Waypoint,
        doubt: Callable[[bytes, bool], str],
        namespaces: Callable[[], Collection[str]],
    ) -> None:
        """Continue where the last agent ended. `doubt` is `Identities.doubt`; `namespaces` are paths of those in which tunnels may be closed."""
        self._path = config.run_dir / "tunnels-distrusted"
        self._sockets = sockets
        self._waypoint = waypoint
        self._doubt = doubt
        self._namespaces = namespaces
        self._wanted = asyncio.Event()
        self._reasons = Reasons()
        self._known: dict[bytes, str] = {}
        self._believed: set[tuple[str, str, str]] = set()
        self._bad: dict[tuple[str, str, str], str] = {}
        self._serials, self._roots = _read(self._path, self._again)
        self.distrusted = Distrusted.of(self._serials, (root.encode() for root in self._roots)) if self._roots else Distrusted()
        """What the builder is told."""
        self._left = ""
        """Why the last look has left some open, for people."""
        self.closed = 0
        """Tunnels closed since the agent started."""
        self.problem = ""
        """Why tunnels of peers that are not believed may go on, for people; "" if they do not."""

    def _again(self) -> None:
        self._reasons = Reasons(revoked=True, roots=True)
        self._wanted.set()

    def trusted(self, revoked: Iterable[int], roots: Iterable[bytes]) -> None:
        """Say who is: by serial numbers that are revoked, and roots, DER. Cheap if nothing changed."""
        serials, hashes = frozenset(revoked), frozenset(hashlib.sha256(root).hexdigest() for root in roots)
        if (serials, hashes) == (self._serials, self._roots):
            return
        reasons = Reasons(bool(serials - self._serials), bool(self._roots - hashes))
        self._serials, self._roots = serials, hashes
        self.distrusted = Distrusted.of(serials, (root.encode() for root in hashes))
        self._reasons |= reasons
        self._known, self._believed = {}, set()  # a look that is under way judges anew
        self._store()
        self._wanted.set()

    def shown(self, one: Shown) -> None:
        """Take what Envoy says of a tunnel."""
        place = (one.netns_path, one.local, one.remote)
        if one.certificate not in self._known:
            self._known[one.certificate] = self._doubt(one.certificate, self._reasons.revoked)
        if reason := self._known[one.certificate]:
            self._bad[place] = reason
        else:
            self._believed.add(place)

    async def run(self) -> None:
        """Look at all peers after each change that may concern one."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                reason = await self._look()
            except (MeshError, OSError) as error:
                reason = str(error)
            before, self.problem = self.problem, f"{_PROBLEM}: {reason}: the agent tries again" if reason else ""
            if reason:
                if self.problem != before:
                    _log.error(self.problem)
                await asyncio.sleep(RETRY_S)
                self._wanted.set()

    async def _look(self) -> str:
        """Why not all could be looked at; "" if they were."""
        self._known, self._believed, self._bad = {}, set(), {}
        if self._reasons == Reasons():
            await self._waypoint.configure()
            return ""
        self._left, heard = "", False
        self._waypoint.ask(True)
        configuring = asyncio.ensure_future(self._waypoint.configure())
        try:
            while not heard:
                async for heard in asking.rounds(self._waypoint.asked):  # noqa: B007  used when the rounds are over
                    bad, self._bad = self._bad, {}
                    if bad:
                        await asyncio.to_thread(self._close, bad)
                if not heard and not self.problem:
                    self.problem = f"{_PROBLEM}: Envoy does not answer; if it is gone, so are they"
                    _log.error(self.problem)
            if self._reasons.roots:
                await asyncio.to_thread(self._close_silent)
            await configuring
        finally:
            configuring.cancel()
            self._waypoint.ask(False)
        self._known, self._believed = {}, set()
        if not self._left and not self._wanted.is_set():
            self._reasons = Reasons()
            self._store()
        return self._left

    def _close(self, bad: dict[tuple[str, str, str], str]) -> None:
        for path in self._namespaces():
            ends = {(local, remote): reason for (where, local, remote), reason in bad.items() if where == path}
            if ends:
                self._destroy(path, lambda found, ends=ends: ends.get(_ends(found), ""))  # type: ignore[misc]

    def _close_silent(self) -> None:
        """Nobody can say by which root a tunnel without streams was believed; who opened it does so again."""
        for path in self._namespaces():
            believed = {(local, remote) for where, local, remote in self._believed if where == path}

            def silent(found: LiveSocket, believed: Collection[tuple[str, str]] = believed) -> str:
                return "" if found.ends[0][1] != HBONE_PORT or _ends(found) in believed else "a root was forgotten, and it says nothing"

            self._destroy(path, silent)

    def _destroy(self, path: str, judge: Callable[[LiveSocket], str]) -> None:
        try:
            found = [(one, reason) for one in self._sockets.dump(Path(path)) if (reason := judge(one))]
            for one, reason in self._sockets.destroy(Path(path), found):
                self.closed += 1
                if self.closed <= _NAMED:
                    _log.warning("a tunnel was closed: its peer is not believed any more", extra={"connection": str(one), "reason": reason})
        except (KernelRefused, OSError) as error:  # the other namespaces are looked at
            self._left = f"{error}; restart their pods"

    def _store(self) -> None:
        content = {
            "serials": [f"{serial:x}" for serial in sorted(self._serials)],
            "roots": sorted(self._roots),
            "looked": self._reasons == Reasons(),
        }
        try:
            files.write(self._path, json.dumps(content).encode())
        except OSError as error:
            _log.error(
                "who is not believed is not stored: the next agent looks again", extra={"path": str(self._path), "reason": str(error)}
            )


def _ends(found: LiveSocket) -> tuple[str, str]:
    local, remote = (addresses.endpoint(*end) for end in found.ends)
    return local, remote


def _read(path: Path, again: Callable[[], None]) -> tuple[frozenset[int], frozenset[str]]:
    """What an agent before this one knew; `again` is called if it did not finish."""
    try:
        content = json.loads(path.read_bytes())
        serials, roots = frozenset(int(serial, 16) for serial in content["serials"]), frozenset(str(root) for root in content["roots"])
        if not content["looked"]:
            again()
    except FileNotFoundError:
        return frozenset(), frozenset()
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.error("who was not believed cannot be read: all peers are looked at again", extra={"path": str(path), "reason": str(error)})
        again()
        return frozenset(), frozenset()
    return serials, roots
