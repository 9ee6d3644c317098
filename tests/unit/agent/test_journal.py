"""What `Journal` reads back is a state that was applied, whatever happened to the file."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import journal
from agent.journal import DROP, PUT, DamagedError, Journal
from meshapi import discovery_pb2 as pb

State = dict[str, bytes]


def change(version: str, put: State, removed: tuple[str, ...] = ()) -> pb.DiscoveryResponse:
    resources = [pb.Resource(name=name, version=version, entity=entity) for name, entity in put.items()]
    return pb.DiscoveryResponse(version=version, resources=resources, removed=removed)


def replay(file: Journal) -> tuple[str, State]:
    """The newest state that counts, and its version."""
    version, state, coming = "", dict[str, bytes](), dict[str, bytes]()
    try:
        for kind, content in file.read():
            if kind == PUT:
                resource = pb.Resource.FromString(content)
                coming[resource.name] = resource.entity
            elif kind == DROP:
                coming.pop(content.decode(), None)
            else:
                version, state = content.decode(), dict(coming)
    except (DamagedError, DecodeError, UnicodeDecodeError, FileNotFoundError):  # what a frame holds is checked by the COMMIT behind it
        pass
    return version, state


def store(file: Journal, *changes: pb.DiscoveryResponse) -> None:
    for one in changes:
        file.add(one)
    file.write()
    file.shrink()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "snapshot.journal"


def test_what_was_removed_or_replaced_does_not_come_back(path: Path) -> None:
    file = Journal(path)
    store(file, change("1", {"a": b"1", "b": b"1", "c": b"1"}))
    store(file, change("2", {"a": b"2"}, ("b",)))
    store(file, change("3", {"a": b"3"}, ("c",)), change("4", {"c": b"4"}))
    assert replay(Journal(path)) == ("4", {"a": b"3", "c": b"4"})
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_change_costs_the_disk_the_change_and_not_the_model(path: Path) -> None:
    file = Journal(path)
    store(file, change("1", {f"r{number}": bytes(100) for number in range(1000)}))
    before = path.stat()
    store(file, change("2", {"r7": b"new"}))
    after = path.stat()
    assert after.st_ino == before.st_ino
    assert after.st_size - before.st_size < 100


def test_the_file_stays_below_a_multiple_of_what_it_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_NOT_WORTH_REWRITING", 1000)
    file = Journal(path)
    state = {f"r{number}": bytes([number]) * 50 for number in range(50)}
    store(file, change("first", state))
    first = path.stat().st_size
    nodes = set()
    for number in range(500):
        state["r3"] = b"%d" % number
        store(file, change(str(number), {"r3": state["r3"]}))
        assert path.stat().st_size < 2.1 * first + 1000
        nodes.add(path.stat().st_ino)
        assert replay(Journal(path)) == (str(number), state)
    assert len(nodes) > 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_rewrite_does_not_make_damage_look_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_NOT_WORTH_REWRITING", 0)
    file = Journal(path)
    store(file, change("1", {"a": b"x" * 100}))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"x" * 100, b"y" * 100))
    file.add(change("2", {"b": b"1" * 500}))
    file.write()
    with pytest.raises(OSError, match=r"no longer what was written: the change at byte .*digest does not match; restart the agent"):
        file.shrink()
    assert replay(Journal(path)) == ("", {})


def test_a_torn_write_is_overwritten_by_the_next(path: Path) -> None:
    file = Journal(path)
    store(file, change("1", {"a": b"1"}), change("2", {"a": b"2" * 1000}))
    path.write_bytes(path.read_bytes()[:-1])
    again = Journal(path)
    assert replay(again) == ("1", {"a": b"1"})
    store(again, change("3", {"b": b"3"}))
    assert replay(Journal(path)) == ("3", {"a": b"1", "b": b"3"})
    assert len(list(Journal(path).read())) == 4, "nothing of the torn write is left to complain about"


def test_what_the_disk_refused_is_stored_with_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Journal(path)
    store(file, change("1", {"a": b"1"}))

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        for number in range(3):
            with pytest.raises(OSError, match="No space"):
                store(file, change(f"refused-{number}", {f"r{number}": b"1"}))
    store(file, change("2", {"b": b"2"}))
    assert replay(Journal(path)) == ("2", {"a": b"1", "r0": b"1", "r1": b"1", "r2": b"1", "b": b"2"})


def test_the_first_write_that_fails_leaves_the_file_that_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(Journal(path), change("1", {"a": b"1"}))

    def fail(_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            store(Journal(path), change("2", {"b": b"2"}))
    assert replay(Journal(path)) == ("1", {"a": b"1"})
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_changes_that_come_while_the_disk_hangs_become_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Journal(path)
    store(file, change("0", {"a": b"0"}))
    hanging, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def hang(descriptor: int) -> None:
        hanging.set()
        go_on.wait(20)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", hang)
    file.add(change("1", {"a": b"1"}))
    writer = threading.Thread(target=file.write)
    writer.start()
    assert hanging.wait(20)
    for number in range(2, 5000):
        file.add(change(str(number), {"a": b"%d" % number, f"r{number % 7}": b"x"}, ("a",)))
    assert len(file._pending) < 200
    go_on.set()
    writer.join()
    assert replay(Journal(path)) == ("1", {"a": b"1"})
    file.write()
    assert file._pending == []
    assert replay(Journal(path)) == ("4999", {"a": b"4999"} | {f"r{number}": b"x" for number in range(7)})


def test_a_file_that_something_else_made_shorter_is_not_appended_to(path: Path) -> None:
    file = Journal(path)
    store(file, change("1", {"a": b"1"}))
    path.write_bytes(b"")
    with pytest.raises(OSError, match="became shorter: something else writes to it"):
        store(file, change("2", {"a": b"2"}))


NAMES = st.sampled_from("abcd")
CHANGES = st.lists(
    st.tuples(st.dictionaries(NAMES, st.binary(max_size=40), max_size=3), st.lists(NAMES, max_size=2, unique=True), st.booleans()),
    max_size=12,
)


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, int, bytes]]:
    kinds = st.sampled_from(["cut", "flip", "append", "insert", "repeat"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 5000), st.binary(min_size=1, max_size=60)), max_size=3))


def damaged(content: bytes, damage: list[tuple[str, int, bytes]]) -> bytes:
    for kind, number, noise in damage:
        at = number % (len(content) + 1)
        if kind == "cut":
            content = content[:at]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << number % 8]) + content[at + 1 :]
        elif kind == "append":
            content += noise
        elif kind == "insert":
            content = content[:at] + noise + content[at:]
        elif kind == "repeat":
            content += content[at:]
    return content


@settings(deadline=None)
@given(CHANGES, damages(), st.integers(1, 5))
def test_any_damage_leaves_a_state_that_was_applied(
    changes: list[tuple[State, list[str], bool]], damage: list[tuple[str, int, bytes]], most: int
) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "_NOT_WORTH_REWRITING", 100)
        patch.setattr(journal, "_MOST_PENDING", most)
        patch.setattr(os, "fsync", lambda _: None)
        path = Path(directory, "journal")
        file = Journal(path)
        state: State = {}
        applied: dict[str, State] = {"": {}}
        for number, (put, removed, now) in enumerate(changes, 1):
            for name in removed:
                state.pop(name, None)
            state |= put
            applied[str(number)] = dict(state)
            file.add(change(str(number), put, tuple(removed)))
            if now:
                store(file)
                assert replay(Journal(path)) == (str(number), state)
        store(file)
        if not changes:
            return
        newest = str(len(changes))
        assert replay(Journal(path)) == (newest, state)
        path.write_bytes(damaged(path.read_bytes(), damage))
        again = Journal(path)
        version, found = replay(again)
        assert found == applied[version]
        if not version:
            store(again, change("new", {"e": b"1"}))
            assert replay(Journal(path)) == ("new", {"e": b"1"})
        else:
            store(again, change("new", {"e": b"1"}, ("a",)))
            assert replay(Journal(path)) == ("new", {name: e for name, e in found.items() if name != "a"} | {"e": b"1"})


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_damage(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "journal")
        path.write_bytes(content)
        with pytest.raises(DamagedError):
            list(Journal(path).read())
        path.write_bytes(journal._FORMAT + content)
        with pytest.raises(DamagedError):
            list(Journal(path).read())
