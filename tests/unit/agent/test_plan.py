"""The plan of a trace."""

from __future__ import annotations

import dataclasses

import pytest

from agent.errors import NotFound
from agent.external import External, Origination
from agent.model import (
    Action,
    Backend,
    Backing,
    Direct,
    HeaderEdit,
    Mtls,
    Operation,
    Policy,
    PolicyRule,
    Route,
    RouteRule,
    Service,
    ServicePort,
    Snapshot,
    Source,
    Workload,
)
from agent.plan import find_caller, find_destination, find_workload, plan, targets
from agent.traffic import LoadBalancing, TrafficPolicy


def workload(name: str, node: str = "node-1", backing: tuple[Backing, ...] = (), policies: tuple[str, ...] = ()) -> Workload:
    return Workload(
        f"default/{name}", name, node, {}, (f"10.0.0.{sum(map(ord, name)) % 250}",), f"ns-{name}", True, True, backing, policies
    )


def service(name: str, port: int, waypoint: bool = False) -> Service:
    return Service(
        f"default/{name}",
        ("10.96.0.1",),
        (ServicePort(port, "", "TCP", "", waypoint, "HTTPRoute default/r" if waypoint else "no L7 feature is used"),),
    )


def snapshot(
    *workloads: Workload, services: tuple[Service, ...] = (), routes: tuple[Route, ...] = (), policies: tuple[Policy, ...] = ()
) -> Snapshot:
    return Snapshot(
        "v", {w.name: w for w in workloads}, {s.name: s for s in services}, {r.name: r for r in routes}, {p.name: p for p in policies}
    )


