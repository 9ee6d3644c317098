"""The order of route matches is total and that of the Gateway API."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.l7.precedence import Key, covers, match_key
from agent.model import HeaderEdit, MatchKind, Route, RouteMatch, RouteRule, StringMatch
from tests.unit.agent.l7 import harness

EXACT, PREFIX, REGEX, PRESENT = MatchKind.EXACT, MatchKind.PREFIX, MatchKind.REGEX, MatchKind.PRESENT
ONE = StringMatch(EXACT, "1")


def path(kind: MatchKind, value: str) -> RouteMatch:
    return RouteMatch(path=StringMatch(kind, value))


def key(match: RouteMatch, name: str = "r", created: int = 0) -> Key:
    return match_key(harness.route(name, harness.rule(matches=(match,)), parent="s", created=created), 0, 0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(path(EXACT, "/a"), path(PREFIX, "/a/long/prefix"), id="exact before any prefix"),
        pytest.param(path(PREFIX, "/a/b"), path(PREFIX, "/a"), id="longer prefix first"),
        pytest.param(path(PREFIX, "/a/b"), RouteMatch(path=StringMatch(PREFIX, "/a"), method="GET"), id="path before method"),
        pytest.param(path(PREFIX, "/a"), path(REGEX, "/a.*longer"), id="prefix before regex"),
        pytest.param(path(REGEX, "/a"), RouteMatch(), id="regex before everything"),
        pytest.param(path(REGEX, "/a"), path(PREFIX, "/"), id="regex before the catch-all prefix"),
        pytest.param(RouteMatch(method="GET"), RouteMatch(headers=(("a", ONE), ("b", ONE))), id="method before headers"),
        pytest.param(RouteMatch(headers=(("a", ONE),)), RouteMatch(query=(("a", ONE), ("b", ONE))), id="headers before query"),
        pytest.param(RouteMatch(query=(("a", ONE),)), RouteMatch(), id="query before nothing"),
    ],
)
def test_the_more_specific_match_comes_first_even_on_a_younger_route(first: RouteMatch, second: RouteMatch) -> None:
    assert key(first, "z", created=9) < key(second, "a", created=1)


def test_ties_go_to_the_older_route_then_to_the_name_then_to_the_order_of_rules() -> None:
    assert key(RouteMatch(), "z", created=1) < key(RouteMatch(), "a", created=2)
    assert key(RouteMatch(), "a", created=2) < key(RouteMatch(), "z", created=2)
    two = harness.route("r", harness.rule(), harness.rule(), parent="s")
    assert match_key(two, 0, 0) < match_key(two, 1, 0)


matches = st.builds(
    RouteMatch,
    path=st.none()
    | st.builds(StringMatch, st.sampled_from([EXACT, PREFIX, REGEX, PRESENT]), st.sampled_from(["/", "/a", "/a/", "/a/b", "/bb"])),
    method=st.sampled_from(["", "GET"]),
    headers=st.sampled_from([(), (("a", ONE),), (("a", ONE), ("b", ONE))]),
    query=st.sampled_from([(), (("a", ONE),)]),
)
rules = st.builds(
    RouteRule,
    name=st.just(""),
    matches=st.lists(matches, max_size=3).map(tuple),
    backends=st.just(()),
    retry=st.none(),
    request_timeout_ms=st.just(0),
    backend_request_timeout_ms=st.just(0),
    request_headers=st.just(HeaderEdit()),
    response_headers=st.just(HeaderEdit()),
)
routes = st.lists(
    st.builds(
        Route,
        name=st.sampled_from(["a/a", "a/b", "b/a", "b/b", "c/c"]),
        parents=st.just(()),
        hostnames=st.sampled_from([(), ("x.test",), ("*.test",), ("*.test", "y.test")]),
        rules=st.lists(rules, min_size=1, max_size=3).map(tuple),
        created=st.integers(0, 2),
    ),
    max_size=4,
    unique_by=lambda route: route.name,
)


def spec_beats(one: RouteMatch, other: RouteMatch) -> bool | None:
    """The specification's comparison of two matches, written as its sentences; None = a tie, or regular expressions are involved."""

    def kind(match: RouteMatch) -> tuple[str, int]:
        if match.path is None or match.path.kind is PRESENT:
            return "prefix", 0
        if match.path.kind is PREFIX:
            return "prefix", len(match.path.value.rstrip("/"))
        return ("exact" if match.path.kind is EXACT else "regex"), 0

    (kind_one, length_one), (kind_other, length_other) = kind(one), kind(other)
    if "regex" in {kind_one, kind_other}:
        return None
    if kind_one != kind_other:
        return kind_one == "exact"
    if length_one != length_other:
        return length_one > length_other
    for a, b in ((bool(one.method), bool(other.method)), (len(one.headers), len(other.headers)), (len(one.query), len(other.query))):
        if a != b:
            return a > b
    return None


@settings(deadline=None)
@given(routes)
def test_sorting_is_a_total_order_consistent_with_the_specification(found: list[Route]) -> None:
    every = [
        (match_key(route, r, m), match)
        for route in found
        for r, rule in enumerate(route.rules)
        for m, match in enumerate(rule.matches or (RouteMatch(),))
    ]
    keys = [entry[0] for entry in every]
    assert len(set(keys)) == len(keys), "two matches must never tie"
    for (key_one, one), (key_other, other) in itertools.combinations(every, 2):
        beats = spec_beats(one, other)
        if beats is not None:
            assert (key_one < key_other) == beats


@pytest.mark.parametrize(
    ("hostname", "domain", "expected"),
    [
        ("a.test", "a.test", True),
        ("A.test", "a.TEST", True),
        ("*.test", "a.test", True),
        ("*.test", "b.a.test", True),
        ("*.test", "*.a.test", True),
        ("*.test", "test", False),
        ("*.a.test", "*.test", False),
        ("a.test", "*.test", False),
    ],
)
def test_a_hostname_covers_a_domain(hostname: str, domain: str, expected: bool) -> None:
    assert covers(hostname, domain) is expected
