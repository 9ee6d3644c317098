from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.errors import ControllerError
from controller.identity import tokens
from controller.identity.directory import TOKENS, Directory
from controller.identity.refusals import Refused
from controller.identity.tokens import Record, TokenStore
from controller.main import main
from meshapi import join
from tests.unit.controller.identity.harness import Clock, authority
from tests.unit.controller.identity.shared import Replica, State

ROOT = "ab" * 32


def store(tmp_path: Path, clock: Clock | None = None) -> TokenStore:
    directory = Directory(tmp_path / "ca")
    directory.prepare()
    return TokenStore(directory, clock or Clock())


def command(directory: Path, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["token", *arguments, "--ca-directory", str(directory)])
    return result.exit_code, result.stdout, result.stderr


def test_a_token_is_shown_once_and_stored_hashed(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    code, out, said = command(tmp_path / "ca", "create", "--node", "n1", "--ttl", "15m")
    assert code == 0
    token = join.parse(out)
    assert len(token.secret) == 32
    assert token.root_hash == join.root_hash(found.roots[0])
    identifier = said.split()[1]
    assert said.startswith(f"token {identifier} for node n1, one join, until 20")
    path = tmp_path / "ca" / "tokens.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert out.split(".")[1] not in path.read_text()
    assert token.secret.hex() not in path.read_text()
    assert command(tmp_path / "ca", "list")[1].startswith(f"{identifier}  n1  valid, until 20")
    assert [item["state"] for item in json.loads(command(tmp_path / "ca", "list", "-o", "json")[1])] == ["valid"]
    assert command(tmp_path / "ca", "revoke", identifier)[1] == f"token {identifier} revoked\n"
    assert command(tmp_path / "ca", "list")[1] == ""
    found.stop()


def test_commands_say_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    code, out, said = command(tmp_path / "gone", "create")
    assert (code, out) == (1, "")
    assert said.startswith(
        f"Error: cannot open the CA directory {tmp_path}/gone: No such file or directory; it is made by `mesh-controller run"
    )
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o700)
    assert "holds no authority.json: start `mesh-controller run`" in command(empty, "create")[2]
    found = authority(tmp_path / "ca")
    assert "is no node name" in command(tmp_path / "ca", "create", "--node", "a/b")[2]
    assert "no tokens with the id 'abcd'" in command(tmp_path / "ca", "revoke", "abcd")[2]
    for ttl in ("1", "8d", "0s", "x", "-1h"):
        assert command(tmp_path / "ca", "create", "--ttl", ttl)[0] == 2
    found.stop()


def test_the_directory_can_come_from_the_environment_that_the_controller_has(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    for name in ("MESH_CONTROLLER_CA_DIRECTORY", "MESH_CONTROLLER_RUN_CA_DIRECTORY"):
        assert CliRunner().invoke(main, ["token", "create"], env={name: str(tmp_path / "ca")}).exit_code == 0
    found.stop()


def test_of_many_threads_one_uses_a_token(tmp_path: Path) -> None:
    found = store(tmp_path)
    text = str(found.create("", 60, ROOT)[0])
    start = threading.Barrier(23)
    results: list[Record | Refused] = []

    def use(number: int) -> None:
        start.wait()
        try:
            results.append(found.reserve(text, f"n{number}"))
        except Refused as error:
            results.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(23)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(result, Record) for result in results) == 1
    assert {result.reason for result in results if isinstance(result, Refused)} == {"token-used"}


def test_a_token_that_is_given_back_serves_again_once(tmp_path: Path) -> None:
    found = store(tmp_path)
    text = str(found.create("n1", 60, ROOT)[0])
    found.release(found.reserve(text, "n1"))
    found.reserve(text, "n1")
    with pytest.raises(Refused, match="was used"):
        found.reserve(text, "n1")


def test_used_and_expired_tokens_stay_listed_for_a_week_and_are_void_after_it(tmp_path: Path) -> None:
    clock = Clock()
    found = store(tmp_path, clock)
    text = str(found.create("n1", 60, ROOT)[0])
    found.reserve(text, "n1")
    clock.now += 60 + tokens.KEPT_S + 1
    found.create("n2", 60, ROOT)
    assert [record.node for record in found.all()] == ["n2"]
    for now in (clock.now, clock.now - 10**7):
        clock.now = now
        with pytest.raises(Refused, match="does not know the join token"):
            found.reserve(text, "n1")


def test_what_was_seen_to_expire_stays_so_if_the_clock_is_set_back(tmp_path: Path) -> None:
    clock = Clock()
    found = store(tmp_path, clock)
    text = str(found.create("n1", 60, ROOT)[0])
    clock.now += 61
    found.lapse()
    clock.now -= 61
    with pytest.raises(Refused, match="expired"):
        found.reserve(text, "n1")


def test_a_damaged_list_lets_nobody_in_and_stays_as_it_is(tmp_path: Path) -> None:
    found = store(tmp_path)
    text = str(found.create("n1", 60, ROOT)[0])
    path = tmp_path / "ca" / "tokens.json"
    path.write_text(path.read_text()[:-20])
    damaged = path.read_bytes()
    for use in (lambda: found.reserve(text, "n1"), lambda: found.create("n2", 60, ROOT), lambda: found.revoke("abcdef"), found.lapse):
        with pytest.raises(ControllerError, match="or delete it: tokens that were not used yet are then void"):
            use()
    assert path.read_bytes() == damaged


def test_there_is_an_end_to_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_TOKENS", 3)
    found = store(tmp_path)
    for _ in range(3):
        found.create("", 60, ROOT)
    with pytest.raises(ControllerError, match="there are 3 tokens"):
        found.create("", 60, ROOT)


def test_a_list_that_is_shared_forgets_what_is_spent_before_it_is_long_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MOST_SHARED", 10_000)
    clock, shared = Clock(), Replica(State())
    found, alone = TokenStore(shared, clock), store(tmp_path, clock)
    for number in range(97):
        for each in (found, alone):
            each.reserve(str(each.create(f"n{number}", 3600, ROOT)[0]), f"n{number}")
        clock.now += tokens.JOINING_S
    assert len(alone.all()) == 97
    assert {record.used_by for record in found.all()} == {f"n{number}" for number in range(97 - len(found.all()), 97)}, (
        "the newest are left"
    )
    assert 9_000 < len(shared.read(TOKENS) or b"") <= 10_500
    valid: list[Record] = []
    while len(shared.read(TOKENS) or b"") < 10_000 or len(found.all()) > len(valid):
        valid.append(found.create("", 3600, ROOT)[1])
    with pytest.raises(ControllerError, match=r"there are \d+ tokens that may still be used, and no room for more"):
        found.create("", 3600, ROOT)
    assert found.all() == valid
    assert len(valid) > 23


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300) | st.from_regex(r"mesh1\.[A-Za-z0-9_-]{0,60}\.[0-9a-f]{0,70}", fullmatch=True))
def test_no_text_passes_for_a_token(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    found = store(tmp_path_factory.mktemp("fuzz"))
    found.create("", 60, ROOT)
    with pytest.raises(Refused):
        found.reserve(text, "n1")
