"""Names of services in workloads' namespaces: the answers, the life of the name servers, and, with the data path, what a program's getaddrinfo sees.

The first tests need no data path: they ask the name server itself, in namespaces and a cgroup of their own, so they run beside a lab.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent import netns
from agent.config import NAMES_PORT, Config
from agent.errors import EnvironmentUnfit
from agent.model import LocalWorkload, Service, ServicePort, Snapshot, Workload
from agent.names import dnsmasq
from agent.names.service import Names, Rows
from lab import cgroup
from tests.kernel import datanode
from tests.kernel.datanode import DataNode
from tests.tasks import run_beside

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not shutil.which("dnsmasq", path="/usr/sbin:/usr/bin"), reason="dnsmasq-base is not installed"),
]

A, PTR, MX, TXT, AAAA = 1, 12, 15, 16, 28
NXDOMAIN = 3
UPSTREAM = "192.0.2.9"
"""What the resolver of these tests answers to every question for an A record."""
RESOLVER = """
import socket, struct, sys, threading
def answer(query):
    end = 12
    while query[end]:
        end += 1 + query[end]
    kind, = struct.unpack("!H", query[end + 1 : end + 3])
    name = query[12:end].decode(errors="replace")
    open(sys.argv[1], "a").write(repr(name) + " %d\\n" % kind)
    code = 3 if "absent" in name else 0
    record = b"\\xc0\\x0c" + struct.pack("!HHIH4B", 1, 1, 60, 4, 192, 0, 2, 9) if kind == 1 and not code else b""
    return query[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, 1 if record else 0, 0, 0) + query[12 : end + 5] + record
def udp(server):
    while True:
        query, client = server.recvfrom(4096)
        server.sendto(answer(query), client)
def tcp(server):
    while True:
        client, _ = server.accept()
        with client:
            while size := client.recv(2):
                reply = answer(client.recv(struct.unpack("!H", size)[0], socket.MSG_WAITALL))
                client.sendall(struct.pack("!H", len(reply)) + reply)
for address in sys.argv[2:]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    datagrams = socket.socket(family, socket.SOCK_DGRAM)
    datagrams.bind((address, 53))
    threading.Thread(target=udp, args=(datagrams,)).start()
    threading.Thread(target=tcp, args=(socket.create_server((address, 53), family=family),)).start()
print("ready", flush=True)
"""


def question(name: str, kind: int, *, edns: bool = False) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.rstrip(".").split("."))
    extra = b"\0" + struct.pack("!HHIH", 41, 1232, 0, 0) if edns else b""
    return struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 1 if edns else 0) + labels + b"\0" + struct.pack("!HH", kind, 1) + extra


def read_answer(raw: bytes) -> tuple[int, list[str]]:
    """Response code, and the data of the answers as text."""
    flags, _, answers = struct.unpack("!HHH", raw[2:8])
    at, found = 12, []

    def name_at(i: int) -> tuple[str, int]:
        labels: list[str] = []
        while raw[i]:
            if raw[i] & 0xC0:
                rest, _ = name_at(struct.unpack("!H", raw[i : i + 2])[0] & 0x3FFF)
                return ".".join([*labels, rest]), i + 2
            labels.append(raw[i + 1 : i + 1 + raw[i]].decode())
            i += 1 + raw[i]
        return ".".join(labels), i + 1

    _, at = name_at(at)
    at += 4
    for _ in range(answers):
        _, at = name_at(at)
        kind, _, ttl, length = struct.unpack("!HHIH", raw[at : at + 10])
        at += 10
        data = raw[at : at + length]
        text = name_at(at)[0] if kind == PTR else socket.inet_ntop(socket.AF_INET if kind == A else socket.AF_INET6, data)
        found.append(f"{text} {ttl}")
        at += length
    return flags & 15, found


class Place:
    """A network namespace with the name servers that the test's agent starts there."""

    def __init__(self, tmp_path: Path, name: str) -> None:
        self.name, self.directory = name, tmp_path
        subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        self.path = netns.resolve(name)
        self.cookie = netns.cookie(self.path)
        self.local = LocalWorkload(Workload("shop/web", "web", "n", {}, (), name, enrolled=True, ready=True), self.cookie, str(self.path))
        self.queries = tmp_path / f"queries-{name}"
        self.queries.touch()

    def resolver(self, *addresses: str) -> subprocess.Popen[str]:
        argv = ["ip", "netns", "exec", self.name, sys.executable, "-c", RESOLVER, str(self.queries), *addresses]
        started = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        return started

    def ask(self, name: str, kind: int = A, *, tcp: bool = False, address: str = "127.0.0.1", edns: bool = False) -> tuple[int, list[str]]:
        """Ask the name server of this namespace; a record reads "DATA TTL"."""
        query = question(name, kind, edns=edns)

        def exchange() -> bytes:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as client:
                client.settimeout(2)
                client.connect((address, NAMES_PORT))
                client.sendall(struct.pack("!H", len(query)) + query if tcp else query)
                return client.recv(4096)[2:] if tcp else client.recv(4096)

        return read_answer(netns.run_in(self.path, exchange))

    def addresses(self, name: str) -> list[str]:
        """The A records without their TTL; [] if there are none or nobody answers."""
        try:
            return [record.split()[0] for record in self.ask(name)[1]]
        except OSError:
            return []