ALLOW_FRONTEND = Policy("default/redis-clients", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/frontend",)),)),))
REDIS = workload("redis", backing=(Backing("default/redis", {6379: 6379}),), policies=("default/redis-clients",))
MODEL = snapshot(workload("frontend"), workload("other"), REDIS, services=(service("redis", 6379),), policies=(ALLOW_FRONTEND,))


@pytest.mark.parametrize(
    ("fail_open", "paths", "said"),
    [
        pytest.param(False, (), "closed", id="closed"),
        pytest.param(True, (), "open: without a waypoint it is L4", id="open"),
        pytest.param(True, ("/items",), "closed: a policy needs the request", id="open-with-an-l7-policy"),
    ],
)
def test_the_plan_says_what_happens_without_a_waypoint(fail_open: bool, paths: tuple[str, ...], said: str) -> None:
    policy = Policy("default/p", Action.ALLOW, (PolicyRule(operations=(Operation(paths=paths),)),))
    cart = workload("cart-1", backing=(Backing("default/cart", {80: 8080}),), policies=("default/p",))
    model = snapshot(
        workload("frontend"),
        cart,
        services=(dataclasses.replace(service("cart", 80, waypoint=True), fail_open=fail_open),),
        policies=(policy,),
    )
    assert plan(model, model.workloads["default/frontend"], "cart", "mesh.local").fail_mode == said


def test_an_allowed_l4_call_names_rule_backend_and_level() -> None:
    planned = plan(MODEL, MODEL.workloads["default/frontend"], "redis", "mesh.local")
    assert (planned.verdict, planned.rule, planned.level) == ("ALLOW", "default/redis-clients[0]", "L4")
    assert [(b.workload, b.share) for b in planned.backends] == [("default/redis", 1.0)]
    assert not planned.problems


def test_a_denied_call_names_the_policy() -> None:
    planned = plan(MODEL, MODEL.workloads["default/other"], "redis", "mesh.local")
    assert (planned.verdict, planned.rule) == ("DENY", "default/redis-clients: no rule matches")


def test_a_caller_that_is_not_enrolled_is_a_stranger() -> None:
    stranger = dataclasses.replace(MODEL.workloads["default/frontend"], enrolled=False)
    planned = plan(MODEL, stranger, "redis", "mesh.local")
    assert planned.verdict == "DENY"
    assert "not enrolled" in planned.problems[0]


def test_a_service_without_endpoints_is_a_problem() -> None:
    away = dataclasses.replace(REDIS, ready=False)
    model = snapshot(workload("frontend"), away, services=(service("redis", 6379),))
    found = plan(model, model.workloads["default/frontend"], "redis", "mesh.local")
    assert "no ready endpoint" in found.problems[0]
    assert found.encryption == "none: there is nowhere to go"


def test_a_plan_follows_the_routes_that_are_for_the_caller() -> None:
    def to(name: str, *callers: tuple[Source, ...]) -> RouteRule:
        rule = RouteRule("", (), (Backend(f"default/{name}", 80, 1),), None, 0, 0, HeaderEdit(), HeaderEdit())
        return dataclasses.replace(rule, callers=callers)

    names = ("all", "some", "theirs")
    parents = (("default/cart", 0),)
    model = snapshot(
        *(workload(name, backing=(Backing(f"default/{name}", {80: 8080}),)) for name in names),
        services=(service("cart", 80, waypoint=True), *(service(name, 80) for name in names)),
        routes=(
            Route("default/r", parents, (), (to("all"), to("some", (Source(service_accounts=("default/web",)),))), 0),
            Route("other/r", parents, (), (to("theirs"),), 0),
        ),
    )

    def behind(name: str, account: str) -> list[str]:
        caller = dataclasses.replace(workload("x"), name=name, service_account=account)
        return [backend.workload for backend in plan(model, caller, "default/cart", "mesh.local").backends]

    assert behind("default/web", "web") == ["default/all", "default/some"]
    assert behind("default/frontend", "frontend") == ["default/all"]
    assert behind("other/web", "web") == ["default/theirs"]
    assert targets(model, "cart")[1] == {f"default/{name}" for name in names}


def test_weights_and_endpoints_share_an_l7_service() -> None:
    v1 = [workload(f"cart-v1-{n}", backing=(Backing("default/cart-v1", {80: 8080}),)) for n in (1, 2)]
    v2 = workload("cart-v2", "node-2", backing=(Backing("default/cart-v2", {80: 8080}),))
    backends = (Backend("default/cart-v1", 80, 3), Backend("default/cart-v2", 80, 1))
    rule = RouteRule("", (), backends, None, 0, 0, HeaderEdit(), HeaderEdit())
    model = snapshot(
        workload("frontend"),
        *v1,
        v2,
        services=(service("cart", 80, waypoint=True), service("cart-v1", 80), service("cart-v2", 80)),
        routes=(Route("default/r", (("default/cart", 0),), (), (rule,), 0),),
    )
    planned = plan(model, model.workloads["default/frontend"], "cart", "mesh.local")
    assert planned.level == "L7"
    assert {b.workload: b.share for b in planned.backends} == {
        "default/cart-v1-1": 0.375,
        "default/cart-v1-2": 0.375,
        "default/cart-v2": 0.25,
    }
    assert targets(model, "cart") == ("default/cart:80", frozenset({"default/cart-v1-1", "default/cart-v1-2", "default/cart-v2"}))
    assert planned.encryption == "none: plaintext between nodes"


@pytest.mark.parametrize(
    ("mode", "enrolled", "encryption", "problem"),
    [
        (Mtls.DISABLE, True, "none: plaintext between nodes", ""),
        (Mtls.PERMISSIVE, True, "mTLS between nodes (HBONE)", ""),
        (Mtls.STRICT, True, "mTLS between nodes (HBONE)", ""),
        (Mtls.STRICT, False, "none: plaintext between nodes", "default/far refuses plaintext from another node on port 80"),
    ],
)
def test_encryption_is_what_mode_and_caller_make_of_it(mode: Mtls, enrolled: bool, encryption: str, problem: str) -> None:
    source = dataclasses.replace(workload("near"), enrolled=enrolled)
    far = dataclasses.replace(workload("far", "node-2", (Backing("default/far", {80: 80}),)), mtls=mode)
    model = Snapshot("1", {w.name: w for w in (source, far)}, {"default/far": service("far", 80)})
    planned = plan(model, source, "far", "mesh.local")
    assert planned.encryption == encryption
    said = [found for found in planned.problems if "PeerAuthentication" in found]
    assert len(said) == bool(problem)
    assert all(found.startswith(problem) for found in said)


@pytest.mark.parametrize(
    ("modes", "target", "encryption"),
    [
        ((Mtls.PERMISSIVE,), "far", "WireGuard between nodes"),
        ((Mtls.DISABLE,), "far", "WireGuard between nodes"),
        ((Mtls.STRICT,), "far", "mTLS between nodes (HBONE)"),
        (
            (Mtls.PERMISSIVE, Mtls.STRICT),
            "far",
            "mTLS between nodes (HBONE) to default/far-1, WireGuard between nodes to default/far-0",
        ),
        ((Mtls.PERMISSIVE,), "far:53/udp", "WireGuard between nodes"),
    ],
)
def test_between_nodes_with_wireguard_only_strict_ports_take_tunnels(modes: tuple[Mtls, ...], target: str, encryption: str) -> None:
    source = workload("near")
    backing = (Backing("default/far", {80: 80}, {53: 53}),)
    far = [dataclasses.replace(workload(f"far-{i}", "node-2", backing), mtls=mode) for i, mode in enumerate(modes)]
    behind = dataclasses.replace(service("far", 80), ports=(*service("far", 80).ports, ServicePort(53, "", "UDP", "", False, "")))
    model = Snapshot("1", {w.name: w for w in (source, *far)}, {"default/far": behind})
    assert plan(model, source, target, "mesh.local", Direct(frozenset({"node-2"}))).encryption == encryption
    stranger = dataclasses.replace(source, enrolled=False)
    assert plan(model, stranger, target, "mesh.local", Direct(frozenset({"node-2"}))).encryption == "none: plaintext between nodes"


def test_l7_rules_leave_the_verdict_to_each_request() -> None:
    l7 = Policy("default/l7", Action.DENY, (PolicyRule(operations=(Operation(paths=("/admin*",)),)),))
    cart = workload("cart", backing=(Backing("default/cart", {80: 8080}),), policies=("default/l7",))
    model = snapshot(workload("frontend"), cart, services=(service("cart", 80, waypoint=True),), policies=(l7,))
    planned = plan(model, model.workloads["default/frontend"], "cart", "mesh.local")
    assert planned.verdict == "ALLOW"
    assert "each request is decided by default/l7" in planned.reason


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("rediss", "did you mean default/redis", id="suggestion"),
        pytest.param("redis:80", "has no port 80; it has 6379", id="port"),
        pytest.param("redis:6379/udp", "has no port 6379/udp; it has 6379", id="protocol"),
        pytest.param("redis:6379/sctp", "sctp is no protocol of a service port: write 6379/tcp or 6379/udp", id="not-a-protocol"),
        pytest.param("redis:x", "x is no port number", id="not-a-number"),
        pytest.param("redis:0", "0 is no port number", id="zero"),
        pytest.param("redis:65536", "65536 is no port number", id="too-high"),
    ],
)
def test_an_unknown_name_says_what_exists(name: str, message: str) -> None:
    with pytest.raises(NotFound, match=message):
        find_destination(MODEL, name)


