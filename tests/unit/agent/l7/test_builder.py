"""What is built from differences is what is built from everything, and what does not differ is not built again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import policy
from agent.balancing import SAME_NODE, SAME_ZONE, node_zone
from agent.compact import Table
from agent.external import Endpoint, External
from agent.l7 import gateways as gateways_of_envoy
from agent.l7 import names, parting, rbac, resources
from agent.l7 import snapshot as snapshot_module
from agent.l7.kept import Kept
from agent.l7.readers import AGAIN
from agent.l7.resources import Resource, Resources
from agent.l7.snapshot import Builder, build
from agent.model import (
    NO_DIRECT,
    Action,
    AtGateway,
    Authentication,
    Backend,
    Backing,
    ClaimCondition,
    Delta,
    Direct,
    Gateway,
    GatewayListener,
    LocalWorkload,
    Mtls,
    Operation,
    Policy,
    PolicyRule,
    Route,
    Service,
    ServicePort,
    Snapshot,
    Source,
    TokenIssuer,
    Workload,
)
from agent.policy import Caller
from agent.revocation import LET_GO_S
from agent.routing import Mirror, Rewrite
from agent.supervisor import READERS_AGAIN_S, residents
from agent.traffic import CheckKind, HealthCheck, Limits, TrafficPolicy
from tests.unit.agent.l7 import harness

NODE = "node-1"
PORTS = (80, 81)
WORKLOADS = tuple(f"default/w{i}" for i in range(6))
SERVICES = tuple(f"default/s{i}" for i in range(3))
ROUTES = ("default/r0", "default/r1", "other/r2")
POLICIES = tuple(f"default/p{i}" for i in range(3))
TRAFFIC = ("default/t0", "default/t1")
AUTHENTICATIONS = ("default/a0", "default/a1")
GATEWAYS = ("default/g0",)
OUTSIDE = "default/a.example"


def some(pool: tuple[Any, ...], most: int = 2) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(pool), max_size=most, unique=True).map(tuple)


ports = st.dictionaries(st.sampled_from(PORTS), st.sampled_from((8080, 8081)), max_size=2)


@st.composite
def workloads(draw: st.DrawFn, name: str) -> Workload:
    return Workload(
        name=name,
        service_account=draw(st.sampled_from(("a", "b"))),
        node=draw(st.sampled_from((NODE, NODE, "node-2"))),
        labels=draw(st.sampled_from(({}, {"app": "x"}, {gateways_of_envoy.LABEL: "g0"}))),
        addresses=draw(some(tuple(f"10.0.0.{i}" for i in range(8)))),
        network_namespace="ns",
        enrolled=draw(st.booleans()),
        ready=draw(st.integers(0, 3)) > 0,
        backing=tuple(Backing(service, draw(ports)) for service in draw(some(SERVICES))),
        policies=draw(some((*POLICIES, "default/missing"))),
        zone=draw(st.sampled_from(("", "z1", "z2"))),
        weight=draw(st.integers(1, 2)),
        mtls=draw(st.sampled_from(Mtls)),
        mtls_ports=draw(st.sampled_from(((), (), ((8080, Mtls.DISABLE),), ((8081, Mtls.STRICT),)))),
        authentications=draw(some(AUTHENTICATIONS, 1)),
    )


@st.composite
def services(draw: st.DrawFn, name: str) -> Service:
    if name == OUTSIDE:
        return draw(outside())
    found = tuple(
        ServicePort(
            port, "", draw(st.sampled_from(("TCP", "TCP", "UDP"))), draw(st.sampled_from(("http", "grpc"))), draw(st.booleans()), ""
        )
        for port in draw(some(PORTS))
    )
    return Service(
        name, draw(some(("10.96.0.1", "10.96.0.2", "10.0.0.1"))), found, draw(st.sampled_from(("", "", SAME_NODE, SAME_ZONE)))
    )  # fmt: skip


@st.composite
def outside(draw: st.DrawFn) -> Service:
    protocols = st.sampled_from(("http", "http", "tls", "tcp"))
    found = tuple(ServicePort(port, "", "TCP", draw(protocols), True, "") for port in draw(some(PORTS)))
    external = External("default/e", ("a.example",), False, True, (Endpoint("a.example", 1, {}),), None, draw(some(POLICIES)))
    return Service(OUTSIDE, ("240.240.0.1",), found, "", external=external)


@st.composite
def gateways(draw: st.DrawFn, name: str) -> Gateway:
    listeners = (GatewayListener("one", 8000), GatewayListener("two", 8000, "b.example"), GatewayListener("three", 8001))
    return Gateway(name, draw(some(listeners, 3)))


@st.composite
def routes(draw: st.DrawFn, name: str) -> Route:
    backends = st.builds(Backend, st.sampled_from(SERVICES), st.sampled_from(PORTS), st.integers(0, 2), st.sampled_from(("", "", "gone")))
    filters: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
        (
            {},
            {},
            {"rewrite": Rewrite("x")},
            {"mirrors": (Mirror(SERVICES[0], 80, 1, 100),)},
            {"callers": ((Source(labels=(("app", "x"),)),),)},
            {"claims": (ClaimCondition(("sub",), ("a",)),)},
        )
    )
    made = (harness.rule(*draw(st.lists(backends, max_size=2))) for _ in range(draw(st.integers(0, 2))))
    rules = tuple(replace(one, **draw(filters)) for one in made)
    parents = draw(st.lists(st.tuples(st.sampled_from(SERVICES), st.sampled_from((0, 80))), max_size=2))
    at = draw(some((AtGateway(GATEWAYS[0], "one", ("*",)), AtGateway(GATEWAYS[0], "three", ("a.example",)))))
    return Route(name, tuple(parents), (), rules, 0, gateways=at, not_from_gateways=draw(some(SERVICES, 1)))


@st.composite
def policies(draw: st.DrawFn, name: str) -> Policy:
    sources = st.sampled_from(
        (
            (),
            (Source(labels=(("app", "x"),)),),
            (Source(namespaces=("default",)),),
            (Source(not_principals=("*/sa/a",)),),
            (Source(ip_blocks=("10.0.0.0/30",)),),
            (Source(namespaces=("default",), not_ip_blocks=("10.0.0.4/32",)),),
        )
    )
    operations = st.sampled_from(((), (Operation(ports=(8080,)),), (Operation(methods=("GET",)),), (Operation(paths=("/x",)),)))
    rules = tuple(PolicyRule(draw(sources), draw(operations)) for _ in range(draw(st.integers(0, 2))))
    return Policy(name, draw(st.sampled_from(Action)), rules)


@st.composite
def traffic(draw: st.DrawFn, name: str) -> TrafficPolicy:
    check = st.sampled_from((None, HealthCheck(CheckKind.HTTP, "/", "", (), "", 1000, 1000, 3, 1)))
    # No other policy has a port that one decides for: each has a service of its own.
    targets = st.sampled_from((((SERVICES[int(name[-1])], 80),), ((SERVICES[int(name[-1])], 80), (SERVICES[int(name[-1])], 81))))
    return TrafficPolicy(
        name, draw(targets), limits=Limits(requests=draw(st.integers(1, 2)), per_workload=draw(st.booleans())), health_check=draw(check)
    )


@st.composite
def authentications(draw: st.DrawFn, name: str) -> Authentication:
    return Authentication(name, draw(st.sampled_from(((), (TokenIssuer("a"),), (TokenIssuer("a", forward=True),)))))


_KINDS: Mapping[str, tuple[tuple[str, ...], Any]] = {
    "workloads": (WORKLOADS, workloads),
    "services": ((*SERVICES, OUTSIDE), services),
    "routes": (ROUTES, routes),
    "policies": (POLICIES, policies),
    "traffic": (TRAFFIC, traffic),
    "authentications": (AUTHENTICATIONS, authentications),
    "gateways": (GATEWAYS, gateways),
}


@st.composite
def differences(draw: st.DrawFn, *, all_of_it: bool = False) -> dict[str, dict[str, Any]]:
    """By kind and name; None: it goes. Most differences are one workload, as in life."""
    kinds = (
        tuple(_KINDS)
        if all_of_it
        else draw(st.sampled_from((("workloads",), ("workloads",), ("workloads",), *((k,) for k in _KINDS), tuple(_KINDS))))
    )
    found: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        pool, entity = _KINDS[kind]
        chosen = pool if all_of_it else draw(some(pool))
        found[kind] = {name: draw(entity(name)) if all_of_it or draw(st.integers(0, 3)) else None for name in chosen}
    return found


def changed(before: Snapshot, version: str, difference: Mapping[str, Mapping[str, Any]]) -> Snapshot:
    """As `agent.discovery` makes it."""
    tables = {}
    for kind in _KINDS:
        table = getattr(before, kind)
        tables[kind] = (table if isinstance(table, Table) else Table()).changed(difference.get(kind, {}))
    delta = Delta(before.version, **{kind: frozenset(difference.get(kind, ())) for kind in _KINDS}) if before.version else None
    return Snapshot(version, **tables, delta=delta)


def enrolled(snapshot: Snapshot, absent: str, place: str = "/netns") -> list[LocalWorkload]:
    found = sorted(snapshot.workloads.items())
    return [LocalWorkload(w, 1, f"{place}/{name}") for name, w in found if w.node == NODE and w.enrolled and name != absent]


def loopback(identity: str) -> str:
    return {"a": "127.0.1.0", "b": "127.0.1.1"}[identity.rpartition("/")[2]]


def zone_of(snapshot: Snapshot) -> str:
    return node_zone(snapshot.workloads.values(), NODE)


def settled(builder: Builder, *inputs: Any, **more: Any) -> Resources:
    """What is built in the end, when receivers have had time to begin to read."""
    built = builder.build(*inputs, **more)
    assert builder.shown is not None
    if builder.settle(builder.shown):
        built = builder.build(*inputs, **more)
    assert not builder.settle(builder.shown)
    return built


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_differences_lead_where_everything_leads(data: st.DataObject) -> None:
    builder = Builder(NODE, harness.TRUST_DOMAIN)
    in_force = changed(Snapshot(), "0", data.draw(differences(all_of_it=True)))
    here = residents(NODE, in_force, Snapshot(), {})
    shown: Resources = {}
    was: Resources = {}
    for number in range(data.draw(st.integers(1, 8))):
        snapshot = changed(in_force, str(number + 1), data.draw(differences()))
        fate = data.draw(st.sampled_from(("applied",) * 5 + ("refused", "unknown", "again")))
        if fate == "unknown":
            snapshot = replace(snapshot, delta=None)
        elif fate == "again":
            snapshot = in_force
        whole = Builder(NODE, harness.TRUST_DOMAIN)
        needed = whole.needs_inbound(snapshot)
        assert builder.needs_inbound(snapshot) >= needed
        if fate == "refused":
            continue
        here = residents(NODE, snapshot, in_force, here)
        in_force = snapshot
        assert here == {name: w for name, w in snapshot.workloads.items() if w.node == NODE}
        local = enrolled(
            snapshot, data.draw(st.sampled_from(("", "", *WORKLOADS))), data.draw(st.sampled_from(("/netns", "/netns", "/other")))
        )
        tunnels = data.draw(st.sampled_from((loopback, loopback, None)))
        direct = data.draw(st.sampled_from((NO_DIRECT, NO_DIRECT, Direct(frozenset({"node-2"})))))
        inputs = (snapshot, local, zone_of(snapshot), tunnels)
        builder.build(*inputs, direct=direct)
        assert builder.shown is not None
        called = builder.shown.called if data.draw(st.booleans()) else parting.NOTHING
        for one in (builder, builder, whole):
            one.look(called)
        full, built = whole.build(*inputs, direct=direct), settled(builder, *inputs, direct=direct)
        assert built == full
        assert builder.needs_inbound(snapshot) == whole.needs_inbound(snapshot)
        assert builder.parts or whole.needs_inbound(snapshot) == needed
        assert shown == was, "who still reads an earlier result sees what it was"
        shown, was = built, {kind: dict(found) for kind, found in built.items()}


L7 = Policy(
    "default/l7", Action.ALLOW, (PolicyRule((Source(namespaces=("default",), labels=(("app", "x"),)),), (Operation(methods=("GET",)),)),)
)


def mesh() -> Snapshot:
    """Two L7 services, the first with an L7 policy, and one of L4; a caller on this node."""
    first = [harness.workload(f"a{i}", f"10.0.1.{i}", backing={"default/a": {80: 8080}}, policies=(L7.name,)) for i in range(2)]
    second = [harness.workload(f"b{i}", f"10.0.2.{i}", backing={"default/b": {80: 8080}}) for i in range(2)]
    third = [harness.workload(f"c{i}", f"10.0.3.{i}", backing={"default/c": {80: 8080}}) for i in range(2)]
    others = [replace(workload, node="node-2") for workload in (*first, *second, *third)]
    known = [harness.service(name, f"10.96.0.{i}", 80, waypoint=name != "c") for i, name in enumerate("abc")]
    everything: dict[str, dict[str, Any]] = {
        "workloads": {w.name: w for w in (harness.workload("caller", "10.0.0.1"), *others)},
        "services": {s.name: s for s in known},
        "policies": {L7.name: L7},
    }
    return changed(Snapshot(), "1", everything)


def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The resources that are packed from now on."""
    found: list[str] = []

    def pack(message: Any) -> Resource:
        found.append(getattr(message, "name", "") or message.cluster_name)
        return resources.pack(message)

    monkeypatch.setattr(snapshot_module, "pack", pack)
    return found