class World:
    """One agent's name servers, without the rest of the agent."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/resolv.conf").write_text("nameserver 127.0.0.1\n")
        unique = f"meshnames-{os.getpid()}"
        self.config = Config("n", "unix:x", cgroup=cgroup.mount_point() / unique, run_dir=Path("/run") / unique)
        self.config.cgroup.mkdir()
        self.config.waypoint_cgroup.mkdir()
        self.places = [Place(tmp_path, f"{unique}-{i}") for i in range(2)]
        self.place = self.places[0]
        self.upstream = [place.resolver("127.0.0.1", "127.0.0.3") for place in self.places]
        self.pushed: list[Rows] = []
        self.names = self.agent()

    def agent(self) -> Names:
        return Names(self.config, self.pushed.append, root=self.root)

    def run(self, scenario: Callable[[], Awaitable[None]]) -> None:
        """Run `scenario` beside an agent, which then ends as if it had been stopped."""
        run_beside(self.names.run(), scenario)

    async def up(self) -> None:
        """Tell the agent of the first place, whose name server then answers."""
        self.names.update(MODEL, [self.place.local])
        assert await until(lambda: self.pushed == [self.rows()])

    def rows(self, *addresses: str) -> Rows:
        return frozenset((self.place.cookie, address) for address in addresses or ("127.0.0.1",))

    def server(self) -> int:
        """The pid of the one name server in the first place."""
        found = self.servers()
        assert len(found) == 1, found
        return found[0]

    def servers(self) -> list[int]:
        return [int(pid) for pid in (self.config.waypoint_cgroup / "cgroup.procs").read_text().split()]

    def close(self) -> None:
        for upstream in self.upstream:
            upstream.kill()
            upstream.communicate()
        dnsmasq.stop(self.config)
        for pid in self.servers():
            os.kill(pid, signal.SIGKILL)
        for place in self.places:
            subprocess.run(["ip", "netns", "del", place.name], check=True)
        assert datanode.until(lambda: _removed(self.config.waypoint_cgroup))
        self.config.cgroup.rmdir()


def _removed(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        directory.rmdir()
    return not directory.exists()


async def until(condition: Callable[[], object], timeout: float = 5.0) -> bool:
    """In a thread: a question to a name server must not keep its agent from working."""
    return await asyncio.to_thread(datanode.until, condition, timeout)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


def snapshot(*services: Service) -> Snapshot:
    return Snapshot("v", {}, {s.name: s for s in services})


PORT = (ServicePort(80, "", "TCP", "", False, "test"),)
CART = Service("shop/cart", ("10.96.0.10",), PORT)
BOTH = Service("shop/both", ("10.96.0.11", "fd96::11"), PORT)
VAULT = Service("bank/vault", ("10.96.0.12",), PORT)
DEV = Service("shop/dev", ("10.96.0.13",), PORT)
MODEL = snapshot(CART, BOTH, VAULT, DEV)


def test_names_of_services_are_answered_and_all_others_are_asked_upstream(world: World) -> None:
    place = world.place

    async def scenario() -> None:
        await world.up()
        await asyncio.to_thread(check)

    def check() -> None:
        for name in (
            "cart",
            "cart.shop",
            "cart.shop.svc",
            "cart.shop.svc.cluster.local",
            "cart.shop.svc.cluster.local.",
            "CaRt.sHoP",
            "CART",
        ):
            assert place.ask(name) == (0, ["10.96.0.10 5"]), name
            assert place.ask(name, tcp=True) == (0, ["10.96.0.10 5"]), name
            assert place.ask(name, edns=True) == (0, ["10.96.0.10 5"]), name
            # A type that the name does not have is answered too, with nothing: neither libc nor a browser waits for upstream.
            assert place.ask(name, AAAA) == place.ask(name, MX) == place.ask(name, 65) == (0, []), name
        assert place.ask("cart", address="::1") == (0, ["10.96.0.10 5"])
        assert place.ask("both", AAAA) == (0, ["fd96::11 5"])
        assert place.ask("vault.bank") == (0, ["10.96.0.12 5"])
        assert place.ask("10.0.96.10.in-addr.arpa", PTR) == (0, ["cart.shop.svc.cluster.local 5"])
        assert place.ask("none.shop.svc.cluster.local") == (NXDOMAIN, [])
        assert place.queries.read_text() == ""
        # None of these is a service's name for this caller: `dev` is a service here and a top-level domain in the world.
        for name in (
            "vault",
            "web.dev",
            "x.cart",
            "x.cart.shop",
            "xcart",
            "cart.example.org",
            "other.shop",
            "cart.shop.svc.example",
            "dev.bank",
        ):
            assert place.ask(name) == place.ask(name, tcp=True) == (0, [f"{UPSTREAM} 60"]), name
        assert place.ask("absent.example") == (NXDOMAIN, [])
        assert "'\\x05vault' 1\n" in place.queries.read_text()

    world.run(scenario)


def test_it_has_no_rights_and_is_in_the_cgroup_that_the_kernel_leaves_alone(world: World) -> None:
    world.run(world.up)
    process = Path("/proc") / str(world.server())
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
    assert set(status["Uid"].split()) == {"65534"}
    assert {int(status[c], 16) for c in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert (process / "ns/net").stat().st_ino == world.place.path.stat().st_ino


def test_a_service_that_comes_or_goes_is_known_within_a_second(world: World) -> None:
    place = world.place

    async def scenario() -> None:
        await world.up()
        pid = world.server()
        world.names.update(snapshot(VAULT, Service("shop/new", ("10.96.0.20",), PORT)), [place.local])
        assert await until(lambda: place.addresses("new") == ["10.96.0.20"], 1.0)
        assert place.ask("cart.shop.svc.cluster.local") == (NXDOMAIN, [])
        assert place.addresses("cart") == [UPSTREAM]
        assert world.server() == pid

    world.run(scenario)


def test_a_dead_name_server_loses_its_rows_at_once_and_is_replaced(world: World) -> None:
    async def scenario() -> None:
        await world.up()
        killed = world.server()
        os.kill(killed, signal.SIGKILL)
        assert await until(lambda: world.pushed[1:2] == [frozenset()], 0.2)
        assert await until(lambda: world.pushed[2:] == [world.rows()])
        assert world.server() != killed
        assert world.place.addresses("cart") == ["10.96.0.10"]
        assert world.names.problems() == []

    world.run(scenario)


def test_one_that_hangs_loses_its_rows_and_is_replaced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsmasq, "HUNG_S", 3.0)
    monkeypatch.setattr(dnsmasq, "HEALTH_POLL_S", 0.1)
    monkeypatch.setattr(dnsmasq, "ANSWER_S", 0.3)

    async def scenario() -> None:
        await world.up()
        hung = world.server()
        os.kill(hung, signal.SIGSTOP)
        assert await until(lambda: world.pushed[-1] == frozenset())
        assert "does not answer" in world.names.problems()[0]
        assert await until(lambda: world.pushed[-1] == world.rows(), 10.0)
        assert world.server() != hung

    world.run(scenario)


def test_a_new_agent_adopts_it_and_the_rows_are_never_gone(world: World) -> None:
    async def second() -> None:
        world.names.update(snapshot(VAULT), [world.place.local])
        assert await until(lambda: len(world.pushed) == 2)
        assert world.pushed[1] == world.rows()
        assert world.server() == pid
        assert await until(lambda: world.place.addresses("cart") == [UPSTREAM], 1.0)  # what changed while there was no agent

    world.run(world.up)
    pid = world.server()
    assert world.place.addresses("cart") == ["10.96.0.10"]  # nobody looks after it now
    world.names = world.agent()
    world.run(second)


def test_one_started_with_other_options_is_replaced(world: World) -> None:
    async def scenario() -> None:
        world.names.update(MODEL, [world.place.local])
        assert await until(lambda: world.pushed and world.pushed[-1] == world.rows())

    world.run(scenario)
    old = world.server()
    record = dnsmasq.Files(world.config, world.place.cookie).record
    record.write_text(json.dumps({**json.loads(record.read_text()), "config": "of another version"}))
    world.names = world.agent()
    world.pushed.clear()
    world.run(scenario)
    assert world.server() != old


def test_one_that_no_record_names_does_not_stay_in_the_way(world: World) -> None:
    async def scenario() -> None:
        world.names.update(MODEL, [world.place.local])
        assert await until(lambda: world.pushed and world.pushed[-1] == world.rows())

    world.run(scenario)
    orphan = world.server()
    dnsmasq.Files(world.config, world.place.cookie).record.unlink()  # as if the agent had been killed just before it wrote that
    world.names = world.agent()
    world.pushed.clear()
    world.run(scenario)
    assert world.server() != orphan


def test_each_namespace_has_one_and_it_ends_with_the_workload(world: World) -> None:
    async def scenario() -> None:
        locals_ = [place.local for place in world.places]
        bank = replace(locals_[1], workload=replace(locals_[1].workload, name="bank/web"))
        world.names.update(MODEL, [locals_[0], bank])
        assert await until(lambda: world.pushed and len(world.pushed[-1]) == 2)
        assert len(world.servers()) == 2
        assert (world.places[0].addresses("cart"), world.places[0].addresses("vault")) == (["10.96.0.10"], [UPSTREAM])
        assert (world.places[1].addresses("cart"), world.places[1].addresses("vault")) == ([UPSTREAM], ["10.96.0.12"])
        world.names.update(MODEL, [bank])
        assert await until(lambda: len(world.servers()) == 1)
        assert await until(lambda: dnsmasq.cookies(world.config) == {world.places[1].cookie})
        assert world.places[1].addresses("vault") == ["10.96.0.12"]

    world.run(scenario)


def test_one_whose_workload_went_while_there_was_no_agent_ends(world: World) -> None:
    async def first() -> None:
        world.names.update(MODEL, [place.local for place in world.places])
        assert await until(lambda: world.pushed and len(world.pushed[-1]) == 2)

    async def second() -> None:
        world.names.update(MODEL, [world.places[1].local])
        assert await until(lambda: len(world.servers()) == 1)

    world.run(first)
    world.names = world.agent()
    world.run(second)


def test_switching_names_off_ends_it(world: World) -> None:
    async def off() -> None:
        assert await until(lambda: world.pushed[-1] == frozenset() and not world.servers())

    world.run(world.up)
    world.config = replace(world.config, names=False)
    world.names = world.agent()
    world.run(off)
    assert not world.config.names_dir.exists()


def test_uninstall_leaves_no_process_and_no_file_also_with_a_connection_open(world: World) -> None:
    async def scenario() -> None:
        world.names.update(MODEL, [place.local for place in world.places])
        assert await until(lambda: world.pushed and len(world.pushed[-1]) == 2)

    world.run(scenario)

    def connect() -> socket.socket:
        client = socket.create_connection(("127.0.0.1", NAMES_PORT), timeout=2)
        client.sendall(struct.pack("!H", len(question("cart", A))) + question("cart", A))
        assert client.recv(4096)
        return client

    with netns.run_in(world.place.path, connect):  # dnsmasq forks for each
        assert len(world.servers()) == 3
        assert dnsmasq.stop(world.config) == 2
        assert datanode.until(lambda: not world.servers())
    assert not world.config.names_dir.exists()
    assert dnsmasq.stop(world.config) == 0


def test_the_second_resolver_is_asked_when_the_first_is_silent(world: World) -> None:
    (world.root / "etc/resolv.conf").write_text("nameserver 127.0.0.2\nnameserver 127.0.0.3\n")
    place = world.place

    async def scenario() -> None:
        world.names.update(MODEL, [place.local])
        assert await until(lambda: world.pushed == [world.rows("127.0.0.2", "127.0.0.3")])
        await asyncio.to_thread(check)

    def check() -> None:
        with pytest.raises(TimeoutError):
            place.ask("example.org")  # libc gives up the first resolver after five seconds, this test after two
        assert place.addresses("example.org") == [UPSTREAM]  # and asks the second

    world.run(scenario)


def test_a_changed_resolv_conf_is_followed(world: World) -> None:
    place = world.place

    async def scenario() -> None:
        await world.up()
        (world.root / "etc/resolv.conf").write_text("nameserver 127.0.0.3\nnameserver ::1\n")
        assert await until(lambda: world.pushed[1:] == [world.rows("127.0.0.3", "::1")])
        assert await asyncio.to_thread(place.addresses, "example.org") == [UPSTREAM]

    world.run(scenario)


def test_a_port_that_is_taken_is_named_and_the_name_server_starts_when_it_is_free(world: World) -> None:
    def take() -> socket.socket:
        taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        taken.bind(("127.0.0.1", NAMES_PORT))
        return taken

    taken = netns.run_in(world.place.path, take)

    async def scenario() -> None:
        world.names.update(MODEL, [world.place.local])
        assert await until(lambda: "Address already in use" in " ".join(world.names.problems()))
        assert world.pushed == [frozenset()]
        taken.close()
        assert await until(lambda: world.pushed[-1] == world.rows(), 10.0)
        assert world.names.problems() == []

    try:
        world.run(scenario)
    finally:
        taken.close()


RESOLVERS = ("10.77.255.200", "fd77:0:0:ff::200")
"""Addresses of the host outside, where the resolver of the pods is in the tests with the data path."""
# What a program sees: libc's own resolver, the name of whoever is connected to, and one datagram from a socket that is not connected.
PROGRAM = """
import json, socket, struct, sys
found = {}
for name in json.loads(sys.argv[1]):
    try:
        found[name] = sorted({a[4][0] for a in socket.getaddrinfo(name, None)})
    except socket.gaierror as error:
        found[name] = error.args[0]
