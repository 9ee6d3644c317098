"""How the two halves of a call find each other, from hand-made halves: no kernel, no Envoy, no clock."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from agent.joining import WAIT_S, Joiner
from agent.observation import Clock, Observation
from agent.report import Connection, Hop
from agent.trace import Seen
from tests.unit.agent.test_trace import RECORD

AHEAD, ERROR = 7_000_000_000, 2_000_000
SECOND = 1_000_000_000
CALLER, TARGET = "10.77.1.10:40001", "10.77.2.22:8080"
HOPS = (Hop("connect", "node-1", 1), Hop("close", "node-1", 2))


def joiner() -> Joiner:
    places = dict.fromkeys(("default/far", "10.77.2.22"), "node-2")
    return Joiner("default/frontend", "default/far:80", places, {"node-2": Clock(AHEAD, ERROR)})


def connection(outcome: str = "closed") -> Connection:
    return Connection(source="default/frontend", destination="default/far:80", hops=HOPS, outcome=outcome)


def seen(outcome: str = "closed", **more: Any) -> Seen:
    given: dict[str, Any] = {"workload": "default/far", "caller": CALLER, "target": TARGET, **more}
    return Seen(connection(outcome), 100 * SECOND, 101 * SECOND, **given)


def request(path: str = "/items", **more: Any) -> Seen:
    record = dataclasses.replace(RECORD, path=path, **more)
    return Seen(connection("200"), 100 * SECOND, 101 * SECOND, target=TARGET, tunnelled=True, record=record)


def far(of: str, at: str, began_s: float = 100.25, **more: Any) -> Observation:
    given: dict[str, Any] = {"caller": CALLER, "target": TARGET, "hops": (Hop(at, "node-2", 5, {"workload": "default/far"}),), **more}
    return Observation(of=of, node="node-2", workload="default/far", began_ns=int(began_s * SECOND) + AHEAD, **given)


def handled(path: str = "/items", began_s: float = 100.25, **more: Any) -> Observation:
    return far(
        "request", "inbound", began_s, **{"caller": "", "method": "GET", "path": path, "status": 200, "duration_ns": SECOND // 2, **more}
    )


def taken(joining: Joiner, *found: Seen | Observation, now: float = 0.0) -> list[Connection]:
    for each in found:
        joining.take(each, now)
    return [one for _, one in joining.finished(now)]


def test_a_connection_is_complete_with_both_of_the_receivers_events_whichever_comes_first() -> None:
    parts = (far("accept", "inbound"), far("close", "end"))
    for found in ((*parts, seen()), (seen(), *parts), (parts[0], seen(), parts[1])):
        (one,) = taken(joiner(), *found)
        assert [(hop.at, hop.node) for hop in one.hops] == [
            ("connect", "node-1"), ("inbound", "node-2"), ("end", "node-2"), ("close", "node-1"),
        ]  # fmt: skip
        assert one.hops[1].detail["afterNs"] == SECOND // 4, "by this node's clock"
        assert (one.clock_error_ns, one.began_ns) == (ERROR, 100 * SECOND)


def test_a_connection_whose_other_half_does_not_come_is_shown_without_it() -> None:
    joining = joiner()
    assert taken(joining, seen()) == []
    assert joining.next_deadline() == WAIT_S
    (one,) = taken(joining, now=WAIT_S)
    assert (one.hops, one.clock_error_ns) == (HOPS, None)


def test_a_connection_within_the_node_does_not_wait() -> None:
    assert len(taken(joiner(), seen(workload="default/near", target="10.77.1.40:6379"))) == 1


def test_nobody_waits_for_a_node_that_is_away() -> None:
    joining = joiner()
    assert taken(joining, seen()) == []
    joining.forget("node-2")
    assert len(taken(joining)) == 1


def test_a_refusal_at_the_receiver_is_the_outcome_with_its_rule_and_next_step() -> None:
    refusal = far("denied", "inbound", outcome="denied", rule="default/p[0]", next_step="do this")
    (one,) = taken(joiner(), refusal, seen("failed"))
    assert (one.outcome, one.rule, one.next_step) == ("denied", "default/p[0]", "do this")


def test_a_refusal_that_nobody_explains_is_shown_alone_and_only_once() -> None:
    joining = joiner()
    assert taken(joining, far("denied", "inbound", outcome="denied", next_step="do this")) == []
    (one,) = taken(joining, now=WAIT_S)
    assert (one.outcome, one.next_step, [hop.at for hop in one.hops]) == ("denied", "do this", ["inbound"])
    assert taken(joining, now=9.0) == []


def test_an_older_connection_of_the_same_port_is_not_taken_for_the_newer_one() -> None:
    old = far("accept", "inbound", began_s=90), far("close", "end", began_s=90)
    joining = joiner()
    assert taken(joining, *old, seen()) == []
    (one,) = taken(joining, now=WAIT_S)
    assert one.hops == HOPS


def tunnel(node: str = "node-2", **more: Any) -> Observation:
    at = "inbound" if node == "node-2" else "tunnel"
    detail = {"peer": "spiffe://m/ns/default/sa/frontend", "tls": "TLSv1.3"}
    given = far("tunnel", at, **{"ended": True, "hops": (Hop(at, node, 5, detail),), **more})
    return given if node == "node-2" else dataclasses.replace(given, node=node, began_ns=given.began_ns - AHEAD)


def test_a_tunnelled_connection_is_complete_with_what_both_ends_say() -> None:
    joining = joiner()
    call = seen(tunnelled=True, target="")
    assert taken(joining, call, tunnel("node-1")) == []
    assert taken(joining, tunnel(ended=False)) == [], "it has only begun"
    (one,) = taken(joining, tunnel())
    assert [(hop.at, hop.node) for hop in one.hops[1:-1]] == [("tunnel", "node-1"), ("inbound", "node-2")]


def test_why_a_tunnel_failed_is_told_by_who_knows_it_better() -> None:
    near = tunnel("node-1", outcome="failed")
    (one,) = taken(joiner(), seen(tunnelled=True, target=""), near, tunnel(outcome="failed", next_step="is it listening?"))
    assert (one.outcome, one.next_step) == ("failed", "is it listening?")
    expired = tunnel("node-1", outcome="failed", next_step="the certificate has run out")
    joining = joiner()
    taken(joining, seen("reset", tunnelled=True, target=""), expired)
    (one,) = taken(joining, now=WAIT_S)
    assert (one.outcome, one.next_step) == ("failed", "the certificate has run out")


def test_a_request_that_failed_waits_for_what_its_own_end_of_the_tunnel_says_also_if_the_other_node_is_away() -> None:
    joining = joiner()
    joining.forget("node-2")
    assert taken(joining, request(response_code=200)) != [], "it did not fail"
    assert taken(joining, request(response_code=503)) == []
    why = Observation(
        of="tunnel",
        node="node-1",
        workload="default/frontend",
        caller="",
        target=TARGET,
        began_ns=int(100.2 * SECOND),
        ended=True,
        outcome="failed",
        next_step="see its certificate",
        hops=(Hop("tunnel", "node-1", 5),),
    )
    joining.take(why, 0.1)
    joining.take(dataclasses.replace(why, began_ns=int(100.9 * SECOND), duration_ns=SECOND, next_step="of a later request"), 0.2)
    (shown,) = [one for _, one in joining.finished(WAIT_S)]
    assert shown.next_step == "see its certificate"
    assert "tunnel" in [hop.at for hop in shown.hops]


def test_a_request_has_what_its_tunnel_and_what_authorization_say_in_one_hop() -> None:
    (one,) = taken(joiner(), tunnel(caller="", ended=False, began_s=50), handled(), request())
    (inbound,) = (hop for hop in one.hops if hop.at == "inbound")
    assert (inbound.detail["tls"], inbound.detail["workload"]) == ("TLSv1.3", "default/far")


def test_requests_of_one_tunnel_find_their_own_halves() -> None:
    joining = joiner()
    halves = [handled(path, hops=(Hop("inbound", "node-2", n, {}),)) for n, path in enumerate(("/a", "/b", "/c"))]
    found = taken(joining, tunnel(caller="", ended=False), *halves, *(request(path) for path in ("/c", "/a", "/b")))
    assert [next(hop.duration_ns for hop in one.hops if hop.at == "inbound") for one in found] == [2, 0, 1]


@pytest.mark.parametrize(
    ("half", "joined"),
    [
        pytest.param(handled("/rewritten"), True, id="a route has changed the path"),
        pytest.param(handled(method="POST"), False, id="another method"),
        pytest.param(handled(began_s=99), False, id="began before"),
        pytest.param(handled(began_s=100.75), False, id="ended after"),
        pytest.param(handled(began_s=100 - 0.006), True, id="before by less than the clocks may be wrong"),
        pytest.param(handled("/x", began_s=90, request_id="seven"), True, id="the same x-request-id"),
    ],
)
def test_a_request_is_joined_with_what_can_be_its_other_half(half: Observation, joined: bool) -> None:
    joining = joiner()
    found = taken(joining, tunnel(caller="", ended=False, hops=()), half, request(request_id="seven"))
    found += taken(joining, now=WAIT_S)
    (one,) = found
    assert ("inbound" in [hop.at for hop in one.hops]) is joined


def test_what_is_remembered_is_bounded() -> None:
    joining = joiner()
    for n in range(10_007):
        joining.take(far("accept", "inbound", caller=f"10.77.1.10:{n}"), 0.0)
        joining.take(handled(f"/{n}"), 0.0)
    assert len(joining._facts) <= 4096
    assert sum(map(len, joining._facts.values())) <= 4096 + 64
    for n in range(1009):
        joining.take(seen(caller=f"10.77.1.10:{n}"), 0.0)
    assert len(list(joining.finished(WAIT_S))) == 1009
    assert (len(joining._waiting), len(joining._order)) == (0, 0)


def test_a_connection_of_two_nodes_can_be_written_as_json() -> None:
    (one,) = taken(joiner(), far("accept", "inbound"), far("close", "end"), seen())
    assert json.loads(json.dumps(dataclasses.asdict(one)))["clock_error_ns"] == ERROR