class _Steady:
    """A builder that sees one change after the other."""

    def __init__(self) -> None:
        self.builder = Builder(NODE, harness.TRUST_DOMAIN)
        self.snapshot = mesh()

    def build(self) -> Resources:
        self.builder.needs_inbound(self.snapshot)
        return self.builder.build(self.snapshot, enrolled(self.snapshot, ""), zone_of(self.snapshot))

    def change(self, workload: Workload) -> Resources:
        self.snapshot = changed(self.snapshot, f"{self.snapshot.version}+", {"workloads": {workload.name: workload}})
        return self.build()

    def unready(self, name: str) -> Resources:
        return self.change(replace(self.snapshot.workloads[name], ready=False))


def groups(resources: Resources, service: str) -> dict[str, str]:
    """The locality of each endpoint of a service, by its address."""
    found = harness.decoded(resources, names.ENDPOINTS, names.service(service, 80)).endpoints
    return {host.endpoint.address.socket_address.address: group.locality.sub_zone for group in found for host in group.lb_endpoints}


def read(resources: Resources, service: str) -> dict[str, bool]:
    """By address of the endpoints of a service: are they those of a receiver that reads?"""
    return {address: bool(group) for address, group in groups(resources, service).items()}


def test_an_endpoint_whose_node_begins_to_read_is_another_one_only_when_it_has_had_time() -> None:
    """Of another node: at once, whichever policy needs the request. Of this one: where its waypoint leaves the decision to it."""
    steady = _Steady()
    first = steady.build()
    assert read(first, "default/a") == {"10.0.1.0": True, "10.0.1.1": True}
    assert read(first, "default/b") == {"10.0.2.0": False, "10.0.2.1": False}
    protected = replace(steady.snapshot.workloads["default/b0"], policies=(L7.name,))
    second = steady.change(protected)
    assert second[names.ENDPOINTS] is first[names.ENDPOINTS]
    assert steady.builder.shown is not None
    assert steady.builder.settle(steady.builder.shown)
    assert read(steady.build(), "default/b") == {"10.0.2.0": True, "10.0.2.1": False}
    here = [replace(steady.snapshot.workloads[f"default/b{i}"], policies=(L7.name,), node=NODE) for i in range(2)]
    steady.change(here[0])
    assert read(settled(steady.builder, steady.snapshot, enrolled(steady.snapshot, ""), ""), "default/b")["10.0.2.0"], "b1 is not protected"
    steady.change(here[1])
    assert not any(read(settled(steady.builder, steady.snapshot, enrolled(steady.snapshot, ""), ""), "default/b").values()), "alike"


