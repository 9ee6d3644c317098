"""What sock_diag's messages mean; those of a real kernel are read in tests/kernel/test_live.py."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.bpf import sockets
from agent.bpf.manifest import Direction
from agent.bpf.sockets import LiveSocket, Record, Sockets
from agent.errors import KernelRefused
from tests.unit.agent import tables

IDENT = (
    struct.pack("!HH", 8080, 40000)
    + bytes([10, 0, 0, 1]).ljust(16, b"\0")
    + bytes([10, 0, 0, 2]).ljust(16, b"\0")
    + struct.pack("=III", 0, 7, 1)
)
RECORD = Record(5, 6, 1, 2, 3, 4, 8080, 8081, Direction.INBOUND, 0, 0, 6, 0)
FOUND = LiveSocket(socket.AF_INET, sockets.ESTABLISHED, IDENT, 0, 0, 0, 0, RECORD)


def attribute(kind: int, body: bytes) -> bytes:
    return struct.pack("=HH", len(body) + 4, kind) + body.ljust(-(-len(body) // 4) * 4, b"\0")


def message(state: int, direction: int, *, established: int = 6, record: bool = True, joined: bytes = b"") -> bytes:
    layout = tables.sock().layout.value
    value = layout.pack(**RECORD._replace(direction=direction, established_ns=established, accelerated=bool(joined))._asdict())
    info = struct.pack("=68xI28xI16xQQ80x", 250, 3, 1001, 2001)
    records = [v for v in (value, joined) if v]
    storage = b"".join(attribute(1 | 0x8000, attribute(2, b"\0\0\0\0") + attribute(1, b"") + attribute(3, v)) for v in records)
    head = struct.pack("=BB2x48s20x", socket.AF_INET, state, IDENT)
    return head + attribute(8, b"\0") + attribute(2, info) + (attribute(20 | 0x8000, storage) if record else b"")


def parse(raw: bytes, maps: dict[str, Any] | None = None) -> LiveSocket:
    return Sockets(maps or tables.of_sockets())._parse(memoryview(b"pad!" + raw), 4, 4 + len(raw))


@pytest.mark.parametrize(
    ("end", "redirected"), [pytest.param(0, (5000, 70000), id="caller"), pytest.param(1, (70000, 5000), id="receiver")]
)
def test_bytes_that_went_past_tcp_are_counted_too(end: int, redirected: tuple[int, int]) -> None:
    maps = tables.of_sockets()
    pair = {"caller": 9, "sequence": 1}
    maps["mesh_pair"].add({**pair, "end": 0}, bytes=(5000, 70000))
    own = maps["mesh_pair"].layout.key.pack(**pair, end=end)
    found = parse(message(sockets.ESTABLISHED, Direction.INBOUND, joined=maps["mesh_joined"].layout.value.pack(key=own, way=1)), maps)
    assert (found.sent_bytes - 1001, found.received_bytes - 2001) == redirected
    maps["mesh_pair"].rows.clear()
    found = parse(message(sockets.ESTABLISHED, Direction.INBOUND, joined=maps["mesh_joined"].layout.value.pack(key=own, way=1)), maps)
    assert found.sent_bytes == 1001, "both ends have just ended"


@pytest.mark.parametrize(
    ("state", "direction", "sent", "received"),
    [
        pytest.param(sockets.ESTABLISHED, Direction.INBOUND, 1001, 2001, id="receiver"),
        pytest.param(sockets.ESTABLISHED, Direction.OUTBOUND, 1000, 2001, id="caller-whose-syn-is-counted"),
        pytest.param(sockets.FIN_WAIT2, Direction.OUTBOUND, 999, 2001, id="fin-acknowledged"),
        pytest.param(sockets.FIN_WAIT1, Direction.OUTBOUND, 1000, 2001, id="fin-under-way"),
        pytest.param(sockets.CLOSE_WAIT, Direction.INBOUND, 1001, 2000, id="fin-received"),
        pytest.param(sockets.LAST_ACK, Direction.INBOUND, 1001, 2000, id="fin-received-and-own-under-way"),
    ],
)
def test_bytes_are_payload(state: int, direction: int, sent: int, received: int) -> None:
    found = parse(message(state, direction))
    assert (found.sent_bytes, found.received_bytes, found.retransmits, found.rtt_us) == (sent, received, 3, 250)
    assert found.record == RECORD._replace(direction=direction)


def test_a_handshake_has_sent_nothing() -> None:
    found = parse(message(sockets.SYN_SENT, Direction.OUTBOUND, established=0))
    assert (found.sent_bytes, found.established) == (0, False)


def test_a_socket_without_a_record_has_the_empty_one() -> None:
    found = parse(message(sockets.ESTABLISHED, Direction.OUTBOUND, record=False))
    assert found.record is sockets.NO_RECORD
    assert found.ends == FOUND.ends


def test_a_socket_is_named_by_its_ends_and_its_cookie() -> None:
    assert str(FOUND) == "10.0.0.1:8080 <- 10.0.0.2:40000"
    assert str(FOUND._replace(record=RECORD._replace(direction=Direction.OUTBOUND))) == "10.0.0.1:8080 -> 10.0.0.2:40000"
    assert FOUND.cookie == (1 << 32) + 7


class Kernel:
    """A netlink socket that answers requests with these errnos, in turn."""

    def __init__(self, *codes: int) -> None:
        self._codes = list(codes)
        self.open = True

    def send(self, request: bytes) -> None:
        self.request = request

    def recv_into(self, buffer: memoryview) -> int:
        answer = struct.pack("=IHHIIi", 20, 2, 0, 1, 0, -self._codes.pop(0))
        buffer[: len(answer)] = answer
        return len(answer)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.open = False


def destroying(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, *names: str) -> Iterator[str]:
    monkeypatch.setattr(sockets, "_open", lambda _: kernel)
    return (name for _, name in Sockets.destroy(Path("/"), [(FOUND, name) for name in names]))


def test_what_was_closed_is_said_and_what_has_ended_by_itself_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(destroying(monkeypatch, Kernel(0, errno.ENOENT, 0), "first", "second", "third")) == ["first", "third"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        pytest.param(errno.EOPNOTSUPP, "CONFIG_INET_DIAG_DESTROY", id="it-cannot"),
        pytest.param(
            errno.EPERM,
            r"refuses to close connection 10\.0\.0\.1:8080 <- 10\.0\.0\.2:40000: Operation not permitted",
            id="it-will-not",
        ),
    ],
)
def test_a_connection_that_the_kernel_does_not_close_leaves_no_other_open(monkeypatch: pytest.MonkeyPatch, code: int, said: str) -> None:
    kernel = Kernel(code, 0, 0)
    closed = destroying(monkeypatch, kernel, "first", "second", "third")
    assert [next(closed), next(closed)] == ["second", "third"]
    with pytest.raises(KernelRefused, match=said):
        next(closed)
    assert not kernel.open


def test_a_namespace_that_is_going_away_has_no_connections_and_one_that_cannot_be_entered_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mount goes first, then the file below it. Real ones are in tests/kernel."""
    found = Sockets(tables.of_sockets())
    (tmp_path / "unmounted").touch()
    for path in (tmp_path / "nothing", tmp_path / "unmounted"):
        assert [*found.dump(path), *found.older(path, 0), *found.destroy(path, [(FOUND, "it")])] == []

    def fails(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("agent.netns.run_in", fails)
    for asked in (found.dump(tmp_path), found.older(tmp_path, 0), found.destroy(tmp_path, [(FOUND, "it")])):
        with pytest.raises(OSError, match="too many open files"):
            list(asked)
