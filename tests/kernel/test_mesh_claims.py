"""A/B by what a verified token says: two backends on two nodes, callers on both, and nobody who gets there by a token that is not good."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from lab.lab import Lab
from tests.kernel import gateway, shop
from tests.tokens import Issuer, tampered, unsigned

pytestmark = pytest.mark.kernel

CALLS = 11
ISSUER, STRANGER = Issuer("https://one.test"), Issuer("https://one.test")
BETA = "filters: [{type: ExtensionRef, extensionRef: {group: meshagent.io, kind: CallerMatch, name: beta}}], backendRefs: [{name: echo-v2, port: 80}]"
ROUTES = {"ab": f"[{{{BETA}}}, {{backendRefs: [{{name: echo-v1, port: 80}}]}}]"}
CALLER_MATCH = """
apiVersion: meshagent.io/v1alpha1
kind: CallerMatch
metadata: {name: beta}
spec: {claims: [{path: [realm, roles], values: [beta], notValues: [staff]}]}
---"""
TOKENS = f"""
apiVersion: meshagent.io/v1alpha1
kind: RequestAuthentication
metadata: {{name: tokens}}
spec: {{selector: {{matchLabels: {{app: echo}}}}, jwtRules: {json.dumps([{"issuer": ISSUER.name, "jwks": ISSUER.jwks}])}}}
---"""
GUARD = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: no-admin}
spec: {selector: {matchLabels: {version: v2}}, action: DENY, rules: [{to: [{operation: {paths: [/admin]}}]}]}
"""
CALLERS = ("frontend", gateway.V2)
"""On node 1, beside v1, and on node 2, beside v2."""


@pytest.fixture(scope="module")
def url(lab: Lab) -> Iterator[str]:
    with gateway.running(lab, ROUTES, CALLER_MATCH, TOKENS) as addresses:
        found = f"http://{addresses['ab']}"
        beta = bearer(ISSUER.token(realm={"roles": ["beta"]}))
        for caller in CALLERS:
            shop.takes(lambda caller=caller: gateway.pods(lab, caller, found, *beta) == {"echo-v2": 1})  # type: ignore[misc]
        yield found


def bearer(token: str) -> tuple[str, str]:
    return "-H", f"authorization: Bearer {token}"


@pytest.mark.parametrize("caller", CALLERS)
def test_who_has_the_claim_gets_the_other_version(lab: Lab, url: str, caller: str) -> None:
    many = f"{url}/?[1-{CALLS}]"
    assert gateway.pods(lab, caller, many, *bearer(ISSUER.token(realm={"roles": ["tester", "beta"]}))) == {"echo-v2": CALLS}
    assert gateway.pods(lab, caller, many, *bearer(ISSUER.token(realm={"roles": "beta"}))) == {"echo-v2": CALLS}
    assert gateway.pods(lab, caller, many, *bearer(ISSUER.token(realm={"roles": ["tester"]}))) == {"echo-v1": CALLS}
    assert gateway.pods(lab, caller, many, *bearer(ISSUER.token(realm={"roles": ["beta", "staff"]}))) == {"echo-v1": CALLS}
    assert gateway.pods(lab, caller, many, *bearer(ISSUER.token(roles=["beta"]))) == {"echo-v1": CALLS}
    assert gateway.pods(lab, caller, many) == {"echo-v1": CALLS}


@pytest.mark.parametrize("caller", CALLERS)
def test_a_token_that_is_not_good_opens_nothing(lab: Lab, url: str, caller: str) -> None:
    good: dict[str, Any] = {"realm": {"roles": ["beta"]}}
    for token in (
        STRANGER.token(**good),
        unsigned(ISSUER.token(**good)),
        tampered(ISSUER.token(), **good),
        ISSUER.token(lifetime_s=-300, **good),
        Issuer("https://two.test").token(**good),
    ):
        assert shop.codes(lab, caller, url, *bearer(token)) == {"401": 1}


def test_one_connection_is_routed_request_by_request(lab: Lab, url: str) -> None:
    beta, other = bearer(ISSUER.token(realm={"roles": ["beta"]})), bearer(ISSUER.token())
    argv = ["curl", "-s", "-w", "\\n", *beta, url, "--next", "-s", "-w", "\\n", *other, url, "--next", "-s", "-w", "\\n", *beta, url]
    text = lab.exec("frontend", argv, check=True).stdout
    assert [json.loads(line)["pod"] for line in text.splitlines()] == ["echo-v2", "echo-v1", "echo-v2"]


@pytest.mark.parametrize("caller", CALLERS)
def test_policies_of_the_version_that_is_chosen_hold(lab: Lab, url: str, caller: str) -> None:
    beta, other = bearer(ISSUER.token(realm={"roles": ["beta"]})), bearer(ISSUER.token())
    with shop.applied(lab, GUARD):
        shop.takes(lambda: shop.codes(lab, caller, f"{url}/admin", *beta) == {"403": 1})
        assert shop.codes(lab, caller, f"{url}/admin?[1-{CALLS}]", *beta) == {"403": CALLS}
        assert shop.codes(lab, caller, f"{url}/admin?[1-{CALLS}]", *other) == {"200": CALLS}
        assert shop.codes(lab, caller, f"{url}/?[1-{CALLS}]", *beta) == Counter({"200": CALLS})
    shop.takes(lambda: shop.codes(lab, caller, f"{url}/admin", *beta) == {"200": 1})
