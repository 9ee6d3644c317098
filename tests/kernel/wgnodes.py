"""Nodes with real WireGuard devices that the agent's own code makes: network namespaces on one wire, a pod behind each, and somebody who listens on the wire.

There is no controller: a test says which model every node has. Without WireGuard the nodes' routes lead packets of pods over the wire as they are, so what
is not encrypted is seen there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from agent.config import Config
from agent.model import Node, Snapshot, WireGuardEnd, Workload
from agent.wireguard import device
from agent.wireguard.keys import KeyPair
from agent.wireguard.part import WireGuard
from lab import netns

T = TypeVar("T")
PREFIX = "wgtest"
WIRE = f"{PREFIX}-wire"
PORT = 51871
NUMBERS = (1, 2, 3)
PATIENCE_S = 30.0
_SYSCTLS = {
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv4/conf/all/rp_filter": "1",  # as strict as distributions are
    "net/ipv4/conf/default/rp_filter": "1",
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/icmp_ratelimit": "0",
    "net/ipv6/icmp/ratelimit": "0",
}


def pod(number: int, family: int = socket.AF_INET, host: int = 2) -> str:
    """An address of a node's pod; host 2 is the enrolled workload's, 3 is one that no model knows."""
    return f"10.80.{number}.{host}" if family == socket.AF_INET else f"fd80:0:0:{number}::{host}"


def wire(number: int, family: int = socket.AF_INET) -> str:
    """The node's own address."""
    return f"10.80.255.{number}" if family == socket.AF_INET else f"fd80:0:0:ff::{number}"


def node_netns(number: int) -> str:
    return f"{PREFIX}-node-{number}"


def pod_netns(number: int) -> str:
    return f"{PREFIX}-pod-{number}"


def workload(number: int, node: int | None = None) -> Workload:
    """The pod of a node; `node`: the one that the model puts it on."""
    addresses = (pod(number), pod(number, socket.AF_INET6))
    return Workload(
        f"default/pod-{number}", "default", f"node-{node or number}", {}, addresses, pod_netns(number), enrolled=True, ready=True
    )


class WgNode:
    """A node, and the agent's WireGuard part in its namespace."""

    def __init__(self, number: int, directory: Path) -> None:
        self.number, self.name = number, f"node-{number}"
        self.config = Config(
            node=self.name,
            controller="unix:/run/none",
            run_dir=directory / self.name,
            wireguard_addresses=(wire(number), wire(number, socket.AF_INET6)),
        )
        self.announced = 0
        self.start()

    def start(self) -> None:
        """Start an agent's part: the first one, or the next."""

        async def changed() -> None:
            raise AssertionError

        def announce() -> None:
            self.announced += 1

        self.config.run_dir.mkdir(exist_ok=True)
        self.part = WireGuard(self.config, changed, announce)
        self.inside(lambda: asyncio.run(self.part.start()))

    def inside(self, function: Callable[[], T]) -> T:
        """Call in the node's namespace; threads that it starts are there too."""
        return netns.inside(node_netns(self.number), function)

    @property
    def said(self) -> Node:
        """What the controller would make of its announcement."""
        end = self.inside(self.part.announcement)
        assert end is not None
        return Node(self.name, WireGuardEnd(end.public_key, end.port, tuple(end.endpoints)))

    def apply(self, snapshot: Snapshot) -> None:
        """Bring a model into force."""

        async def around() -> None:
            await self.part.prepare(snapshot)
            await self.part.finish()

        self.inside(lambda: asyncio.run(around()))

    def look(self) -> bool:
        """What the agent does every second; True if something has to change."""
        return self.inside(self.part._look)

    def ip(self, *lines: str) -> str:
        """Run iproute2 commands in the node."""
        return ip(node_netns(self.number), *lines)


class Mesh:
    """All nodes, and the model that they have."""

    def __init__(self, directory: Path) -> None:
        self.nodes = {number: WgNode(number, directory) for number in NUMBERS}
        self._version = 0

    def model(self, *workloads: Workload, nodes: dict[str, Node] | None = None) -> Snapshot:
        """A model with these workloads (none: all pods) and nodes (none: as they announce themselves)."""
        self._version += 1
        found = {w.name: w for w in workloads or [workload(number) for number in NUMBERS]}
        said = {node.name: node.said for node in self.nodes.values()} if nodes is None else nodes
        return Snapshot(str(self._version), found, nodes=said)

    def apply(self, snapshot: Snapshot, *numbers: int) -> None:
        """Bring a model into force on these nodes (none: all)."""
        for number in numbers or NUMBERS:
            self.nodes[number].apply(snapshot)

    def settle(self, snapshot: Snapshot) -> None:
        """Bring a model into force, and wait until every node encrypts to every other one that has a key."""
        self.apply(snapshot)
        able = {name for name, node in snapshot.nodes.items() if node.wireguard}
        end = time.monotonic() + PATIENCE_S
        for node in self.nodes.values():
            while node.part.direct.nodes != able - {node.name}:
                assert time.monotonic() < end, (node.name, node.part.direct, node.part.problems(), node.part.status())
                time.sleep(0.1)
                if node.look():
                    node.apply(snapshot)