def test_a_new_endpoint_is_from_the_beginning_what_it_is_later() -> None:
    steady = _Steady()
    steady.build()
    found = steady.change(replace(steady.snapshot.workloads["default/a0"], name="default/a9", addresses=("10.0.1.9",)))
    assert read(found, "default/a")["10.0.1.9"]
    assert settled(steady.builder, steady.snapshot, enrolled(steady.snapshot, ""), "") is found


def test_who_reads_is_settled_as_it_was_when_the_time_began() -> None:
    """Changes that come meanwhile have their own."""
    steady = _Steady()
    steady.build()
    protected = [replace(steady.snapshot.workloads[f"default/b{i}"], policies=(L7.name,)) for i in range(2)]
    steady.change(protected[0])
    shown = steady.builder.shown
    assert shown is not None
    steady.change(protected[1])
    assert steady.builder.settle(shown)
    assert read(steady.build(), "default/b") == {"10.0.2.0": True, "10.0.2.1": False}


def test_of_who_has_begun_to_read_connections_are_let_go_of_again_for_a_minute_because_its_node_may_have_begun_late() -> None:
    steady = _Steady()
    first = steady.build()
    assert not steady.builder.settle_again()
    protected = steady.change(replace(steady.snapshot.workloads["default/b0"], policies=(L7.name,)))
    found = [settled(steady.builder, steady.snapshot, enrolled(steady.snapshot, ""), "")]
    while steady.builder.settle_again():
        found.append(steady.build())
    assert protected is not found[0]
    seen = [groups(one, "default/b") for one in found]
    assert [one["10.0.2.0"] for one in seen] == [names.READ[1 + turn % 2] for turn in range(AGAIN + 1)]
    assert {one["10.0.2.1"] for one in seen} == {""}
    touched = {kind for one in found for kind in one if one[kind] is not protected[kind]}
    assert touched == {names.ENDPOINTS, names.CLUSTER}, "clusters of single workloads have theirs in them"
    assert AGAIN * READERS_AGAIN_S >= 60
    assert READERS_AGAIN_S < LET_GO_S / 2 + 1, "wherever in it a node begins, there is time for requests that are under way"
    assert groups(first, "default/a") == groups(found[-1], "default/a")


