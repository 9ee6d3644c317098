"""Tokens at a real Envoy with generated configuration: which are believed, what policies see of them, and what reaches the application."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from envoy.extensions.common.matching.v3 import extension_matcher_pb2
from envoy.extensions.filters.http.composite.v3 import composite_pb2
from envoy.extensions.filters.http.jwt_authn.v3 import config_pb2
from google.protobuf.any_pb2 import Any as AnyMessage

from agent.l7 import names
from agent.l7.snapshot import Builder
from agent.model import (
    Action,
    Authentication,
    ClaimCondition,
    HeaderCondition,
    MatchKind,
    Operation,
    Policy,
    PolicyRule,
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

ONE, TWO, STRANGER = Issuer("https://one.test"), Issuer("two@test", algorithm="RS256"), Issuer("https://one.test", kid="k1")
GUARD = Policy("default/(authentication:1)", Action.DENY, (PolicyRule(operations=(Operation(methods=("(none)",), protocols=("TCP",)),)),))


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def believes(*issuers: TokenIssuer) -> Authentication:
    return Authentication("default/tokens", issuers)


def trusted(issuer: Issuer, **more: Any) -> TokenIssuer:
    return TokenIssuer(issuer.name, keys=issuer.jwks, **more)


def ask(
    directory: Path, authentication: Authentication, *asked: tuple[str, Mapping[str, str]], rules: tuple[Policy, ...] = ()
) -> list[Answer]:
    """Requests (path, headers) to a workload with this RequestAuthentication and these policies."""
    [entry] = free_ports(1)
    with requests.backends(s=requests.plain) as targets:
        policies = (GUARD, *rules)
        pod = requests.pod("p", "s", entry, targets["s"], policies=tuple(p.name for p in policies))
        pod = dataclasses.replace(pod, authentications=(authentication.name,))
        snapshot = requests.scene([pod], [harness.service("s", "127.0.0.1", entry)], policies=policies)
        snapshot = dataclasses.replace(snapshot, authentications={authentication.name: authentication} if authentication.issuers else {})
        return requests.through_envoy(
            directory, snapshot, [entry], lambda: [harness.request(entry, path, headers=headers) for path, headers in asked]
        )


def test_a_token_is_believed_if_issuer_key_audience_and_time_are_right_and_a_request_without_one_goes_on(tmp_path: Path) -> None:
    good = ONE.token(aud="shop")
    cases = {
        "none": ({}, 200),
        "good": (bearer(good), 200),
        "good, of several audiences": (bearer(ONE.token(aud=["x", "shop"])), 200),
        "good, of the other issuer": (bearer(TWO.token()), 200),
        "not Bearer": ({"authorization": "Basic dG9tOnRvbQ=="}, 200),
        "expired": (bearer(ONE.token(aud="shop", lifetime_s=-120)), 401),
        "not yet": (bearer(ONE.token(aud="shop", nbf=4102444800)), 401),
        "wrong audience": (bearer(ONE.token(aud="bank")), 403),
        "no audience": (bearer(ONE.token()), 403),
        "wrong key": (bearer(STRANGER.token(aud="shop")), 401),
        "unknown key": (bearer(ONE.token(aud="shop", header={"kid": "k9"})), 401),
        "unknown issuer": (bearer(Issuer("https://evil.test").token(aud="shop")), 401),
        "one issuer's key under another's name": (bearer(TWO.token(iss=ONE.name, aud="shop")), 401),
        "algorithm none": (bearer(tokens.unsigned(good)), 401),
        "algorithm of another kind": (bearer(ONE.token(aud="shop", header={"alg": "HS256"})), 401),
        "tampered": (bearer(tokens.tampered(good, sub="root")), 401),
        "garbage": (bearer("garbage"), 401),
        "dots": (bearer("a.b.c"), 401),
        "large garbage": (bearer("x" * 40000), 401),
        "oversized": (bearer("x" * 70000), 431),
        "in the query": ({}, 200),
        "bad in the query": ({}, 401),
    }
    asked = [("/", headers) for headers, _ in cases.values()]
    asked[-2], asked[-1] = (f"/?access_token={good}", {}), ("/?access_token=a.b.c", {})
    answers = ask(tmp_path, believes(trusted(ONE, audiences=("shop",)), trusted(TWO)), *asked)
    assert {name: answer.status for name, answer in zip(cases, answers, strict=True)} == {n: status for n, (_, status) in cases.items()}
    refused = answers[list(cases).index("expired")]
    assert refused.headers[names.REASON_HEADER] == "request-authentication"
    assert "www-authenticate" in refused.headers


def test_the_application_sees_of_a_token_what_the_issuer_says_and_never_what_a_client_forges(tmp_path: Path) -> None:
    shown = trusted(ONE, forward=True, payload_header="x-payload", claim_headers=(("x-group", "realm.group"),))
    token = ONE.token(realm={"group": "staff"})
    forged = {"x-payload": "forged", "x-group": "root"}
    answers = ask(tmp_path, believes(shown, trusted(TWO)), ("/", bearer(token) | forged), ("/", forged), ("/", bearer(TWO.token())))
    seen = [answer.seen["headers"] for answer in answers]
    assert seen[0]["authorization"] == f"Bearer {token}"
    assert seen[0]["x-payload"] == token.split(".")[1]
    assert seen[0]["x-group"] == "staff"
    assert {"x-payload", "x-group"}.isdisjoint(seen[1])
    assert "authorization" not in seen[2], "not forwarded unless asked for"


def test_tokens_are_found_in_headers_parameters_and_cookies(tmp_path: Path) -> None:
    places = trusted(ONE, headers=(("x-token", "JWT "),), parameters=("t",), cookies=("session",), payload_header="x-payload")
    token = ONE.token()
    answers = ask(
        tmp_path,
        believes(places),
        ("/", {"x-token": f"JWT {token}"}),
        (f"/?a=1&t={token}&b=2", {}),
        ("/", {"cookie": f"a=1; session={token}"}),
        ("/", bearer("not.looked.at")),
        ("/", {"x-token": "JWT a.b.c"}),
    )
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 401]
    assert ["x-payload" in answer.seen["headers"] for answer in answers[:4]] == [True, True, True, False]
    assert answers[1].seen["path"] == "/?a=1&b=2", "the application does not see the token"


def test_keys_that_are_not_known_yet_refuse_tokens_and_nothing_else(tmp_path: Path) -> None:
    answers = ask(tmp_path, believes(TokenIssuer(ONE.name)), ("/", {}), ("/", bearer(ONE.token())))
    assert [answer.status for answer in answers] == [200, 401]


def test_an_authentication_that_is_named_but_missing_lets_nothing_past(tmp_path: Path) -> None:
    answers = ask(tmp_path, believes(), ("/", {}), ("/", bearer(ONE.token())))
    assert [answer.status for answer in answers] == [401, 401]


CLAIMS: dict[str, Any] = {
    "groups": ["a", "b"],
    "realm": {"roles": ["admin"]},
    "scope": "read write",
    "aud": "shop",
    "azp": "app",
    "verified": True,
    "level": 3,
}
CONDITIONS = [
    pytest.param(Source(request_principals=("https://one.test/tom",)), True, id="principal"),
    pytest.param(Source(request_principals=("https://one.test/*",)), True, id="issuer"),
    pytest.param(Source(request_principals=("https://one.test/t*",)), True, id="prefix"),
    pytest.param(Source(request_principals=("https://one.te*",)), True, id="prefix-within-issuer"),
    pytest.param(Source(request_principals=("*/tom",)), True, id="subject"),
    pytest.param(Source(request_principals=("*.test/tom",)), True, id="suffix"),
    pytest.param(Source(request_principals=("*",)), True, id="any"),
    pytest.param(Source(request_principals=("https://one.test/tim", "two@test/*", "https:/*/tom", "tom")), False, id="others"),
    pytest.param(Source(not_request_principals=("*",)), False, id="not-any"),
    pytest.param(Source(not_request_principals=("two@test/*",)), True, id="not-another"),
    pytest.param(ClaimCondition(("groups",), ("b",)), True, id="list"),
    pytest.param(ClaimCondition(("groups",), ("c",)), False, id="not-in-list"),
    pytest.param(ClaimCondition(("groups",), (), ("a",)), False, id="unwanted-in-list"),
    pytest.param(ClaimCondition(("realm", "roles"), ("adm*",)), True, id="nested"),
    pytest.param(ClaimCondition(("scope",), ("write",)), True, id="spaces"),
    pytest.param(ClaimCondition(("aud",), ("shop",)), True, id="audience"),
    pytest.param(ClaimCondition(("azp",), ("*pp",)), True, id="presenter"),
    pytest.param(ClaimCondition(("verified",), ("true",)), True, id="truth"),
    pytest.param(ClaimCondition(("level",), ("3",)), True, id="number"),
    pytest.param(ClaimCondition(("absent",), ("*",)), False, id="absent"),
    pytest.param(ClaimCondition(("absent",), (), ("x",)), True, id="absent-is-not-x"),
]


def test_policies_see_what_a_verified_token_says(tmp_path: Path) -> None:
    """Each condition as an ALLOW for a path of its own: one Envoy for all of them."""
    conditions = [(param.values[0], param.values[1], f"/{param.id}") for param in CONDITIONS]
    rules = []
    for condition, _, path in conditions:
        to = (Operation(paths=(path,)),)
        if isinstance(condition, Source):
            rules.append(PolicyRule((condition,), to))
        else:
            assert isinstance(condition, ClaimCondition)
            rules.append(PolicyRule(operations=to, also_operations=(Operation(claims=(condition,)),)))
    allow = Policy("default/allow", Action.ALLOW, tuple(rules))
    headers = bearer(ONE.token(**CLAIMS))
    answers = ask(
        tmp_path,
        believes(trusted(ONE)),
        *((path, headers) for _, _, path in conditions),
        *((path, {}) for _, _, path in conditions),
        rules=(allow,),
    )
    found = {path: answer.status for (_, _, path), answer in zip(conditions, answers, strict=False)}
    assert found == {path: 200 if fits else 403 for _, fits, path in conditions}
    without = {path for (_, _, path), answer in zip(conditions, answers[len(conditions) :], strict=True) if answer.status == 200}
    assert without == {"/not-any", "/not-another", "/unwanted-in-list", "/absent-is-not-x"}, "no token: no value fits, every notValue holds"


def test_a_deny_without_a_token_and_conditions_on_headers_hold(tmp_path: Path) -> None:
    rules = (
        Policy("default/token", Action.DENY, (PolicyRule((Source(not_request_principals=("*",)),)),)),
        Policy("default/role", Action.DENY, (PolicyRule(also_operations=(Operation(headers=(HeaderCondition("x-role", ("admin",)),)),)),)),
        Policy("default/version", Action.ALLOW, (PolicyRule(also_operations=(Operation(headers=(HeaderCondition("x-version", (), ("v1*",)),)),)),)),
    )  # fmt: skip
    good = bearer(ONE.token())
    sent = [
        {},
        good,
        {**good, "x-role": "admin"},
        {**good, "x-role": "user, admin"},
        {**good, "x-role": "administrator"},
        {**good, "x-version": "v1.2"},
    ]
    answers = ask(tmp_path, believes(trusted(ONE)), *(("/", headers) for headers in sent), rules=rules)
    assert [answer.status for answer in answers] == [403, 200, 403, 403, 200, 403]


def test_each_backend_of_a_route_demands_its_own_tokens(tmp_path: Path) -> None:
    ports = free_ports(3)
    known = {name: Authentication(name, (trusted(issuer),)) for name, issuer in (("default/one", ONE), ("default/two", TWO))}
    entry = ports[0]
    with requests.backends(one=requests.plain, two=requests.plain) as targets:
        pods = [
            dataclasses.replace(requests.pod(f"p-{n}", n, 80, targets[n], policies=(GUARD.name,)), authentications=(f"default/{n}",))
            for n in ("one", "two")
        ]
        split = harness.route(
            "r",
            harness.rule(requests.to("one", 80, 1), requests.to("one", 80, 1), matches=(requests.path(MatchKind.PREFIX, "/one"),)),
            harness.rule(requests.to("two", 80, 1), requests.to("two", 80, 1), matches=(requests.path(MatchKind.PREFIX, "/two"),)),
            parent="s",
        )
        services = [
            harness.service("s", "127.0.0.1", entry),
            *(harness.service(n, "10.96.0.9", 80, waypoint=False) for n in ("one", "two")),
        ]
        snapshot = dataclasses.replace(requests.scene(pods, services, split, policies=[GUARD]), authentications=known)
        asked = [(path, issuer) for path in ("/one", "/two") for issuer in (ONE, TWO)]
        answers = requests.through_envoy(
            tmp_path, snapshot, [entry], lambda: [harness.request(entry, path, headers=bearer(issuer.token())) for path, issuer in asked]
        )
    assert [answer.status for answer in answers] == [200, 401, 401, 200]


def nodes(*where: str, forward: bool = False) -> Snapshot:
    """A service with an endpoint on each of these nodes; the agent's own is node-1."""
    known = believes(trusted(ONE, forward=forward))
    pods = [
        dataclasses.replace(
            harness.workload(f"p{n}", f"10.0.0.{n + 2}", backing={"default/s": {80: 8080}}, policies=(GUARD.name,)),
            node=node,
            authentications=(known.name,),
        )
        for n, node in enumerate(where)
    ]
    snapshot = harness.snapshot([requests.CALLER, *pods], [harness.service("s", "10.96.0.1", 80)], policies=[GUARD])
    return dataclasses.replace(snapshot, authentications={known.name: known})


