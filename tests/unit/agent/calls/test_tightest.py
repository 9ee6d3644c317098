"""Policies that are made of what was called: they allow it, they are valid, and nobody new comes through."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.calls import compare, paths
from agent.calls.judge import Answer, Call, judge
from agent.calls.ring import Outcome, Recorded, Seen
from agent.calls.tightest import Result, selector_of, tightest
from agent.cli.resources import yaml
from agent.model import Backing, Policy, Service, ServicePort, Snapshot, Workload
from agent.policy import Caller
from agent.report import CallRow
from controller.schema import read
from tests.unit.agent import policies as drawn

CALLS = 7
NEW = Caller("shop", "new", drawn.TRUST_DOMAIN)
CALLERS = ("shop/web", "bank/teller", "bank/gone", "")
PATHS = ("/items", "/items/7", "/items/8/price", "/admin/users", "/u/a@b", "/x;y", "/static/a.css", "/%3B")


def workload(name: str, account: str, port: int = 0, **labels: str) -> Workload:
    backing = (Backing("shop/cart", {80: port}, {53: port}),) if port else ()
    return Workload(name, account, "node-1", labels, ("10.0.0.1",), name, True, True, backing)


def mesh(policies: list[Policy]) -> Snapshot:
    names = tuple(policy.name for policy in policies)
    workloads = [
        workload("shop/web", "web"),
        workload("bank/teller", "teller"),
        replace(workload("shop/cart-1", "cart", 8080, app="cart", version="v1"), policies=names),
        replace(workload("shop/cart-2", "cart", 8080, app="cart", version="v2"), policies=names),
        replace(workload("shop/db", "db", tier="data", zone="a"), policies=names),
        workload("shop/plain", "plain"),
    ]
    port = ServicePort(80, "http", "TCP", "http", True, "")
    services = {"shop/cart": Service("shop/cart", ("10.96.0.1",), (port,))}
    return Snapshot("1", {one.name: one for one in workloads}, services, policies={policy.name: policy for policy in policies})


connections = st.builds(
    Seen,
    st.just(False),
    st.sampled_from(CALLERS),
    st.sampled_from(("shop/cart-1", "shop/db", "shop/plain", "")),
    st.just("shop/cart"),
    st.sampled_from((80, 53, 9)),
    st.sampled_from(("TCP", "UDP")),
    st.sampled_from(Outcome),
    st.just(""),
    st.just(""),
    st.just(""),
)
direct = connections.map(lambda seen: seen._replace(service="", target=seen.target or "shop/db"))
requests = st.builds(
    lambda seen, method, path: seen._replace(protocol="TCP", port=80, method=method, path=paths.template(path)),
    connections,
    st.sampled_from(("GET", "POST", "DELETE", "")),
    st.sampled_from(PATHS),
)
recorded = st.lists(st.one_of(connections, direct, requests), max_size=12, unique=True).map(
    lambda found: [Recorded(seen, CALLS, time.time()) for seen in found]
)


def proposed(found: list[Recorded], snapshot: Snapshot) -> tuple[tuple[CallRow, ...], Result]:
    rows = compare.listed(found, snapshot, drawn.TRUST_DOMAIN, "shop").rows
    assert all(isinstance(row, CallRow) for row in rows)
    kept = tuple(row for row in rows if isinstance(row, CallRow))
    return kept, tightest("shop", kept)


@settings(max_examples=500, deadline=None)
@given(recorded, drawn.policy_sets(most=2))
def test_what_was_called_and_let_through_is_allowed(found: list[Recorded], policies: list[Policy]) -> None:
    snapshot = mesh(policies)
    rows, result = proposed(found, snapshot)
    for row in rows:
        good = row.outcome == "served" and row.answer == "allowed" and row.service_account and row.port
        if good:
            namespace, _, account = row.service_account.partition("/")
            call = Call(Caller(namespace, account, drawn.TRUST_DOMAIN), row.port, row.protocol, row.method, row.path)
            for labels in row.receivers.values():
                own = [one.policy for one in result.policies if set(one.selector) <= set(labels.items())]
                assert not labels or judge(own, call).answer is Answer.ALLOWED


@settings(max_examples=200, deadline=None)
@given(recorded)
def test_the_policies_are_valid_and_nobody_new_comes_through(found: list[Recorded]) -> None:
    _, result = proposed(found, mesh([]))
    checked = read(yaml([one.resource() for one in result.policies]), "stdin")
    assert [(one.key.qualified if one.key else "", one.problems) for one in checked] == [(one.policy.name, ()) for one in result.policies]
    for one in result.policies:
        for method, path in (("GET", "/items"), ("", "")):
            assert judge([one.policy], Call(NEW, 8080, "TCP", method, path)).answer is Answer.DENIED


def row(**fields: Any) -> CallRow:
    known: dict[str, Any] = {
        "owner": "shop/web", "source": "shop/web", "service_account": "shop/web", "receivers": {"shop/cart-1": {"app": "cart"}}, "destination": "shop/cart:80",
        "port": 8080, "protocol": "TCP", "method": "GET", "path": "/items", "outcome": "served", "answer": "allowed", "count": CALLS,
    }  # fmt: skip
    return CallRow(**{**known, **fields})


def rules(*rows: CallRow) -> list[dict[str, Any]]:
    (one,) = tightest("shop", rows).policies
    found: list[dict[str, Any]] = one.resource()["spec"]["rules"]
    return found


def test_callers_that_do_the_same_share_a_rule_and_others_have_their_own() -> None:
    wide = rules(row(), row(service_account="bank/teller"), row(service_account="bank/boss", method="POST"), row(method="HEAD"))
    read_only, teller, boss = (
        {"operation": {"ports": ["8080"], "methods": methods, "paths": ["/items"]}} for methods in (["GET", "HEAD"], ["GET"], ["POST"])
    )
    assert [(rule["from"][0]["source"]["serviceAccounts"], rule["to"]) for rule in wide] == [
        (["bank/boss"], [boss]),
        (["bank/teller"], [teller]),
        (["shop/web"], [read_only]),
    ]
    assert rules(row(), row(service_account="bank/teller"))[0]["from"][0]["source"]["serviceAccounts"] == ["bank/teller", "shop/web"]


def test_paths_with_identifiers_become_prefixes_that_swallow_others() -> None:
    found = rules(row(path="/items/{}/price"), row(path="/items/list"), row(path="/cart"))
    assert found[0]["to"][0]["operation"]["paths"] == ["/cart", "/items/*"]


def test_a_connection_asks_for_no_request() -> None:
    assert rules(row(method="", path=""))[0]["to"] == [{"operation": {"ports": ["8080"], "protocols": ["TCP"]}}]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        pytest.param({"answer": "denied"}, "calls that are denied now", id="denied-by-todays-policies"),
        pytest.param({"outcome": "denied"}, "calls that are denied now", id="was-denied"),
        pytest.param({"outcome": "unanswered"}, "requests that nobody answered", id="unanswered"),
        pytest.param({"outcome": "unauthorized"}, "requests that were answered with 401 or 403", id="refused-by-the-application"),
        pytest.param({"service_account": "", "source": ""}, "calls of callers that nobody vouches for", id="stranger"),
        pytest.param({"port": 0}, "calls to a port that is not known", id="port"),
        pytest.param({"receivers": {"shop/x": {}}}, "calls to workloads without labels, which no selector can choose", id="labels"),
    ],
)
def test_what_is_left_out_is_said_and_counted(fields: dict[str, Any], why: str) -> None:
    result = tightest("shop", [row(**fields)])
    assert (result.policies, result.notes) == ((), (f"left out: {CALLS} {why}",))


def test_what_is_denied_now_and_would_be_allowed_is_noted() -> None:
    result = tightest(
        "shop", [row(path="/items/{}"), row(path="/items/secret", answer="denied", count=3), row(path="/admin", answer="denied")]
    )
    assert [note for note in result.notes if note.startswith("too wide")] == [
        "too wide: denied now, and allowed by these policies unless a DENY stays in force: shop/web -> shop/cart:80 GET /items/secret (3 calls)"
    ]


def test_workloads_are_chosen_by_their_applications_name() -> None:
    assert selector_of({"app": "cart", "version": "v1"}) == (("app", "cart"),)
    assert selector_of({"tier": "data", "zone": "a"}) == (("tier", "data"), ("zone", "a"))
