from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.errors import ControllerError
from controller.identity import crl, keys, ledger, revocations, rotation, tokens, trust
from controller.identity.fields import BadState
from controller.identity.lapse import Lapse
from controller.identity.ledger import Issued, Taken
from tests.unit.controller.identity.harness import DOMAIN, Clock, authority

PARSERS: list[Callable[[bytes], object]] = [keys.parse, tokens.parse_records, revocations.parse, ledger.parse_line, trust.parse, crl.parse]
GOOD_KEYS = keys.dump(rotation.begin(rotation.first(DOMAIN, 1.8e9, 86_400, with_root=True), 1.8e9, 600))


def refusal(directory: Path, **more: Any) -> str:
    with pytest.raises(ControllerError) as caught:
        authority(directory, **more)
    return str(caught.value)


def made(directory: Path) -> Path:
    """Make a CA directory and return it."""
    authority(directory).stop()
    return directory


def test_the_directory_and_the_ca_file_are_for_their_owner_only(tmp_path: Path) -> None:
    directory = made(tmp_path / "ca")
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "authority.json").stat().st_mode & 0o777 == 0o600


def test_private_keys_are_in_the_ca_file_and_in_no_other(tmp_path: Path) -> None:
    directory = made(tmp_path / "ca")
    holding = {path.name for path in directory.iterdir() if b"PRIVATE" in path.read_bytes()}
    assert holding == {"authority.json"}


def test_a_restart_finds_the_same_root_and_the_same_sequence(tmp_path: Path) -> None:
    clock = Clock()
    first = authority(tmp_path / "ca", clock)
    first.stop()
    again = authority(tmp_path / "ca", clock)
    assert again.trust.current == first.trust.current
    again.stop()


def test_two_controllers_do_not_share_a_directory(tmp_path: Path) -> None:
    first = authority(tmp_path / "ca")
    assert "another controller uses the CA directory" in refusal(tmp_path / "ca")
    first.stop()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_ca_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    directory = made(tmp_path / "ca")
    (directory / "authority.json").chmod(mode)
    said = refusal(directory)
    assert said.startswith(f"others may read {directory}/authority.json (mode {mode:04o})")
    assert "chmod 600" in said


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    directory = made(tmp_path / "ca")
    directory.chmod(0o770)
    assert "others may write to the CA directory" in refusal(directory)


@pytest.mark.parametrize("name", ["authority.json", "tokens.json", "trust.json", "lists.json"])
def test_a_state_file_that_others_may_write_to_is_refused(tmp_path: Path, name: str) -> None:
    directory = made(tmp_path / "ca")
    (directory / "tokens.json").write_text('{"tokens": []}')
    (directory / name).chmod(0o660)
    assert f"others may write to {directory}/{name} (owner {os.geteuid()}, mode 0660)" in refusal(directory)


@pytest.mark.parametrize("name", ["authority.json", "tokens.json", "revoked.json", "trust.json", "lists.json"])
def test_a_file_that_is_cut_off_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    directory = made(tmp_path / "ca")
    whole = (directory / name).read_bytes() if (directory / name).exists() else b'{"tokens": [], "revoked": []}'
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        (directory / name).write_bytes(whole[:length])
        (directory / name).chmod(0o600)
        said = refusal(directory)
        assert said.startswith(f"{directory}/{name} cannot be used: "), said
        assert "Restore it from a backup" in said
        assert (directory / name).read_bytes() == whole[:length]


def test_a_ca_file_that_is_gone_while_the_rest_is_there_makes_no_new_root(tmp_path: Path) -> None:
    directory = made(tmp_path / "ca")
    (directory / "tokens.json").write_text('{"tokens": []}')
    (directory / "authority.json").unlink()
    assert "but no authority.json, where the CA's keys are: was it deleted" in refusal(directory)
    assert not (directory / "authority.json").exists()


def test_another_trust_domain_is_refused(tmp_path: Path) -> None:
    directory = made(tmp_path / "ca")
    path = directory / "authority.json"
    path.write_text(path.read_text().replace(DOMAIN, "other.local"))
    path.chmod(0o600)
    assert "is for trust domain other.local, --trust-domain is mesh.local" in refusal(directory)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda record: record["roots"][0].update(stage="next"), "at most one signs"),
        (lambda record: record["roots"].append(record["roots"][0]), "at most one signs"),
        (lambda record: record["roots"][0].update(key=record["jwt"][0]["key"]), "does not belong"),
        (lambda record: record["roots"][0].update(stage="unknown"), "a stage is none of"),
        (lambda record: record.update(version=2), "it has version 2"),
        (lambda record: record.update(extra=1), "does not have exactly the fields"),
        (lambda record: record["jwt"].clear(), "exactly one must sign"),
        (lambda record: record.update(longest_s=-1), "longest_s is missing or not a number"),
        (lambda record: record.update(longest_s=True), "longest_s is missing or not a number"),
    ],
)
def test_a_ca_file_that_contradicts_itself_is_refused(change: Callable[[Any], None], expected: str) -> None:
    record = json.loads(keys.dump(rotation.first(DOMAIN, 1.8e9, 86_400, with_root=True)))
    change(record)
    with pytest.raises(BadState, match=expected):
        keys.parse(json.dumps(record).encode())


def test_no_message_and_no_repr_shows_a_key() -> None:
    held = keys.parse(GOOD_KEYS.encode())
    assert "PRIVATE" not in repr(held)
    assert not re.search(r"[A-Za-z0-9+/]{40}", repr(held.jwt))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "version",
                    "trust_domain",
                    "longest_s",
                    "roots",
                    "jwt",
                    "tokens",
                    "revoked",
                    "lists",
                    "crl",
                    "serial",
                    "key",
                    "sequence",
                    "hash",
                    "node",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: f"{parser.__module__.rpartition('.')[2]}")
