"""What is built for a rich model: the real Envoy accepts it, and small changes stay small."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from agent.l7 import names
from agent.l7.resources import Resources
from agent.l7.snapshot import build
from agent.model import (
    Action,
    Backend,
    Backing,
    HeaderEdit,
    MatchKind,
    Operation,
    Policy,
    PolicyRule,
    Retry,
    RouteMatch,
    ServicePort,
    Snapshot,
    Source,
    StringMatch,
    Workload,
)
from tests.unit.agent.l7 import harness

GET = Operation(methods=("GET",), paths=("/a*", "*b", "*", "/c"), not_paths=("/d",), hosts=("h", "*.h", "h*", "*"), not_hosts=("x",))

EVERY = ("default/allow", "default/audit", "default/deny", "default/no-place", "default/place")


def rich() -> Snapshot:
    every = {"default/web": {80: 8080, 81: 8081}, "default/grpc": {9000: 9000}}
    source = Source(("*", "mesh.test/*"), ("*/sa/x",), ("default",), ("other",), ("default/a",), ("default/b",))
    by_place = (Source(labels=(("app", "a"),)), Source(ip_blocks=("10.0.0.0/8", "fd00::/8"), not_ip_blocks=("10.0.0.9/32",)))
    policies = [
        Policy("default/place", Action.ALLOW, (PolicyRule(by_place, (Operation(protocols=("TCP",)),)),)),
        Policy("default/no-place", Action.DENY, (PolicyRule((*by_place, Source(not_ip_blocks=("::/0",)))),)),
        Policy("default/allow", Action.ALLOW, (PolicyRule((source,), (GET,)), PolicyRule((Source(),), (Operation(ports=(8080,)),)))),
        Policy("default/deny", Action.DENY, (PolicyRule((Source(not_principals=("*",)),), (Operation(not_methods=("GET",)),)),)),
        Policy("default/audit", Action.AUDIT, (PolicyRule(operations=(Operation(not_ports=(1,), methods=("*",)),)),)),
    ]
    workloads = [
        harness.workload("a", "10.0.0.1", "fd00::1"),
        harness.workload("b1", "10.0.0.2", "fd00::2", backing=every, policies=EVERY),
        harness.workload("b2", "10.0.0.3", backing=every, policies=EVERY),
        harness.workload("c", "10.0.0.4", backing={"default/l4": {6379: 6379}}),
    ]
    services = [
        harness.service("web", "10.96.0.1", 80, 81),
        harness.service("grpc", "fd00:96::2", 9000, protocol="kubernetes.io/h2c"),
        harness.service("l4", "10.96.0.3", 6379, waypoint=False),
    ]
    match = RouteMatch(
        StringMatch(MatchKind.REGEX, "/x/[0-9]+"),
        "GET",
        tuple((f"h{kind.value}", StringMatch(kind, "v")) for kind in MatchKind),
        tuple((f"q{kind.value}", StringMatch(kind, "v")) for kind in MatchKind),
    )
    edit = HeaderEdit({"a": "1", "Host": "h.test"}, {"b": "50%"}, ("c", "host"))
    both = (
        Backend("default/web", 80, 3, request_headers=edit, response_headers=edit),
        Backend("default/web", 81, 1),
        Backend("default/x", 1, 1, "?"),
    )
    rules = [
        harness.rule(*both, matches=(match, RouteMatch(StringMatch(MatchKind.SUFFIX, r".p\Eng"))), retry=Retry(3, (503,), 50), try_ms=999),
        harness.rule(Backend("default/web", 81, 1), matches=(RouteMatch(StringMatch(MatchKind.PREFIX, "/p/")),), timeout_ms=1500),
        harness.rule(name="none"),
    ]
    routes = [
        harness.route("r1", *rules, parent="web", hostnames=("shop.test", "*.shop.test"), created=5),
        harness.route("r2", *rules, parent="web", port=81),
    ]
    return harness.snapshot(workloads, services, routes, policies)


def built(snapshot: Snapshot, traced: frozenset[str] = frozenset()) -> Resources:
    paths = {"default/a": harness.OWN_NETNS, "default/b1": harness.OWN_NETNS_TOO}
    local = [harness.local(snapshot.workloads[name], path) for name, path in paths.items()]
    return build(snapshot, local, trust_domain=harness.TRUST_DOMAIN, traced=traced)


def test_envoy_accepts_a_rich_snapshot(tmp_path: Path) -> None:
    resources = built(rich())
    harness.validate(resources, tmp_path)
    assert set(resources[names.LISTENER]) == {"outbound/default/a", "outbound/default/b1", "inbound/default/b1"}
    scopes = {"10.96.0.1:80", "10.96.0.1:81", "[fd00:96::2]:9000"}
    for address in ("10.0.0.2", "[fd00::2]", "10.0.0.3"):
        scopes |= {f"{address}:{port}" for port in (8080, 8081, 9000)}
    assert set(resources[names.SCOPE]) == scopes


def test_l4_services_and_nodes_without_workloads_cost_nothing() -> None:
    assert not any("l4" in name for kind in built(rich()).values() for name in kind)
    nothing = build(rich(), [], trust_domain=harness.TRUST_DOMAIN)
    assert {kind: len(found) for kind, found in nothing.items() if found} == {names.RUNTIME: 1, names.BUCKET: 1}


def test_versions_depend_on_content_alone() -> None:
    one, other = rich(), rich()
    turned = dataclasses.replace(
        other, workloads=dict(reversed(list(other.workloads.items()))), policies=dict(reversed(list(other.policies.items())))
    )
    assert built(one) == built(turned)


def changed(before: Resources, after: Resources) -> set[str]:
    return {name for kind in after for name, resource in after[kind].items() if before[kind].get(name) != resource}


def test_a_new_endpoint_changes_endpoints_only() -> None:
    snapshot = rich()
    more = harness.workload("b3", "10.0.0.9", backing={"default/grpc": {9000: 9000}}, policies=snapshot.workloads["default/b1"].policies)
    more = dataclasses.replace(more, node="node-2")
    after = dataclasses.replace(snapshot, workloads={**snapshot.workloads, more.name: more})
    differences = changed(built(snapshot), built(after))
    # and the receiver's list of who has which address, of which it is a part
    own = {"workload/default/b3/9000", "10.0.0.9:9000"}
    assert differences - own == {"service/default/grpc/9000", "inbound/default/b1"}


def test_an_address_of_this_node_stands_for_nobody_who_is_not_bound_to_a_namespace() -> None:
    snapshot = rich()
    unbound = harness.workload("b3", "10.0.0.9", policies=snapshot.workloads["default/b1"].policies)
    with_unbound = dataclasses.replace(snapshot, workloads={**snapshot.workloads, unbound.name: unbound})
    assert "inbound/default/b1" not in changed(built(snapshot), built(with_unbound))


def test_a_trace_changes_the_runtime_layer_only() -> None:
    assert changed(built(rich()), built(rich(), frozenset({"default/a"}))) == {names.RUNTIME_LAYER}


def test_one_key_is_never_given_twice() -> None:
    snapshot = rich()
    twin = harness.workload("z", "10.0.0.2", backing={"default/web": {80: 8080}}, policies=("default/allow",))
    resources = built(dataclasses.replace(snapshot, workloads={**snapshot.workloads, twin.name: twin}))
    scope = harness.decoded(resources, names.SCOPE, "10.0.0.2:8080")
    assert scope.route_configuration_name == "workload/default/b1/8080"


def test_ipv6_is_listened_on_only_where_the_workload_has_it() -> None:
    resources = built(rich())
    assert len(harness.decoded(resources, names.LISTENER, "outbound/default/b1").additional_addresses) == 1
    four = harness.workload("v4", "10.0.0.77")
    only = build(harness.snapshot([four]), [harness.local(four)], trust_domain=harness.TRUST_DOMAIN)
    assert not harness.decoded(only, names.LISTENER, "outbound/default/v4").additional_addresses


def test_a_datagram_port_beside_an_l7_port_of_the_same_number_hides_nothing() -> None:
    snapshot = rich()
    web = snapshot.services["default/web"]
    datagrams = ServicePort(80, "quic", "UDP", "", False, "UDP is never L7")
    both = dataclasses.replace(web, ports=(*web.ports, datagrams))
    only = dataclasses.replace(web, name="default/only-udp", addresses=("10.96.0.9",), ports=(datagrams,))
    after = dataclasses.replace(snapshot, services={**snapshot.services, both.name: both, only.name: only})
    assert built(after) == built(snapshot)


def endpoints(snapshot: Snapshot) -> dict[str, int]:
    """Address and weight of what Envoy may choose for the service `web`."""
    local = [harness.local(snapshot.workloads["default/a"])]
    found = harness.decoded(build(snapshot, local, trust_domain=harness.TRUST_DOMAIN), names.ENDPOINTS, "service/default/web/80")
    hosts = [host for group in found.endpoints for host in group.lb_endpoints]
    return {host.endpoint.address.socket_address.address: host.load_balancing_weight.value for host in hosts}


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        ("", {"10.0.0.2": 3, "10.0.0.3": 1, "10.0.0.4": 1}),
        ("PreferSameNode", {"10.0.0.2": 3}),
        ("PreferSameZone", {"10.0.0.2": 3, "10.0.0.3": 1}),
    ],
)
def test_requests_go_to_the_endpoints_that_this_node_prefers_by_weight(distribution: str, expected: dict[str, int]) -> None:
    def pod(name: str, address: str, node: str, zone: str, weight: int) -> Workload:
        one = harness.workload(name, address, backing={"default/web": {80: 8080}})
        return dataclasses.replace(one, node=node, zone=zone, weight=weight)

    pods = [
        pod("b", "10.0.0.2", "node-1", "z1", 3),
        pod("c", "10.0.0.3", "node-2", "z1", 1),
        pod("d", "10.0.0.4", "node-3", "z2", 1),
    ]
    web = dataclasses.replace(harness.service("web", "10.96.0.1", 80), traffic_distribution=distribution)
    assert endpoints(harness.snapshot([harness.workload("a", "10.0.0.1"), *pods], [web])) == expected


def test_a_service_of_another_namespace_does_not_say_what_is_spoken_at_a_port_that_has_its_own() -> None:
    snapshot = rich()
    lure = dataclasses.replace(harness.service("lure", "10.96.0.9", 80, protocol="kubernetes.io/h2c"), name="aaa/lure")
    held = snapshot.workloads["default/b1"]
    lured = dataclasses.replace(held, backing=(Backing("aaa/lure", {80: 8080}), *held.backing))
    after = dataclasses.replace(
        snapshot, workloads={**snapshot.workloads, held.name: lured}, services={**snapshot.services, lure.name: lure}
    )
    name = names.workload("default/b1", 8080)
    assert built(after)[names.CLUSTER][name] == built(snapshot)[names.CLUSTER][name]