def test_an_endpoint_of_an_l4_service_changes_nothing() -> None:
    steady = _Steady()
    before = steady.build()
    assert steady.unready("default/c1") is before


def test_an_endpoint_of_an_l7_service_makes_that_service_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = _Steady()
    before = steady.build()
    found = made(monkeypatch)
    after = steady.unready("default/b1")
    assert found == ["service/default/b/80"]
    steady.unready("default/a1")
    assert found == ["service/default/b/80", "service/default/a/80"], "also if it has an address of its own that is served"
    differing = {(kind, name) for kind in after for name in after[kind] if after[kind][name] is not before[kind][name]}
    assert differing == {(names.ENDPOINTS, "service/default/b/80")}
    assert len(before[names.ENDPOINTS]) == len(after[names.ENDPOINTS]), "who still reads the result of before sees what it was"


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        pytest.param("default/b0", {"policies": ("default/missing",)}, id="other policies behind a route"),
        pytest.param("default/b1", {"policies": ("default/missing",)}, id="endpoints behind a route that are no longer alike"),
        pytest.param("default/a1", {"backing": (Backing("default/a", {80: 9090}),)}, id="another port behind an address"),
    ],
)
def test_what_stands_behind_a_route_or_an_address_reaches_it(name: str, difference: dict[str, Any]) -> None:
    steady = _Steady()
    sends = harness.route("r", harness.rule(Backend("default/b", 80, 1)), parent="a")
    steady.snapshot = changed(steady.snapshot, "1+", {"routes": {sends.name: sends}})
    steady.unready("default/b1")
    if name == "default/b1":
        difference = {**difference, "ready": True}
    after = steady.change(replace(steady.snapshot.workloads[name], **difference))
    full = build(steady.snapshot, enrolled(steady.snapshot, ""), trust_domain=harness.TRUST_DOMAIN)
    assert all(after[kind] == full[kind] for kind in after)


