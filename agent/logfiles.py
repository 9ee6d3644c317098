"""Log files of bounded size: what is full is moved aside, the oldest goes. Used by `agent.connection_log` and for the log that Envoy writes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)

MODE = 0o640
LOOK_S = 5.0
MOST_BYTES = 64 << 20
KEPT = 3
"""So many full ones, FILE.1 being the newest: four files of 64 MiB at most, and what is written between two looks."""


@dataclass(frozen=True, slots=True)
class LogFile:
    """One log. Its directory is made by whoever owns it."""

    path: Path
    most_bytes: int = MOST_BYTES

    def prepare(self) -> None:
        """Make the file if it is not there, with its own mode and not that of who writes it. Raises OSError."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, MODE))

    def rotate(self) -> bool:
        """Move the file aside if it is full, or make it if somebody has removed it; True if whoever writes it has to open it anew. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_size < self.most_bytes:
                return False
            for number in range(KEPT, 0, -1):
                newer = self._old(number - 1) if number > 1 else self.path
                with contextlib.suppress(FileNotFoundError):
                    newer.replace(self._old(number))
        self.prepare()
        return True

    def _old(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


async def keep_bounded(file: LogFile, reopen: Callable[[], None]) -> None:
    """For ever look whether a log that somebody else writes is full; `reopen`, which may block, has the writer open it anew."""
    due, problem = False, ""
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            due |= await asyncio.to_thread(file.rotate)
            if due:
                await asyncio.to_thread(reopen)
            due, problem = False, ""
        except (OSError, http.client.HTTPException) as error:
            if str(error) != problem:
                _log.warning("a log file is not kept bounded; trying again", extra={"file": str(file.path), "reason": str(error)})
            problem = str(error)
