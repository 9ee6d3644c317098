"""A loopback address stands for one SPIFFE ID as long as the node is up, and nothing falls back to plaintext because an agent started anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.config import Config
from agent.errors import KernelRefused
from agent.tunnels import FIRST, LAST, Tunnels

A, B, C = (f"spiffe://mesh.local/ns/shop/sa/{name}" for name in "abc")


def tunnels(tmp_path: Path) -> Tunnels:
    return Tunnels(Config("here", "unix:x", run_dir=tmp_path))


def test_numbers_begin_at_127_0_1_0_and_each_identity_keeps_its_own(tmp_path: Path) -> None:
    found = tunnels(tmp_path)
    assert [found.number(name) for name in (A, B, A)] == [FIRST, FIRST + 1, FIRST]
    assert found.loopback(found.number(A)) == "127.0.1.0"
    again = tunnels(tmp_path)
    assert [again.number(name) for name in (C, B, A)] == [FIRST + 2, FIRST + 1, FIRST]


def test_the_last_address_is_127_255_255_254_and_then_it_says_what_to_do(tmp_path: Path) -> None:
    found = tunnels(tmp_path)
    assert found.loopback(LAST) == "127.255.255.254"
    found._ids.start_above(LAST - 1)
    assert found.number(A) == LAST
    for _ in range(2):
        with pytest.raises(KernelRefused, match=f"{B} gets no tunnel: all 16776959 loopback addresses .*; restart the node"):
            found.number(B)
    assert found.number(A) == LAST


@pytest.mark.parametrize(("number", "address"), [(0x0001FF, "127.0.1.255"), (0x010000, "127.1.0.0"), (0xABCDEF, "127.171.205.239")])
def test_a_number_is_the_lower_24_bits(number: int, address: str) -> None:
    assert Tunnels.loopback(number) == address


def test_only_what_envoy_has_is_usable_and_the_next_agent_knows_it(tmp_path: Path) -> None:
    found = tunnels(tmp_path)
    assert (found.number(A), found.number(B)) == (FIRST, FIRST + 1)
    assert found.usable() == {}
    assert found.mark_ready([B, C])
    assert not found.mark_ready([C])
    assert tunnels(tmp_path).usable() == found.usable() == {B: FIRST + 1, C: FIRST + 2}
    assert found.keep([A, B])
    assert not found.keep([A, B])
    assert tunnels(tmp_path).ready == found.ready == {B}


def test_what_lost_its_number_is_not_ready(tmp_path: Path) -> None:
    tunnels(tmp_path).mark_ready([A])
    (tmp_path / "tunnels").unlink()
    assert tunnels(tmp_path).ready == frozenset()
