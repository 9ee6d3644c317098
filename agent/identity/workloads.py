"""The X.509-SVIDs of this node's workloads: made, kept, renewed at half of their life, dropped when they are no longer to be believed.

A certificate is published after everything about it was checked, and stays until it has expired, is revoked, has lost its root, or its workload has gone or
has another identity: a renewal that fails takes nothing away. Keys are made here and live in this object and in the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from agent.errors import MeshError
from agent.identity import certificates
from agent.identity.authority import Away
from agent.identity.clock import Clock, Due, renewal
from agent.identity.keys import PrivateKey
from agent.identity.store import Kept, Svid
from agent.identity.trust import Trust
from agent.patience import Backoff
from meshapi import identity_pb2 as pb

_log = logging.getLogger(__name__)

BATCH: Final = 50
"""Certificates in one request: bounds what a request costs the controller, and how long a new workload waits for others."""
FIRST_BACKOFF_S: Final = 0.2
MAX_BACKOFF_S: Final = 300.0
"""For one workload that was refused."""
MAX_PAUSE_S: Final = 10.0
"""For all, after a request that failed as a whole."""
LOOK_S: Final = 30.0
"""So often the wall clock is looked at: it may have been set."""

Sign = Callable[[Sequence[tuple[str, bytes]]], Awaitable[Sequence[pb.Signed]]]


@dataclass(slots=True)
class _Entry:
    """One workload."""

    spiffe_id: str
    backoff: Backoff
    svid: Svid | None = None
    due: Due | None = None
    """When it is to be renewed."""
    retry_at: float = 0.0
    """Boot clock: not before, after a failure."""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a workload's identity is doing. `problem`: why it has none, or no newer one; "" if all is well."""

    workload: str
    spiffe_id: str
    svid: Svid | None
    due: Due | None
    problem: str