def ip(namespace: str, *lines: str) -> str:
    """Run iproute2 commands in a namespace and return what they say."""
    run = netns.inside(
        namespace,
        lambda: subprocess.run(["ip", "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False),
    )
    assert run.returncode == 0, (lines, run.stderr)
    return run.stdout


def _namespace(name: str) -> None:
    netns.create(name)

    def prepare() -> None:
        for key, value in _SYSCTLS.items():
            (Path("/proc/sys") / key).write_text(value)

    netns.inside(name, prepare)
    ip(name, "link set lo up")


def build() -> None:
    """Make the namespaces."""
    _namespace(WIRE)
    ip(WIRE, "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set br0 up")
    for number in NUMBERS:
        node, inner = node_netns(number), pod_netns(number)
        _namespace(node)
        _namespace(inner)
        ip(WIRE, f"link add n{number} type veth peer name wire0 netns {node}", f"link set n{number} master br0 up")
        ip(node, f"link add pod0 type veth peer name eth0 netns {inner}", "link set pod0 up", "link set wire0 up")
        lines, inside = [], ["link set eth0 up"]
        for family, length in ((socket.AF_INET, 24), (socket.AF_INET6, 64)):
            gateway = pod(number, family, 1)
            lines += [f"address add {wire(number, family)}/{length} dev wire0 nodad", f"address add {gateway}/{length} dev pod0 nodad"]
            lines += [f"route add {pod(n, family, 0)}/{length} via {wire(n, family)}" for n in NUMBERS if n != number]
            inside += [f"address add {pod(number, family)}/{length} dev eth0 nodad", f"route add default via {gateway}"]
        ip(node, *lines)
        ip(inner, *inside)


def tear_down() -> None:
    """Take them away."""
    for name in netns.names(f"{PREFIX}-"):
        netns.delete(name)
    netns.remove_directory()


class Seen:
    """What was seen on the wire."""

    def __init__(self, marker: bytes) -> None:
        self.marker = marker
        self.plain = 0
        """Frames with the marker."""
        self.encrypted = 0
        """UDP datagrams to WireGuard's port."""

    def take(self, frame: bytes) -> None:
        """Look at one."""
        self.plain += self.marker in frame
        start = {b"\x08\x00": (23, 34), b"\x86\xdd": (20, 54)}.get(frame[12:14])
        if (
            start
            and frame[start[0]] == socket.IPPROTO_UDP
            and PORT
            in (
                int.from_bytes(frame[start[1] : start[1] + 2], "big"),
                int.from_bytes(frame[start[1] + 2 : start[1] + 4], "big"),
            )
        ):
            self.encrypted += 1


@contextmanager
def listening(marker: bytes) -> Iterator[Seen]:
    """Listen on every port of the wire within the block."""

    def opened() -> socket.socket:
        found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        found.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        return found

    seen, ended = Seen(marker), threading.Event()
    with netns.inside(WIRE, opened) as tap:

        def read() -> None:
            while True:
                last = ended.is_set()
                while select.select([tap], [], [], 0.0 if last else 0.05)[0]:
                    seen.take(tap.recv(1 << 17))
                if last:
                    return

        thread = threading.Thread(target=read, name="wire")
        thread.start()
        try:
            yield seen
        finally:
            time.sleep(0.1)
            ended.set()
            thread.join()


class Server:
    """In a pod: echoes TCP connections and datagrams, at one port, in both families."""

    def __init__(self, number: int, port: int) -> None:
        self.port = port
        self._ended = threading.Event()
        self._sockets = netns.inside(pod_netns(number), lambda: [self._open(family, kind) for family in _FAMILIES for kind in _KINDS])
        self._threads = [threading.Thread(target=self._serve, args=(found,), name="echo") for found in self._sockets]
        for thread in self._threads:
            thread.start()

    def _open(self, family: int, kind: int) -> socket.socket:
        found = socket.socket(family, kind)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(("", self.port))
        found.settimeout(0.2)
        if kind == socket.SOCK_STREAM:
            found.listen(16)
        return found

    def _serve(self, found: socket.socket) -> None:
        stream = found.type == socket.SOCK_STREAM
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                if stream:
                    connection, _ = found.accept()
                    thread = threading.Thread(target=self._echo, args=(connection,), name="echo")
                    thread.start()
                    self._threads.append(thread)
                else:
                    data, peer = found.recvfrom(1 << 16)
                    found.sendto(data, peer)

    def _echo(self, connection: socket.socket) -> None:
        connection.settimeout(0.2)
        with connection:
            while not self._ended.is_set():
                try:
                    data = connection.recv(1 << 16)
                except TimeoutError:
                    continue
                except OSError:
                    return
                if not data:
                    return
                connection.settimeout(PATIENCE_S)
                with contextlib.suppress(OSError):
                    connection.sendall(data)
                connection.settimeout(0.2)

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        for found in self._sockets:
            found.close()


_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)


@contextmanager
def serving(number: int, port: int = 7777) -> Iterator[Server]:
    """An echo server in a pod."""
    server = Server(number, port)
    try:
        yield server
    finally:
        server.close()


def dial(source: int, target: int, family: int, port: int = 7777, timeout: float = 20.0) -> socket.socket:
    """A TCP connection between pods."""

    def connect() -> socket.socket:
        found = socket.socket(family, socket.SOCK_STREAM)
        found.settimeout(timeout)
        try:
            found.connect((pod(target, family), port))
        except BaseException:
            found.close()
            raise
        return found

    return netns.inside(pod_netns(source), connect)


def exchange(connection: socket.socket, data: bytes) -> None:
    """Send and get it back."""
    connection.sendall(data)
    got = b""
    while len(got) < len(data):
        part_of_it = connection.recv(1 << 16)
        assert part_of_it, "the connection ended"
        got += part_of_it
    assert got == data


def call(source: int, target: int, family: int, data: bytes, *, port: int = 7777, timeout: float = 20.0) -> None:
    """Send over a new connection and get it back."""
    with dial(source, target, family, port, timeout) as connection:
        exchange(connection, data)


def ask(source: int, target: int, family: int, data: bytes, *, timeout: float = 20.0, bound: str = "") -> bool:
    """Send datagrams until one comes back; False if none does."""

    def opened() -> socket.socket:
        found = socket.socket(family, socket.SOCK_DGRAM)
        if bound:
            found.bind((bound, 0))
        found.settimeout(0.5)
        return found

    end = time.monotonic() + timeout
    with netns.inside(pod_netns(source), opened) as found:
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                found.sendto(data, (pod(target, family), 7777))
                if found.recv(1 << 16) == data:
                    return True
    return False


def bulk(source: int, target: int, family: int, size: int, marker: bytes) -> None:
    """Send much, get it back, compare digests."""
    block = hashlib.sha256(marker).digest() * 1024 + marker
    with dial(source, target, family) as connection:
        connection.settimeout(120)
        sent, received = hashlib.sha256(), hashlib.sha256()
        total = -(-size // len(block)) * len(block)

        def send() -> None:
            for _ in range(total // len(block)):
                sent.update(block)
                connection.sendall(block)

        thread = threading.Thread(target=send, name="bulk")
        thread.start()
        left = total
        while left:
            data = connection.recv(1 << 16)
            assert data, "the connection ended"
            received.update(data)
            left -= len(data)
        thread.join()
    assert sent.digest() == received.digest()


def rekeyed_behind(node: WgNode) -> None:
    """Give a node's device another key than it announced."""
    node.inside(lambda: node.part._device.rekey(KeyPair()))


def unavailable() -> str:
    """Why this kernel cannot run these tests."""
    return device.unavailable()


def is_there(node: WgNode) -> bool:
    """Has the node a device?"""
    return node.inside(lambda: node.part._device.read(allowed=False)) is not None


def describe(mesh: Mesh) -> str:
    """What the nodes and pods have, for the message of a test that fails."""
    words = ("rule show", "route show table all", "-s link show", "neigh show")
    found = []
    for name in (*(node_netns(n) for n in mesh.nodes), *(pod_netns(n) for n in mesh.nodes)):
        for word in words:
            run = netns.inside(name, lambda w=word: subprocess.run(["ip", *w.split()], capture_output=True, text=True, check=False))  # type: ignore[misc]
            found.append(f"{name}: ip {word}\n{run.stdout}")
    return "\n".join([*found, *(text for node in mesh.nodes.values() for text in node.part.problems())])
