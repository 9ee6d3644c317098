"""Name servers for the node's workloads, and the kernel's rows that lead queries to them. One task of the supervisor.

A resolver has a row only while the name server of that namespace answers: without it, queries go where they were meant for.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from agent import files
from agent.config import Config
from agent.errors import MeshError
from agent.model import LocalWorkload, Snapshot
from agent.names import dnsmasq, records
from agent.patience import within

_log = logging.getLogger(__name__)

POLL_S = 1.0
"""How often a resolv.conf is read again: it may be a link to a file that is replaced, which no watch of one file sees."""
PAUSE_S = 0.2
"""The shortest time between two reloads: what changes meanwhile is one."""

Rows = frozenset[tuple[int, str]]


class Names:
    """See the module. `set_resolvers` brings the kernel's table to exactly these (netns cookie, resolver address).

    `allow` is told the same of every resolver that a resolv.conf names, whoever answers: a workload that may not go out still finds names.
    """

    def __init__(
        self,
        config: Config,
        set_resolvers: Callable[[Rows], None],
        *,
        root: Path = Path("/"),
        allow: Callable[[Rows], None] = lambda _: None,
    ) -> None:
        """Touch nothing yet. `root` is where /etc is, for tests."""
        self._config = config
        self._set_resolvers = set_resolvers
        self._allow = allow
        self._allowed: Rows | None = None
        self._root = root
        self._wanted: tuple[Snapshot, tuple[LocalWorkload, ...]] | None = None
        self._changed = asyncio.Event()
        self._servers: dict[int, dnsmasq.Server] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._locals: dict[int, LocalWorkload] = {}
        self._resolvers: dict[int, tuple[str, ...]] = {}
        self._written: dict[Path, bytes] = {}
        self._stale: set[int] = set()
        self._current: tuple[Snapshot, dict[int, LocalWorkload], dict[int, tuple[str, ...]]] | None = None
        self._rows: Rows | None = None
        self._failure = self._refusal = ""

    def update(self, snapshot: Snapshot, local: Iterable[LocalWorkload]) -> None:
        """Answer by this `snapshot`, in these workloads' namespaces and no others. Called on the event loop; never raises."""
        self._wanted = (snapshot, tuple(local))
        self._changed.set()

    def problems(self) -> list[str]:
        """What an operator should know."""
        found = [problem for problem in (self._failure, self._refusal) if problem]
        if any(server.problem == dnsmasq.NO_SUCH_PROGRAM for server in self._servers.values()):
            found.append(f"workloads do not resolve the names of services: {dnsmasq.NO_SUCH_PROGRAM}")
        for cookie, server in self._servers.items():
            name = server.workload
            if server.problem and server.problem != dnsmasq.NO_SUCH_PROGRAM:
                found.append(f"workload {name} does not resolve the names of services, it asks its own resolvers: {server.problem}")
            elif not self._resolvers.get(cookie, ("",)):
                found.append(f"workload {name} does not resolve the names of services: every resolver of its resolv.conf has a scope (%)")
        return found

    async def run(self) -> None:
        """Serve for ever. Cancelling leaves name servers and rows as they are."""
        if not self._config.names:
            await self._retire()
        try:
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(self._changed.wait(), POLL_S)
                self._changed.clear()
                if self._config.names and self._wanted is not None:
                    await self._reconcile(*self._wanted)
                elif not self._config.names:
                    self._push(frozenset())  # until the kernel has taken it
                    await self._look()
                await asyncio.sleep(PAUSE_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _retire(self) -> None:
        """End what an earlier agent started that had names on."""
        self._push(frozenset())
        await asyncio.to_thread(dnsmasq.stop, self._config)

    async def _look(self) -> None:
        """Without name servers: only see which resolvers may be asked."""
        if self._wanted is None:
            return
        self._locals = {one.netns_cookie: one for one in self._wanted[1]}
        with contextlib.suppress(OSError):
            self._resolvers = await asyncio.to_thread(lambda: {cookie: self._read_resolvers(one) for cookie, one in self._locals.items()})
        self._push_allowed()

    def _push_allowed(self) -> None:
        rows = frozenset((cookie, address) for cookie in self._locals for address in self._resolvers.get(cookie, ()))
        if rows == self._allowed:
            return
        try:
            self._allow(rows)
        except (OSError, MeshError) as error:
            _log.error("resolvers of workloads that may not go out cannot be asked", extra={"reason": str(error)})
        else:
            self._allowed = rows

    async def _reconcile(self, snapshot: Snapshot, local: tuple[LocalWorkload, ...]) -> None:
        for task in self._tasks.values():
            if task.done():
                task.result()  # it handles what can go wrong: this is a defect, and ends the agent
        self._locals = {one.netns_cookie: one for one in local}
        try:
            await asyncio.to_thread(self._write, snapshot)
            for cookie in self._servers.keys() - self._locals.keys():
                await self._end(cookie)
            await asyncio.to_thread(self._forget)
        except (OSError, MeshError) as error:
            problem = f"the names of services are not up to date: {error}"
            if problem != self._failure:
                _log.error("%s", problem)
            self._failure = problem
            return
        self._failure = ""
        for cookie, one in self._locals.items():
            if cookie not in self._servers:
                self._servers[cookie] = dnsmasq.Server(self._config, one, self._push_current)
                self._tasks[cookie] = asyncio.create_task(self._servers[cookie].run(), name=f"names-{one.workload.name}")
            elif cookie in self._stale:
                self._servers[cookie].reload()
            self._servers[cookie].local = one
        self._stale.clear()
        self._push_allowed()
        self._push_current()

    async def _end(self, cookie: int) -> None:
        task, server = self._tasks.pop(cookie), self._servers.pop(cookie)
        self._push_current()  # rows first
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(server.close)

    def _forget(self) -> None:
        """End name servers of an earlier agent whose workloads are gone."""
        for cookie in dnsmasq.cookies(self._config) - self._locals.keys():
            dnsmasq.finish(self._config, cookie)
        self._written = {path: text for path, text in self._written.items() if int(path.stem) in self._locals}

    def _write(self, snapshot: Snapshot) -> None:
        """Bring the files of every workload up to date and note whose changed. Runs in a worker thread."""
        resolvers = {cookie: self._read_resolvers(one) for cookie, one in self._locals.items()}
        if self._current is not None and self._current[0] is snapshot and self._current[1:] == (self._locals, resolvers):
            return
        directory, domain = self._config.names_dir, self._config.cluster_domain
        for made in (directory.parent, directory):
            made.mkdir(mode=0o755, parents=True, exist_ok=True)
            made.chmod(0o755)  # whatever the umask: user nobody reads here
        known: dict[str, tuple[records.Record, ...]] = {}
        texts: dict[tuple[str, tuple[str, ...]], tuple[bytes, bytes]] = {}
        for cookie, one in self._locals.items():
            namespace, ask = one.workload.namespace, resolvers[cookie]
            if namespace not in known:
                known[namespace] = records.records(snapshot, namespace, domain)
            if (namespace, ask) not in texts:
                hosts, servers = records.hosts_file(known[namespace]), records.servers_file(known[namespace], ask, domain)
                texts[namespace, ask] = hosts.encode(), servers.encode()
            own = dnsmasq.Files(self._config, cookie)
            for path, text in zip((own.hosts, own.servers), texts[namespace, ask], strict=True):
                if self._put(path, text):
                    self._stale.add(cookie)
        self._resolvers = resolvers
        self._current = (snapshot, self._locals, resolvers)

    def _put(self, path: Path, text: bytes) -> bool:
        """Write a file that user nobody may read, if it would change."""
        digest = hashlib.sha256(text).digest()
        if self._written.get(path) == digest:
            return False
        files.write(path, text, mode=0o644)
        self._written[path] = digest
        return True

    def _read_resolvers(self, one: LocalWorkload) -> tuple[str, ...]:
        try:
            text = records.resolv_conf(one.workload.network_namespace, self._root).read_text(errors="replace")
        except FileNotFoundError:
            text = ""  # resolv.conf(5): then the resolver is on the local machine
        return records.nameservers(text)

    def _push_current(self) -> None:
        """Lead to the name servers that answer. Not before it is known which ones an earlier agent left: their rows are in force."""
        if self._rows is None and not all(server.judged for server in self._servers.values()):
            return
        self._push(
            frozenset(
                (cookie, address)
                for cookie, server in self._servers.items()
                if server.answering
                for address in self._resolvers.get(cookie, ())
                if server.ipv6 or ":" not in address
            )
        )

    def _push(self, rows: Rows) -> None:
        if rows == self._rows:
            return
        try:
            self._set_resolvers(rows)
        except (OSError, MeshError) as error:
            problem = f"queries for the names of services are not led to their name servers: {error}"
            if problem != self._refusal:
                _log.error("%s", problem)
            self._refusal = problem
        else:
            self._rows, self._refusal = rows, ""