@pytest.mark.parametrize(
    "name", ["redis.default", "redis.default.svc", "redis.default.svc.cluster.local", "redis.default.svc.cluster.local."]
)
def test_a_service_is_found_by_the_names_that_pods_use(name: str) -> None:
    assert str(find_destination(MODEL, f"{name}:6379")) == "default/redis:6379"


@pytest.mark.parametrize("name", ["rediss.default.svc.cluster.local", "redis.defaults", "redis.default.pod.cluster.local"])
def test_a_dns_name_that_nobody_has_is_said_to_be_none(name: str) -> None:
    with pytest.raises(NotFound, match=f"no service has the DNS name {name}: .*NXDOMAIN; did you mean default/redis"):
        find_destination(MODEL, name)


def test_a_name_that_several_namespaces_have_lists_the_candidates() -> None:
    several = {f"{n}/web": dataclasses.replace(service("web", 80), name=f"{n}/web") for n in ("shop", "bank", *(f"n{i}" for i in range(9)))}
    model = dataclasses.replace(MODEL, services={**MODEL.services, **several})
    with pytest.raises(
        NotFound, match=r"the name is ambiguous, say which: bank/web, n0/web, n1/web, n2/web, n3/web, n4/web, n5/web, \.\.\."
    ):
        find_destination(model, "web")


