"""How kernel events and the waypoint's records become connections, from hand-made events: no kernel, no Envoy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from agent import causes, trace
from agent.bpf.events import Event
from agent.bpf.manifest import Close, Direction, EventKind, Reason, Verdict
from agent.l7.access_log import RequestRecord
from agent.report import Connection, as_json
from agent.trace import Pair, Seen, Tracer, Watch

L4 = Pair("default/frontend", "default/redis:6379", frozenset({"default/redis"}))
L7 = Pair("default/frontend", "default/cart:80", frozenset({"default/cart-1", "default/cart-2"}), allowing="default/cart-l7")
NOTHING = Event(
    kind=EventKind.CONNECT, time_ns=0, socket_cookie=1, duration_ns=11, sent_bytes=0, received_bytes=0, local="", dialled="10.96.0.20:6379",
    remote="10.77.1.40:6379", source="default/frontend", target="default/redis", service="default/redis:6379", rule="default/p[0]", pid=23,
    command="redis-cli", rtt_us=0, retransmits=0, verdict=Verdict.ALLOW, direction=Direction.OUTBOUND, reason=0, redirected=False,
)  # fmt: skip
RECORD = RequestRecord(
    side="outbound", workload="default/frontend", method="GET", path="/items", authority="cart", protocol="HTTP/1.1", response_code=200,
    response_flags=(), response_code_details="via_upstream", audited="", route_name="default/split rule 0",
    upstream_cluster="service/default/cart-v1/80", upstream_address="10.77.2.22:8080", tunnelled=False,
    upstream_local_address="10.77.1.10:51001",
    downstream_remote_address="127.0.0.1:40001", original_destination="10.96.0.10:80", attempts=1, start_ns=1, duration_ns=5_000,
    upstream_connected_ns=1_000, first_upstream_byte_ns=3_000, bytes_received=101, bytes_sent=307,
)  # fmt: skip


def event(kind: EventKind, **changes: Any) -> Event:
    return dataclasses.replace(NOTHING, kind=kind, **changes)


def l7(kind: EventKind, cookie: int = 1, port: int = 40_001, **changes: Any) -> Event:
    """An event of a connection to the waypoint: its target is not known."""
    local = f"127.0.0.1:{port}" if kind is not EventKind.CONNECT else ""
    return dataclasses.replace(
        NOTHING, kind=kind, socket_cookie=cookie, local=local, remote="127.0.0.1:15001", dialled="10.96.0.10:80", target="",
        service="default/cart:80", rule="", verdict=Verdict.NONE, redirected=True, **changes,
    )  # fmt: skip


def found(watch: Watch) -> list[Connection]:
    connections = []
    while not watch.found.empty():
        one = watch.found.get_nowait()
        assert isinstance(one, Seen)
        connections.append(one.connection)
    return connections


def names(connection: Connection) -> list[str]:
    return [hop.at for hop in connection.hops]


def test_a_call_past_an_absent_waypoint_says_so() -> None:
    watch = Watch(L7, "node-1")
    for kind, reason in ((EventKind.CONNECT, Reason.FAIL_OPEN), (EventKind.CLOSED, Close.NORMAL)):
        watch.on_event(event(kind, service="default/cart:80", target="default/cart-1", reason=reason))
    (connection,) = found(watch)
    assert connection.hops[0].detail["past"] == "waypoint, which is away"


def test_a_backend_behind_a_tunnel_is_named_with_its_way() -> None:
    watch = Watch(L7, "node-1")
    for kind in (EventKind.CONNECT, EventKind.ESTABLISHED):
        watch.on_event(l7(kind))
    watch.on_record(dataclasses.replace(RECORD, tunnelled=True))
    (connection,) = found(watch)
    (backend,) = (hop for hop in connection.hops if hop.at == "backend")
    assert (backend.detail["address"], backend.detail["via"]) == ("10.77.2.22:8080", "tunnel")


def test_an_l4_connection_is_reported_once_when_it_has_ended() -> None:
    watch = Watch(L4, "node-1")
    watch.on_event(event(EventKind.CONNECT))
    watch.on_event(event(EventKind.ESTABLISHED, local="10.77.1.10:40001", duration_ns=101, rtt_us=7))
    watch.on_event(
        event(EventKind.ESTABLISHED, local="10.77.1.40:6379", remote="10.77.1.10:40001", direction=Direction.INBOUND, socket_cookie=2)
    )
    assert watch.found.empty()
    closed = event(
        EventKind.CLOSED,
        local="10.77.1.10:40001",
        duration_ns=307,
        sent_bytes=6,
        received_bytes=7,
        rtt_us=9,
        retransmits=1,
        reason=Close.NORMAL,
    )
    watch.on_event(closed)
    (seen,) = found(watch)
    assert (seen.source, seen.destination, seen.outcome, seen.rule) == ("default/frontend", "default/redis:6379", "closed", "default/p[0]")
    assert as_json(seen.hops) == [
        {"at": "connect", "node": "node-1", "durationNs": 11, "verdict": "allow", "rule": "default/p[0]", "dialled": "10.96.0.20:6379",
         "to": "default/redis", "remote": "10.77.1.40:6379", "pid": 23, "command": "redis-cli"},
        {"at": "handshake", "node": "node-1", "durationNs": 101, "local": "10.77.1.10:40001", "rttUs": 7},
        {"at": "inbound", "node": "node-1", "durationNs": 0, "workload": "default/redis", "verdict": "allow", "rule": "default/p[0]"},
        {"at": "close", "node": "node-1", "durationNs": 307, "sentBytes": 6, "receivedBytes": 7, "rttUs": 9, "retransmits": 1},
    ]  # fmt: skip
    watch.on_event(closed)
    assert len(found(watch)) <= 1, "a second end of the same connection is at most an end without hops"


@pytest.mark.parametrize(
    ("reason", "outcome", "step"),
    [
        (Close.NORMAL, "closed", None),
        (Close.RESET, "reset", None),
        (Close.REFUSED, "failed", "did not accept"),
        (Close.TIMED_OUT, "timed out", "nothing answered"),
        (Close.FAILED, "given up", "gave up"),
    ],
)
def test_how_a_connection_ended_is_its_outcome(reason: Close, outcome: str, step: str | None) -> None:
    watch = Watch(L4, "node-1")
    watch.on_event(event(EventKind.CONNECT))
    watch.on_event(event(EventKind.CLOSED, reason=reason))
    (seen,) = found(watch)
    assert (seen.outcome, names(seen)) == (outcome, ["connect", "close"])
    assert (seen.next_step is None) if step is None else (step in str(seen.next_step))


@pytest.mark.parametrize("reason", [r for r in Reason if r not in {Reason.NONE, Reason.FAIL_OPEN, Reason.PROBE}])
def test_a_denial_is_reported_at_once_with_the_next_step(reason: Reason) -> None:
    watch = Watch(L4, "node-1")
    watch.on_event(event(EventKind.DENIED, verdict=Verdict.DENY, reason=reason, rule="default/p: no rule matches"))
    (seen,) = found(watch)
    assert (seen.outcome, seen.rule) == (
        "refused" if reason in {Reason.NO_BACKEND, Reason.NO_PORT, Reason.NO_TUNNEL} else "denied",
        "default/p: no rule matches",
    )
    assert seen.next_step
    assert as_json(seen.hops)[0]["reason"] == reason.name.lower()


def test_a_denial_at_the_receiver_says_where() -> None:
    watch = Watch(L4, "node-1")
    watch.on_event(event(EventKind.DENIED, verdict=Verdict.DENY, reason=Reason.POLICY, direction=Direction.INBOUND))
    assert names(found(watch)[0]) == ["inbound"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"source": "default/other"}, id="another-source"),
        pytest.param({"service": "default/web:80", "target": "default/web-1"}, id="another-destination"),
        pytest.param({"source": ""}, id="a-stranger"),
        pytest.param({"service": "", "target": ""}, id="nothing-known"),
    ],
)
def test_events_of_other_pairs_are_not_taken(changes: dict[str, str]) -> None:
    watch = Watch(L4, "node-1")
    for kind in EventKind:
        watch.on_event(event(kind, **changes))
    assert found(watch) == []


def test_a_workload_that_is_dialled_by_its_own_address_belongs_to_the_trace_of_its_service() -> None:
    watch = Watch(L4, "node-1")
    watch.on_event(event(EventKind.CONNECT, service=""))
    watch.on_event(event(EventKind.CLOSED, service=""))
    assert [c.outcome for c in found(watch)] == ["closed"]


def test_a_request_is_joined_with_the_connection_that_carried_it() -> None:
    watch = Watch(L7, "node-1")
    watch.on_event(l7(EventKind.CONNECT))
    watch.on_event(l7(EventKind.ESTABLISHED, duration_ns=101))
    watch.on_record(dataclasses.replace(RECORD, attempts=3))
    (seen,) = found(watch)
    assert (seen.outcome, seen.rule, seen.next_step) == ("200", None, None)
    connect, handshake, waypoint, backend, response = as_json(seen.hops)
    assert (connect["at"], connect["to"], connect["dialled"]) == ("connect", "waypoint", "10.96.0.10:80")
    assert (handshake["at"], handshake["durationNs"]) == ("handshake", 101)
    assert (waypoint["at"], waypoint["attempts"], waypoint["route"], waypoint["status"]) == ("waypoint", 3, "default/split rule 0", 200)
    assert (backend["at"], backend["durationNs"], backend["address"]) == ("backend", 2_000, "10.77.2.22:8080")
    assert (response["at"], response["durationNs"], response["sentBytes"], response["receivedBytes"]) == ("response", 5_000, 101, 307)


def test_requests_of_one_connection_are_reported_one_by_one() -> None:
    watch = Watch(L7, "node-1")
    watch.on_event(l7(EventKind.CONNECT))
    watch.on_event(l7(EventKind.ESTABLISHED))
    for n in range(7):
        watch.on_record(dataclasses.replace(RECORD, path=f"/items?{n}"))
    assert [as_json(c.hops)[2]["path"] for c in found(watch)] == [f"/items?{n}" for n in range(7)]


def test_a_record_that_comes_after_the_connection_has_ended_still_finds_it() -> None:
    watch = Watch(L7, "node-1")
    watch.on_event(l7(EventKind.CONNECT))
    watch.on_event(l7(EventKind.ESTABLISHED))
    watch.on_event(l7(EventKind.CLOSED, reason=Close.NORMAL))
    assert found(watch) == [], "each request of it is reported by itself"
    watch.on_record(RECORD)
    assert names(found(watch)[0]) == ["connect", "handshake", "waypoint", "backend", "response"]


def test_a_port_that_is_used_again_belongs_to_the_newer_connection() -> None:
    watch = Watch(L7, "node-1")
    for cookie, pid in ((1, 101), (2, 307)):
        watch.on_event(l7(EventKind.CONNECT, cookie, pid=pid))
        watch.on_event(l7(EventKind.ESTABLISHED, cookie))
        watch.on_event(l7(EventKind.CLOSED, cookie, reason=Close.NORMAL))
    watch.on_record(RECORD)
    (seen,) = found(watch)
    assert as_json(seen.hops)[0]["pid"] == 307


def test_a_connection_that_never_reached_the_waypoint_is_reported_as_failed() -> None:
    watch = Watch(L7, "node-1")
    watch.on_event(l7(EventKind.CONNECT))
    watch.on_event(l7(EventKind.CLOSED, reason=Close.REFUSED))
    (seen,) = found(watch)
    assert seen.outcome == "failed"
    assert "the waypoint does not listen" in str(seen.next_step)
    watch.on_record(RECORD)
    assert found(watch) == []


@pytest.mark.parametrize(
    ("details", "rule"),
    [
        pytest.param("rbac_access_denied_matched_policy[default/cart-no-admin[0]]", "default/cart-no-admin[0]", id="a-deny-rule"),
        pytest.param("rbac_access_denied_matched_policy[none]", "default/cart-l7: no rule matches", id="no-allow-rule"),
    ],
)
def test_a_request_that_policy_refused_names_the_rule(details: str, rule: str) -> None:
    watch = Watch(L7, "node-1")
    watch.on_event(l7(EventKind.CONNECT))
    watch.on_event(l7(EventKind.ESTABLISHED))
    watch.on_record(dataclasses.replace(RECORD, response_code=403, response_code_details=details, upstream_address="", upstream_cluster=""))
    (seen,) = found(watch)
    assert (seen.outcome, seen.rule) == ("403", rule)
    assert seen.next_step == causes.of_policy(rule, request=True)
    assert rule == as_json(seen.hops)[2]["rule"]
    assert names(seen) == ["connect", "handshake", "waypoint", "response"]


def test_a_caller_that_went_away_is_no_response() -> None:
    watch = Watch(L7, "node-1")
    watch.on_event(l7(EventKind.CONNECT))
    watch.on_event(l7(EventKind.ESTABLISHED))
    watch.on_record(dataclasses.replace(RECORD, response_code=0))
    assert [c.outcome for c in found(watch)] == ["no response"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"downstream_remote_address": "127.0.0.1:40003"}, id="of-another-connection"),
        pytest.param({"downstream_remote_address": ""}, id="without-an-address"),
        pytest.param({"workload": "default/other"}, id="of-another-caller"),
        pytest.param({"side": "inbound"}, id="of-the-receivers-side"),
    ],
)
def test_records_of_other_connections_are_not_taken(changes: dict[str, Any]) -> None:
    watch = Watch(L7, "node-1")
    watch.on_event(l7(EventKind.CONNECT))
    watch.on_event(l7(EventKind.ESTABLISHED))
    watch.on_record(dataclasses.replace(RECORD, **changes))
    assert found(watch) == []


def test_what_a_trace_remembers_is_bounded_and_the_newest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_REMEMBERED", 23)
    watch = Watch(L7, "node-1")
    for n in range(101):
        watch.on_event(l7(EventKind.CONNECT, n, 40_000 + n))
        watch.on_event(l7(EventKind.ESTABLISHED, n, 40_000 + n))
        watch.on_event(
            event(
                EventKind.ESTABLISHED,
                direction=Direction.INBOUND,
                target="default/cart-1",
                remote=f"10.77.1.10:{n}",
                socket_cookie=n + 1000,
            )
        )
    assert [len(table) for table in (watch._open, watch._by_port, watch._inbound)] == [23, 23, 23]
    watch.on_record(dataclasses.replace(RECORD, downstream_remote_address="127.0.0.1:40000"))
    assert found(watch) == [], "forgotten"
    watch.on_record(dataclasses.replace(RECORD, downstream_remote_address="127.0.0.1:40100"))
    assert len(found(watch)) == 1


def test_the_filter_follows_the_traces_that_run() -> None:
    asked: list[frozenset[Pair]] = []
    tracer = Tracer("node-1", asked.append)
    one, two, same = tracer.begin(L4), tracer.begin(L7), tracer.begin(L4)
    for watch in (one, two, same):
        tracer.end(watch)
    assert asked == [{L4}, {L4, L7}, {L4, L7}, {L4, L7}, {L4}, set()]


def test_every_trace_of_a_pair_sees_its_connections() -> None:
    tracer = Tracer("node-1", lambda _: None)
    watches = [tracer.begin(L7), tracer.begin(L7), tracer.begin(L4)]
    for each in (l7(EventKind.CONNECT), l7(EventKind.ESTABLISHED)):
        tracer.on_event(each)
    tracer.on_record(RECORD)
    assert [len(found(watch)) for watch in watches] == [1, 1, 0]


def test_a_trace_that_is_not_read_holds_a_bounded_number_of_connections(caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer("node-1", lambda _: None)
    watch = tracer.begin(L4)
    for n in range(5003):
        tracer.on_event(event(EventKind.CONNECT, socket_cookie=n))
        tracer.on_event(event(EventKind.CLOSED, socket_cookie=n, reason=Close.NORMAL))
    tracer.end(watch)
    assert len(found(watch)) + watch.missed == 5003
    assert watch.missed > 0
    assert [record.__dict__["missed"] for record in caplog.records] == [watch.missed]


def test_a_call_that_was_not_let_out_is_in_every_trace_of_its_source_with_the_next_step() -> None:
    watch = Watch(L7, "node-1")
    refused = event(EventKind.DENIED, reason=Reason.EGRESS, target="", service="", dialled="203.0.113.7:443", verdict=Verdict.DENY)
    watch.on_event(refused)
    watch.on_event(dataclasses.replace(refused, source="default/other"))
    (connection,) = found(watch)
    assert (connection.destination, connection.outcome, connection.hops[0].detail["reason"]) == ("203.0.113.7:443", "denied", "egress")
    assert "ExternalService" in (connection.next_step or "")


def test_a_connection_from_before_the_trace_that_ends_for_a_log_is_no_connection_of_it() -> None:
    watch = Watch(L4, "node-1")
    watch.on_event(event(EventKind.CLOSED, reason=Close.NORMAL))
    assert found(watch) == []