@pytest.mark.parametrize(
    "difference",
    [{"mtls": Mtls.STRICT}, {"mtls_ports": ((8080, Mtls.PERMISSIVE),)}, {"service_account": "b"}, {"node": NODE}],
    ids=lambda difference: next(iter(difference)),
)
def test_the_way_to_a_workloads_own_address_follows_its_mode_and_its_identity(difference: dict[str, Any]) -> None:
    builder, before = Builder(NODE, harness.TRUST_DOMAIN), mesh()
    asking = replace(before.workloads["default/a1"], service_account="a", mtls=Mtls.DISABLE if "mtls" in str(difference) else Mtls.STRICT)
    before = changed(before, "2", {"workloads": {asking.name: asking}})
    builder.build(before, enrolled(before, ""), "", loopback)
    after = changed(before, "3", {"workloads": {asking.name: replace(asking, **difference)}})
    local = enrolled(before, "")
    full = Builder(NODE, harness.TRUST_DOMAIN).build(after, local, "", loopback)
    assert settled(builder, after, local, "", loopback) == full


def test_who_has_which_address_is_asked_again_only_if_it_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = _Steady()
    steady.change(replace(steady.snapshot.workloads["default/caller"], policies=(L7.name,)))
    asked: list[Caller] = []

    def source_matches(source: Source, caller: Caller) -> bool:
        asked.append(caller)
        return policy.source_matches(source, caller)

    monkeypatch.setattr(rbac, "source_matches", source_matches)
    steady.unready("default/c1")
    assert not asked
    steady.change(replace(steady.snapshot.workloads["default/c0"], addresses=("10.0.3.9",)))
    assert [caller.addresses for caller in asked] == [("10.0.3.9",)]


