from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.documents import BadDocument, parse, path_text
from controller.schema import read_or_problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a: 1\nb: 2\na: 3\n", "f:3: key 'a' is there twice, first on line 1", id="duplicate key"),
        pytest.param("a: 1\n---\n- 1\n", "f:3: a document must be a mapping with apiVersion, kind and metadata", id="list"),
        pytest.param(
            "a:\n\tb: 1\n", "f:2: not YAML: found character '\\t' that cannot start any token (a tab: indent with spaces)", id="tab"
        ),
        pytest.param(b"a: 1\nb: \xff\n", "f:2: not UTF-8: byte 0xff; save the file as UTF-8", id="not utf-8"),
        pytest.param("a: *x\n", "f:1: alias *x names no complete value before it", id="unknown alias"),
        pytest.param("a: &x\n  b: *x\n", "f:2: alias *x names no complete value before it", id="alias to itself"),
        pytest.param("a: !!python/name:os.system x\n", "f:1: tag 'tag:yaml.org,2002:python/name:os.system' is not supported", id="tag"),
        pytest.param("a: &x {b: 1}\nc:\n  <<: *x\n", "f:3: merge keys (<<) are not supported: write the fields out", id="merge key"),
        pytest.param("? {a: 1}\n: 2\n", "f:1: a key must be plain text", id="mapping as key"),
        pytest.param("a: " + "[" * 70, "f:1: nested deeper than 64 levels", id="deep"),
        pytest.param("a: 1\nb: \x07\n", "f:2: not YAML: special characters are not allowed", id="control character"),
    ],
)
def test_what_cannot_be_read_says_where_and_why(text: str | bytes, expected: str) -> None:
    with pytest.raises(BadDocument) as caught:
        parse(text, "f")
    assert str(caught.value.problem) == expected


def test_aliases_cannot_multiply_into_memory() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 9):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    with pytest.raises(BadDocument, match="more than 100000 values"):
        parse(bomb, "f")


def test_a_document_over_one_mebibyte_is_refused() -> None:
    with pytest.raises(BadDocument, match="document larger than 1 MiB"):
        parse("a: " + "x" * (1 << 20) + "\nb: 1\n", "f")


def test_scalars_follow_yaml_1_2() -> None:
    (document,) = parse(
        "[]: 1\n".replace("[]", "a") + "b: on\nc: 0x1F\nd: '7'\ne: ~\nf: 1.5\ng: true\nh: 0o17\ni: 2024-01-01\nj: 010\n", "f"
    )
    expected = {"a": 1, "b": "on", "c": 31, "d": "7", "e": None, "f": 1.5, "g": True, "h": 15, "i": "2024-01-01", "j": 10}
    assert document.value == expected


def test_lines_are_those_of_the_keys_and_items() -> None:
    (document,) = parse("# comment\na:\n  b:\n    - 1\n    -\n      c: x\n", "f")
    assert [document.line_of(path) for path in (("a",), ("a", "b", 0), ("a", "b", 1, "c"), ("a", "b", 1, "missing"))] == [2, 4, 6, 6]


def test_paths_are_spelled_as_people_write_them() -> None:
    assert path_text(("spec", "rules", 0, "a.b/c", "d")) == "spec.rules[0]['a.b/c'].d"


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.binary(), st.text(alphabet="a:-[]{}&*!|>'\"%@`#,? \n\t0~<", max_size=80)))
def test_any_input_gives_objects_or_clean_problems(text: str | bytes) -> None:
    checked, unreadable = read_or_problems(text, "f")
    for problem in [*(problem for item in checked for problem in item.problems), *([unreadable] if unreadable else [])]:
        assert str(problem).startswith("f:")
        assert "\n" not in str(problem)
        assert problem.line >= 1
    assert all(item.object is not None or item.problems for item in checked)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcdef", min_size=1, max_size=4), inner, max_size=3),
    max_leaves=23,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=4), JSON, min_size=1, max_size=5))
def test_json_is_read_as_what_it_says(value: dict[str, object]) -> None:
    (document,) = parse(json.dumps(value), "f")
    assert document.value == value


WORDS = st.sampled_from(
    [
        "spec",
        "rules",
        "from",
        "to",
        "source",
        "operation",
        "ports",
        "paths",
        "action",
        "metadata",
        "name",
        "x",
        "parentRefs",
        "kind",
        "backendRefs",
        "mtls",
        "mode",
        "portLevelMtls",
        "80",
        "selector",
        "matchLabels",
    ]
)
SHAPES = st.recursive(
    st.none() | st.integers(-1, 70000) | st.sampled_from(["x", "*", "/a", "ALLOW", "Service", "10.0.0.1", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=17,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [
            ("v1", "Service"),
            ("v1", "Namespace"),
            ("meshagent.io/v1alpha1", "Workload"),
            ("meshagent.io/v1alpha1", "AuthorizationPolicy"),
            ("meshagent.io/v1alpha1", "PeerAuthentication"),
            ("gateway.networking.k8s.io/v1", "HTTPRoute"),
        ]
    ),
    SHAPES,
    SHAPES,
)
def test_any_shape_of_a_known_kind_gives_an_object_or_clean_problems(kind: tuple[str, str], metadata: object, spec: object) -> None:
    text = json.dumps({"apiVersion": kind[0], "kind": kind[1], "metadata": metadata, "spec": spec})
    checked, unreadable = read_or_problems(text, "f")
    assert unreadable is None
    assert all((item.object is None) == bool(item.problems) for item in checked)
