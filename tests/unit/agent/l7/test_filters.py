"""What rules with filters, routes for some callers and routes for gRPC become, and that a real Envoy takes it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2

from agent.l7 import filters, names, rbac
from agent.l7.precedence import match_key
from agent.l7.snapshot import Builder, build
from agent.model import (
    Action,
    Backend,
    GrpcMethod,
    HeaderEdit,
    MatchKind,
    Operation,
    Policy,
    PolicyRule,
    Route,
    RouteMatch,
    RouteRule,
    Snapshot,
    Source,
    StringMatch,
    Workload,
)
from agent.routing import Cors, Mirror, Redirect, Rewrite, Session
from controller import regexes
from tests.unit.agent.l7 import harness

CALLER = replace(harness.workload("caller", "10.0.0.1", account="web"), labels={"version": "v1"})
OTHER = replace(harness.workload("other/caller", "10.0.0.2", account="web"), labels={"version": "v2"})
S, T = Backend("default/s", 80, 1), Backend("default/t", 80, 1)


def at(value: str, kind: MatchKind = MatchKind.PREFIX) -> RouteMatch:
    return RouteMatch(path=StringMatch(kind, value))


def scene(*routes: Route, policies: Sequence[Policy] = (), port: int = 80) -> Snapshot:
    names_of = tuple(policy.name for policy in policies)
    pods = [
        harness.workload(f"p-{name}", f"10.0.1.{n}", backing={f"default/{name}": {port: 8080}}, policies=names_of)
        for n, name in enumerate("st", 1)
    ]
    services = [harness.service(name, f"10.96.0.{n}", port) for n, name in enumerate("st", 1)]
    return harness.snapshot([CALLER, OTHER, *pods], services, routes, policies)


def built(snapshot: Snapshot, *callers: Workload, service: str = "default/s", port: int = 80) -> list[route_components_pb2.Route]:
    local = [
        harness.local(one, path) for one, path in zip(callers or (CALLER, OTHER), (harness.OWN_NETNS, harness.OWN_NETNS_TOO), strict=False)
    ]
    resources = build(snapshot, local, trust_domain=harness.TRUST_DOMAIN)
    configuration = harness.decoded(resources, names.ROUTES, names.service(service, port))
    assert isinstance(configuration, route_pb2.RouteConfiguration)
    (host,) = configuration.virtual_hosts
    return [route for route in host.routes if not route.match.HasField("connect_matcher")]


def ruled(*backends: Backend, match: RouteMatch | None = None, **more: Any) -> RouteRule:
    return replace(harness.rule(*backends, matches=(match,) if match else ()), **more)


def one(rule: RouteRule, port: int = 80) -> route_components_pb2.Route:
    (found,) = built(scene(harness.route("r", rule, parent="s"), port=port), port=port)
    return found


EVERYTHING = (
    ruled(match=at("/a"), redirect=Redirect("https", "a.b", 8443, None, "/x", 308)),
    ruled(match=at("/b"), redirect=Redirect(full_path="/x")),
    ruled(match=at("/b2"), redirect=Redirect(prefix="/")),
    ruled(S, match=at("/c"), rewrite=Rewrite("a.b", None, "/")),
    ruled(S, match=at("/d"), rewrite=Rewrite("", "/x\\1", None)),
    ruled(
        S,
        T,
        match=at("/e"),
        rewrite=Rewrite("", None, "/y"),
        mirrors=(Mirror("default/t", 80, 1250, 10_000), Mirror("default/gone", 80, 1, 100)),
    ),
    ruled(S, match=at("/f"), cors=Cors(((False, "https://a.b"), (True, ".*")), "GET", "x-a", "x-b", 5, True)),
    ruled(S, match=at("/g"), session=Session("c", "/g", 1500, "")),
    ruled(S, match=at("/h"), session=Session("", "", 0, "x-s")),
    ruled(
        S,
        match=at("/i"),
        callers=((Source(labels=(("version", "v1"),)), Source(namespaces=("x",))), (Source(service_accounts=("default/web", "a/b")),)),
    ),
    ruled(S, match=at("/j"), invalid="no such filter"),
)


def test_a_real_envoy_takes_all_filters(tmp_path: Path) -> None:
    consumer = replace(harness.route("x", ruled(T), parent="s"), name="other/x")
    called = ruled(S, match=RouteMatch(grpc=GrpcMethod(None, StringMatch(MatchKind.REGEX, "A.*"))))
    grpc = replace(harness.route("g", called, ruled(S, match=RouteMatch(grpc=GrpcMethod())), parent="t"), grpc=True)
    snapshot = scene(harness.route("r", *EVERYTHING, parent="s"), consumer, grpc)
    harness.validate(build(snapshot, [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN), tmp_path)


def test_a_real_envoy_takes_every_expression_that_the_controller_lets_through(tmp_path: Path) -> None:
    texts = [
        "(.{100}){6}",
        "[^a]{230}",
        r"(\w{4}){100}",
        "(a|b|cc){360}",
        "(?i)x{1000}",
        "((ab?){31}){23}",
        r"\D+\.[^\]\-x]*",
        "x" * 1024,
        "(" * 99 + "a" + ")" * 99,
        *("[*+.]+", r"a\++", r"[\]*+]+", "a}+", r"a\}+", "[(?=]", r"[(?#\w]*", "[[:alpha:][:^space:]]+", r"[\\b]", "a{,3}+"),
    ]
    assert [regexes.problem(text) for text in texts] == [""] * len(texts)
    rules = [ruled(S, match=at(text, MatchKind.REGEX)) for text in texts]
    snapshot = scene(harness.route("r", *rules, parent="s"))
    harness.validate(build(snapshot, [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN), tmp_path)


@pytest.mark.parametrize(
    ("wanted", "port", "expected"),
    [
        pytest.param(Redirect(), 80, 0, id="as-it-came"),
        pytest.param(Redirect(), 8080, 8080, id="the-services-port"),
        pytest.param(Redirect(hostname="a.b"), 8080, 8080, id="the-services-port-elsewhere"),
        pytest.param(Redirect("https"), 80, 0, id="the-schemes-port-is-left-out"),
        pytest.param(Redirect("https"), 8080, 443, id="the-schemes-port-replaces-that-of-host"),
        pytest.param(Redirect("https", "a.b"), 8080, 0, id="a-host-without-a-port"),
        pytest.param(Redirect("", "a.b", 80), 80, 0, id="80-is-left-out"),
        pytest.param(Redirect("https", "", 80), 80, 80, id="80-of-https"),
        pytest.param(Redirect("", "", 9000), 80, 9000, id="the-filters-port"),
    ],
)
def test_the_port_of_a_redirect_is_the_filters_the_schemes_or_the_services(wanted: Redirect, port: int, expected: int) -> None:
    assert one(ruled(redirect=wanted), port).redirect.port_redirect == expected


@pytest.mark.parametrize(
    ("prefix", "new", "plain", "pattern"),
    [
        ("/foo", "/xyz", "/xyz", ""),
        ("/foo/", "/xyz/", "/xyz", ""),
        ("/foo", "", "", r"^\Q/foo\E/*"),
        ("/foo", "/", "", r"^\Q/foo\E/*"),
        ("/", "/xyz", "/xyz/", ""),
        ("/", "", "/", ""),
    ],
)
def test_one_slash_stands_between_the_new_prefix_and_the_rest(prefix: str, new: str, plain: str, pattern: str) -> None:
    action = route_components_pb2.RouteAction()
    filters.rewrite(action, Rewrite("", None, new), at(prefix))
    assert (action.prefix_rewrite, action.regex_rewrite.pattern.regex) == (plain, pattern)


def test_a_rule_for_other_callers_is_left_out_and_names_are_compared_by_envoy() -> None:
    labels = ruled(S, callers=((Source(labels=(("version", "v2"),)),),))
    account = ruled(S, callers=((Source(service_accounts=("default/web",)),),))
    nobody = ruled(S, callers=((Source(labels=(("version", "v3"),)),),))
    snapshot = scene(harness.route("r", labels, account, nobody, parent="s"))
    found = [[(state.key, state.string_match.exact) for state in route.match.filter_state] for route in built(snapshot)]
    assert found == [[(names.WORKLOAD_KEY, "other/caller")], [(names.SERVICE_ACCOUNT_KEY, "default/web")]]
    assert len(built(snapshot, CALLER)) == 1, "the other one is not on this node"


def test_many_callers_are_several_routes_because_envoy_bounds_expressions(tmp_path: Path) -> None:
    accounts = tuple(f"default/account-with-a-long-name-{n:04}" for n in range(500))
    snapshot = scene(harness.route("r", ruled(S, callers=((Source(service_accounts=accounts),),)), parent="s"))
    routes = built(snapshot)
    assert len(routes) == 3
    found = [
        name.removeprefix(r"\Q").removesuffix(r"\E")
        for route in routes
        for name in route.match.filter_state[0].string_match.safe_regex.regex.split("|")
    ]
    assert found == list(accounts)
    harness.validate(build(snapshot, [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN), tmp_path)


def accounts(number: int) -> list[str]:
    return [f"default/a-long-name-{number}-{i:04}" for i in range(900)]


def test_several_long_lists_of_callers_are_one_list_of_those_who_are_here() -> None:
    """Each in several parts: their product would have no bound."""
    several = tuple((Source(service_accounts=("default/web", *accounts(n))),) for n in range(12))
    routes = built(scene(harness.route("r", ruled(S, callers=several), parent="s")))
    assert [[(s.key, s.string_match.exact) for s in route.match.filter_state] for route in routes] == [
        [(names.WORKLOAD_KEY, "default/caller")]
    ]
    assert len(built(scene(harness.route("r", ruled(S, callers=(several[0],) * 12), parent="s")))) < 6, (
        "the same one again says nothing new"
    )


def test_consumer_routes_come_first_and_end_with_a_404_of_their_own() -> None:
    consumer = replace(harness.route("x", ruled(T, match=at("/x")), parent="s"), name="other/x")
    found = built(scene(harness.route("r", ruled(S), parent="s"), consumer))
    assert [(route.name, [state.string_match.exact for state in route.match.filter_state]) for route in found] == [
        ("other/x rule 0", ["other"]),
        ("other no route", ["other"]),
        ("default/r rule 0", []),
    ]
    alone = built(scene(consumer))
    assert [route.name for route in alone][2:] == ["service/default/s/80 default"]
    assert alone[2].route.cluster == "service/default/s/80"


def test_a_rule_for_some_callers_wins_against_its_equal() -> None:
    special = harness.route("z", ruled(S, callers=((Source(namespaces=("a",)),),)), parent="s", created=9)
    assert match_key(special, 0, 0) < match_key(harness.route("a", ruled(S), parent="s", created=1), 0, 0)


def test_more_characters_of_service_and_method_win_in_grpc() -> None:
    def key(service: str, method: str = "", headers: int = 0) -> Any:
        parts = (StringMatch(MatchKind.EXACT, text) if text else None for text in (service, method))
        match = RouteMatch(grpc=GrpcMethod(*parts), headers=tuple((f"h{n}", StringMatch(MatchKind.EXACT, "")) for n in range(headers)))
        return match_key(harness.route("r", ruled(match=match), parent="s"), 0, 0)

    ordered = [key("a.bcd", "x"), key("a.bcd", "", 3), key("a.bc", "xyz"), key("a.bc", "xy", 2), key("a.bc", "xy"), key("", "xyz"), key("")]
    assert ordered == sorted(ordered)
    assert len(set(ordered)) == len(ordered)


def test_a_mirror_goes_through_the_listener_that_knows_who_calls() -> None:
    route = one(ruled(S, mirrors=(Mirror("default/t", 80, 1, 4 * 25), Mirror("default/gone", 80, 1, 100))))
    (policy,) = route.route.request_mirror_policies
    assert policy.cluster == names.MIRROR
    said = {item.append.header.key: item.append.header.value for item in policy.request_headers_mutations}
    assert said["x-meshagent-mirror-cluster"] == "service/default/t/80"
    assert all(
        item.append.append_action
        == route_components_pb2.RouteAction.RequestMirrorPolicy().request_headers_mutations.add().append.OVERWRITE_IF_EXISTS_OR_ADD
        for item in policy.request_headers_mutations
    )


GUARD = Policy("default/guard", Action.DENY, (PolicyRule(operations=(Operation(paths=("/secret*",)),)),))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        pytest.param(ruled(T), frozenset(), id="plain"),
        pytest.param(ruled(T, rewrite=Rewrite("", "/secret", None)), {"default/p-t"}, id="path"),
        pytest.param(ruled(T, rewrite=Rewrite("a.b", None, None)), {"default/p-t"}, id="host"),
        pytest.param(ruled(replace(T, hostname="a.b")), {"default/p-t"}, id="host-for-one-backend"),
        pytest.param(ruled(S, mirrors=(Mirror("default/t", 80, 1, 100),)), {"default/p-t"}, id="copies"),
        pytest.param(ruled(T, request_headers=HeaderEdit(set={"x-role": "guest"})), {"default/p-t"}, id="a-header"),
        pytest.param(ruled(replace(T, request_headers=HeaderEdit(remove=("x-role",)))), {"default/p-t"}, id="a-header-for-one-backend"),
    ],
)
def test_what_arrives_changed_is_for_the_receiver_to_decide(rule: RouteRule, expected: set[str]) -> None:
    snapshot = scene(harness.route("r", rule, parent="s"), policies=[GUARD])
    builder = Builder("node-1", harness.TRUST_DOMAIN)
    assert builder.needs_inbound(snapshot) == expected
    (found,) = built(snapshot, service="default/t")
    assert bool(found.typed_per_filter_config) is not bool(expected), "decided once: at the caller or at the receiver"
    assert rbac.needs_request(GUARD)


def test_an_l4_policy_is_not_moved_by_a_rewrite() -> None:
    guard = replace(GUARD, rules=(PolicyRule(operations=(Operation(ports=(8080,)),)),))
    snapshot = scene(harness.route("r", ruled(T, rewrite=Rewrite("a.b", None, None)), parent="s"), policies=[guard])
    assert not Builder("node-1", harness.TRUST_DOMAIN).needs_inbound(snapshot)


def test_filters_cost_nothing_until_a_route_asks_for_them() -> None:
    resources = build(scene(harness.route("r", ruled(S), parent="s")), [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN)
    assert names.MIRROR not in resources[names.LISTENER]
    manager = harness.manager(harness.decoded(resources, names.LISTENER, "outbound/default/caller"))
    assert isinstance(manager, hcm_pb2.HttpConnectionManager)
    order = [item.name for item in manager.http_filters]
    assert order.index(names.CORS_FILTER) < order.index(names.DENY_FILTER) < order.index(names.SESSION_READER) < len(order) - 3
    assert all(
        item.disabled
        for item in manager.http_filters
        if item.name in {names.CORS_FILTER, names.SESSION_READER, names.SESSION_WRITER, names.SESSION_FILTER}
    )


def test_ten_thousand_matches_of_one_service_are_built_in_seconds_and_taken_by_a_real_envoy(tmp_path: Path) -> None:
    rule = harness.rule(S, matches=tuple(at(f"/path/{n}") for n in range(64)))
    routes = [harness.route(f"r{n}", *[rule] * 2, parent="s") for n in range(78)]
    started = time.monotonic()
    resources = build(scene(*routes), [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN)
    assert time.monotonic() - started < 20
    assert len(harness.decoded(resources, names.ROUTES, "service/default/s/80").virtual_hosts[0].routes) == 9984
    harness.validate(resources, tmp_path)


@pytest.mark.parametrize(
    ("rule", "taken"),
    [
        pytest.param(ruled(S), True, id="every-path"),
        pytest.param(ruled(S, match=RouteMatch(path=StringMatch(MatchKind.PREFIX, "/"))), True, id="the-root"),
        pytest.param(ruled(S, match=RouteMatch(method="CONNECT")), True, id="the-method"),
        pytest.param(ruled(S, match=RouteMatch(method="GET")), False, id="another-method"),
        pytest.param(ruled(S, match=RouteMatch(path=StringMatch(MatchKind.PREFIX, "/a"))), False, id="a-path"),
        pytest.param(ruled(S, rewrite=Rewrite("", "/secret", None)), False, id="a-rewritten-path"),
    ],
)
def test_connect_is_for_rules_that_ask_for_no_path(rule: RouteRule, taken: bool) -> None:
    found = connecting(scene(harness.route("r", rule, parent="s")))
    assert [route.route.cluster for route in found] == (["service/default/s/80"] if taken else [])
    assert all(route.route.upgrade_configs[0].enabled.value for route in found)


def connecting(snapshot: Snapshot) -> list[route_components_pb2.Route]:
    resources = build(snapshot, [harness.local(CALLER, harness.OWN_NETNS)], trust_domain=harness.TRUST_DOMAIN)
    configuration = harness.decoded(resources, names.ROUTES, names.service("default/s", 80))
    assert isinstance(configuration, route_pb2.RouteConfiguration)
    return [route for route in configuration.virtual_hosts[0].routes if route.match.HasField("connect_matcher")]


def test_connect_goes_nowhere_where_the_request_decides() -> None:
    """After it nobody looks at what is said."""
    callers = replace(GUARD, rules=(PolicyRule(sources=(Source(service_accounts=("default/evil",)),)),))
    for routes in ((), (harness.route("r", ruled(S), parent="s"),)):
        assert connecting(scene(*routes, policies=[GUARD])) == []
        assert len(connecting(scene(*routes, policies=[callers]))) == 1
    resources = build(scene(), [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN)
    manager = harness.manager(harness.decoded(resources, names.LISTENER, "outbound/default/caller"))
    assert isinstance(manager, hcm_pb2.HttpConnectionManager)
    assert {one.upgrade_type: one.enabled.value for one in manager.upgrade_configs if one.HasField("enabled")} == {"CONNECT": False}
