"""A real Redis for tests: on a unix socket in a directory of the test, nothing on disk. `scripts/setup` installs it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PASSWORD = "sesame-open-seventeen"  # noqa: S105


class RedisServer:
    """One redis-server that can be stopped and started."""

    def __init__(self, directory: Path) -> None:
        self._socket = directory / "redis.sock"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://:{PASSWORD}@{self._socket}"

    def start(self) -> None:
        """Start it and wait until it accepts: its socket has a name before it listens."""
        options = {"--port": "0", "--unixsocket": str(self._socket), "--unixsocketperm": "600", "--save": "", "--requirepass": PASSWORD}
        command = ["redis-server", *(word for pair in options.items() for word in pair), "--dir", str(self._directory)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while not self._accepts():
            assert time.monotonic() < end
            assert self._process.poll() is None
            time.sleep(0.01)

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(str(self._socket))
            return True
        return False

    def stop(self) -> None:
        """End it; what it held is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._socket.unlink(missing_ok=True)


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[RedisServer]:
    """A running Redis."""
    server = RedisServer(directory)
    server.start()
    try:
        yield server
    finally:
        server.stop()