def test_a_kind_that_nothing_differs_in_is_the_same_object_so_that_nobody_need_look_at_it() -> None:
    steady = _Steady()
    before = steady.build()
    after = steady.unready("default/b1")
    assert {kind for kind in after if after[kind] is not before[kind]} == {names.ENDPOINTS}


def test_a_change_of_a_policy_or_a_route_makes_what_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = _Steady()
    steady.build()
    found = made(monkeypatch)
    steady.snapshot = changed(steady.snapshot, "2", {"policies": {L7.name: replace(L7, action=Action.DENY)}})
    steady.build()
    assert set(found) == {"service/default/a/80", *(f"workload/default/a{i}/8080" for i in range(2))}
    found.clear()
    sends = harness.route("r", harness.rule(Backend("default/a", 80, 1)), parent="b")
    steady.snapshot = changed(steady.snapshot, "3", {"routes": {sends.name: sends}})
    steady.build()
    assert found == ["service/default/b/80"]
    steady.snapshot = changed(steady.snapshot, "4", {"policies": {L7.name: L7}})
    found.clear()
    steady.build()
    assert "service/default/b/80" in found, "its requests go there"


class _Unseen(Mapping[str, Workload]):
    """Workloads that nobody may pass over."""

    def __getitem__(self, name: str) -> Workload:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a pass over all workloads")

    def __len__(self) -> int:
        return 100_000


def test_a_mesh_without_l7_is_spared_every_pass_over_its_workloads() -> None:
    policies = {"default/p": Policy("default/p", Action.DENY, (PolicyRule(),))}
    snapshot = Snapshot(
        "1", workloads=_Unseen(), services={"default/c": harness.service("c", "10.96.0.1", 80, waypoint=False)}, policies=policies
    )
    builder = Builder(NODE, harness.TRUST_DOMAIN)
    assert not builder.needs_inbound(snapshot)
    caller = LocalWorkload(harness.workload("caller", "10.0.0.1"), 1, "/netns/caller")
    assert list(builder.build(snapshot, [caller], "")[names.LISTENER]) == ["outbound/default/caller"]


def test_what_is_not_asked_for_in_a_turn_is_forgotten() -> None:
    kept = Kept()
    calls: list[int] = []

    def make(number: int) -> Resource:
        calls.append(number)
        return Resource(str(number), b"")

    first = kept("place", make, 1)
    kept.turn()
    assert kept("place", make, 1) is first
    assert kept("place", make, 2) != first
    kept.turn()
    kept.turn()
    kept("place", make, 2)
    assert calls == [1, 2, 2]