@pytest.mark.parametrize(
    ("snapshot", "receivers", "at_caller"),
    [
        pytest.param(nodes("node-1", "node-1"), set(), "strips", id="here"),
        pytest.param(nodes("node-2", "node-2"), set(), "keeps", id="there"),
        pytest.param(nodes("node-1", "node-2"), {"default/p0", "default/p1"}, "nothing", id="both"),
        pytest.param(nodes("node-1", "node-2", forward=True), set(), "keeps", id="both-forwarded"),
    ],
)
def test_a_token_is_taken_away_by_the_last_who_verifies_it(snapshot: Snapshot, receivers: set[str], at_caller: str) -> None:
    builder = Builder("node-1", harness.TRUST_DOMAIN)
    assert builder.needs_inbound(snapshot) == receivers
    local = [harness.local(one) for one in snapshot.workloads.values() if one.node == "node-1"]
    built = builder.build(snapshot, local, "")
    route = harness.decoded(built, names.ROUTES, names.service("default/s", 80)).virtual_hosts[0].routes[0]
    assert (names.JWT_FILTER in str(route)) is (at_caller != "nothing")
    if at_caller != "nothing":
        assert provider(route.typed_per_filter_config[names.JWT_FILTER]).forward is (at_caller == "keeps")


def provider(config: AnyMessage) -> Any:
    """The only provider in a route's configuration of the filter."""
    matcher, action, found = (
        extension_matcher_pb2.ExtensionWithMatcherPerRoute(),
        composite_pb2.ExecuteFilterAction(),
        config_pb2.JwtAuthentication(),
    )
    assert config.Unpack(matcher)
    assert matcher.xds_matcher.on_no_match.action.typed_config.Unpack(action)
    assert action.typed_config.typed_config.Unpack(found)
    (one,) = found.providers.values()
    return one


