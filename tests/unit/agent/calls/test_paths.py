"""Folded paths, and that what is said of them holds for every path that they stand for, as Envoy compares it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.calls import paths
from agent.l7 import spelling
from tests.unit.agent.l7.test_spelling import permits

UUID = "550e8400-e29b-41d4-a716-446655440000"
SEGMENTS = (
    "items",
    "admin",
    "a",
    "b.css",
    "v1",
    "1234",
    UUID,
    "deadbeef01",
    "x;y",
    "..;z",
    "a%3Bb",
    "%40me",
    "a@b",
    "",
    "z" * 70,
    "*",
    "{}",
)
LITERALS = ("items", "admin", "a", "b.css", "1234", "12", UUID, "%40me", "a@b", "@me", "x;y", "x", "")
drawn_paths = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=4).map(lambda found: "/" + "/".join(found))
texts = st.lists(st.sampled_from(LITERALS), min_size=1, max_size=4).map("/".join)
patterns = st.one_of(
    texts.map(lambda text: "/" + text),
    texts.map(lambda text: f"/{text}*"),
    texts.map(lambda text: f"*{text}"),
    texts.map(lambda text: f"*/{text}"),
    st.sampled_from(("*", "/*")),
)


@pytest.mark.parametrize(
    ("path", "folded"),
    [
        pytest.param("/items", "/items", id="a-plain-path-stays"),
        pytest.param("/items/?token=secret", "/items/", id="the-query-is-cut"),
        pytest.param("/items/1234/price", "/items/{}/price", id="digits"),
        pytest.param(f"/u/{UUID}", "/u/{}", id="uuid"),
        pytest.param("/api/v1/commits/deadbeef01", "/api/v1/commits/{}", id="a-hash-but-not-a-version"),
        pytest.param("/u/a@b", "/u/{}", id="what-has-two-spellings"),
        pytest.param("/u/a;b=c/x", "/*", id="parameters-may-be-read-in-any-way"),
        pytest.param("/u/a%3bb", "/*", id="escaped-parameters-too"),
        pytest.param("*", "*", id="no-path"),
        pytest.param("", "*", id="nothing"),
        pytest.param("/a" + "/b" * 40, "/a/*", id="too-deep"),
        pytest.param("/" + "/".join(["b" * 60] * 5), "/" + "b" * 60 + "/*", id="too-long"),
        pytest.param("/7" * 40, "/*", id="too-deep-below-an-identifier"),
    ],
)
def test_a_path_is_folded(path: str, folded: str) -> None:
    assert paths.template(path) == folded


@settings(max_examples=3000, deadline=None)
@given(drawn_paths, patterns, st.booleans())
def test_what_is_said_of_a_folded_path_holds_for_the_path_in_both_forms_that_envoy_compares(path: str, pattern: str, coarser: bool) -> None:
    folded = paths.coarse(paths.template(path)) if coarser else paths.template(path)
    said = paths.fits(pattern, folded)
    if said is not None:
        assert permits(spelling.path(pattern, wide=True), path) is said
        assert permits(spelling.path(pattern, wide=False), path) is said


@settings(max_examples=1000, deadline=None)
@given(drawn_paths, st.booleans())
def test_the_pattern_that_is_made_of_a_folded_path_permits_the_path(path: str, coarser: bool) -> None:
    folded = paths.coarse(paths.template(path)) if coarser else paths.template(path)
    pattern = paths.pattern_of(folded)
    assert pattern
    assert paths.fits(pattern, folded) is True
    assert permits(spelling.path(pattern, wide=False), path)


@pytest.mark.parametrize(
    ("pattern", "folded", "said"),
    [
        pytest.param("/items/*", "/items/{}", True, id="prefix-before-the-hole"),
        pytest.param("/items/1*", "/items/{}", None, id="prefix-into-the-hole"),
        pytest.param("/items/1/x*", "/items/{}/y", False, id="prefix-beyond-the-hole-that-differs"),
        pytest.param("/items/1/y*", "/items/{}/y", None, id="prefix-beyond-the-hole-that-may-fit"),
        pytest.param("*/price", "/items/{}/price", True, id="suffix-behind-the-hole"),
        pytest.param("*.css", "/items/{}", None, id="suffix-in-the-hole"),
        pytest.param("*.css", "/items/{}/x", False, id="suffix-that-differs"),
        pytest.param("/items/7", "/items/{}", None, id="exact"),
        pytest.param("/items/7/8", "/items/{}", False, id="a-hole-is-one-segment"),
        pytest.param("/items/", "/items/{}", False, id="a-hole-is-not-empty"),
        pytest.param("/static/a", "/static/*", None, id="what-follows-may-fit"),
        pytest.param("/other/a", "/static/*", False, id="what-follows-cannot-fit"),
        pytest.param("*", "*", None, id="there-may-be-no-path"),
    ],
)
def test_patterns_meet_folded_paths(pattern: str, folded: str, said: bool | None) -> None:
    assert paths.fits(pattern, folded) is said