query = bytes.fromhex(sys.argv[2])
for resolver in json.loads(sys.argv[3]):
    family = socket.AF_INET6 if ":" in resolver else socket.AF_INET
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(family, kind) as s:
            s.settimeout(3)
            s.connect((resolver, 53))
            s.sendall(struct.pack("!H", len(query)) + query if kind == socket.SOCK_STREAM else query)
            found[f"{kind.name} {resolver}"] = [s.getpeername()[0], s.recv(4096).hex().rpartition("0004")[2]]
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(3)
        s.sendto(query, (resolver, 53))
        reply, peer = s.recvfrom(4096)
        found[f"sendto {resolver}"] = [peer[0], reply.hex().rpartition("0004")[2]]
print(json.dumps(found))
"""


class Mesh:
    """A node's data path with names, and a resolver outside."""

    def __init__(self, node: DataNode, directory: Path) -> None:
        self.node, self.directory = node, directory
        self.queries = directory / "queries"
        self.queries.touch()
        namespace = datanode.workload("caller").network_namespace
        own = directory / "etc/netns" / namespace
        own.mkdir(parents=True)
        self.resolv_conf = own / "resolv.conf"
        self.resolv_conf.write_text("".join(f"nameserver {address}\n" for address in RESOLVERS) + "options timeout:1 attempts:2\n")
        self.model = datanode.snapshot(datanode.workload("caller"), datanode.workload("server-a"))
        enrolled = node.enrolment.enforce(self.model, frozenset())
        self.local = [one for one in enrolled.local if one.workload.name == "default/caller"]
        node.enforce(self.model)
        self.rows: Rows = frozenset()

    def set_resolvers(self, rows: Rows) -> None:
        self.node.enrolment.tables.set_resolvers(rows)
        self.rows = rows

    @contextlib.contextmanager
    def agent(self) -> Iterator[Names]:
        """The part of an agent that looks after names, in a thread; what it started stays when it ends."""
        names = Names(self.node.config, self.set_resolvers, root=self.directory)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        task = asyncio.run_coroutine_threadsafe(names.run(), loop)
        loop.call_soon_threadsafe(names.update, self.model, self.local)
        try:
            yield names
        finally:
            task.cancel()
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    def see(self, *names: str, resolvers: tuple[str, ...] = RESOLVERS, about: str = "echo") -> dict[str, object]:
        """What PROGRAM prints in the pod `caller`, which reads its own resolv.conf."""
        program = [sys.executable, "-c", PROGRAM, json.dumps(names), question(about, A).hex(), json.dumps(resolvers)]
        script = f'mount --bind {self.resolv_conf} /etc/resolv.conf && exec "$@"'
        run = self.node.lab.exec("caller", ["unshare", "--mount", "sh", "-c", script, "sh", *program])
        assert run.returncode == 0, run.stderr
        found = json.loads(run.stdout)
        assert isinstance(found, dict)
        return found

    def server(self) -> int:
        record = dnsmasq.Files(self.node.config, self.local[0].netns_cookie).record
        return int(json.loads(record.read_text())["pid"])


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with datanode.running() as node:
        made = Mesh(node, tmp_path_factory.mktemp("names"))
        with node.program("client", [sys.executable, "-c", RESOLVER, str(made.queries), *RESOLVERS]):
            yield made
    assert not made.node.config.names_dir.exists()


