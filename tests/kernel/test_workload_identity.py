"""The Workload API seen by an independent client, the `spiffe` package, from different network namespaces of one machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent import features, netns
from agent.identity.service import Identity
from agent.identity.workload_api import WorkloadApi
from agent.model import LocalWorkload
from lab import netns as lab_netns
from tests.tasks import until
from tests.unit.agent.identity.signer import TRUST_DOMAIN, Signer, spiffe_id, workload

# The package's dependency `pem` imports OpenSSL if it finds it, and Debian's does not go with the pinned cryptography.
CLIENT = """
import sys
sys.path = [path for path in sys.path if "dist-packages" not in path]
import json, threading
from spiffe import WorkloadApiClient
from spiffe.workloadapi.errors import WorkloadApiError

def say(**what):
    print(json.dumps(what), flush=True)

client = WorkloadApiClient(sys.argv[1])
try:
    svid = client.fetch_x509_svid(timeout=20)
except WorkloadApiError as error:
    say(refused=str(error))
    sys.exit(0)
if len(sys.argv) > 2:  # only that: tokens need the controller
    say(id=str(svid.spiffe_id))
    sys.exit(0)
bundles = client.fetch_x509_bundles(timeout=20)
token = client.fetch_jwt_svid(audience={"bank"}, timeout=20)
checked = client.validate_jwt_svid(token.token, "bank", timeout=20)
client.fetch_jwt_bundles(timeout=20)
say(id=str(svid.spiffe_id), serial=svid.leaf.serial_number, roots=[len(b.x509_authorities) for b in bundles.bundles], jwt=str(token.spiffe_id),
    checked=str(checked.spiffe_id))
ended = threading.Event()
def failed(error):
    say(failed=str(error))
client.stream_x509_contexts(lambda context: say(serial=context.default_svid.leaf.serial_number), failed)
ended.wait(60)
"""


@pytest.fixture
def space() -> Iterator[Callable[[], str]]:
    """Makes network namespaces with names that nobody else has."""
    made: list[str] = []

    def make() -> str:
        name = f"meshid-{secrets.token_hex(4)}"
        lab_netns.create(name)
        made.append(name)
        return name

    yield make
    for name in made:
        lab_netns.delete(name)


@dataclass
class Node:
    signer: Signer
    identity: Identity
    socket: Path

    def enrol(self, *named: tuple[str, str]) -> None:
        """(workload, name of its network namespace)."""
        paths = [(name, lab_netns.path(space)) for name, space in named]
        self.identity.update([LocalWorkload(workload(name), netns.cookie(path), str(path)) for name, path in paths])


@contextlib.asynccontextmanager
async def node(run_dir: Path) -> AsyncIterator[Node]:
    async with Signer().serving() as signer:
        config = signer.joining(run_dir, cgroup=features.cgroup2_mount(), keys_on_disk=True)
        identity = Identity(config)
        identity.load()
        tasks = [asyncio.create_task(identity.run()), asyncio.create_task(WorkloadApi(config, identity).run())]
        try:
            await until(config.workload_socket.is_socket)
            yield Node(signer, identity, config.workload_socket)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Client:
    """The package, in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def said(self) -> dict[str, Any]:
        """The next line."""
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), 40)
        assert line, "the client has ended"
        found: dict[str, Any] = json.loads(line)
        return found


def calling(path: Path, *arguments: str) -> list[str]:
    """The command line of a client."""
    return [sys.executable, "-c", CLIENT, f"unix:{path}", *arguments]


def entering(namespace: str, *, user: int = 0) -> list[str]:
    """What a command line begins with to run in a namespace. No function between fork and exec: gRPC in this process does not survive that."""
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
    return ["nsenter", f"--net={lab_netns.path(namespace)}", *drop]


@contextlib.asynccontextmanager
async def client(n: Node, namespace: str, user: int = 0) -> AsyncIterator[Client]:
    process = await asyncio.create_subprocess_exec(*entering(namespace, user=user), *calling(n.socket), stdout=subprocess.PIPE, cwd="/")
    try:
        yield Client(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def run(directory: Path, scenario: Callable[[Node], Awaitable[None]]) -> None:
    async def body() -> None:
        async with node(directory / "run") as running:
            await asyncio.wait_for(scenario(running), 100)

    asyncio.run(body())


@pytest.fixture(autouse=True)
def dumpable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test process stays as it is."""
    monkeypatch.setattr("agent.identity.service.protect_memory", lambda: None)


def test_two_namespaces_get_two_identities_and_a_third_nothing(tmp_path: Path, space: Callable[[], str]) -> None:
    async def scenario(n: Node) -> None:
        one, two, stranger = space(), space(), space()
        n.enrol(("cart", one), ("shop", two))
        async with client(n, one) as first, client(n, two) as second, client(n, stranger) as third:
            answers = [await first.said(), await second.said()]
            assert [(a["id"], a["jwt"], a["checked"]) for a in answers] == [(spiffe_id(name),) * 3 for name in ("cart", "shop")]
            assert answers[0]["serial"] != answers[1]["serial"]
            assert [a["roots"] for a in answers] == [[1], [1]]
            refused = await third.said()
            assert "no identity: process" in refused["refused"]
            assert TRUST_DOMAIN not in refused["refused"]

    run(tmp_path, scenario)


def test_a_watcher_sees_a_renewed_certificate_and_only_its_own(tmp_path: Path, space: Callable[[], str]) -> None:
    async def scenario(n: Node) -> None:
        one, two = space(), space()
        n.enrol(("cart", one), ("shop", two))
        async with client(n, one) as first, client(n, two) as second:
            for each in (first, second):
                serial = (await each.said())["serial"]
                assert (await each.said())["serial"] == serial
            before = n.identity.svid("default/cart")
            assert before is not None
            n.signer.revoked.append(before.chain.serial)
            await n.signer.announce()
            while True:  # without a certificate for a moment: the client says so and comes back
                said = await first.said()
                if said.get("serial", before.chain.serial) != before.chain.serial:
                    break
            after = n.identity.svid("default/cart")
            assert after is not None
            assert said["serial"] == after.chain.serial
            other = n.identity.svid("default/shop")
            assert other is not None
            assert (await second.said())["serial"] == other.chain.serial

    run(tmp_path, scenario)


def test_a_process_of_another_user_gets_its_workloads_identity(space: Callable[[], str]) -> None:
    async def scenario(n: Node) -> None:
        one = space()
        n.enrol(("cart", one))
        async with client(n, one, user=65534) as caller:
            assert (await caller.said())["id"] == spiffe_id("cart")

    directory = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
    directory.chmod(0o755)
    try:
        run(directory, scenario)
    finally:
        shutil.rmtree(directory)


def test_a_namespace_that_is_made_anew_is_nobodys(tmp_path: Path, space: Callable[[], str]) -> None:
    async def scenario(n: Node) -> None:
        one = space()
        n.enrol(("cart", one))
        await until(lambda: n.identity.svid("default/cart"))
        lab_netns.delete(one)
        lab_netns.create(one)
        async with client(n, one) as caller:
            assert "no identity" in (await caller.said())["refused"]

    run(tmp_path, scenario)
