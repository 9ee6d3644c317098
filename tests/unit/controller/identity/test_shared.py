"""What controllers that share a state do to each other: one that was away, one that lags, one that begins again and again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from controller.identity import jwtkeys, rotation
from controller.identity.certificates import new_key
from controller.identity.directory import Directory
from controller.identity.jwtkeys import SharedKeys
from meshapi import identity_pb2 as pb
from tests.unit.controller.identity.harness import Clock
from tests.unit.controller.identity.shared import Mesh, Replica, State

TOKENS_S, DAY_S = 300, 86_400


def kids(bundle: pb.TrustBundle) -> set[str]:
    return {key["kid"] for key in json.loads(bundle.jwt_keys)["keys"]}


def test_a_controller_that_was_away_when_the_jwt_keys_were_withdrawn_does_not_bring_its_own_back(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    one, shared = mesh.authority("one")
    other, _ = mesh.authority("other")
    asyncio.run(one.tick())
    before = kids(one.trust.current)
    assert len(before) == 4
    other.stop()
    jwtkeys.withdraw(shared)
    asyncio.run(one.tick())
    back, _ = mesh.authority("other")
    for found in (back, one):
        asyncio.run(found.tick())
        assert not kids(found.trust.current) & before
    assert kids(one.trust.current) == kids(back.trust.current)
    after = kids(back.trust.current)
    back.stop()
    again, _ = mesh.authority("other")  # and that it has made others it remembers
    asyncio.run(again.tick())
    assert kids(again.trust.current) == after


def test_a_controller_that_lags_does_not_tell_keys_again_that_were_withdrawn_meanwhile(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    found, shared = mesh.authority("one")
    asyncio.run(found.tick())

    def told() -> set[str]:
        return {one.key for one in jwtkeys.parse(Replica(mesh.state).read(jwtkeys.FILE) or b"")}

    before = told()
    assert len(before) == 2
    shared.lags = True
    jwtkeys.withdraw(Replica(mesh.state))
    mesh.clock.now += 2 * rotation.JWT_PERIOD_S  # they are to be told for longer
    for _ in range(2):
        asyncio.run(found.tick())
        assert not told() & before
    assert len(told()) >= 2


def test_a_controller_that_begins_again_and_again_takes_no_other_ones_keys_away(tmp_path: Path) -> None:
    state, clock, steady = State(), Clock(1_700_000_000.0), Clock(0.0)

    def keys(name: str) -> SharedKeys:
        (tmp_path / name).mkdir(mode=0o700, exist_ok=True)
        return SharedKeys(Replica(state), Directory(tmp_path / name), clock, steady)

    living, own = keys("living"), new_key().public_key()
    for _ in range(48):
        living.tell([own], TOKENS_S, DAY_S)
        clock.now, steady.now = clock.now + 3600, steady.now + 3600
    for number in range(2 * jwtkeys.MOST):
        keys(f"short-{number}").tell([new_key().public_key(), new_key().public_key()], TOKENS_S, DAY_S)
        clock.now += 5
        assert living.withdrawn() is None
    assert living.knows(own)
    assert len(living.others) <= jwtkeys.MOST
    clock.now += 2 * (TOKENS_S + jwtkeys.FIRST_S)
    living.tell([own, new_key().public_key()], TOKENS_S, DAY_S)
    assert living.others == (), "nobody lives any more who has signed with them"


def test_a_controller_that_begins_again_with_the_keys_that_it_had_tells_them_once(tmp_path: Path) -> None:
    state, clock, steady = State(), Clock(1_700_000_000.0), Clock(0.0)
    own = [new_key().public_key(), new_key().public_key()]
    for _ in range(5):
        found = SharedKeys(Replica(state), Directory(tmp_path), clock, steady)
        found.tell(own, TOKENS_S, DAY_S)
        assert all(found.knows(key) for key in own)
    assert len(jwtkeys.parse(Replica(state).read(jwtkeys.FILE) or b"")) == 2


def test_keys_of_a_controller_that_has_lived_for_long_are_believed_for_long_after_it(tmp_path: Path) -> None:
    state, clock, steady = State(), Clock(1_700_000_000.0), Clock(0.0)
    found, own = SharedKeys(Replica(state), Directory(tmp_path), clock, steady), new_key().public_key()
    writes = set()
    for _ in range(2 * DAY_S // 60):
        found.tell([own], TOKENS_S, DAY_S)
        writes.add(state.version)
        (told,) = jwtkeys.parse(Replica(state).read(jwtkeys.FILE) or b"")
        assert told.until - clock.now >= min(DAY_S, TOKENS_S + jwtkeys.FIRST_S, max(900, steady.now))
        clock.now, steady.now = clock.now + 60, steady.now + 60
    assert told.until - clock.now >= DAY_S - 60
    assert len(writes) < 20