@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_content_makes_a_parser_do_anything_but_refuse(parser: Callable[[bytes], object], content: bytes) -> None:
    try:
        found = parser(content)
    except BadState:
        return
    assert found == []  # the empty list is good


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD_KEYS) - 1), st.integers(1, 20), st.binary(max_size=20))
def test_a_damaged_ca_file_is_refused_or_still_whole(where: int, length: int, instead: bytes) -> None:
    content = GOOD_KEYS.encode()
    damaged = content[:where] + instead + content[where + length :]
    with contextlib.suppress(BadState):
        assert len(keys.parse(damaged).roots) == 2


def test_deeply_nested_state_is_refused() -> None:
    for parser in PARSERS:
        with pytest.raises(BadState):
            parser(b"[" * 100_000)


def test_a_ledger_line_that_a_crash_cut_off_is_dropped_and_the_rest_stays(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    records = [Issued(f"{number:x}", "spiffe://mesh.local/ns/a/sa/b", "n1", "0" * 64, 2_000_000_000) for number in range(1, 24)]
    found._ledger.append(records)
    found.stop()
    path = tmp_path / "ca" / "issued.jsonl"
    with path.open("ab") as file:
        file.write(b'{"serial": "ff", "spif')
    again = authority(tmp_path / "ca")
    assert {record.serial for record in again._ledger.live(0)} == {record.serial for record in records}
    assert path.read_bytes().endswith(b"}\n")
    again.stop()
    path.write_bytes(b"x\ny\n" + path.read_bytes())
    assert "2 of its lines are no records" in refusal(tmp_path / "ca")


def test_what_cannot_be_recorded_is_not_issued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = authority(tmp_path / "ca")
    size = (tmp_path / "ca" / "issued.jsonl").stat().st_size if (tmp_path / "ca" / "issued.jsonl").exists() else 0

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(ControllerError, match="No space left on device; is the disk full"):
        found._ledger.append([Issued("1", "spiffe://mesh.local/ns/a/sa/b", "n1", "0" * 64, 2_000_000_000)])
    assert (tmp_path / "ca" / "issued.jsonl").stat().st_size == size
    assert not list(found._ledger.live(0))
    found.stop()


def test_nothing_is_forgotten_because_the_clock_jumped_for_a_moment() -> None:
    wall, steady = Clock(1000.0), Clock(0.0)
    lapse = Lapse(wall, steady, 600)
    wall.now = 10_000_000.0
    assert not lapse.passed("a", 2000)
    steady.now = 599.0
    assert not lapse.passed("a", 2000)
    wall.now = 1599.0
    assert not lapse.passed("a", 2000)
    wall.now, steady.now = 2001.0, 601.0
    assert not lapse.passed("a", 2000)
    steady.now = 1202.0
    assert lapse.passed("a", 2000)


def test_a_damaged_line_within_the_ledger_does_not_pass_for_one_that_was_cut_off(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    found._ledger.append([Issued(f"{number:x}", "spiffe://mesh.local/ns/a/sa/b", "n1", "0" * 64, 2_000_000_000) for number in (1, 2, 3)])
    found.stop()
    path = tmp_path / "ca" / "issued.jsonl"
    path.write_text(path.read_text().replace('"serial": "2"', '"serial": 2'))
    assert "1 of its lines are no records" in refusal(tmp_path / "ca")


def test_what_a_crash_left_of_a_write_is_removed_because_it_may_hold_keys(tmp_path: Path) -> None:
    directory = made(tmp_path / "ca")
    left = directory / ".authority.json.x1.tmp"
    left.write_text("PRIVATE KEY")
    authority(directory).stop()
    assert not left.exists()


def test_times_that_no_date_can_have_are_refused() -> None:
    line = b'{"serial": "1", "spiffe_id": "a", "node": "", "issuer": "", "until": %d}'
    assert ledger.parse_line(line % 253_402_300_799)
    for until in (253_402_300_800, 10**400):
        with pytest.raises(BadState):
            ledger.parse_line(line % until)


def test_what_nobody_asks_for_any_more_is_not_watched_for_ever_and_what_somebody_asks_for_is() -> None:
    wall, steady = Clock(1000.0), Clock(0.0)
    lapse = Lapse(wall, steady, 100_000)
    for number in range(997):  # on record until another controller forgets them
        lapse.passed(("issued", number), 500)
    while steady.now < 99_999:
        assert not lapse.passed("kept", 500)
        steady.now += 60
    assert lapse.passed("kept", 500)
    assert len(lapse._since) == 1


def test_a_ledger_on_disk_takes_no_second_certificate_where_there_must_be_one_and_hands_on_what_was_known(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    first = Issued("1", "spiffe://mesh.local/meshagent/node/n1", "n1", "0" * 64, 2_000_000_000, knew=7)
    found._ledger.append([first])
    with pytest.raises(Taken):
        found._ledger.append([replace(first, serial="2")], lambda record: record.spiffe_id == first.spiffe_id)
    found._ledger.append([replace(first, serial="3", knew=0)], lambda record: record.node == "n2", {"3": "1"})
    assert {record.serial: record.knew for record in found._ledger.live(0)} == {"1": 7, "3": 7}
    found.stop()
    path = tmp_path / "ca" / "issued.jsonl"
    assert "knew" not in path.read_text(), "an earlier release refuses it"
    lines = [json.dumps({**json.loads(line), "knew": 7}) + "\n" for line in path.read_text().splitlines()]
    path.write_text("".join(lines))  # as it was written for a while
    again = authority(tmp_path / "ca")
    assert {record.serial: record.knew for record in again._ledger.live(0)} == {"1": 7, "3": 7}
    assert "knew" not in path.read_text()
    again.stop()
