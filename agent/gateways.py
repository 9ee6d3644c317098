"""Certificates of the gateways on this node, with their keys: fetched from the controller, kept in memory, and on tmpfs for a restart. Run by the supervisor.

Asked for only while a workload of this node lends its place to a gateway; what is no longer served is forgotten. Nothing here is logged but names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import grpc

from agent import files, netns
from agent.config import Config
from agent.dialling import dial
from agent.patience import Backoff
from meshapi import gateway_pb2 as pb

_log = logging.getLogger(__name__)

Certificates = Mapping[str, tuple[bytes, bytes]]
"""Chain and key, PEM, by the name of the Secret."""

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 10.0
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
_VERSION: Final = 1
_NAME: Final = "gateways.json"
_METHOD: Final = f"/{pb.DESCRIPTOR.services_by_name['Gateways'].full_name}/Certificates"


class GatewayCertificates:
    """See the module. Belongs to one event loop."""

    def __init__(self, config: Config, changed: Callable[[], None]) -> None:
        """`changed` is called whenever `held` is another."""
        self._config = config
        self._changed = changed
        self._path = config.identity_dir / _NAME
        self._wanted = asyncio.Event()
        self._unwanted = asyncio.Event()
        self._unwanted.set()
        self._last_error = ""
        self.held: Certificates = MappingProxyType({})
        """What Envoy is to have."""

    def load(self) -> None:
        """Begin with what an earlier agent of this node had."""
        if not self._may_keep():
            return
        try:
            self.held = read(self._path)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            _log.error("stored certificates of gateways are not used", extra={"path": str(self._path), "error": str(error)})

    def want(self, wanted: bool) -> None:
        """Say whether a gateway runs on this node."""
        if not wanted and self._wanted.is_set() | bool(self.held):
            self._take({})
        for event, on in ((self._wanted, wanted), (self._unwanted, not wanted)):
            if on:
                event.set()
            else:
                event.clear()

    def problems(self) -> list[str]:
        """Sentences for `meshagent status`."""
        if not self._wanted.is_set() or not self._last_error or self.held:
            return []
        return [f"certificates of this node's gateways cannot be fetched: {self._last_error}"]

    async def run(self) -> None:
        """Follow the controller while there is a gateway, for ever."""
        backoff = Backoff(FIRST_BACKOFF_S, MAX_BACKOFF_S)
        while True:
            await self._wanted.wait()
            try:
                await self._follow()
                backoff.reset()
                reason = "the controller ended the stream"
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, OSError) as error:
                reason = _words(error)
            if not self._wanted.is_set():
                continue
            if reason != self._last_error:
                _log.warning("certificates of gateways stay as they are: the controller cannot be asked", extra={"error": reason})
            self._last_error = reason
            await asyncio.sleep(backoff.pause())

    async def _follow(self) -> None:
        """One connection, until it ends or nothing is wanted any more."""
        async with await dial(self._config) as channel:
            method: Any = channel.unary_stream(_METHOD, pb.CertificatesRequest.SerializeToString, pb.GatewayCertificates.FromString)
            call = method(pb.CertificatesRequest(node=self._config.node))
            reading, unwanted = asyncio.ensure_future(self._read(call)), asyncio.ensure_future(self._unwanted.wait())
            try:
                await asyncio.wait({reading, unwanted}, return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    reading.result()
            finally:
                call.cancel()
                for task in (reading, unwanted):
                    task.cancel()
                await asyncio.gather(reading, unwanted, return_exceptions=True)

    async def _read(self, call: Any) -> None:
        async for message in call:
            if not self._unwanted.is_set():
                self._last_error = ""
                self._take({one.name: (one.chain, one.key) for one in message.certificates})

    def _take(self, found: Certificates) -> None:
        if found == self.held:
            return
        self.held = MappingProxyType(dict(found))
        _log.info("certificates of gateways", extra={"secrets": ", ".join(sorted(found)) or "none"})
        self._store()
        self._changed()

    def _store(self) -> None:
        """Keep them for a restart, where that is no disk. A few kilobytes of memory: nobody waits for it."""
        try:
            if not self.held:
                self._path.unlink(missing_ok=True)
            elif self._may_keep():
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                entries = {name: {"chain": chain.decode(), "key": key.decode()} for name, (chain, key) in self.held.items()}
                files.write(self._path, json.dumps({"version": _VERSION, "certificates": entries}).encode())
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "they are no text"
            _log.error("certificates of gateways are not kept for a restart", extra={"path": str(self._path), "error": str(reason)})

    def _may_keep(self) -> bool:
        return self._config.keys_on_disk or netns.file_system(self._config.identity_dir) in _IN_MEMORY


def read(path: Path) -> Certificates:
    """Return what a file holds. Raises OSError, and ValueError, which never quotes it."""
    content = path.read_bytes()
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
        document = json.loads(content)
        if document["version"] == _VERSION:
            entries = document["certificates"].items()
            return MappingProxyType({name: (entry["chain"].encode(), entry["key"].encode()) for name, entry in entries})
    raise ValueError("it is damaged, or of another form")


def _words(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower().replace('_', ' ')}: {' '.join((error.details() or 'no details').split())[:300]}"
    return " ".join(str(error).split())[:300] or type(error).__name__
