"""Which events become lines, what they say, and that files stay bounded."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from agent import connection_log, logfiles
from agent.bpf.manifest import Close, Direction, EventKind, Reason, Verdict
from agent.connection_log import ConnectionLog, line
from agent.logfiles import LogFile
from tests.tasks import beside
from tests.unit.agent.test_trace import event

CLOSED = {"reason": Close.RESET, "local": "10.77.1.10:40001", "duration_ns": 1_999_999, "sent_bytes": 23, "received_bytes": 101}


def written(path: Path, *events: Any, wanted: frozenset[str] = frozenset({"default/frontend", "default/redis"})) -> list[dict[str, Any]]:
    """What a log writes of these, when it is ended."""
    log = ConnectionLog(LogFile(path), wanted.__contains__)

    async def run() -> None:
        async with beside(log.run()):
            await asyncio.sleep(0)
            for one in events:
                log.on_event(one)

    asyncio.run(run())
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def test_the_end_of_a_connection_says_who_where_and_how() -> None:
    closed = event(EventKind.CLOSED, time_ns=2_000_000_000, **CLOSED)
    assert line(closed, 1_700_000_000_123_000_000) == {
        "time": "2023-11-14T22:13:22.123Z",
        "kind": "connection",
        "direction": "outbound",
        "source": "default/frontend",
        "sourceAddress": "10.77.1.10:40001",
        "dialled": "10.96.0.20:6379",
        "service": "default/redis:6379",
        "destination": "default/redis",
        "destinationAddress": "10.77.1.40:6379",
        "protocol": "TCP",
        "outcome": "closed",
        "reason": "reset",
        "rule": "default/p[0]",
        "durationMs": 1,
        "sentBytes": 23,
        "receivedBytes": 101,
        "rttUs": 0,
        "retransmits": 0,
    }


def test_a_denied_one_has_no_duration_but_a_rule() -> None:
    denied = event(EventKind.DENIED, reason=Reason.POLICY, verdict=Verdict.DENY)
    found = line(denied, 0)
    assert (found["outcome"], found["reason"], found["rule"]) == ("denied", "policy", "default/p[0]")
    assert not found.keys() & {"durationMs", "sentBytes", "sourceAddress"}


def test_only_ends_and_denials_of_those_who_want_it_are_written(tmp_path: Path) -> None:
    lines = written(
        tmp_path / "c.log",
        event(EventKind.CONNECT),
        event(EventKind.ESTABLISHED),
        event(EventKind.AUDITED, reason=Reason.AUDIT),
        event(EventKind.CLOSED, **CLOSED),
        event(EventKind.CLOSED, **CLOSED, direction=Direction.FROM_WAYPOINT),
        event(EventKind.CLOSED, **CLOSED, direction=Direction.INBOUND, source=""),
        event(EventKind.CLOSED, **CLOSED, source="other/a"),
        event(EventKind.DENIED, reason=Reason.POLICY, direction=Direction.INBOUND, target="other/b"),
    )
    assert [(one["direction"], one.get("source")) for one in lines] == [("outbound", "default/frontend"), ("inbound", None)]


def test_more_than_can_wait_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_log, "MOST_WAITING", 23)
    log = ConnectionLog(LogFile(tmp_path / "c.log"), lambda _: True)
    for _ in range(30):
        log.on_event(event(EventKind.CLOSED, **CLOSED))
    assert log.dropped == 7


def test_a_full_log_is_moved_aside_and_the_oldest_goes(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "logs" / "a.log", most_bytes=10)
    assert file.rotate(), "it was not there"
    for number in range(6):
        file.path.write_text(f"number {number}\n" * 2)
        assert file.rotate()
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["a.log", "a.log.1", "a.log.2", "a.log.3"]
    assert (tmp_path / "logs" / "a.log.1").read_text().startswith("number 5")
    assert (tmp_path / "logs" / "a.log.3").read_text().startswith("number 3")
    assert file.path.read_text() == ""
    assert not file.rotate()


def test_files_are_for_their_owner_and_its_group(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        LogFile(tmp_path / "logs" / "a.log").prepare()
    finally:
        os.umask(before)
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "logs" / "a.log").stat().st_mode & 0o777 == logfiles.MODE == 0o640
