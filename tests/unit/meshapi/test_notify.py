"""What systemd hears of a service."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshapi.notify import Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The other end of the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as found:
        found.bind(str(tmp_path / "notify"))
        found.settimeout(0.5)
        yield found


def heard(manager: socket.socket) -> list[str]:
    """One message's assignments."""
    return manager.recv(4096).decode().split("\n")


def environment(manager: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname(), **more}


def test_the_first_beat_says_that_it_is_ready_and_later_ones_only_what_is_new(manager: socket.socket) -> None:
    notifier = Notifier(environment(manager))
    for status in ("in force", "in force", "away"):
        notifier.beat(status)
    notifier.stopping()
    said = [heard(manager) for _ in range(3)]
    assert said == [["READY=1", "STATUS=in force"], ["READY=1", "STATUS=away"], ["STOPPING=1"]]


def test_a_watched_service_says_with_every_beat_that_it_is_alive(manager: socket.socket) -> None:
    notifier = Notifier(environment(manager, WATCHDOG_USEC="30000000", WATCHDOG_PID=str(os.getpid())))
    notifier.beat("in force")
    notifier.beat("in force")
    assert [heard(manager), heard(manager)] == [["READY=1", "STATUS=in force", "WATCHDOG=1"], ["WATCHDOG=1"]]


def test_the_watchdog_of_another_process_is_not_answered(manager: socket.socket) -> None:
    notifier = Notifier(environment(manager, WATCHDOG_USEC="30000000", WATCHDOG_PID="1"))
    notifier.beat("in force")
    assert heard(manager) == ["READY=1", "STATUS=in force"]


def test_what_could_not_be_told_is_told_with_the_next_beat(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    notifier = Notifier({"NOTIFY_SOCKET": str(path)})
    notifier.beat("in force")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as late:
        late.bind(str(path))
        late.settimeout(0.5)
        notifier.beat("in force")
        assert heard(late) == ["READY=1", "STATUS=in force"]


def test_a_queue_that_is_full_does_not_block(manager: socket.socket) -> None:
    notifier = Notifier(environment(manager, WATCHDOG_USEC="30000000"))
    for _ in range(1009):  # net.unix.max_dgram_qlen is 512 at most distributions
        notifier.beat("in force")
    assert heard(manager) == ["READY=1", "STATUS=in force", "WATCHDOG=1"]


def test_a_socket_in_the_abstract_namespace_is_found() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as found:
        found.bind("")  # the kernel chooses an abstract name (unix(7), autobind)
        found.settimeout(0.5)
        name = found.getsockname()
        Notifier({"NOTIFY_SOCKET": "@" + name[1:].decode()}).beat("in force")
        assert heard(found) == ["READY=1", "STATUS=in force"]


def test_programs_that_the_service_starts_cannot_speak_in_its_name(manager: socket.socket) -> None:
    found = environment(manager, WATCHDOG_USEC="30000000", WATCHDOG_PID="1", PATH="/bin")
    Notifier(found)
    assert found == {"PATH": "/bin"}


def test_what_others_wrote_into_a_status_is_one_line_of_text(manager: socket.socket) -> None:
    Notifier(environment(manager)).beat("resource shop/x:\nMAINPID=1")
    assert heard(manager) == ["READY=1", "STATUS=resource shop/x:\N{REPLACEMENT CHARACTER}MAINPID=1"]


def test_without_systemd_nothing_is_told() -> None:
    notifier = Notifier({})
    notifier.beat("in force")
    notifier.stopping()