def test_a_service_name_stands_for_a_workload_behind_it() -> None:
    model = snapshot(workload("redis-0", backing=(Backing("default/redis", {6379: 6379}),)), services=(service("redis", 6379),))
    assert find_workload(model, "redis").name == "default/redis-0"


DNS = Service(
    "default/dns",
    ("10.96.0.10",),
    tuple(ServicePort(port, "", protocol, "", False, "L4") for port, protocol in ((53, "UDP"), (53, "TCP"), (5300, "UDP"))),
)
DNS_1 = workload("dns-1", backing=(Backing("default/dns", {53: 1053}, {53: 2053, 5300: 2300}),), policies=("default/dns-clients",))
OVER_UDP = Policy("default/dns-clients", Action.ALLOW, (PolicyRule(operations=(Operation(ports=(2053,), protocols=("UDP",)),)),))
NAMES = snapshot(workload("frontend"), DNS_1, services=(DNS,), policies=(OVER_UDP,))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("dns", "default/dns:53", id="tcp-is-the-default"),
        pytest.param("dns:53", "default/dns:53", id="tcp-is-found-first"),
        pytest.param("dns:53/tcp", "default/dns:53", id="tcp-is-asked-for"),
        pytest.param("dns:53/udp", "default/dns:53/udp", id="udp-is-asked-for"),
        pytest.param("dns:53/UDP", "default/dns:53/udp", id="udp-in-capitals"),
        pytest.param("dns:5300", "default/dns:5300/udp", id="only-udp-has-the-port"),
        pytest.param("dns-1", "default/dns-1:1053", id="workload"),
        pytest.param("dns-1:2053", "default/dns-1:2053/udp", id="workload-listens-over-udp"),
        pytest.param("dns-1:9", "default/dns-1:9", id="workload-port-that-no-service-names"),
        pytest.param("dns-1:9/udp", "default/dns-1:9/udp", id="workload-port-over-udp"),
        pytest.param("frontend", "default/frontend", id="workload-that-backs-no-service"),
    ],
)
def test_a_destination_has_a_protocol_and_its_name_finds_it_again(name: str, expected: str) -> None:
    assert str(find_destination(NAMES, name)) == expected
    assert str(find_destination(NAMES, expected)) == expected


def test_a_service_with_datagram_ports_alone_is_found_without_a_port() -> None:
    only = dataclasses.replace(DNS, ports=(ServicePort(53, "", "UDP", "", False, "L4"),))
    assert str(find_destination(snapshot(DNS_1, services=(only,)), "dns")) == "default/dns:53/udp"


def test_each_protocol_has_its_own_target_and_its_own_verdict() -> None:
    frontend = NAMES.workloads["default/frontend"]
    udp, tcp = (plan(NAMES, frontend, name, "mesh.local") for name in ("dns:53/udp", "dns:53/tcp"))
    assert (udp.destination, udp.verdict, udp.rule) == ("default/dns:53/udp", "ALLOW", "default/dns-clients[0]")
    assert (tcp.destination, tcp.verdict, tcp.rule) == ("default/dns:53", "DENY", "default/dns-clients: no rule matches")
    assert [planned.backends[0].address.rpartition(":")[2] for planned in (udp, tcp)] == ["2053", "1053"]
    assert targets(NAMES, "dns:53/udp") == ("default/dns:53/udp", frozenset({"default/dns-1"}))


