"""An open loop of HTTP requests for tests: h2load at a fixed rate, whose log says of each request when it began, what came and how long it took."""

from __future__ import annotations

import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lab.lab import Lab

OK, FAILED = 200, -1


@dataclass(slots=True)
class Seen:
    """What came of the requests, once the loop has ended. `statuses` has FAILED for those that got no answer."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """Sorted."""
    failed: list[tuple[float, int]] = field(default_factory=list)
    """When those began that were not answered with 200 (seconds since the first request), and what came."""

    def percentile(self, share: float) -> float:
        """Seconds that this share of the requests did not take longer than."""
        return self.seconds[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


@contextmanager
def asking(
    lab: Lab, caller: str, url: str, *, rate: int, seconds: int, connections: int = 20, options: tuple[str, ...] = ("--h1",)
) -> Iterator[Seen]:
    """Ask `rate` times a second for `seconds`, beginning with the block; the block's end waits for the last answer."""
    seen = Seen()
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        argv = [
            "h2load",
            *options,
            "-c",
            str(connections),
            "--rps",
            str(rate / connections),
            "-D",
            str(seconds),
            "--log-file",
            str(log),
            url,
        ]
        running = lab.popen(caller, argv)
        try:
            yield seen
            out, error = running.communicate(timeout=seconds + 30)
        finally:
            if running.poll() is None:
                running.kill()
                running.wait()
        assert running.returncode == 0, out + error
        _read(log, seen)


def _read(log: Path, seen: Seen) -> None:
    rows = [tuple(int(field) for field in line.split("\t")[:3]) for line in log.read_text().splitlines()]
    first = min((began for began, _, _ in rows), default=0)
    for began, status, microseconds in rows:
        seen.statuses[status] += 1
        seen.seconds.append(microseconds / 1e6)
        if status != OK:
            seen.failed.append(((began - first) / 1e6, status))
    seen.seconds.sort()
    seen.failed.sort()


def available() -> bool:
    """Is there an h2load (Debian: nghttp2-client) that can keep a rate?"""
    try:
        return "--rps" in subprocess.run(["h2load", "--help"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
