"""The dnsmasq of one namespace: start it there, adopt it after an agent restart, know whether it answers, restart it when it does not, end it.

dnsmasq and not Envoy's DNS filter, because that one answers UDP and three types only and forwards from its own namespace. It runs as nobody
without any capability, in the waypoint's cgroup, whose queries the kernel leaves alone; so it reaches the very resolvers it stands in for.
Its life is not tied to the agent's (`agent.process`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import pwd
import random
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent import netns
from agent.config import NAMES_PORT, Config
from agent.errors import EnvironmentUnfit
from agent.model import LocalWorkload
from agent.patience import within
from agent.process import Process, end, reap, record, recorded, send, spawn

_log = logging.getLogger(__name__)

HEALTH_POLL_S = 2.0
START_POLL_S = 0.02
ANSWER_S = 1.0
MISSES = 2
"""So many questions in a row without an answer, and the workload's queries go to its resolvers again."""
HUNG_S = 10.0
"""One that has not answered for so long is replaced."""
STABLE_S = 60.0
"""A run of this length makes the next restart immediate again."""
LONGEST_BACKOFF_S = 15.0
TTL_S = 5
"""How long an answer about a service may be kept by whoever asked."""
# Joins the cgroup first; each step replaces the one before, so that dnsmasq has the pid that is recorded.
_LAUNCHER = (
    'echo $$ > "$0/cgroup.procs" && uid=$1 gid=$2 && shift 2 && exec setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs'
    ' --inh-caps=-all --bounding-set=-all -- "$@"'
)
NO_SUCH_PROGRAM = "dnsmasq is not installed: apt-get install dnsmasq-base, or run the agent with --no-names"
_QUESTION = b"\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07version\x04bind\x00\x00\x10\x00\x03"
"""version.bind, class CHAOS, type TXT: dnsmasq answers that itself (dnsmasq(8), CACHE STATISTICS), so a dead resolver is not mistaken for it."""


def find() -> str:
    """Path of the dnsmasq binary. Raises EnvironmentUnfit if there is none."""
    found = shutil.which("dnsmasq", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))
    if found is None:
        raise EnvironmentUnfit(NO_SUCH_PROGRAM)
    return found