def test_an_audited_rule_that_would_deny_is_named_and_nothing_else_changes() -> None:
    audit = Policy("default/dry-run", Action.AUDIT, (PolicyRule(),))
    redis = dataclasses.replace(REDIS, policies=("default/dry-run", "default/redis-clients"))
    model = snapshot(workload("frontend"), redis, services=(service("redis", 6379),), policies=(ALLOW_FRONTEND, audit))
    planned = plan(model, model.workloads["default/frontend"], "redis", "mesh.local")
    assert (planned.verdict, planned.rule, planned.audit) == ("ALLOW", "default/redis-clients[0]", "default/dry-run[0]")
    assert plan(MODEL, MODEL.workloads["default/frontend"], "redis", "mesh.local").audit is None


def spread(distribution: str, caller: Workload, waypoint: bool = False) -> dict[str, float]:
    backing = (Backing("default/web", {80: 8080}),)
    places = (("a", "node-1", "z1", 1), ("b", "node-1", "z1", 3), ("c", "node-2", "z1", 4), ("d", "node-3", "z2", 8))
    endpoints = [dataclasses.replace(workload(name, node, backing), zone=zone, weight=weight) for name, node, zone, weight in places]
    web = dataclasses.replace(service("web", 80, waypoint), traffic_distribution=distribution)
    model = snapshot(caller, *endpoints, services=(web,))
    return {b.workload.partition("/")[2]: b.share for b in plan(model, caller, "web", "mesh.local").backends}


@pytest.mark.parametrize("waypoint", [False, True], ids=["l4", "l7"])
def test_shares_follow_weights_among_the_preferred_endpoints(waypoint: bool) -> None:
    here = workload("frontend", "node-1")
    in_zone = dataclasses.replace(workload("frontend", "node-4"), zone="z1")
    assert spread("", here, waypoint) == {"a": 0.0625, "b": 0.1875, "c": 0.25, "d": 0.5}
    assert spread("PreferSameNode", here, waypoint) == {"a": 0.25, "b": 0.75}
    assert spread("PreferSameZone", here, waypoint) == {"a": 0.125, "b": 0.375, "c": 0.5}
    assert spread("PreferSameNode", in_zone, waypoint) == {"a": 0.125, "b": 0.375, "c": 0.5}
    assert spread("PreferSameZone", workload("frontend", "node-4"), waypoint) == spread("", here, waypoint)


def test_a_trace_watches_every_endpoint_whichever_is_preferred() -> None:
    backing = (Backing("default/web", {80: 8080}),)
    web = dataclasses.replace(service("web", 80), traffic_distribution="PreferSameNode")
    model = snapshot(workload("a", "node-1", backing), workload("b", "node-2", backing), services=(web,))
    assert targets(model, "web") == ("default/web:80", frozenset({"default/a", "default/b"}))


def test_what_a_traffic_policy_prefers_is_what_the_plan_shows() -> None:
    backing = (Backing("default/web", {80: 8080}),)
    pods = (workload("a", "node-1", backing), workload("b", "node-2", backing))
    model = snapshot(workload("frontend"), *pods, services=(service("web", 80, waypoint=True),))
    near = TrafficPolicy("default/near", (("default/web", 80),), LoadBalancing(prefer="PreferSameNode"))
    for policies, expected in (({}, {"default/a": 0.5, "default/b": 0.5}), ({near.name: near}, {"default/a": 1.0})):
        planned = plan(dataclasses.replace(model, traffic=policies), model.workloads["default/frontend"], "web", "mesh.local")
        assert {one.workload: one.share for one in planned.backends} == expected


