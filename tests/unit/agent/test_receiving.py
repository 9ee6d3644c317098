"""What a receiver's node tells of a pair, from hand-made events and records: only what is the pair's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from agent import causes
from agent.bpf.manifest import Close, Direction, EventKind, Reason, Verdict
from agent.l7.tunnel_log import TunnelRecord
from agent.observation import Observation
from agent.receiving import Caller, Reception
from agent.trace import Pair
from tests.unit.agent.test_trace import RECORD, event

IDENTITY = "spiffe://mesh.local/ns/default/sa/frontend"
PAIR = Pair("default/frontend", "", frozenset({"default/redis"}), "default/p", receiving=True)
TUNNEL = TunnelRecord(
    receiver=True, workload="default/redis", netns_path="", caller="127.0.0.1:40001", target="10.77.1.40:6379", remote="10.77.1.10:50001",
    peer=IDENTITY, tls="TLSv1.3", code=200, details="via_upstream", flags=(), failure="", ended=True, start_ns=1, duration_ns=2, sent_bytes=3,
    received_bytes=5,
)  # fmt: skip
INNER = dataclasses.replace(
    RECORD,
    side="inner",
    workload="default/redis",
    peer=IDENTITY,
    peer_address="10.77.1.10",
    downstream_remote_address="",
    request_id="seven",
)


def reception() -> Reception:
    return Reception(PAIR, "node-2", Caller(IDENTITY, frozenset({"10.77.1.10", "fd77::10"})))


def inbound(kind: EventKind, **more: Any) -> Any:
    given: dict[str, Any] = {
        "local": "10.77.1.40:6379",
        "remote": "10.77.1.10:40001",
        "service": "",
        "direction": Direction.INBOUND,
        **more,
    }
    return event(kind, **given)


def found(one: Reception) -> list[Observation]:
    return [one.found.get_nowait() for _ in range(one.found.qsize())]


def test_the_kernels_events_of_a_connection_are_told_with_its_ends() -> None:
    one = reception()
    for kind, more in (
        (EventKind.ESTABLISHED, {}),
        (EventKind.CLOSED, {"reason": Close.NORMAL, "sent_bytes": 7}),
        (EventKind.DENIED, {"verdict": Verdict.DENY, "reason": Reason.PLAINTEXT}),
    ):
        one.on_event(inbound(kind, **more))
    told = found(one)
    assert [(each.of, each.caller, each.target) for each in told] == [
        (of, "10.77.1.10:40001", "10.77.1.40:6379") for of in ("accept", "close", "denied")
    ]
    assert (told[1].hops[0].at, told[1].hops[0].detail["sentBytes"]) == ("end", 7)
    assert (told[2].outcome, told[2].next_step) == ("denied", causes.DENIED[Reason.PLAINTEXT])


@pytest.mark.parametrize(
    "more",
    [
        {"source": "default/other"},
        {"target": "default/cart-1"},
        {"remote": "10.77.9.9:40001"},
        {"direction": Direction.OUTBOUND},
        {"local": "10.77.1.40:15008"},
    ],
    ids=str,
)
def test_events_of_others_are_not_told(more: dict[str, Any]) -> None:
    one = reception()
    one.on_event(inbound(EventKind.ESTABLISHED, **more))
    assert found(one) == []


def test_a_tunnel_is_told_with_who_has_proved_what() -> None:
    one = reception()
    one.on_tunnel(TUNNEL)
    one.on_tunnel(dataclasses.replace(TUNNEL, code=403, details="rbac_access_denied_matched_policy[none]"))
    one.on_tunnel(dataclasses.replace(TUNNEL, code=503))
    good, denied, failed = found(one)
    assert (good.caller, good.outcome, good.hops[0].detail["peer"], good.hops[0].detail["tls"]) == (
        "127.0.0.1:40001",
        "",
        IDENTITY,
        "TLSv1.3",
    )
    assert (denied.outcome, denied.rule) == ("denied", "default/p: no rule matches")
    assert (failed.outcome, failed.next_step) == ("failed", causes.NOT_LISTENING)


@pytest.mark.parametrize(
    "more",
    [
        {"peer": "spiffe://mesh.local/ns/default/sa/other"},
        {"peer": ""},
        {"remote": "10.77.9.9:50001"},
        {"workload": "default/cart-1"},
        {"receiver": False},
    ],
    ids=str,
)
def test_tunnels_of_others_are_not_told(more: dict[str, Any]) -> None:
    one = reception()
    one.on_tunnel(dataclasses.replace(TUNNEL, **more))
    assert found(one) == []


def test_a_request_that_came_out_of_a_tunnel_is_told_with_its_rule_and_the_application() -> None:
    one = reception()
    one.on_record(INNER)
    one.on_record(dataclasses.replace(INNER, response_code=403, response_code_details="rbac_access_denied_matched_policy[default/p[0]]"))
    good, denied = found(one)
    assert (good.caller, good.request_id, [hop.at for hop in good.hops]) == ("", "seven", ["inbound", "app"])
    assert (good.hops[1].duration_ns, good.hops[1].detail["address"]) == (2_000, "10.77.2.22:8080")
    assert (denied.rule, denied.next_step, denied.hops[0].detail["verdict"]) == (
        "default/p[0]",
        causes.of_policy("default/p[0]", request=True),
        "deny",
    )


def test_a_request_in_plaintext_is_told_with_the_connection_that_carried_it() -> None:
    one = reception()
    one.on_record(dataclasses.replace(INNER, side="inbound", peer="", peer_address="", downstream_remote_address="[fd77::10]:40001"))
    (told,) = found(one)
    assert (told.caller, told.hops[0].detail["port"]) == ("[fd77::10]:40001", 15006)


@pytest.mark.parametrize(
    "more",
    [
        {"peer": "spiffe://mesh.local/ns/default/sa/other"},
        {"peer_address": "10.77.9.9"},
        {"side": "inbound", "downstream_remote_address": "10.77.9.9:1"},
        {"side": "outbound"},
        {"workload": "default/cart-1"},
    ],
    ids=str,
)
def test_requests_of_others_are_not_told(more: dict[str, Any]) -> None:
    one = reception()
    one.on_record(dataclasses.replace(INNER, **more))
    assert found(one) == []


def test_a_question_that_is_not_read_holds_a_bounded_number_of_observations() -> None:
    one = reception()
    for _ in range(5003):
        one.on_tunnel(TUNNEL)
    assert (len(found(one)), one.missed) == (4096, 5003 - 4096)