VIP = socket.inet_aton(datanode.VIP4).hex()
ELSEWHERE = socket.inet_aton(UPSTREAM).hex()
ALL = frozenset(RESOLVERS)


def test_a_program_finds_services_and_everything_else_and_sees_the_resolver_that_it_asked(mesh: Mesh) -> None:
    with mesh.agent():
        assert datanode.until(lambda: {address for _, address in mesh.rows} == ALL, 5)
        mesh.queries.write_text("")
        found = mesh.see("echo", "echo.default", "echo.default.svc.cluster.local", "empty")
        assert [found[n] for n in ("echo", "echo.default", "echo.default.svc.cluster.local")] == [
            sorted((datanode.VIP4, datanode.VIP6))
        ] * 3
        assert found["empty"] == [datanode.VIP_EMPTY]
        for resolver in RESOLVERS:
            assert [found[f"{how} {resolver}"] for how in ("SOCK_DGRAM", "SOCK_STREAM", "sendto")] == [[resolver, VIP]] * 3
        assert mesh.queries.read_text() == ""
        found = mesh.see("example.org", "x.echo", "absent.example", about="example.org")
        assert found["example.org"] == found["x.echo"] == [UPSTREAM]
        assert found["absent.example"] == socket.EAI_NONAME
        assert {str(found[f"sendto {r}"]) for r in RESOLVERS} == {str([r, ELSEWHERE]) for r in RESOLVERS}