@pytest.mark.parametrize(
    ("port", "caller", "verdict"),
    [(80, "frontend", "ALLOW"), (80, "other", "DENY"), (9000, "frontend", "ALLOW"), (9000, "other", "DENY")],
)
def test_a_call_to_the_outside_is_decided_by_the_policies_of_its_external_service(port: int, caller: str, verdict: str) -> None:
    external = External("api", ("api.example.com",), False, True, (), policies=(ALLOW_FRONTEND.name,))
    ports = tuple(ServicePort(n, "", "TCP", spoken, True, "ExternalService default/api") for n, spoken in ((80, "http"), (9000, "tcp")))
    outside = Service("default/api.example.com", ("240.240.0.9",), ports, external=external)
    model = dataclasses.replace(MODEL, services={**MODEL.services, outside.name: outside})
    found = plan(model, model.workloads[f"default/{caller}"], f"api.example.com:{port}", "mesh.test")
    assert (found.verdict, found.level, found.reason) == (verdict, "L7", "ExternalService default/api")
    assert found.problems == ()


@pytest.mark.parametrize(
    ("spoken", "tls", "encryption"),
    [
        ("http", None, "none: plaintext to the host outside"),
        ("http", Origination("api.example.com", ("api.example.com",), ""), "TLS between the waypoint and the host outside"),
        ("tls", None, "TLS between the application and the host outside"),
    ],
)
def test_the_plan_of_a_call_to_the_outside_says_who_encrypts_it(spoken: str, tls: Origination | None, encryption: str) -> None:
    ports = (ServicePort(443, "", "TCP", spoken, True, ""),)
    external = External("api", ("api.example.com",), False, True, (), tls)
    outside = Service("default/api.example.com", ("240.240.0.9",), ports, external=external)
    model = dataclasses.replace(MODEL, services={outside.name: outside})
    assert plan(model, model.workloads["default/frontend"], "api.example.com", "mesh.test").encryption == encryption


PROBED = dataclasses.replace(REDIS, node="node-2", mtls=Mtls.STRICT, probe_ports=(8080, 9090))


@pytest.mark.parametrize(
    ("destination", "found", "verdict", "rule", "problems"),
    [
        pytest.param(
            "redis", "default/redis:8080", "ALLOW", "a probe of the kubelet, which no policy decides about", 0, id="its-first-probe"
        ),
        pytest.param("redis:9090", "default/redis:9090", "ALLOW", "a probe of the kubelet, which no policy decides about", 0, id="another"),
        pytest.param("redis:6379", "default/redis:6379", "DENY", "default/redis-clients: no rule matches", 2, id="no-probe"),
        pytest.param("redis:8080/udp", "default/redis:8080/udp", "DENY", "default/redis-clients: no rule matches", 2, id="datagrams"),
    ],
)
def test_the_plan_of_a_kubelets_call_tells_probes_from_other_calls(
    destination: str, found: str, verdict: str, rule: str, problems: int
) -> None:
    model = snapshot(workload("frontend"), PROBED, policies=(ALLOW_FRONTEND,))
    caller = find_caller(model, "kubelet", destination, "node-1")
    assert (caller.name, caller.node) == ("(kubelet)/node-2", "node-2")  # nobody else's probes are its
    planned = plan(model, caller, destination, "mesh.local")
    assert (planned.destination, planned.verdict, planned.rule, len(planned.problems)) == (found, verdict, rule, problems)


def test_a_kubelet_calls_pods_and_no_services() -> None:
    model = snapshot(services=(service("cart", 80),))
    caller = find_caller(model, "kubelet", "cart", "node-1")
    with pytest.raises(NotFound, match="default/cart is a service, and the kubelet calls pods: name a workload"):
        plan(model, caller, "cart", "mesh.local")


def test_a_workload_that_is_called_kubelet_is_that_workload() -> None:
    model = snapshot(workload("kubelet"), PROBED)
    assert find_caller(model, "kubelet", "redis", "node-1").name == "default/kubelet"
    assert find_caller(model, "default/redis", "redis", "node-1") is PROBED
