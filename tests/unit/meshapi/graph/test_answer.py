from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshapi.graph.answer import MOST_BYTES, MOST_EDGES, Answer, Backend, Unreadable, decode, finite, line
from tests.unit.meshapi.graph import made

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
GOOD = Answer("node-1", 5.0, (made.edge("default/a", "default/b", rules=("default/p[0]",)),), 0, ("a problem",))


@given(made.answers())
def test_what_a_node_says_is_what_is_read(answer: Answer) -> None:
    assert decode(answer.encode(), "node-1") == answer


def test_an_answer_that_would_be_too_large_is_sent_without_the_edges_that_matter_least() -> None:
    backends = tuple(Backend(f"default/{'b' * 240}-{number}", 1.0, mtls=False) for number in range(16))
    edges = tuple(made.edge("default/a", f"default/b-{number}", backends=backends) for number in range(MOST_EDGES))
    answer = Answer("node-1", 5.0, edges, 7)
    document = answer.encode()
    read = decode(document, "node-1")
    assert MOST_BYTES - 6000 < len(document) <= MOST_BYTES
    assert 0 < len(read.edges) < MOST_EDGES
    assert (read.edges, read.folded) == (edges[: len(read.edges)], 7 + MOST_EDGES - len(read.edges))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@given(made.answers(), JSON, st.randoms())
def test_a_document_with_anything_anywhere_in_it_is_sound_or_unreadable(answer: Answer, anything: Any, chosen: random.Random) -> None:
    document = json.loads(answer.encode())
    container, key = chosen.choice(places(document))
    container[key] = anything
    try:
        read = decode(json.dumps(document).encode(), "node-1")
    except Unreadable:
        return
    assert decode(read.encode(), "node-1") == read
    assert read.node == "node-1"
    assert all(0 <= value < 1e16 for edge in read.edges for value in (edge.rate, edge.errors, edge.denied, edge.bytes))


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_what_is_no_graph_is_unreadable(document: bytes) -> None:
    with pytest.raises(Unreadable):
        decode(document, "node-1")


def changed(**fields: Any) -> bytes:
    document = json.loads(GOOD.encode())
    for name, value in fields.items():
        (document if name in document else document["edges"][0])[name] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("document", "why"),
    [
        pytest.param(changed(node="node-2"), "node: it is another node's", id="another-node"),
        pytest.param(changed(kind="plan"), "older version", id="another-kind"),
        pytest.param(changed(rate=-1), r"edges\[0\].rate: must be a number, 0 or more", id="negative"),
        pytest.param(changed(rate=True), r"edges\[0\].rate", id="bool-as-number"),
        pytest.param(changed(rate=float("nan")), "not JSON", id="nan"),
        pytest.param(changed(bytes=float("inf")), "not JSON", id="infinity"),
        pytest.param(changed(rate=10**400), r"edges\[0\].rate", id="huge-integer"),
        pytest.param(changed(port=65536), r"edges\[0\].port", id="port"),
        pytest.param(changed(source="default/<img src=x onerror=alert(1)>"), r"edges\[0\].source: must be NAMESPACE/NAME", id="markup"),
        pytest.param(changed(source="default/a/b"), r"edges\[0\].source", id="two-slashes"),
        pytest.param(changed(source=""), r"edges\[0\].source: nobody's node", id="source-of-nobody"),
        pytest.param(changed(destination=""), r"edges\[0\].destination", id="no-destination"),
        pytest.param(changed(side="destination"), r"edges\[0\].kind", id="service-at-its-destination"),
        pytest.param(changed(side=["source"]), r"edges\[0\].side: must be one of 'source', 'destination'", id="list-as-word"),
        pytest.param(changed(rules=["a\x1b[2J"]), r"edges\[0\].rules\[0\]", id="terminal-escape"),
        pytest.param(changed(problems=["x" * 301]), r"problems\[0\]", id="long-text"),
        pytest.param(changed(rules=["r"] * 4), r"edges\[0\].rules: must be a list of at most 3", id="many-rules"),
        pytest.param(changed(backends=[{"workload": "default/a", "rate": 1, "mtls": 1}]), r"backends\[0\]: wants", id="backend"),
        pytest.param(changed(edges=json.loads(GOOD.encode())["edges"] * 2), "edges: one is there twice", id="twice"),
        pytest.param(changed(edges=[{}] * (MOST_EDGES + 1)), "edges: must be a list of at most", id="many-edges"),
        pytest.param(b"[" * 100_000, "not JSON", id="deep"),
        pytest.param(b" " * (MOST_BYTES + 1), "bytes, at most", id="long"),
    ],
)
def test_why_a_document_is_unreadable_is_said_without_repeating_it(document: bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why) as found:
        decode(document, "node-1")
    assert "onerror" not in str(found.value)


def test_a_field_that_nobody_knows_is_ignored() -> None:
    assert decode(GOOD.encode()[:-1] + b', "later": 1}', "node-1") == GOOD


def test_as_many_edges_as_a_node_may_tell_pass_through_the_controller() -> None:
    from controller.relay import MAX_DOCUMENT  # noqa: PLC0415 - only this test asks the controller

    name = f"{'n' * 63}/{'w' * 63}"
    full = [
        made.edge(name, f"{name}{i}", rate=1 / 3, errors=1 / 3, denied=1 / 3, bytes=1 / 3, p50=1 / 3, p99=1 / 3, rules=("r" * 120,) * 3)
        for i in range(MOST_EDGES)
    ]
    assert len(Answer("node-1", 5.0, tuple(full)).encode()) < MAX_DOCUMENT


@given(st.text(max_size=400), st.floats())
def test_an_agent_says_only_what_is_read(text: str, value: float) -> None:
    answer = Answer("node-1", 1.0, (made.edge("default/a", "default/b", rate=finite(value), rules=(line(text),)),))
    assert decode(answer.encode(), "node-1") == answer