def test_a_resolver_that_is_not_in_the_list_is_asked_itself(mesh: Mesh) -> None:
    first, second = RESOLVERS
    before = mesh.resolv_conf.read_text()
    mesh.resolv_conf.write_text(f"nameserver {first}\n")
    try:
        with mesh.agent():
            assert datanode.until(lambda: {address for _, address in mesh.rows} == {first}, 5)
            assert mesh.see(resolvers=(first,))[f"sendto {first}"] == [first, VIP]
            assert mesh.see(resolvers=(second,))[f"sendto {second}"] == [second, ELSEWHERE]
    finally:
        mesh.resolv_conf.write_text(before)


def test_names_go_on_when_the_agent_is_gone(mesh: Mesh) -> None:
    with mesh.agent():
        assert datanode.until(lambda: {address for _, address in mesh.rows} == ALL, 5)
    assert mesh.see("echo")["echo"] == sorted((datanode.VIP4, datanode.VIP6))


def test_when_the_name_server_is_killed_other_names_go_on_at_once(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    with mesh.agent():
        assert datanode.until(lambda: {address for _, address in mesh.rows} == ALL, 5)
        monkeypatch.setattr(dnsmasq, "find", _no_program)
        os.kill(mesh.server(), signal.SIGKILL)
        assert datanode.until(lambda: mesh.rows == frozenset(), 1)
        assert mesh.see("example.org")["example.org"] == [UPSTREAM]
        monkeypatch.undo()
        assert datanode.until(lambda: {address for _, address in mesh.rows} == ALL, 10)
        assert mesh.see("echo")["echo"] == sorted((datanode.VIP4, datanode.VIP6))


def _no_program() -> str:
    raise EnvironmentUnfit(dnsmasq.NO_SUCH_PROGRAM)
