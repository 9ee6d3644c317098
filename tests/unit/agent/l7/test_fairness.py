"""What one workload may take of the waypoint: limits that always hold, and those that a policy gives to each caller, at a real Envoy on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TypeVar

import hpack
import pytest
from hyperframe import frame as frames

from agent.l7 import fairness, memory, names
from agent.l7.bootstrap import bootstrap
from agent.l7.clusters import socket_address
from agent.l7.resources import Resources, pack
from agent.l7.snapshot import build
from agent.model import Backend, Snapshot
from agent.traffic import Limits, TrafficPolicy
from tests.ports import free_ports
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7 import test_requests as requests

HOSTS = {"loud": "127.0.0.1", "quiet": "127.0.0.2"}
T = TypeVar("T")


def scene(port: int, target: int, *policies: TrafficPolicy, weighted: bool = False) -> Snapshot:
    """A service that both callers dial, each at an address of its own."""
    service = dataclasses.replace(harness.service("s", HOSTS["loud"], port), addresses=tuple(HOSTS.values()))
    pods = [harness.workload(name, f"10.0.0.{n}") for n, name in enumerate(HOSTS, 1)]
    backends = [Backend("default/s", port, 1), Backend("default/s", port, 3)] if weighted else [Backend("default/s", port, 1)]
    found = [harness.route("r", harness.rule(*backends), parent="s")] if weighted else []
    model = harness.snapshot([*pods, requests.pod("p", "s", port, target)], [service], found)
    return dataclasses.replace(model, traffic={one.name: one for one in policies})


def resources(snapshot: Snapshot, port: int) -> Resources:
    """The listeners of both callers on loopback, without their namespaces."""
    local = [harness.local(snapshot.workloads[f"default/{name}"]) for name in HOSTS]
    built = harness.on_loopback(build(snapshot, local, trust_domain=harness.TRUST_DOMAIN), port)
    for name, host in HOSTS.items():
        full = names.listener(names.OUTBOUND, f"default/{name}")
        listener = harness.decoded(built, names.LISTENER, full)
        listener.address.CopyFrom(socket_address(host, port))
        built[names.LISTENER][full] = pack(listener)  # type: ignore[index]
    return built


def through_envoy(directory: Path, snapshot: Snapshot, port: int, work: Callable[[], T]) -> T:
    async def scenario() -> T:
        async with harness.waypoint(harness.config(directory)) as (server, _):
            await harness.applied(server, resources(snapshot, port))
            return await asyncio.to_thread(work)

    return asyncio.run(scenario())


def ask(caller: str, port: int) -> int:
    """One request in the name of a caller."""
    with socket.create_connection((HOSTS[caller], port), timeout=10) as stream, stream.makefile("rb") as answer:
        stream.sendall(b"GET / HTTP/1.1\r\nhost: s\r\nconnection: close\r\n\r\n")
        return int(answer.readline().split()[1])


@contextlib.contextmanager
def asking(caller: str, port: int, count: int) -> Iterator[list[int]]:
    """So many at the same time; the list has those that are answered."""
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(ask(caller, port))) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        for thread in threads:
            thread.join()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("weighted", [False, True], ids=["one-backend", "weights"])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_a_caller_that_uses_up_its_share_leaves_that_of_another(tmp_path: Path, apart: bool, weighted: bool) -> None:
    [port] = free_ports(1)
    release = threading.Event()
    arrived: list[str] = []

    def slow(handler: BaseHTTPRequestHandler) -> int:
        arrived.append(handler.path)
        release.wait(10)
        return 200

    def work() -> tuple[list[int], list[int]]:
        with asking("loud", port, 7) as loud:
            try:
                until(lambda: len(loud) == 5 and len(arrived) == 2)
                with asking("quiet", port, 2) as quiet:
                    until(lambda: len(quiet) == 2 or len(arrived) == 4)
                    release.set()
            finally:
                release.set()
        return loud, quiet

    with requests.backends(s=slow) as targets:
        limited = TrafficPolicy("default/tp", (("default/s", port),), limits=Limits(requests=2, per_workload=apart))
        loud, quiet = through_envoy(tmp_path, scene(port, targets["s"], limited, weighted=weighted), port, work)
    assert Counter(loud) == {503: 5, 200: 2}
    assert Counter(quiet) == ({200: 2} if apart else {503: 2})


def test_what_each_workload_has_of_its_own_is_accepted_and_nothing_else_changes(tmp_path: Path) -> None:
    plain, limited = (
        scene(80, 8080),
        scene(80, 8080, TrafficPolicy("default/tp", (("default/s", 80),), limits=Limits(1, 2, 3, per_workload=True))),
    )
    paths = (harness.OWN_NETNS, harness.OWN_NETNS_TOO)
    local = [harness.local(plain.workloads[f"default/{name}"], path) for name, path in zip(HOSTS, paths, strict=True)]
    before, after = (build(snapshot, local, trust_domain=harness.TRUST_DOMAIN) for snapshot in (plain, limited))
    own = {names.share("service/default/s/80", f"default/{name}") for name in HOSTS}
    assert set(after[names.CLUSTER]) - set(before[names.CLUSTER]) == own
    assert set(after[names.ENDPOINTS]) - set(before[names.ENDPOINTS]) == own
    for name in own:
        cluster = harness.decoded(after, names.CLUSTER, name)
        assert (cluster.name, cluster.alt_stat_name) == (name, "service/default/s/80")
        assert cluster.circuit_breakers.thresholds[0].max_requests.value == 3
        assert harness.decoded(after, names.ENDPOINTS, name).cluster_name == name
    assert after[names.LISTENER] == before[names.LISTENER], "which would drain connections"
    harness.validate(after, tmp_path)


def test_the_connections_of_one_workload_are_bounded_and_another_gets_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness.guard, "__defaults__", (13,))
    [port] = free_ports(1)

    def work() -> tuple[int, int]:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(socket.create_connection((HOSTS["loud"], port), timeout=5)) for _ in range(29)]
            for stream in held:
                with contextlib.suppress(OSError):
                    stream.sendall(b"GET / HTTP/1.1\r\nhost: s\r\n\r\n")
            return sum(_answered(stream) for stream in held), ask("quiet", port)

    with requests.backends(s=requests.plain) as targets:
        assert through_envoy(tmp_path, scene(port, targets["s"]), port, work) == (13, 200)


def _answered(stream: socket.socket) -> bool:
    try:
        return stream.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def test_every_listener_of_a_workload_takes_turns_and_has_a_bound(tmp_path: Path) -> None:
    snapshot = scene(80, 8080)
    built = build(snapshot, [harness.local(snapshot.workloads["default/loud"])], trust_domain=harness.TRUST_DOMAIN)
    for name in built[names.LISTENER]:
        listener = harness.decoded(built, names.LISTENER, name)
        assert listener.max_connections_to_accept_per_socket_event.value == 1
        assert listener.per_connection_buffer_limit_bytes.value == fairness.BUFFER
        assert listener.filter_chains[0].filters[1].name == "envoy.filters.network.connection_limit"
    layers = bootstrap("n", tmp_path, tmp_path)["layered_runtime"]["layers"]
    assert layers[0]["static_layer"]["http"] == {"max_requests_per_io_cycle": 1}


def test_http2_is_told_how_many_streams_and_bytes(tmp_path: Path) -> None:
    [port] = free_ports(1)

    def work() -> dict[int, int]:
        with socket.create_connection((HOSTS["loud"], port), timeout=5) as stream, stream.makefile("rb") as reader:
            stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frames.SettingsFrame().serialize())
            while True:
                found, length = frames.Frame.parse_frame_header(memoryview(reader.read(9)))
                found.parse_body(memoryview(reader.read(length)))
                if isinstance(found, frames.SettingsFrame) and found.settings:
                    return dict(found.settings)

    with requests.backends(s=requests.plain) as targets:
        settings = through_envoy(tmp_path, scene(port, targets["s"]), port, work)
    assert settings[frames.SettingsFrame.MAX_CONCURRENT_STREAMS] == fairness.MOST_STREAMS
    assert settings[frames.SettingsFrame.INITIAL_WINDOW_SIZE] == fairness.STREAM_WINDOW


def test_many_requests_at_once_on_one_connection_are_all_answered(tmp_path: Path) -> None:
    """They wait for their turn (`max_requests_per_io_cycle`) and none is lost."""
    [port] = free_ports(1)
    count = 97

    def work() -> int:
        encoder, decoder = hpack.Encoder(), hpack.Decoder()
        wanted = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "s")]
        sent = b"".join(
            frames.HeadersFrame(1 + 2 * n, encoder.encode(wanted), flags=["END_HEADERS", "END_STREAM"]).serialize() for n in range(count)
        )
        good = 0
        with socket.create_connection((HOSTS["loud"], port), timeout=10) as stream, stream.makefile("rb") as reader:
            stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frames.SettingsFrame().serialize() + sent)
            while good < count:
                found, length = frames.Frame.parse_frame_header(memoryview(reader.read(9)))
                found.parse_body(memoryview(reader.read(length)))
                if isinstance(found, frames.HeadersFrame):
                    fields: dict[Any, Any] = dict(decoder.decode(found.data))
                    good += fields[":status"] == "200"
        return good

    with requests.backends(s=requests.plain) as targets:
        assert through_envoy(tmp_path, scene(port, targets["s"]), port, work) == count


def test_without_any_limit_envoy_may_use_half_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        8388608 kB\nMemFree:         1 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    assert memory.limit(tmp_path / "none") == 0
    assert memory.room(tmp_path / "none").heap == 4 << 30
    assert memory.Room(64 << 20, memory.FEWEST_CONNECTIONS).connections == 4096