class Server:
    """The name server of one namespace. `changed` is called, on the event loop, when `answering` changes."""

    def __init__(
        self, config: Config, local: LocalWorkload, changed: Callable[[], None], *, jitter: Callable[[], float] = random.random
    ) -> None:
        self._config = config
        self.local = local
        self._changed = changed
        self._jitter = jitter
        self._files = Files(config, local.netns_cookie)
        self._process: Process | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._stale = False
        self.ipv6 = False
        """It listens on ::1 too."""
        self.answering = False
        self.judged = False
        """It is known whether one runs that an earlier agent started."""
        self.problem = ""
        self.restarts = 0

    @property
    def workload(self) -> str:
        """Whose it is."""
        return self.local.workload.name

    @property
    def pid(self) -> int | None:
        """Process id, if one runs."""
        return self._process.pid if self._process else None

    def reload(self) -> None:
        """Read the files again: now, or as soon as it answers."""
        self._stale = True
        if self.answering and self._process is not None:
            self._hang_up(self._process)

    def _hang_up(self, process: Process) -> None:
        self._stale = False
        send(process, signal.SIGHUP)  # clears its cache and reads --addn-hosts and --servers-file (dnsmasq(8), NOTES)

    async def run(self) -> None:
        """Keep it running for ever. Cancelling leaves it running."""
        failures, logged = 0, ""
        while True:
            started = time.monotonic()
            reason = ""
            try:
                probe = await asyncio.to_thread(self._look)
                try:
                    await self._live(probe)
                finally:
                    probe.close()
                reason = await asyncio.to_thread(self._last_words)
            except (OSError, EnvironmentUnfit) as error:
                reason = str(error)
            self._process = None
            self._judge(answering=False, problem=reason or "dnsmasq ended without a word")
            failures = 0 if time.monotonic() - started > STABLE_S else failures
            delay = 0.0 if failures == 0 else min(0.5 * 2**failures, LONGEST_BACKOFF_S) * (0.5 + self._jitter() / 2)
            failures += 1
            self.restarts += 1
            if self.problem != logged or delay == 0.0:  # what does not change is said once
                logged = self.problem
                _log.error(
                    "a name server ended; until the next one answers, its workload asks its own resolvers",
                    extra={"workload": self.workload, "reason": self.problem},
                )
            await asyncio.sleep(delay)

    def close(self) -> None:
        """End it for good and remove its files. Blocks; called after `run` was cancelled."""
        with self._lock:
            self._closed = True
            finish(self._config, self.local.netns_cookie)

    async def _live(self, probe: socket.socket) -> None:
        """Adopt or start it, and return when it has ended."""
        process = await self._adopt(probe)
        if process is None:
            process = await asyncio.to_thread(self._start)
            _log.info("started a name server", extra={"workload": self.workload, "pid": process.pid})
        self._process = process
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            reap(process.pid)
            return
        ended = asyncio.Event()

        def on_end() -> None:
            loop.remove_reader(pidfd)
            ended.set()
            self._judge(answering=False, problem="dnsmasq ended")  # at once: whoever asks meanwhile asks the workload's own resolver

        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, on_end)
        try:
            if process.alive():
                await self._watch(process, probe, ended)
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            reap(process.pid)

    async def _watch(self, process: Process, probe: socket.socket, ended: asyncio.Event) -> None:
        answered, misses = time.monotonic(), 0
        while not ended.is_set():
            if await _answers(probe):
                answered, misses = time.monotonic(), 0
                if ended.is_set():
                    return
                if self._stale:
                    self._hang_up(process)
                self._judge(answering=True, problem="")
            else:
                misses += 1
                if misses >= MISSES and self.answering:
                    self._judge(answering=False, problem=f"dnsmasq (pid {process.pid}) does not answer")
                if time.monotonic() - answered > HUNG_S:
                    await asyncio.to_thread(end, process, 1.0)
                    return
            with contextlib.suppress(asyncio.TimeoutError):
                await within(ended.wait(), START_POLL_S if misses else HEALTH_POLL_S)

    def _judge(self, *, answering: bool, problem: str) -> None:
        told = (self.answering, self.judged) != (answering, True)
        self.answering, self.judged, self.problem = answering, True, problem
        if told:
            self._changed()

    async def _adopt(self, probe: socket.socket) -> Process | None:
        """Return the one that an earlier agent started, if it was started as this agent would and answers; end it if not."""
        process = recorded(self._files.record)
        if process is None:
            return None
        if process.config == self._digest() and await _answers(probe):
            _log.info("adopted a running name server", extra={"workload": self.workload, "pid": process.pid})
            self._stale = True  # the earlier agent may have been killed between writing the files and saying so
            return process
        await asyncio.to_thread(end, process)
        return None

    def _look(self) -> socket.socket:
        """Open a socket that asks the name server, in its namespace, and see whether there is IPv6."""
        return netns.run_in(Path(self.local.netns_path), self._open)

    def _open(self) -> socket.socket:
        self.ipv6 = False
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as trial:
            trial.bind(("::1", 0))
            self.ipv6 = True
        probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        probe.setblocking(False)
        try:
            probe.connect(("127.0.0.1", NAMES_PORT))
        except OSError as error:
            probe.close()
            raise OSError(error.errno, f"reach 127.0.0.1 in network namespace {self.local.netns_path}: is lo up?") from error
        return probe

    def _arguments(self) -> list[str]:
        return [
            "--keep-in-foreground",
            "--conf-file=/dev/null",  # nothing of the machine's own dnsmasq
            "--pid-file=",
            f"--port={NAMES_PORT}",
            "--bind-interfaces",
            "--listen-address=127.0.0.1",
            *(("--listen-address=::1",) if self.ipv6 else ()),
            "--no-hosts",
            f"--addn-hosts={self._files.hosts}",
            f"--local-ttl={TTL_S}",
            "--no-resolv",
            f"--servers-file={self._files.servers}",
            "--strict-order",  # the first resolver of the list is asked first, as by libc: a list may begin with the only one that knows
            "--cache-size=0",  # a workload's resolvers answer as they did before; nothing can go stale between it and them
            "--proxy-dnssec",
            "--edns-packet-max=4096",
            "--dns-forward-max=1000",
            "--log-facility=/dev/null",  # each reload is some lines; why it does not start goes to stderr
        ]

    def _digest(self) -> str:
        return hashlib.sha256("\0".join(self._arguments()).encode()).hexdigest()

    def _start(self) -> Process:
        with self._lock:
            if self._closed:
                raise EnvironmentUnfit("the workload is gone")
            binary, (uid, gid) = find(), _nobody()
            kill_strays(self._config, self._files)
            argv = [str(self._config.waypoint_cgroup), uid, gid, binary, *self._arguments()]
            self._stale = False
            process = netns.run_in(
                Path(self.local.netns_path), functools.partial(spawn, _LAUNCHER, argv, self._files.log, self._digest())
            )  # the child is born in the thread's namespace
            record(self._files.record, process)
            return process

    def _last_words(self) -> str:
        try:
            lines = self._files.log.read_text(errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Files:
    """What belongs to one name server, below `names_dir`: outside `run_dir`, because nobody must be able to read it."""

    def __init__(self, config: Config, cookie: int) -> None:
        base = config.names_dir / str(cookie)
        self.record, self.hosts, self.servers, self.log = (base.with_suffix(s) for s in (".json", ".hosts", ".servers", ".log"))


def finish(config: Config, cookie: int) -> bool:
    """End the name server of a namespace, if there is one, and remove its files; True if there was one. Blocks."""
    files = Files(config, cookie)
    process = recorded(files.record)
    if process is not None:
        end(process)
    killed = kill_strays(config, files)
    for path in (files.record, files.hosts, files.servers, files.log):
        path.unlink(missing_ok=True)
    return process is not None or killed


def cookies(config: Config) -> set[int]:
    """Of which namespaces there are files."""
    return {int(path.stem) for path in config.names_dir.glob("*.*") if path.stem.isdigit()}


def stop(config: Config) -> int:
    """End every name server that an agent with this configuration started; returns how many there were. For `meshagent uninstall`."""
    ended = sum(finish(config, cookie) for cookie in cookies(config))
    if config.names_dir.is_dir():
        shutil.rmtree(config.names_dir)
    with contextlib.suppress(OSError):
        config.names_dir.parent.rmdir()  # other agents of this machine have theirs beside it
    return ended


def kill_strays(config: Config, files: Files) -> bool:
    """Kill what no record names: one whose agent was killed while it started it, and the children that dnsmasq has for TCP connections.

    They are known by being in the waypoint's cgroup with a file in their arguments that belongs to this namespace and no other.
    """
    mark = f"--servers-file={files.servers}".encode()
    found = False
    try:
        pids = (config.waypoint_cgroup / "cgroup.procs").read_text().split()
    except OSError:
        return False
    for pid in map(int, pids):
        with contextlib.suppress(OSError):
            if mark not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                continue
            pidfd = os.pidfd_open(pid)
            try:
                if mark in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    found = True
            finally:
                os.close(pidfd)
                reap(pid)
    return found


async def _answers(probe: socket.socket) -> bool:
    """True if the name server answers within ANSWER_S."""
    try:
        return await within(_ask(probe), ANSWER_S)
    except (OSError, asyncio.TimeoutError):
        return False


async def _ask(probe: socket.socket) -> bool:
    loop = asyncio.get_running_loop()
    number = struct.pack("!H", random.getrandbits(16))  # tells answers apart, keeps no secret
    await loop.sock_sendall(probe, number + _QUESTION)
    while (await loop.sock_recv(probe, 512))[:2] != number:  # an answer that came too late
        pass
    return True


def _nobody() -> tuple[str, str]:
    """uid and gid of nobody."""
    try:
        found = pwd.getpwnam("nobody")
    except KeyError:
        return "65534", "65534"  # /proc/sys/kernel/overflowuid
    return str(found.pw_uid), str(found.pw_gid)
