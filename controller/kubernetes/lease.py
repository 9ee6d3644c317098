"""Which of several controllers writes: the one that holds a Lease. All of them serve.

https://kubernetes.io/docs/concepts/architecture/leases/, and the rules of client-go's leader election: who does not hold it may take it when it has seen it
unchanged for its whole duration by its own clock, so clocks of machines are never compared; every write names the version that was read, so only one succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import logging
import random
import time
from collections.abc import Callable
from typing import Any, Final

from controller.kubernetes.api import Api, ApiError, TooLarge, Unreachable

_log = logging.getLogger(__name__)

DURATION_S: Final = 15
RENEW_S: Final = 5.0
GRACE_S: Final = 10.0
"""After so long without a renewal the holder takes itself for one no more: before anybody else may."""
RELEASE_S: Final = 3.0
_API: Final = "/apis/coordination.k8s.io/v1"


class Lease:
    """See the module. `held` is True while this controller may write."""

    def __init__(self, api: Api, namespace: str, name: str, identity: str, changed: Callable[[], None]) -> None:
        """`changed` is called when `held` changes."""
        self._api, self._namespace, self._name, self._changed = api, namespace, name, changed
        self.identity = identity
        self._path = f"{_API}/namespaces/{namespace}/leases"
        self._seen: tuple[str, str] = ("", "")
        """Holder and version that were read last, and when that was first so."""
        self._since = 0.0
        self._renewed = 0.0
        """When the last renewal that succeeded was asked for."""
        self._holder = False
        self._was = False
        self._problem = ""

    @property
    def held(self) -> bool:
        """May this controller write, now?"""
        return self._holder and time.monotonic() - self._renewed < GRACE_S

    async def run(self) -> None:
        """Take part for ever."""
        while True:
            try:
                await asyncio.wait_for(self._once(), GRACE_S - RENEW_S)
            except asyncio.TimeoutError:
                self._told(f"no answer within {GRACE_S - RENEW_S:.0f} s")
            if self.held is not self._was:
                self._was = self.held
                _log.info(
                    "this controller writes status" if self._was else "this controller writes no status", extra={"identity": self.identity}
                )
                self._changed()
            await asyncio.sleep(RENEW_S * (0.8 + random.random() * 0.4))  # noqa: S311 - spreads load, keeps no secret

    async def release(self) -> None:
        """Give it up, so that nobody needs to wait; called after `run` has ended."""
        if not self._holder:
            return
        self._holder = False
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._release(), RELEASE_S)

    async def _release(self) -> None:
        try:
            lease = await self._read()
            if lease is not None and lease["spec"].get("holderIdentity") == self.identity:
                await self._write(lease, "")
        except (ApiError, Unreachable, TooLarge) as error:
            _log.info("the lease is not given up, others wait until it runs out", extra={"error": str(error)})

    async def _once(self) -> None:
        asked = time.monotonic()
        try:
            lease = await self._read()
            if lease is None:
                await self._create()
            elif self._may(lease):
                await self._write(lease, self.identity)
            else:
                self._holder = False
                return
            self._holder, self._renewed, self._problem = True, asked, ""
        except (ApiError, Unreachable, TooLarge) as error:
            if isinstance(error, ApiError) and error.code == 409:
                self._holder = False  # somebody was quicker
            else:
                self._told(str(error))

    def _told(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            _log.warning("who writes cannot be settled", extra={"lease": f"{self._namespace}/{self._name}", "error": problem})

    async def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(await self._api.get(f"{self._path}/{self._name}", {}))
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        except (ValueError, RecursionError) as error:
            raise Unreachable("a Lease that is no JSON") from error
        if not isinstance(found, dict) or not isinstance(found.get("spec", {}), dict) or not isinstance(found.get("metadata"), dict):
            raise Unreachable("a Lease that is none")
        return {**found, "spec": found.get("spec") or {}}

    def _may(self, lease: dict[str, Any]) -> bool:
        holder = lease["spec"].get("holderIdentity") or ""
        seen = (str(holder), str(lease["metadata"].get("resourceVersion")))
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._since = seen, now
        seconds = lease["spec"].get("leaseDurationSeconds")
        lasts = seconds if isinstance(seconds, int) and 0 < seconds < 3600 else DURATION_S
        return not holder or holder == self.identity or now - self._since > lasts

    async def _create(self) -> None:
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name},
            "spec": self._spec(self.identity, {}),
        }
        await self._api.send("POST", self._path, lease)

    async def _write(self, lease: dict[str, Any], holder: str) -> None:
        await self._api.send("PUT", f"{self._path}/{self._name}", {**lease, "spec": self._spec(holder, lease["spec"])})

    def _spec(self, holder: str, before: dict[str, Any]) -> dict[str, Any]:
        now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        same = before.get("holderIdentity") == holder
        turns = before.get("leaseTransitions")
        return {
            "holderIdentity": holder,
            "leaseDurationSeconds": DURATION_S,
            "renewTime": now,
            "acquireTime": before.get("acquireTime") if same else now,
            "leaseTransitions": (turns if isinstance(turns, int) else 0) + (0 if same else 1),
        }
