"""`meshagent policy try`: what is asked, what is printed, and which rows of a node are believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from agent.cli.policy import Answers, merged, own_row
from agent.errors import NotFound

CALLS = 7
WORKLOADS: dict[str, dict[str, Any]] = {
    "shop/web": {"metadata": {"name": "web"}, "spec": {"node": "node-1", "serviceAccount": "web"}},
    "shop/cart-1": {"metadata": {"name": "cart-1", "labels": {"app": "cart"}}, "spec": {"node": "node-2"}},
    "bank/teller": {"metadata": {"name": "teller"}, "spec": {"node": "node-2", "serviceAccount": "teller"}},
}


def change(**fields: Any) -> dict[str, Any]:
    known = {
        "change": "newly denied",
        "owner": "shop/web",
        "source": "shop/web",
        "destination": "shop/cart:80",
        "method": "GET",
        "path": "/items",
    }
    return {**known, "count": CALLS, "lastSeen": 1.0, "rule": "shop/p[0]", **fields}


def call(**fields: Any) -> dict[str, Any]:
    known = {"serviceAccount": "shop/web", "receivers": {"shop/cart-1": {"app": "cart"}}, "port": 8080, "protocol": "TCP"}
    seen = {name: value for name, value in change().items() if name not in {"change", "lastSeen", "rule"}}
    return {**seen, **known, "outcome": "served", "answer": "allowed", **fields}


@pytest.mark.parametrize(
    ("node", "row"),
    [
        pytest.param("node-1", change(), id="a-call-of-its-own"),
        pytest.param("node-2", change(owner="shop/cart-1", source="unknown"), id="a-strangers-call-to-its-own"),
        pytest.param("node-1", call(), id="a-call-for-a-proposal"),
        pytest.param("node-1", call(serviceAccount=""), id="its-own-who-is-not-enrolled"),
        pytest.param("node-2", call(owner="shop/cart-1", source="", serviceAccount=""), id="a-stranger-for-a-proposal"),
        pytest.param("node-1", call(path="*"), id="a-path-that-is-not-known"),
    ],
)
def test_a_node_is_believed_about_its_own_workloads(node: str, row: dict[str, Any]) -> None:
    assert own_row(row, node, WORKLOADS) == row


@pytest.mark.parametrize(
    ("node", "row"),
    [
        pytest.param("node-2", change(), id="of-another-nodes-workload"),
        pytest.param("node-1", change(source="bank/teller"), id="in-anothers-name"),
        pytest.param("node-1", change(owner="shop/none", source="shop/none"), id="of-nobody"),
        pytest.param("node-1", call(serviceAccount="bank/teller"), id="with-anothers-account"),
        pytest.param("node-2", call(owner="shop/cart-1", source="", serviceAccount="shop/web"), id="a-stranger-with-an-account"),
        pytest.param("node-2", call(owner="bank/teller", source="", serviceAccount=""), id="a-stranger-elsewhere"),
        pytest.param("node-1", call(receivers={"shop/none": {}}), id="to-nobody"),
        pytest.param("node-1", call(receivers=None), id="no-shape"),
        pytest.param("node-1", {"owner": ["shop/web"]}, id="no-row"),
        pytest.param("node-1", change(path="/items\n- from: []"), id="a-path-that-is-no-path"),
        pytest.param("node-1", change(method="GET\x1b[2J"), id="a-method-that-is-none"),
        pytest.param("node-1", change(count="7"), id="a-count-that-is-none"),
        pytest.param("node-1", change(change="nope"), id="a-change-that-is-none"),
        pytest.param("node-1", change(more=1), id="a-key-that-nobody-knows"),
        pytest.param("node-1", change(lastSeen="now"), id="a-time-that-is-none"),
        pytest.param("node-1", call(port=70000), id="a-port-that-is-none"),
    ],
)
def test_whatever_else_a_node_tells_is_left_out(node: str, row: dict[str, Any]) -> None:
    assert own_row(row, node, WORKLOADS) is None


def test_what_a_node_tells_is_one_line_without_control_characters() -> None:
    row = own_row(change(destination="shop/cart:80\x1b[2J\n  forged", rule="r\x1b]0;pwn\x07"), "node-1", WORKLOADS)
    assert row is not None
    assert (row["destination"], row["rule"]) == ("shop/cart:80\ufffd[2J\ufffd  forged", "r\ufffd]0;pwn\ufffd")


def test_labels_are_those_that_the_controller_knows() -> None:
    found = own_row(call(receivers={"shop/cart-1": {"app": "bank"}}), "node-1", WORKLOADS)
    assert found is not None
    assert found["receivers"] == {"shop/cart-1": {"app": "cart"}}


def test_the_same_call_on_two_nodes_is_one_row_and_denials_come_first() -> None:
    rows = merged([change(change="undecided"), change(), change(lastSeen=2.0, owner="shop/web-2"), change(path="/a", count=100)])
    assert [(row["change"], row["path"], row["count"], row["lastSeen"]) for row in rows] == [
        ("newly denied", "/a", 100, 1.0),
        ("newly denied", "/items", 2 * CALLS, 2.0),
        ("undecided", "/items", CALLS, 1.0),
    ]


def test_no_answer_is_not_a_good_one() -> None:
    with pytest.raises(NotFound, match="no node is connected"):
        Answers([])
    with pytest.raises(NotFound, match="the agent of node node-7 does not know the question"):
        Answers([{"node": "node-7", "ready": True}])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], "give policies with -f or --delete", id="nothing"),
        pytest.param(["--delete", "a/b", "--from-traffic", "shop"], "give policies with -f or --delete", id="both"),
        pytest.param(["--delete", "a/b", "--since", "2h"], "an hour is remembered at most", id="too-long-ago"),
        pytest.param(["--delete", "a/b", "--since", "soon"], "is no time", id="no-time"),
        pytest.param(["-f", "/none.yaml"], "cannot read /none.yaml", id="no-file"),
    ],
)
def test_misuse_is_exit_code_2(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, ["policy", "try", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_without_an_agent_the_answer_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["policy", "try", "--delete", "shop/p", "--run-dir", str(tmp_path)])
    assert (result.exit_code, result.output) == (
        1,
        f"Error: no agent has its socket in {tmp_path}: is 'meshagent run' running, and are you root?\n",
    )
