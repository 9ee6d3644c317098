"""Services that need the waypoint no more and are still called through it: what Envoy is told of them, and what a real one then says to its callers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import hpack
import pytest
from hyperframe import frame as frames

from agent.l7 import names, parting
from agent.l7.parting import Dialled, Partings
from agent.l7.resources import Resources
from agent.l7.snapshot import Builder
from agent.model import Snapshot
from tests.ports import free_ports
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7 import test_requests as requests

SERVICE = "default/s"


def services(*ports: int) -> Dialled:
    return Dialled(frozenset((SERVICE, port) for port in ports))


def scene(port: int, target: int, *, waypoint: bool) -> Snapshot:
    """A caller and a service on loopback."""
    pods = [harness.workload("caller", "10.0.0.1"), requests.pod("p", "s", port, target)]
    return harness.snapshot(pods, [harness.service("s", "127.0.0.1", port, waypoint=waypoint)])


class Steady:
    """A builder that sees the service lose its waypoint."""

    def __init__(self, port: int = 80, target: int = 8080) -> None:
        self.builder = Builder("node-1", harness.TRUST_DOMAIN)
        self.port = port
        self.snapshots = {waypoint: scene(port, target, waypoint=waypoint) for waypoint in (True, False)}

    def build(self, *, waypoint: bool) -> Resources:
        snapshot = self.snapshots[waypoint]
        self.builder.needs_inbound(snapshot)
        return self.builder.build(snapshot, [harness.local(snapshot.workloads["default/caller"])], "")


def asks(resources: Resources, port: int = 80) -> bool:
    """Do the answers of the service ask callers to connect anew?"""
    config = harness.decoded(resources, names.ROUTES, names.service(SERVICE, port))
    return names.PARTING_FILTER in config.typed_per_filter_config


def test_what_has_lost_its_waypoint_keeps_its_place_until_nobody_is_connected_to_it() -> None:
    steady = Steady()
    before = steady.build(waypoint=True)
    after = steady.build(waypoint=False)
    assert after[names.SCOPE].keys() == before[names.SCOPE].keys() == {"127.0.0.1:80"}
    assert not asks(after)
    assert steady.builder.parts
    assert steady.builder.look(services(80))
    assert asks(steady.build(waypoint=False))
    assert not steady.builder.look(services(80))
    assert steady.builder.look(parting.NOTHING)
    assert not steady.builder.parts
    last = steady.build(waypoint=False)
    assert not last[names.SCOPE]
    assert not last[names.CLUSTER].keys() & before[names.CLUSTER].keys()


def test_what_nobody_seems_to_be_connected_to_stays_for_one_look_more() -> None:
    steady = Steady()
    steady.build(waypoint=True)
    steady.build(waypoint=False)
    assert not steady.builder.look(parting.NOTHING)
    assert steady.build(waypoint=False)[names.SCOPE]
    assert steady.builder.look(parting.NOTHING)


def test_what_gets_its_waypoint_back_asks_nobody_to_leave() -> None:
    steady = Steady()
    steady.build(waypoint=True)
    steady.build(waypoint=False)
    steady.builder.look(services(80))
    assert asks(steady.build(waypoint=False))
    assert not asks(steady.build(waypoint=True))
    assert not steady.builder.parts


def test_a_builder_that_begins_takes_up_what_is_still_called_and_nothing_that_does_not_exist() -> None:
    steady = Steady()
    steady.builder.needs_inbound(steady.snapshots[False])
    assert steady.builder.look(Dialled(frozenset({(SERVICE, 80), (SERVICE, 81), ("default/gone", 80)}), frozenset({"default/gone"})))
    built = steady.build(waypoint=False)
    assert built[names.SCOPE].keys() == {"127.0.0.1:80"}
    assert asks(built)


def test_so_many_are_asked_at_a_time_and_the_others_later() -> None:
    partings, every = Partings(), services(*range(1, parting.MOST_ASKED + 24))
    assert partings.look(every, every)
    assert partings.anew == services(*range(1, parting.MOST_ASKED + 1))
    left = services(*range(24, parting.MOST_ASKED + 24))
    assert partings.over(every, left) == services(*range(1, 24))
    assert partings.look(left, left)
    assert partings.anew == left
    assert partings.say(left) == every  # from the first look on
    assert partings.say(left) == parting.NOTHING


def test_who_was_asked_and_is_silent_does_not_keep_others_from_being_asked() -> None:
    partings, every = Partings(), services(*range(1, parting.MOST_ASKED + 24))
    partings.look(every, every)
    assert partings.look(every, every)
    assert partings.anew == services(*range(1, parting.MOST_ASKED - 22), *range(parting.MOST_ASKED + 1, parting.MOST_ASKED + 24))


def test_what_had_its_waypoint_back_meanwhile_has_not_been_seen() -> None:
    partings, one = Partings(), services(1)
    partings.look(one, parting.NOTHING)
    partings.say(parting.NOTHING)
    assert partings.over(one, parting.NOTHING) == parting.NOTHING


def _http1(stream: socket.socket) -> tuple[str, bool]:
    """Ask once; the status, and whether the connection is to end."""
    stream.sendall(b"GET / HTTP/1.1\r\nhost: s\r\n\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\n") and b"\r\n0\r\n\r\n" not in answer:
        if not (some := stream.recv(65536)):
            break
        answer += some
        head, _, body = answer.partition(b"\r\n\r\n")
        length = next((line.split(b":")[1] for line in head.lower().splitlines() if line.startswith(b"content-length")), b"-1")
        if b"\r\n\r\n" in answer and len(body) >= int(length) >= 0:
            break
    return answer.split()[1].decode(), b"connection: close" in answer.lower()


class _Http2:
    """The same over HTTP/2: a connection is to end when GOAWAY has come."""

    def __init__(self) -> None:
        self.stream_id, self._decoder = -1, hpack.Decoder()

    def __call__(self, stream: socket.socket) -> tuple[str, bool]:
        if self.stream_id < 0:
            stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frames.SettingsFrame(0).serialize())
        self.stream_id += 2
        headers = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "s")]
        ask = frames.HeadersFrame(self.stream_id, data=hpack.Encoder().encode(headers), flags=["END_HEADERS", "END_STREAM"])
        stream.sendall(ask.serialize())
        status, away, rest = "", False, b""
        while True:
            while len(rest) < 9:
                rest += stream.recv(65536)
            frame, length = frames.Frame.parse_frame_header(memoryview(rest[:9]))
            while len(rest) < 9 + length:
                rest += stream.recv(65536)
            body, rest = rest[9 : 9 + length], rest[9 + length :]
            away = away or isinstance(frame, frames.GoAwayFrame)
            if isinstance(frame, frames.HeadersFrame) and not status:
                status = next(value.decode() for name, value in self._decoder.decode(body, raw=True) if name == b":status")
            if "END_STREAM" in frame.flags:
                return status, away


@pytest.mark.parametrize("ask", [pytest.param(_http1, id="http1"), pytest.param(_Http2(), id="http2")])
def test_envoy_goes_on_to_answer_and_then_asks_callers_to_connect_anew(
    tmp_path: Path, ask: Callable[[socket.socket], tuple[str, bool]]
) -> None:
    (port,) = free_ports(1)

    async def scenario(target: int) -> list[tuple[str, bool]]:
        steady, found = Steady(port, target), []
        async with harness.waypoint(harness.config(tmp_path)) as (server, _):
            await harness.applied(server, harness.on_loopback(steady.build(waypoint=True), port))
            with socket.create_connection(("127.0.0.1", port), timeout=10) as stream:
                found.append(await asyncio.to_thread(ask, stream))
                await harness.applied(server, harness.on_loopback(steady.build(waypoint=False), port))
                found.append(await asyncio.to_thread(ask, stream))
                assert steady.builder.look(services(port))
                await harness.applied(server, harness.on_loopback(steady.build(waypoint=False), port))
                found.append(await asyncio.to_thread(ask, stream))
        return found

    with harness.http_server("p", "127.0.0.1") as backend:
        found = asyncio.run(scenario(backend.server_address[1]))
    assert found == [("200", False), ("200", False), ("200", True)]