class Workloads:
    """See the module. Belongs to one event loop."""

    def __init__(self, sign: Sign, connected: asyncio.Event, clock: Clock, changed: Callable[[], None]) -> None:
        """`changed` is called after what is published changed; it must not raise."""
        self._sign = sign
        self._connected = connected
        self._clock = clock
        self._changed = changed
        self._entries: dict[str, _Entry] = {}
        self._trust: Trust | None = None
        self._stored: dict[str, Svid] = {}
        """From the store, of workloads that nobody has asked for yet."""
        self._news = asyncio.Event()
        self._paused_until = 0.0
        """Boot clock: the controller is not asked before, after a request that failed as a whole."""
        self.signed = 0
        """Certificates that were taken since the start."""
        self.failures = 0
        """Requests for one that failed."""

    def restore(self, kept: Kept) -> None:
        """Begin with what an earlier agent had, without what its trust does not vouch for any more."""
        self._trust = kept.trust
        for name, svid in kept.svids.items():
            try:
                certificates.verify(svid.chain, kept.trust.certificates if kept.trust else (), self._clock.wall())
            except ValueError as error:
                _log.warning("a stored identity does not serve", extra={"workload": name, "reason": str(error)})
            else:
                self._stored[name] = svid

    def want(self, wanted: Mapping[str, str]) -> None:
        """Have a certificate for exactly these workloads; SPIFFE ID by workload. Others are forgotten at once."""
        before = {name: (entry.spiffe_id, entry.svid) for name, entry in self._entries.items()}
        for name in self._entries.keys() - wanted.keys():
            del self._entries[name]
        for name, spiffe_id in wanted.items():
            entry = self._entries.get(name)
            if entry is None or entry.spiffe_id != spiffe_id:
                entry = self._entries[name] = _Entry(spiffe_id, Backoff(FIRST_BACKOFF_S, MAX_BACKOFF_S, self._clock.random))
                if (stored := self._stored.get(name)) is not None:
                    self._try(name, entry, stored)
        self._stored = {}
        self._news.set()
        if before != {name: (entry.spiffe_id, entry.svid) for name, entry in self._entries.items()}:
            self._changed()

    def _try(self, name: str, entry: _Entry, stored: Svid) -> None:
        try:
            self._check(entry, stored, verified=True)
        except ValueError as error:
            _log.warning("a stored identity does not serve", extra={"workload": name, "reason": str(error)})
            return
        self._hold(entry, stored, fresh=False)

    def take_trust(self, trust: Trust) -> None:
        """Drop what `trust` does not vouch for, and check what comes by it from now on."""
        before, self._trust = self._trust, trust
        still = before is not None and set(before.roots) <= set(trust.roots)  # who vouched for them still does
        for name, entry in self._entries.items():
            if entry.svid is not None:
                try:
                    self._check(entry, entry.svid, verified=still)
                except ValueError as error:
                    _log.warning("an identity is given up", extra={"workload": name, "reason": str(error)})
                    entry.svid, entry.due, entry.retry_at = None, None, 0.0
        self._news.set()
        self._changed()

    def _check(self, entry: _Entry, svid: Svid, *, verified: bool) -> None:
        """Raise ValueError unless `svid` is what the workload of `entry` is to have. `verified`: its chain was found good with the roots in force."""
        if self._trust is None:
            raise ValueError("there is no trust bundle yet")
        if svid.chain.public != svid.key.public():
            raise ValueError("the certificate is for another key")
        if svid.chain.spiffe_id != entry.spiffe_id:
            raise ValueError(f"the certificate is for {svid.chain.spiffe_id!r:.200} and the workload is {entry.spiffe_id}")
        if svid.chain.serial in self._trust.revoked:
            raise ValueError("the certificate is revoked")
        if not verified:  # 0.2 ms
            certificates.verify(svid.chain, self._trust.certificates, self._clock.wall())

    def _hold(self, entry: _Entry, svid: Svid, *, fresh: bool) -> None:
        entry.svid, entry.problem, entry.retry_at = svid, "", 0.0
        entry.due = renewal(svid.chain.not_before, svid.chain.not_after, self._clock, fresh=fresh)
        entry.backoff.reset()

    def get(self, name: str) -> Svid | None:
        """The SVID of a workload, if there is one that holds now."""
        entry = self._entries.get(name)
        if entry is None or entry.svid is None or self._clock.wall() >= entry.svid.chain.not_after:
            return None
        return entry.svid

    def standing(self, name: str) -> Standing | None:
        """How one workload's identity is doing; None if nobody wants one for it."""
        entry = self._entries.get(name)
        return None if entry is None else Standing(name, entry.spiffe_id, self.get(name), entry.due, entry.problem)

    def standings(self) -> list[Standing]:
        """All of them, by name."""
        return [Standing(name, entry.spiffe_id, self.get(name), entry.due, entry.problem) for name, entry in sorted(self._entries.items())]

    def kept(self) -> Kept:
        """What a restart should begin with."""
        now = {name: svid for name in self._entries if (svid := self.get(name)) is not None}
        return Kept(self._trust, {**self._stored, **now})

    async def run(self) -> None:
        """Sign what has no certificate, renew what is due, drop what has expired; for ever."""
        pause = Backoff(FIRST_BACKOFF_S, MAX_PAUSE_S, self._clock.random)
        while True:
            self._news.clear()
            self._expire()
            batch = self._batch() if self._connected.is_set() and self._trust is not None else []
            if not batch:
                await self._wait()
                continue
            try:
                await self._sign_batch(batch)
            except MeshError as error:
                self._failed_all(batch, error)
                self._paused_until = self._clock.boot() + pause.pause()
            else:
                pause.reset()

    def _expire(self) -> None:
        now, lost = self._clock.wall(), False
        for name, entry in self._entries.items():
            if entry.svid is not None and now >= entry.svid.chain.not_after:
                _log.error("an identity has expired", extra={"workload": name, "spiffe_id": entry.spiffe_id, "reason": entry.problem})
                entry.svid, entry.due, lost = None, None, True
        if lost:
            self._changed()

    def _batch(self) -> list[str]:
        """Who is next: first those without a certificate, then whose ends soonest."""
        now = self._clock.boot()
        if now < self._paused_until:
            return []
        ready = [
            (entry.svid.chain.not_after if entry.svid else 0.0, name)
            for name, entry in self._entries.items()
            if entry.retry_at <= now and (entry.svid is None or entry.due is None or entry.due.come(self._clock))
        ]
        return [name for _, name in sorted(ready)[:BATCH]]

    async def _wait(self) -> None:
        """Until something is due, something was changed, or the clocks are to be looked at."""
        waits = [LOOK_S]
        now, wall = self._clock.boot(), self._clock.wall()
        for entry in self._entries.values():
            due = entry.due.wait_s(self._clock) if entry.due is not None else 0.0
            waits.append(max(due, entry.retry_at - now, self._paused_until - now))
            if entry.svid is not None:
                waits.append(entry.svid.chain.not_after - wall)
        waiting = [asyncio.create_task(self._news.wait())]
        seconds = min(waits)
        if not self._connected.is_set():
            waiting.append(asyncio.create_task(self._connected.wait()))
        if len(waiting) > 1 or self._trust is None:
            seconds = min([LOOK_S, *(e.svid.chain.not_after - wall for e in self._entries.values() if e.svid is not None)])
        try:
            await asyncio.wait(waiting, timeout=max(seconds, 0.005), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _sign_batch(self, names: list[str]) -> None:
        """Have one batch signed. Raises MeshError if the request as a whole failed."""
        wanted = {name: self._entries[name].spiffe_id for name in names}
        keys, requests = await asyncio.to_thread(_requests, names)
        answers = await self._sign(requests)
        roots = self._trust.certificates if self._trust is not None else ()
        read = await asyncio.to_thread(_read, keys, answers, roots, self._clock.wall())
        verified = self._trust is not None and self._trust.certificates == roots  # no others came meanwhile
        taken = False
        for name, found in zip(names, read, strict=True):
            entry = self._entries.get(name)
            if entry is None or entry.spiffe_id != wanted[name]:
                continue  # it went, or became another, meanwhile
            try:
                if isinstance(found, ValueError):
                    raise found
                self._check(entry, found, verified=verified)
            except ValueError as error:
                self._failed(name, entry, str(error))
                continue
            self._hold(entry, found, fresh=True)
            self.signed += 1
            taken = True
        if taken:
            self._changed()

    def _failed_all(self, names: list[str], error: MeshError) -> None:
        _log.log(
            logging.INFO if isinstance(error, Away) else logging.ERROR,
            "identities not signed, trying again",
            extra={"workloads": len(names), "reason": str(error)},
        )
        for name in names:
            if (entry := self._entries.get(name)) is not None:
                self.failures += 1
                entry.problem = str(error)

    def _failed(self, name: str, entry: _Entry, reason: str) -> None:
        self.failures += 1
        if reason != entry.problem:
            _log.error("an identity was not signed, trying again", extra={"workload": name, "spiffe_id": entry.spiffe_id, "reason": reason})
        entry.problem = reason
        entry.retry_at = self._clock.boot() + entry.backoff.pause()


def _requests(names: list[str]) -> tuple[list[PrivateKey], list[tuple[str, bytes]]]:
    keys = [PrivateKey.generate() for _ in names]
    return keys, [(name, key.csr()) for name, key in zip(names, keys, strict=True)]


def _read(keys: list[PrivateKey], answers: Sequence[pb.Signed], roots: Sequence[x509.Certificate], now: float) -> list[Svid | ValueError]:
    """What the controller answered to each, decoded and verified; or why it does not serve."""
    found: list[Svid | ValueError] = []
    for key, answer in zip(keys, answers, strict=True):
        try:
            found.append(_svid(key, answer, roots, now))
        except ValueError as error:
            found.append(error)
    return found


def _svid(key: PrivateKey, answer: pb.Signed, roots: Sequence[x509.Certificate], now: float) -> Svid:
    if answer.error or not answer.chain:
        raise ValueError(f"refused: {' '.join(answer.error.split())[:300] or 'without a reason'}")
    chain = certificates.read(answer.chain)
    if chain.public != key.public():
        raise ValueError("the certificate is for another key")
    certificates.verify(chain, roots, now)
    return Svid(key, chain)