@pytest.mark.parametrize(
    ("source", "claims", "payload", "lists"),
    [
        pytest.param(Source(service_accounts=("default/caller",)), (), "", [], id="nothing"),
        pytest.param(Source(request_principals=("*",)), (), names.JWT_PAYLOAD, [], id="who"),
        pytest.param(Source(), (ClaimCondition(("groups",), ("a",)),), names.JWT_PAYLOAD, [], id="a-claim"),
        pytest.param(Source(), (ClaimCondition(("scope",), ("a",)),), names.JWT_PAYLOAD, ["scope"], id="a-list"),
        pytest.param(Source(), (ClaimCondition(("permission",), (), ("a",)),), names.JWT_PAYLOAD, ["permission"], id="another"),
    ],
)
@pytest.mark.parametrize("action", [Action.ALLOW, Action.DENY, Action.AUDIT])
def test_of_a_token_that_is_written_which_rules_read(
    action: Action, source: Source, claims: tuple[ClaimCondition, ...], payload: str, lists: list[str]
) -> None:
    asking = Policy(GUARD.name, action, (PolicyRule((source,), (Operation(paths=("/",)),), also_operations=(Operation(claims=claims),)),))
    snapshot = dataclasses.replace(nodes("node-1"), policies={GUARD.name: asking})
    local = [harness.local(one) for one in snapshot.workloads.values()]
    built = Builder("node-1", harness.TRUST_DOMAIN).build(snapshot, local, "")
    route = harness.decoded(built, names.ROUTES, names.service("default/s", 80)).virtual_hosts[0].routes[0]
    found = provider(route.typed_per_filter_config[names.JWT_FILTER])
    assert (found.payload_in_metadata, list(found.normalize_payload_in_metadata.space_delimited_claims)) == (payload, lists)


def test_a_changed_key_changes_routes_and_no_listener() -> None:
    snapshot = nodes("node-1")
    builder = Builder("node-1", harness.TRUST_DOMAIN)
    local = [harness.local(one) for one in snapshot.workloads.values()]
    before = builder.build(snapshot, local, "")
    new = dataclasses.replace(believes(trusted(STRANGER)))
    after = builder.build(dataclasses.replace(snapshot, authentications={new.name: new}), local, "")
    assert {kind for kind in before if before[kind] != after[kind]} == {names.ROUTES}


def test_envoy_accepts_what_is_built(tmp_path: Path) -> None:
    snapshot = nodes("node-2", "node-2")
    harness.validate(Builder("node-1", harness.TRUST_DOMAIN).build(snapshot, [harness.local(requests.CALLER)], ""), tmp_path)
