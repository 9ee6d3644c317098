"""Session persistence through a real Envoy: what a client brings back decides on the backend and the endpoint, whatever the weights are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from agent.l7 import names
from agent.model import Action, Backend, HeaderEdit, Operation, Policy, PolicyRule, RouteRule, Snapshot
from agent.routing import Session
from tests.ports import free_ports
from tests.unit.agent.l7 import harness, test_claims
from tests.unit.agent.l7 import test_requests as requests
from tests.unit.agent.l7.harness import Answer

COOKIE, LASTING, HEADER = Session("stay", "/", 0, ""), Session("st.a%y", "/", 60_500, ""), Session("", "", 0, "X-Stay")
CALLS = 23
PODS = ("a1", "a2", "b1", "b2")
DENY = Policy("default/deny", Action.DENY, (PolicyRule(operations=(Operation(paths=("/secret",)),)),))


@contextmanager
def pods() -> Iterator[dict[str, int]]:
    """Two pods of each of two services."""

    def behaviour(handler: BaseHTTPRequestHandler) -> int:
        return 503 if "fail" in handler.path else 200

    with requests.backends(**dict.fromkeys(PODS, behaviour)) as targets:
        yield targets


def scene(targets: dict[str, int], entries: list[int], *rules: RouteRule, denied: str = "") -> Snapshot:
    """A service for each rule, all with backends `a` and `b`."""
    policies = {pod: ("default/deny",) if pod[0] == denied else () for pod in targets}
    workloads = [requests.pod(pod, pod[0], 80, target, policies=policies[pod]) for pod, target in targets.items()]
    services = [harness.service(name, "10.96.0.9", 80, waypoint=False) for name in "ab"]
    services += [harness.service(f"s{n}", "127.0.0.1", entry) for n, entry in enumerate(entries)]
    routes = [harness.route(f"r{n}", rule, parent=f"s{n}") for n, rule in enumerate(rules)]
    return requests.scene(workloads, services, *routes, policies=[DENY])


def ruled(session: Session, a: int, b: int) -> RouteRule:
    edit = HeaderEdit({"x-backend": "b"}, {}, ())
    backends = (requests.to("a", 80, a), requests.to("b", 80, b, response_headers=edit))
    return replace(harness.rule(*(one for one in backends if one.weight >= 0)), session=session)


def told(session: Session, answer: Answer) -> dict[str, str]:
    """The headers by which a client goes on with its session."""
    if session.header:
        return {session.header: answer.headers[session.header.lower()]}
    value = answer.headers["set-cookie"].partition(";")[0]
    assert value.startswith(f"{session.cookie}=")
    return {"Cookie": f"other=1; {value}; more=stay=2"}


def through_envoy(directory: Path, snapshot: Snapshot, entries: list[int], work: Callable[[], list[Answer]]) -> list[Answer]:
    return requests.through_envoy(directory, snapshot, entries, work)


@pytest.mark.parametrize("session", [COOKIE, LASTING, HEADER], ids=["cookie", "lasting", "header"])
def test_a_session_stays_with_its_backend_and_its_endpoint_and_others_are_drawn_by_weight(tmp_path: Path, session: Session) -> None:
    entries = free_ports(4)
    first: list[Answer] = []

    def work() -> list[Answer]:
        first.extend(harness.request(entries[0]) for _ in range(4 * CALLS))
        one = {answer.name: told(session, answer) for answer in first}
        assert one.keys() == set(PODS)
        return [harness.request(entry, headers=one[pod]) for pod in PODS for entry in entries[:3] for _ in range(CALLS)]

    with pods() as targets:
        rules = [ruled(session, 3, 1), ruled(session, 1, 1000), ruled(session, 0, 1), ruled(session, 1, -1)]
        later = through_envoy(tmp_path, scene(targets, entries, *rules), entries, work)
    assert [answer.name for answer in later] == [pod for pod in PODS for _ in range(3 * CALLS)], "also where the weight is 0"
    assert all((answer.name[0] == "b") is (answer.headers.get("x-backend") == "b") for answer in [*first, *later])
    assert all("set-cookie" not in answer.headers and "x-stay" not in answer.headers for answer in later), "nothing new to tell"
    assert not any(name.startswith("x-meshagent") for answer in [*first, *later] for name in answer.headers | answer.seen["headers"])
    share = Counter(answer.name[0] for answer in first)
    assert abs(share["b"] - CALLS) <= 4.5 * (4 * CALLS * 3 / 16) ** 0.5


def test_whose_endpoint_has_gone_gets_another_of_the_backend_and_is_told(tmp_path: Path) -> None:
    before, after = free_ports(2)
    with pods() as targets:
        first: list[Answer] = []

        def begin() -> list[Answer]:
            while not first or first[-1].name != "b1":
                first.append(harness.request(before))
            return first

        through_envoy(tmp_path, scene(targets, [before], ruled(COOKIE, 1, 1)), [before], begin)
        left = {pod: target for pod, target in targets.items() if pod != "b1"}
        brought = told(COOKIE, first[-1])

        def go_on() -> list[Answer]:
            moved = [harness.request(after, headers=brought) for _ in range(CALLS)]
            return moved + [harness.request(after, headers=told(COOKIE, moved[-1])) for _ in range(CALLS)]

        later = through_envoy(tmp_path, scene(left, [after], ruled(COOKIE, 1000, 1)), [after], go_on)
    assert {answer.name for answer in later} == {"b2"}
    assert ["set-cookie" in answer.headers for answer in later] == [True] * CALLS + [False] * CALLS


@pytest.mark.parametrize("session", [COOKIE, HEADER], ids=["cookie", "header"])
def test_each_backends_policies_hold_for_who_is_led_there_by_a_session(tmp_path: Path, session: Session) -> None:
    [entry] = free_ports(1)

    def work() -> list[Answer]:
        brought = {answer.name[0]: told(session, answer) for answer in (harness.request(entry) for _ in range(CALLS))}
        return [harness.request(entry, path, headers=brought[backend]) for backend in "ab" for path in ("/", "/secret", "/fail")]

    with pods() as targets:
        answers = through_envoy(tmp_path, scene(targets, [entry], ruled(session, 1, 1), denied="b"), [entry], work)
    assert [answer.status for answer in answers] == [200, 200, 503, 200, 403, 503]
    assert "set-cookie" not in answers[4].headers
    assert "x-stay" not in answers[4].headers


@pytest.mark.parametrize(
    "value", ["nonsense", "MARK.nonsense", "MARK.", ".", "", "MARK.MTI3LjAuMC4xOjIyCg==", '"MARK.MTI3LjAuMC4xOjIy"', "MARK.%%"]
)
@pytest.mark.parametrize("session", [COOKIE, HEADER], ids=["cookie", "header"])
def test_nonsense_begins_a_session_and_what_a_client_says_in_the_waypoints_words_counts_for_nothing(
    tmp_path: Path, session: Session, value: str
) -> None:
    [entry] = free_ports(1)

    def work() -> list[Answer]:
        begun = harness.request(entry)
        header, good = next(iter(told(session, begun).items()))
        found = re.search(r"\b([0-9a-f]{8})\.", good)
        assert found
        bad = value.replace("MARK", found[1])
        forged = {header: f"stay={bad}" if session.cookie else bad, "x-meshagent-session": good.partition(".")[2]}
        return [harness.request(entry, headers=forged) for _ in range(2 * CALLS)]

    with pods() as targets:
        answers = through_envoy(tmp_path, scene(targets, [entry], ruled(session, 1, 1)), [entry], work)
    assert {answer.status for answer in answers} == {200}
    assert len({answer.name for answer in answers}) > 1
    assert all(told(session, answer) for answer in answers)


def test_a_cookie_for_some_paths_is_given_there_alone(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    paths = {"/x": True, "/x/y": True, "/x?q=1": True, "/xy": False, "/": False, "/y/x": False}
    with pods() as targets:
        snapshot = scene(targets, [entry], ruled(Session("stay", "/x", 0, ""), 1, 1))
        answers = through_envoy(tmp_path, snapshot, [entry], lambda: [harness.request(entry, path) for path in paths])
    assert dict(zip(paths, ["set-cookie" in answer.headers for answer in answers], strict=True)) == paths


def test_a_lasting_cookie_says_how_long(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    with pods() as targets:
        [answer] = through_envoy(tmp_path, scene(targets, [entry], ruled(LASTING, 1, 1)), [entry], lambda: [harness.request(entry)])
    assert re.fullmatch(r"st\.a%y=[0-9a-f]{8}\.[A-Za-z0-9+/]+=*; Max-Age=61; Path=/; HttpOnly", answer.headers["set-cookie"])


def test_a_backend_that_does_not_exist_has_no_sessions_and_without_weights_only_they_go_on(tmp_path: Path) -> None:
    begun, ended = free_ports(2)
    missing = replace(harness.rule(requests.to("a", 80, 0), Backend("default/none", 80, 0)), session=HEADER)

    def work() -> list[Answer]:
        first = harness.request(begun)
        return [first, harness.request(ended, headers=told(HEADER, first)), harness.request(ended)]

    with pods() as targets:
        first, kept, new = through_envoy(tmp_path, scene(targets, [begun, ended], ruled(HEADER, 1, -1), missing), [begun, ended], work)
    assert (kept.status, kept.name) == (200, first.name)
    assert (new.status, new.headers[names.REASON_HEADER]) == (500, "no-backend")


def test_a_session_goes_on_behind_a_route_that_a_claim_has_chosen(tmp_path: Path) -> None:
    """The first route of such a request has no session: its filters are made because the RouteConfiguration asks for them (`agent.l7.claims`)."""
    [entry] = free_ports(1)
    beta = test_claims.bearer(test_claims.ISSUER.token(groups=["beta"]))
    both = (requests.to("a", 80), requests.to("b", 80, 3))

    def work() -> list[Answer]:
        first = {answer.name: told(COOKIE, answer) for answer in (harness.request(entry, headers=beta) for _ in range(2 * CALLS))}
        assert first.keys() == {"a", "b"}
        return [harness.request(entry, headers=beta | first[name]) for name in "ab" for _ in range(CALLS)]

    with requests.backends(a=requests.plain, b=requests.plain) as targets:
        rules = (replace(test_claims.claimed(test_claims.BETA, to=both), session=COOKIE), harness.rule(requests.to("a", 80)))
        answers = through_envoy(tmp_path, test_claims.scene(entry, targets, *rules), [entry], work)
    assert [answer.name for answer in answers] == ["a"] * CALLS + ["b"] * CALLS
