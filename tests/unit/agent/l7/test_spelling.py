"""Patterns of policies hold whatever way a caller spells what they are about: wide where they forbid, narrow where they permit."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.l7 import spelling
from agent.policy import matches


def fits(matcher: Any, text: str) -> bool:
    """As Envoy's StringMatcher does."""
    kind = matcher.WhichOneof("match_pattern")
    if kind == "safe_regex":
        return bool(re.fullmatch(matcher.safe_regex.regex, text))
    wanted = getattr(matcher, kind)
    return bool({"exact": text == wanted, "prefix": text.startswith(wanted), "suffix": text.endswith(wanted)}[kind])


def permits(permission: Any, text: str) -> bool:
    """As Envoy's RBAC does, for conditions on the path."""
    kind = permission.WhichOneof("rule")
    if kind == "url_path":
        return fits(permission.url_path.path, text)
    if kind == "not_rule":
        return not permits(permission.not_rule, text)
    combine = {"and_rules": all, "or_rules": any}[kind]
    return combine(permits(rule, text) for rule in getattr(permission, kind).rules)


SEGMENTS = st.text("ab.-", min_size=1, max_size=3).filter(lambda text: set(text) != {"."})
PATHS = st.lists(SEGMENTS, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))
PATTERNS = st.one_of(
    PATHS, PATHS.map(lambda path: path + "*"), PATHS.map(lambda path: "*" + path), PATHS.map(lambda path: "*" + path[1:]), st.just("*")
)
PARAMETERS = st.sampled_from(["", "", ";", ";a=b", ";.css", "%3Bx", ";a;b"])


@st.composite
def spelled(draw: st.DrawFn) -> tuple[str, str]:
    """A path, and the same with parameters, as a servlet reads it."""
    path = draw(PATHS)
    parts = ["".join([part, draw(PARAMETERS)]) for part in path[1:].split("/")]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts) - 1)), ";x")
    return path, "/" + "/".join(parts)


@given(PATTERNS, spelled())
def test_what_forbids_holds_for_every_way_to_write_a_path(pattern: str, path: tuple[str, str]) -> None:
    plain, written = path
    assert permits(spelling.path(pattern, wide=True), plain) >= matches(pattern, plain)
    assert permits(spelling.path(pattern, wide=True), written) >= matches(pattern, plain)


@given(PATTERNS, spelled())
def test_what_permits_holds_only_if_every_reading_does(pattern: str, path: tuple[str, str]) -> None:
    plain, written = path
    assert permits(spelling.path(pattern, wide=False), plain) == matches(pattern, plain)
    assert permits(spelling.path(pattern, wide=False), written) <= matches(pattern, plain)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("/a@b", "/a%40b", True),
        ("/a%40b", "/a@b", True),
        ("/%61dmin", "/admin", True),
        ("/caf\u00e9", "/caf%C3%A9", True),
        ("/caf%c3%a9", "/caf%C3%A9", True),
        ("/a+b", "/a%2bb", True),
        ("/a.c", "/abc", False),
        ("/admin", "/admin/", False),
        ("/admin", "/administrator", False),
        ("/admin*", "/administrator", True),
        ("/admin", "/x;/admin", False),
        ("/admin", "/x/..%3b/admin", True),
        ("/admin", "/x/...%3b/admin", False),
        ("/a/admin", "/a/x/..%3b/admin", True),
        ("/a/admin", "/a/.;x/admin", True),
        ("/a/admin", "/a/.%3Bx/admin", True),
        ("/a/admin", "/b/.%3Bx", True),
        ("/a/admin", "/b/x.%3Bx", False),
        ("/a/*", "/b/..%3b", True),
        ("*/admin", "/a/admin/x/..%3b", True),
    ],
)
def test_escapes_mean_what_they_stand_for(pattern: str, path: str, expected: bool) -> None:
    assert permits(spelling.path(pattern, wide=True), path) is expected


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.css", "/a.css", True),
        ("*.css", "/admin/a.css", True),
        ("*.css", "/x;v=1/a.css", True),
        ("*.css", "/x%3Bv=1/a.css", True),
        ("*.css", "/x/..%3b/a.css", False),
        ("*.css", "/a%20b%3a%3F%C3%A9.css", True),
        ("*.css", "/%3a%40%5B.css", True),
        ("*.css", "/admin;.css", False),
        ("*.css", "/admin%3b.css", False),
        ("*.css", "/admin%3B.css", False),
        ("*.css", "/admin%3bx%20.css", False),
        ("*.css", "/a%20admin%3b.css", False),
        ("*.css", "/admin%;.css", False),
        ("*.css", "/admin%%3b.css", False),
        ("*.css", "/admin%2%3b.css", False),
        ("*.css", "/admin%3%3b.css", False),
        ("*b.css", "/admin%3b.css", False),
        ("*3b.css", "/admin%3b.css", False),
        ("*2.css", "/a%22.css", False),
        ("*2.css", "/a%202.css", True),
        ("*x/a.css", "/x/a.css", True),
        ("*x/a.css", "/b%3bx/a.css", False),
        ("*/a.css", "/b%3bx/a.css", True),
        ("/*", "/x/..%3b/admin", True),
        ("/public/*", "/public/", True),
        ("/public/*", "/public/a/b", True),
        ("/public/*", "/public/a;v=1/b;w=2", True),
        ("/public/*", "/public/a%3bv=1/b%3Bw", True),
        ("/public/*", "/public/;x/%3bx", True),
        ("/public/*", "/public/..a/.b/...", True),
        ("/public/*", "/public/.../...%3bx/a..%3bx/a.%3bx", True),
        ("/public/*", "/public/.%3a/..%3a/..%20%3b/.%/..%3/..%c3%3b/..%3c;/100%", True),
        ("/public/*", "/public/..%3b/admin", False),
        ("/public/*", "/public/..%3B/admin", False),
        ("/public/*", "/public/..%3bv=1/admin", False),
        ("/public/*", "/public/..;/admin", False),
        ("/public/*", "/public/..;v=1/admin", False),
        ("/public/*", "/public/.%3b/admin", False),
        ("/public/*", "/public/..%3b", False),
        ("/public/*", "/public/a/..%3b/..%3b/admin", False),
        ("/public/*", "/public/a/b/.../..%3b/x", False),
        ("/public*", "/public", True),
        ("/public*", "/publicly/a", True),
        ("/public*", "/public..%3b/a", True),
        ("/public*", "/public/..%3b/admin", False),
        ("/public*", "/publicly/..%3b/admin", False),
        ("/.*", "/.well-known/a", True),
        ("/.*", "/..a/b", True),
        ("/.*", "/.%3b/admin", False),
        ("/.*", "/..%3b/admin", False),
        ("/.*", "/.;/admin", False),
        ("/a/..*", "/a/..b", True),
        ("/a/..*", "/a/...%3b", True),
        ("/a/..*", "/a/..%3b/admin", False),
        ("/a/..%*", "/a/..%20", True),
        ("/a/..%*", "/a/..%3b/admin", False),
        ("/a/.%3*", "/a/.%3a", True),
        ("/a/.%3*", "/a/.%3b/admin", False),
        ("/a.b+c/*", "/a.b+c/d", True),
        ("/a.b+c/*", "/axb+c/d", False),
        ("/public/..%3b/*", "/public/..%3b/admin", False),
        ("/public/..%3b/admin", "/public/..%3b/admin", True),
    ],
)
def test_what_permits_looks_through_escaped_parameters_and_keeps_what_is_harmless(pattern: str, path: str, expected: bool) -> None:
    assert permits(spelling.path(pattern, wide=False), path) is expected


