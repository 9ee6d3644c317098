"""Connections that are older than a policy: what goes past the rules ends, what is allowed loses no request."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from agent.revocation import LET_GO_S
from agent.supervisor import READERS_S
from lab.cli import SHOP
from lab.lab import Lab
from tests.kernel import keeper, shop

pytestmark = pytest.mark.kernel

KEEPER = Path(keeper.__file__)
AT_ONCE_S = 2.0
"""What applications that are connected without a waypoint have, from the moment that `apply` returns."""
BOUND_S = 15.0
"""What connections in a waypoint's pool have, README: Honest limits."""
POLICY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: kept}}
spec:
  selector: {{matchLabels: {{{labels}}}}}
  action: {action}
  rules: [{rule}]
"""
HEALTH_ONLY = POLICY.format(labels="app: frontend", action="ALLOW", rule="{to: [{operation: {methods: [GET], paths: [/healthz]}}]}")
NOT_OTHER = POLICY.format(labels="app: frontend", action="DENY", rule="{from: [{source: {serviceAccounts: [default/other]}}]}")
ITEMS_ONLY = "{to: [{operation: {methods: [GET], paths: [/items]}}]}"
ALIKE = POLICY.format(labels="app: cart", action="ALLOW", rule=ITEMS_ONLY)
UNLIKE = POLICY.format(labels="version: v1", action="ALLOW", rule=ITEMS_ONLY)
"""The endpoints of cart differ: only the receiver can decide."""
ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart-split}
spec:
  parentRefs: [{group: "", kind: Service, name: cart, port: 80}]
  rules: [{backendRefs: [{name: cart, port: 80}]}]
"""
CARTS = ("cart-v1-1", "cart-v1-2", "cart-v2-1")
"""The first is on the caller's node, the others are reached through tunnels."""


class Call(NamedTuple):
    """What a keeper says of a request."""

    at: float
    connection: int
    outcome: str
    pod: str


@contextmanager
def keeping(lab: Lab, place: str, *args: str) -> Iterator[list[Call]]:
    """A keeper that runs within the block; the list is filled when it ends."""
    process = lab.popen(place, ["python3", str(KEEPER), *args])
    calls: list[Call] = []
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        yield calls
    finally:
        process.terminate()
        out, error = process.communicate(timeout=20)
    assert process.returncode == 0, error
    calls += [Call(*one) for one in json.loads(out)]


def outcomes(calls: list[Call]) -> Counter[str]:
    return Counter(call.outcome for call in calls)


def frozen(lab: Lab, node: str) -> ExitStack:
    """Envoy does nothing until the stack is closed."""
    pid = int(lab.status(node)["waypoint"]["pid"])
    stack = ExitStack()
    os.kill(pid, signal.SIGSTOP)
    stack.callback(os.kill, pid, signal.SIGCONT)
    return stack


@contextmanager
def policy(lab: Lab, document: str) -> Iterator[float]:
    """A policy that is applied in the block; when that was done (CLOCK_MONOTONIC)."""
    try:
        lab.apply(document)
        yield time.monotonic()
    finally:
        with shop.changed(lab):
            shop.delete(lab, document)


@pytest.fixture
def unread(lab: Lab) -> Iterator[None]:
    """Nobody reads requests to cart but the caller's waypoint, which only routes them, and never tries again."""
    own = [text for text in (SHOP / "mesh" / "policies.yaml").read_text().split("---\n") if "name: cart-" in text]
    assert len(own) == 2
    with shop.changed(lab):
        lab.apply(ROUTE)
    for text in own:
        with shop.changed(lab):
            shop.delete(lab, text)
    shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/?[1-31]") == {"200": 31})
    time.sleep(READERS_S + 1)  # then Envoy has let go of connections that were read
    try:
        yield
    finally:
        with shop.changed(lab):
            lab.apply(SHOP / "mesh")
        shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items") == {"200": 1})
        shop.takes(lambda: shop.codes(lab, "other", "http://cart/items") == {"403": 1})


