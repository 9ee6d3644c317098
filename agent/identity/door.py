"""The unix socket that workloads see: it accepts, asks the kernel who is there, and leads the bytes to the gRPC server, which is told who that was.

gRPC accepts connections by itself and hides them; its Python interface has no way to be given one. So the server listens on a socket inside a directory
that only root can enter, and for each caller the door connects there from an address of its own: a file name in the same directory, used once. That name is
what gRPC gives as the call's peer, and the only thing that connects a call with the caller found by the kernel. Nothing that a caller sends says who it is,
and nobody else can connect to the inner socket or have a name in that directory. The bytes are copied; they are few.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections import Counter
from pathlib import Path
from typing import Final

from agent.errors import EnvironmentUnfit
from agent.identity.callers import Caller, Callers

_log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 1024
MAX_OF_ONE: Final = 64
"""Connections of one network namespace: one workload does not take the others' places. Those of nobody's share one such number."""
_CHUNK: Final = 1 << 16
_PAUSE_S: Final = 0.2
_BACKLOG: Final = 128
_LONGEST_PATH: Final = 107  # sun_path, unix(7)


class Door:
    """See the module. Belongs to one event loop."""

    def __init__(self, path: Path, inner: Path, callers: Callers) -> None:
        """`path`: what workloads see; `inner`: the directory of the inner socket, 0700."""
        self._path = path
        self._inner = inner
        self._callers = callers
        self._numbers = itertools.count(1)
        self._present: dict[str, tuple[socket.socket, Caller]] = {}
        self._count: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self.turned_away = 0
        """Connections that were closed because there were too many."""

    @property
    def inner_socket(self) -> Path:
        """Where the gRPC server listens."""
        return self._inner / "api.sock"

    def caller(self, peer: str) -> Caller:
        """Who is behind what gRPC calls a peer: "unix:" and the name that the door connected from. Nobody, if it is anything else.

        Who was nobody is looked at again: a process may connect before its workload is enrolled, and go on asking over the same connection.
        """
        name = peer.rpartition("/")[2]
        if name not in self._present:
            return _NOBODY
        connection, caller = self._present[name]
        if caller.refused:
            caller = self._callers.identify(connection)
            self._present[name] = connection, caller
        return caller

    def prepare(self) -> None:
        """Make both directories, and remove what a killed agent left. Raises EnvironmentUnfit."""
        longest = max(len(os.fsencode(self._path)), len(os.fsencode(self._inner)) + 21)
        if longest > _LONGEST_PATH:
            raise EnvironmentUnfit(
                f"{self._path} and {self._inner}: a unix socket's path has at most {_LONGEST_PATH} bytes; choose a shorter --run-dir"
            )
        try:
            if not self._path.parent.is_dir():
                self._path.parent.mkdir(parents=True)
                self._path.parent.chmod(0o755)  # whatever the umask
            self._inner.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._inner.chmod(0o700)
            for left in self._inner.iterdir():
                left.unlink()
        except OSError as error:
            raise EnvironmentUnfit(f"cannot prepare {error.filename} for the workload socket: {error.strerror}") from error

    async def run(self) -> None:
        """Accept until cancelled; the connections end with it. Raises EnvironmentUnfit if the socket cannot be made."""
        with self._listening() as listener:
            try:
                await self._accept(listener)
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    def _listening(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            self._path.chmod(0o666)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise EnvironmentUnfit(f"cannot listen on {self._path}: {error.strerror}; choose another --workload-socket") from error
        return listener

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptors: those who wait are not lost
                _log.error("the workload socket accepts nobody for a moment", extra={"reason": str(error)})
                await asyncio.sleep(_PAUSE_S)
                continue
            caller = self._callers.identify(connection)
            if self._count.total() >= MAX_CONNECTIONS or self._count[caller.netns_cookie] >= MAX_OF_ONE:
                self.turned_away += 1
                connection.close()
                continue
            self._count[caller.netns_cookie] += 1
            task = asyncio.create_task(self._serve(connection, caller))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket, caller: Caller) -> None:
        """Lead one connection to the server and back."""
        name = f"caller-{next(self._numbers)}"
        address = self._inner / name
        onward = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._present[name] = connection, caller
        loop = asyncio.get_running_loop()
        with connection, onward:
            try:
                onward.bind(str(address))
                await loop.sock_connect(onward, str(self.inner_socket))
                address.unlink()  # the kernel keeps the name of a bound socket; the file has done its work
                both = [asyncio.create_task(_copy(connection, onward)), asyncio.create_task(_copy(onward, connection))]
                try:
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for one in both:
                        one.cancel()
                    await asyncio.gather(*both, return_exceptions=True)
            except OSError as error:
                _log.error("a caller of the workload socket could not be served", extra={"pid": caller.pid, "reason": str(error)})
            finally:
                del self._present[name]
                self._count[caller.netns_cookie] -= 1
                with contextlib.suppress(OSError):
                    address.unlink(missing_ok=True)


_NOBODY: Final = Caller(refused="the connection did not come through the workload socket")


async def _copy(source: socket.socket, target: socket.socket) -> None:
    """Until either side closes."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while content := await loop.sock_recv(source, _CHUNK):
            await loop.sock_sendall(target, content)
