"""What another node says is believed only as far as it can be understood, and shown as text and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.observation import LONGEST, Clock, Observation, document, observed
from agent.report import Hop, encode
from meshapi.text import shown

GOOD = Observation(
    of="request", node="node-2", workload="default/far", caller="", target="10.77.2.22:8080", began_ns=23, method="GET", path="/items", status=200,
    rule="default/p[0]", hops=(Hop("inbound", "node-2", 7, {"port": 15008, "flags": ["a", "b"], "peer": "spiffe://m/ns/a/sa/b"}),),
)  # fmt: skip


def changed(**more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {**json.loads(encode(GOOD)), **more}
    return found


def test_an_observation_comes_over_as_it_was() -> None:
    assert observed(document(encode(GOOD)), "node-2") == GOOD


def test_nobody_speaks_for_another_node() -> None:
    found = observed(changed(node="node-1", hops=[{"at": "app", "node": "node-1", "durationNs": 1}]), "node-2")
    assert {found.node, *(hop.node for hop in found.hops)} == {"node-2"}


@pytest.mark.parametrize(
    "changes",
    [
        {"of": "connect"},
        {"kind": "plan"},
        {"beganNs": "now"},
        {"beganNs": True},
        {"durationNs": 1 << 70},
        {"status": None},
        {"path": 7},
        {"rule": []},
        {"hops": None},
        {"hops": [{}]},
        {"hops": [{"at": "waypoint", "node": "x", "durationNs": 1}]},
        {"hops": [{"at": "app", "node": "x", "durationNs": 1, "address": {"a": 1}}]},
        {"hops": [{"at": "app", "node": "x", "durationNs": 1}] * 5},
    ],
    ids=str,
)
def test_what_is_no_observation_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        observed(changed(**changes), "node-2")


def test_an_observation_that_lacks_a_field_is_refused() -> None:
    for field in json.loads(encode(GOOD)).keys() - {"node"}:
        found = changed()
        del found[field]
        with pytest.raises(ValueError, match="not an observation"):
            observed(found, "node-2")


@pytest.mark.parametrize(
    "data", [b"[]", b"{", b"null", b"[" * 20_000, b" " * (LONGEST + 1), b"\xff"], ids=["list", "half", "null", "deep", "long", "bytes"]
)
def test_what_is_no_document_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        document(data)


def test_text_of_others_has_no_control_characters_and_an_end() -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\r\n\u202e\u009b" + "x" * 9999
    found = observed(
        changed(path=evil, nextStep=evil, hops=[{"at": "app", "node": "n", "durationNs": 1, "details": evil, "evil": evil}]), "node-2"
    )
    for text in (found.path, found.next_step or "", found.hops[0].detail["details"]):
        assert text.isprintable()
        assert len(text) <= 2048
    assert "evil" not in found.hops[0].detail
    assert shown("a\nb\tc") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    assert shown("x" * 9999, 3) == "xxx"


@pytest.mark.parametrize(("out", "back"), [(3, 3), (0, 6), (6, 0)])
def test_a_clock_is_known_within_half_of_the_round_trip(out: int, back: int) -> None:
    """Whichever way was the slow one."""
    ahead = 1000
    clock = Clock.of(100, 100 + out + ahead, 100 + out + back)
    assert clock.error_ns == 3
    assert abs(clock.ahead_ns - ahead) <= clock.error_ns