@pytest.mark.parametrize("envoy", ["running", "frozen"])
def test_a_connection_that_goes_past_the_first_l7_policy_ends_at_once_and_new_ones_are_read(lab: Lab, envoy: str) -> None:
    """From the same node, from another one through a tunnel, and from outside the mesh. A frozen Envoy does not hold that up."""
    callers = {"other": "http://frontend/healthz", "cart-v1-2": "http://frontend/healthz", "client": "http://10.77.1.10:8080/healthz"}
    with ExitStack() as stack:
        kept = {place: stack.enter_context(keeping(lab, place, "get", "2", "20", url)) for place, url in callers.items()}
        time.sleep(1)
        with frozen(lab, "node-1") if envoy == "frozen" else ExitStack():
            applied = stack.enter_context(policy(lab, HEALTH_ONLY))
            time.sleep(AT_ONCE_S + 1)
        if envoy == "running":
            for place, url in callers.items():
                assert shop.codes(lab, place, url, "-X", "POST") == {"403": 1}, place
        ended = time.monotonic()
    for place, calls in kept.items():
        before = [call for call in calls if call.connection < 2]
        after = [call for call in calls if call.connection >= 2 and call.at < ended]
        assert outcomes(before)["200"] > 10, place
        assert max(call.at for call in before) < applied + AT_ONCE_S, place
        assert sum(count for outcome, count in outcomes(before).items() if outcome != "200") == 2, (place, outcomes(before))
        if envoy == "running":
            assert outcomes(after).keys() == {"200"}, (place, outcomes(after))


def test_an_l4_denial_closes_what_lives_although_envoy_is_frozen(lab: Lab) -> None:
    with (
        keeping(lab, "other", "get", "2", "40", "http://frontend/healthz") as denied,
        keeping(lab, "cart-v1-1", "get", "2", "40", "http://frontend/healthz") as allowed,
    ):
        with frozen(lab, "node-1"), policy(lab, NOT_OTHER) as applied:
            time.sleep(AT_ONCE_S)
            assert "Operation not permitted" in lab.exec("other", ["curl", "-sv", "http://frontend/healthz"]).stderr
        time.sleep(0.5)
    before = [call for call in denied if call.connection < 2]
    assert max(call.at for call in before) < applied + AT_ONCE_S
    assert outcomes(before)["ECONNABORTED"] + outcomes(before)["ECONNRESET"] + outcomes(before)["RemoteDisconnected"] == 2, outcomes(before)
    assert outcomes(allowed).keys() == {"200"}


@pytest.mark.parametrize("document", [pytest.param(ALIKE, id="endpoints-alike"), pytest.param(UNLIKE, id="the-receiver-decides")])
@pytest.mark.usefixtures("unread")
def test_the_first_l7_policy_loses_no_request_that_it_allows_and_no_connection_evades_it(lab: Lab, document: str) -> None:
    protected = CARTS if document == ALIKE else CARTS[:2]
    with (
        keeping(lab, "frontend", "get", "10", "100", "http://cart/items") as allowed,
        keeping(lab, "frontend", "get", "10", "100", "http://cart/") as denied,
    ):
        time.sleep(2)
        with policy(lab, document) as applied:
            time.sleep(BOUND_S + 2)
            ended = time.monotonic()
    assert outcomes(allowed).keys() == {"200"}
    assert len(allowed) > 1500
    before, after = [c for c in denied if c.at < applied - 1], [c for c in denied if applied + BOUND_S < c.at < ended]
    assert {call.pod for call in before} == set(CARTS)
    assert {call.pod for call in after} - {""} == set(CARTS) - set(protected)
    assert outcomes(denied).keys() == {"200", "403"}
    late = [call.at - applied for call in denied if call.pod in protected and applied < call.at < ended]
    print(f"the last unread request was answered {max(late, default=0.0):.3f} s after the policy; {len(allowed)} allowed, none lost")


@pytest.mark.usefixtures("unread")
def test_a_request_that_goes_on_past_the_receiver_ends_when_its_waypoint_has_had_time(lab: Lab) -> None:
    with keeping(lab, "frontend", "put", "12", "http://cart/items") as uploads:
        time.sleep(1)
        with policy(lab, UNLIKE) as applied:
            time.sleep(BOUND_S + 1)
            ended = time.monotonic()
    cut, answered = [c for c in uploads if c.at < ended], [c for c in uploads if c.at >= ended]
    print([(round(call.at - applied, 2), call.outcome, call.pod) for call in uploads])
    assert len(uploads) == 12
    assert {call.pod for call in answered} == {"cart-v2-1"}
    assert outcomes(answered).keys() == {"200"}
    assert len(cut) >= 4
    assert all(LET_GO_S - 1 < call.at - applied < BOUND_S for call in cut)