_EXTERNAL = External("default/e", ("a.example",), False, True, (Endpoint("a.example", 1, {}),), None, ("default/out",))
_HTTP = Service(OUTSIDE, ("240.240.0.1",), (ServicePort(80, "", "TCP", "http", True, ""),), "", external=_EXTERNAL)
_TLS = replace(_HTTP, ports=(ServicePort(443, "", "TCP", "tls", True, ""),))
_OUT = Policy("default/out", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/caller",)),)),))
_NOBODY = replace(_OUT, rules=())
_SHARES = TrafficPolicy("default/t0", (("default/b", 80),), limits=Limits(requests=2, per_workload=True))
_CLAIMS = replace(
    harness.route("r", replace(harness.rule(Backend("default/b", 80, 1)), claims=(ClaimCondition(("sub",), ("a",)),)), parent="a")
)
_CHANGES = harness.route("changes", replace(harness.rule(Backend("default/b", 80, 1)), rewrite=Rewrite("x")), parent="a")
_TOKENS = Authentication("default/a0", (TokenIssuer("a"),))
_GATEWAY = Gateway(GATEWAYS[0], (GatewayListener("one", 8000),))
_PLACE = replace(harness.workload("place", "10.0.0.9"), labels={gateways_of_envoy.LABEL: "g0"})
_IN = replace(
    harness.route("in", harness.rule(Backend("default/b", 80, 1)), parent="none"), parents=(), gateways=(AtGateway(GATEWAYS[0], "one"),)
)
_LATE = harness.workload("late", "10.0.0.8")


def test_what_a_gateway_alone_copies_has_somewhere_to_go() -> None:
    copies = replace(_IN, rules=(replace(_IN.rules[0], mirrors=(Mirror("default/a", 80, 1, 100),)),))
    kinds: dict[str, Any] = {"workloads": _PLACE, "gateways": _GATEWAY, "routes": copies}
    known = changed(mesh(), "2", {kind: {entity.name: entity} for kind, entity in kinds.items()})
    built = build(known, enrolled(known, ""), trust_domain=harness.TRUST_DOMAIN)
    assert all(names.MIRROR in built[kind] for kind in (names.CLUSTER, names.LISTENER, names.ROUTES))


@pytest.mark.parametrize(
    ("before", "difference"),
    [
        pytest.param({"services": _HTTP, "policies": _OUT}, {"policies": _NOBODY}, id="who may go out, HTTP"),
        pytest.param({"services": _TLS, "policies": _OUT}, {"policies": _NOBODY}, id="who may go out, TLS"),
        pytest.param({"services": _TLS, "policies": _OUT}, {"workloads": _LATE}, id="a workload that may not go out"),
        pytest.param({"policies": _OUT}, {"services": _TLS}, id="the first service outside that is not HTTP"),
        pytest.param({"services": _TLS}, {"services": _HTTP}, id="the last service outside that is not HTTP"),
        pytest.param({"traffic": _SHARES}, {"workloads": _LATE}, id="one more caller has a share"),
        pytest.param({"traffic": replace(_SHARES, limits=Limits(requests=2))}, {"traffic": _SHARES}, id="shares"),
        pytest.param({"traffic": _SHARES}, {"services": replace(harness.service("b", "10.96.0.1", 80), ports=())}, id="shares of nothing"),
        pytest.param({"routes": _CLAIMS}, {"authentications": _TOKENS}, id="whose tokens have claims"),
        pytest.param({"authentications": _TOKENS, "routes": _CLAIMS}, {"routes": replace(_CLAIMS, rules=())}, id="nobody asks for claims"),
        pytest.param(
            {"authentications": _TOKENS, "routes": _CHANGES}, {"routes": replace(_CHANGES, rules=())}, id="tokens are kept no more"
        ),
        pytest.param({"authentications": _TOKENS}, {"routes": _CHANGES}, id="tokens are kept for the receiver"),
        pytest.param({"routes": _IN, "gateways": _GATEWAY}, {"workloads": _PLACE}, id="the place of a gateway"),
        pytest.param({"routes": _IN, "workloads": _PLACE}, {"gateways": _GATEWAY}, id="a gateway"),
        pytest.param({"workloads": _PLACE, "gateways": _GATEWAY}, {"routes": _IN}, id="the first route of a gateway"),
        pytest.param({"workloads": _PLACE, "gateways": _GATEWAY, "routes": _IN}, {"policies": L7}, id="policies behind a gateway"),
        pytest.param(
            {"workloads": _PLACE, "gateways": _GATEWAY, "routes": _IN}, {"gateways": replace(_GATEWAY, listeners=())}, id="a listener"
        ),
    ],
)
def test_a_difference_reaches_whatever_depends_on_it(before: dict[str, Any], difference: dict[str, Any]) -> None:
    steady = _Steady()
    protected = [
        replace(w, policies=(L7.name,), authentications=(_TOKENS.name,)) for n, w in steady.snapshot.workloads.items() if "/b" in n
    ]
    known: dict[str, dict[str, Any]] = {"workloads": {w.name: w for w in protected}, "policies": {L7.name: replace(L7, rules=())}}
    for kind, entity in before.items():
        known.setdefault(kind, {})[entity.name] = entity
    steady.snapshot = changed(steady.snapshot, "1+", known)
    was = steady.build()
    steady.snapshot = changed(steady.snapshot, "2", {kind: {entity.name: entity} for kind, entity in difference.items()})
    now = settled(steady.builder, steady.snapshot, enrolled(steady.snapshot, ""), zone_of(steady.snapshot))
    full = build(steady.snapshot, enrolled(steady.snapshot, ""), trust_domain=harness.TRUST_DOMAIN)
    assert all(now[kind] == full[kind] for kind in now)
    assert now != was