BELOW = st.text("./;%3bBa", max_size=12)
BEGINNINGS = st.sampled_from(["/", "/a/", "/a", "/.", "/a/..", "/a/.%", "/a/..%3", "/..a", "/...", "/a."])


@given(BEGINNINGS, BELOW)
def test_a_prefix_permits_everything_but_dots_with_parameters(prefix: str, below: str) -> None:
    hidden = any(re.match(r"\.{1,2}(;|%3[bB])", segment) for segment in (prefix + below).split("/"))
    assert permits(spelling.path(prefix + "*", wide=False), prefix + below) is (prefix == "/" or not hidden)


@given(st.text("./;%3bBaf2", max_size=12))
def test_a_suffix_permits_no_parameter_in_its_segment(before: str) -> None:
    segment = before.rpartition("/")[2]
    whole = re.fullmatch("(?:[^%;]|%(?!3[bB])[0-9a-fA-F]{2})*", segment) is not None
    hidden = any(re.match(r"\.{1,2}(;|%3[bB])", part) for part in f"{before}.css".split("/"))
    assert permits(spelling.path("*.css", wide=False), f"/{before}.css") is (whole and not hidden)


@pytest.mark.parametrize(
    ("pattern", "host", "wide", "narrow"),
    [
        ("a.test", "A.TEST.:80", True, True),
        ("a.test", "b.test,a.test", True, False),
        ("a.test", "a.test, b.test", True, False),
        ("*.test", "evil,x.test", True, False),
        ("api*", "api.test,evil", True, False),
        ("*", "a,b", True, False),
        ("a.test", "xa.test", False, False),
        ("a.test", "a-test", False, False),
    ],
)
def test_hosts_are_compared_without_case_port_and_dot_and_several_are_one_for_what_forbids(
    pattern: str, host: str, wide: bool, narrow: bool
) -> None:
    assert fits(spelling.host(pattern, wide=True), host) is wide
    assert fits(spelling.host(pattern, wide=False), host) is narrow


@pytest.mark.parametrize(
    ("pattern", "value", "wide", "narrow"),
    [
        ("admin", "admin", True, True),
        ("admin", "user, admin", True, False),
        ("admin", "admin,user", True, False),
        ("admin", "administrator", False, False),
        ("adm*", "user,administrator", True, False),
        ("*min", "admin,user", True, False),
        ("a,b", "a,b", True, True),
    ],
)
def test_a_header_that_is_there_twice_is_found_by_what_forbids(pattern: str, value: str, wide: bool, narrow: bool) -> None:
    assert fits(spelling.header(pattern, wide=True), value) is wide
    assert fits(spelling.header(pattern, wide=False), value) is narrow
