"""Routing by claims of a verified token, through a real Envoy: the final route's policies hold, whatever the first one was."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from agent.l7 import claims, names
from agent.l7.resources import Resources, pack
from agent.l7.snapshot import build
from agent.model import (
    Action,
    Authentication,
    Backend,
    ClaimCondition,
    Operation,
    Policy,
    PolicyRule,
    RouteRule,
    Snapshot,
    Source,
    TokenIssuer,
)
from tests import tokens
from tests.ports import free_ports
from tests.tokens import Issuer
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7 import test_requests as requests
from tests.unit.agent.l7.harness import Answer

ISSUER, STRANGER = Issuer("https://one.test"), Issuer("https://one.test")
KNOWN = Authentication("default/auth", (TokenIssuer(ISSUER.name, keys=ISSUER.jwks),))
DENY = Policy("default/deny", Action.DENY, (PolicyRule(operations=(Operation(paths=("/secret",)),)),))
MUST = Policy("default/must", Action.ALLOW, (PolicyRule(sources=(Source(request_principals=("*",)),)),))
BETA = ClaimCondition(("groups",), ("beta", "alpha*"))


def claimed(*conditions: ClaimCondition, to: tuple[Backend, ...] | None = None) -> RouteRule:
    return dataclasses.replace(harness.rule(*(to or (requests.to("b", 80),))), claims=conditions)


def scene(entry: int, targets: dict[str, int], *rules: RouteRule, a: tuple[str, ...] = (), b: tuple[str, ...] = ()) -> Snapshot:
    """A service whose requests go to `a` or `b`, each with policies of its own; all believe the same issuer."""
    pods = [
        dataclasses.replace(requests.pod(f"p-{name}", name, 80, targets[name], policies=policies), authentications=(KNOWN.name,))
        for name, policies in (("a", a), ("b", b))
    ]
    services = [harness.service("s", "127.0.0.1", entry), *(harness.service(name, "10.96.0.9", 80, waypoint=False) for name in "ab")]
    route = harness.route("r", *rules, parent="s")
    snapshot = requests.scene(pods, services, route, policies=[DENY, MUST])
    return dataclasses.replace(snapshot, authentications={KNOWN.name: KNOWN})


def through_envoy(directory: Path, snapshot: Snapshot, entry: int, *asked: tuple[str, dict[str, str]], spoil: bool = False) -> list[Answer]:
    """The answers to (path, headers); `spoil` takes away what makes routing twice safe."""
    resources: Resources = build(snapshot, [harness.local(snapshot.workloads["default/caller"])], trust_domain=harness.TRUST_DOMAIN)
    if spoil:
        name = f"service/default/s/{entry}"
        configuration = harness.decoded(resources, names.ROUTES, name)
        for key in [key for key in configuration.typed_per_filter_config if key != claims.FILTER]:
            del configuration.typed_per_filter_config[key]
        resources = {**resources, names.ROUTES: {**resources[names.ROUTES], name: pack(configuration)}}

    def work() -> list[Answer]:
        return [harness.request(entry, path, headers=headers) for path, headers in asked]

    async def scenario() -> list[Answer]:
        async with harness.waypoint(harness.config(directory)) as (server, _):
            await harness.applied(server, harness.on_loopback(resources, entry))
            return await asyncio.to_thread(work)

    return asyncio.run(scenario())


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def outcomes(answers: list[Answer]) -> list[str]:
    return [answer.name or str(answer.status) for answer in answers]


def test_a_claim_of_a_good_token_chooses_the_route_and_nothing_else_does(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    good = ISSUER.token(groups=["beta", "staff"])
    cases = {
        "one of a list": (bearer(good), "b"),
        "a text": (bearer(ISSUER.token(groups="beta")), "b"),
        "a pattern": (bearer(ISSUER.token(groups=["alpha-7"])), "b"),
        "another": (bearer(ISSUER.token(groups=["gamma"])), "a"),
        "no such claim": (bearer(ISSUER.token()), "a"),
        "no token": ({}, "a"),
        "a header that says so": ({"groups": "beta", "x-jwt-claim-groups": "beta"}, "a"),
        "another key": (bearer(STRANGER.token(groups=["beta"])), "401"),
        "no signature": (bearer(tokens.unsigned(good)), "401"),
        "tampered": (bearer(tokens.tampered(ISSUER.token(groups=["x"]), groups=["beta"])), "401"),
        "expired": (bearer(ISSUER.token(groups=["beta"], lifetime_s=-120)), "401"),
    }
    with requests.backends(a=requests.plain, b=requests.plain) as targets:
        snapshot = scene(entry, targets, claimed(BETA), harness.rule(requests.to("a", 80)))
        answers = through_envoy(tmp_path, snapshot, entry, *(("/", headers) for headers, _ in cases.values()))
    assert dict(zip(cases, outcomes(answers), strict=True)) == {name: expected for name, (_, expected) in cases.items()}


@pytest.mark.parametrize("weighted", [False, True], ids=["one-backend", "weights"])
def test_the_policies_of_the_final_route_hold_and_those_of_the_first_do_not(tmp_path: Path, weighted: bool) -> None:
    [entry] = free_ports(1)
    both = (requests.to("b", 80), requests.to("b", 80, 2)) if weighted else (requests.to("b", 80),)
    beta, other = bearer(ISSUER.token(groups=["beta"])), bearer(ISSUER.token(groups=["x"]))
    asked = [("/", beta), ("/secret", beta), ("/secret", other), ("/secret", {}), ("/", other), ("/", {})]
    with requests.backends(a=requests.plain, b=requests.plain) as targets:
        rules = (claimed(BETA, to=both), harness.rule(requests.to("a", 80)))
        into = through_envoy(tmp_path, scene(entry, targets, *rules, b=("default/deny",)), entry, *asked)
        out = through_envoy(tmp_path, scene(entry, targets, *rules, a=("default/deny", "default/must")), entry, *asked)
    assert outcomes(into) == ["b", "403", "a", "a", "a", "a"]
    assert outcomes(out) == ["b", "b", "403", "403", "a", "403"]


def test_without_the_configuration_that_does_nothing_a_policy_would_be_skipped(tmp_path: Path) -> None:
    """Why it is there: if this fails, Envoy has changed."""
    [entry] = free_ports(1)
    with requests.backends(a=requests.plain, b=requests.plain) as targets:
        rules = (claimed(BETA), harness.rule(requests.to("a", 80)))
        snapshot = scene(entry, targets, *rules, b=("default/deny",))
        answers = through_envoy(tmp_path, snapshot, entry, ("/secret", bearer(ISSUER.token(groups=["beta"]))), spoil=True)
    assert outcomes(answers) == ["b"]


def test_a_request_that_only_a_claim_leads_anywhere_is_found_and_others_are_404(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    asked = [("/", bearer(ISSUER.token(groups=["beta"]))), ("/secret", bearer(ISSUER.token(groups=["beta"]))), ("/", {})]
    with requests.backends(a=requests.plain, b=requests.plain) as targets:
        answers = through_envoy(tmp_path, scene(entry, targets, claimed(BETA), b=("default/deny",)), entry, *asked)
    assert outcomes(answers) == ["b", "403", "404"]
    assert answers[-1].headers[names.REASON_HEADER] == "no-route"


def test_what_a_token_must_not_say(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    not_guest = ClaimCondition(("realm", "role"), (), ("guest", "robot"))
    said = [bearer(ISSUER.token(realm={"role": role})) for role in ("guest", "robot", "user")]
    with requests.backends(a=requests.plain, b=requests.plain) as targets:
        snapshot = scene(entry, targets, claimed(ClaimCondition(("sub",), ("*",)), not_guest), harness.rule(requests.to("a", 80)))
        answers = through_envoy(tmp_path, snapshot, entry, *(("/", headers) for headers in said), ("/", {}))
    assert outcomes(answers) == ["a", "a", "b", "a"]


def test_the_application_sees_what_the_policies_say_and_no_more(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    with requests.backends(a=requests.plain, b=requests.plain) as targets:
        snapshot = scene(entry, targets, claimed(BETA), harness.rule(requests.to("a", 80)))
        [answer] = through_envoy(tmp_path, snapshot, entry, ("/", bearer(ISSUER.token(groups=["beta"]))))
    assert "authorization" not in answer.seen["headers"], "the final route's filter takes the token away"


def test_a_service_that_asks_for_no_claims_is_as_it_was(tmp_path: Path) -> None:
    snapshot = scene(80, {"a": 1, "b": 2}, harness.rule(requests.to("a", 80)))
    built = build(snapshot, [harness.local(snapshot.workloads["default/caller"])], trust_domain=harness.TRUST_DOMAIN)
    assert not harness.decoded(built, names.ROUTES, "service/default/s/80").typed_per_filter_config
    snapshot = scene(80, {"a": 1, "b": 2}, claimed(BETA))
    harness.validate(build(snapshot, [harness.local(snapshot.workloads["default/caller"])], trust_domain=harness.TRUST_DOMAIN), tmp_path)
