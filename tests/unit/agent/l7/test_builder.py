"""What is built from differences is what is built from everything, and what does not differ is not built again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.balancing import SAME_NODE, SAME_ZONE, node_zone
from agent.compact import Table
from agent.l7 import names, rbac, resources
from agent.l7 import snapshot as snapshot_module
from agent.l7.kept import Kept
from agent.l7.resources import Resource, Resources
from agent.l7.snapshot import Builder, build
from agent.model import (
    Action,
    Backend,
    Backing,
    Delta,
    LocalWorkload,
    Operation,
    Policy,
    PolicyRule,
    Route,
    Service,
    ServicePort,
    Snapshot,
    Source,
    Workload,
)
from agent.supervisor import residents
from tests.unit.agent.l7 import harness

NODE = "node-1"
PORTS = (80, 81)
WORKLOADS = tuple(f"default/w{i}" for i in range(6))
SERVICES = tuple(f"default/s{i}" for i in range(3))
ROUTES = tuple(f"default/r{i}" for i in range(2))
POLICIES = tuple(f"default/p{i}" for i in range(3))


def some(pool: tuple[Any, ...], most: int = 2) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(pool), max_size=most, unique=True).map(tuple)


ports = st.dictionaries(st.sampled_from(PORTS), st.sampled_from((8080, 8081)), max_size=2)


@st.composite
def workloads(draw: st.DrawFn, name: str) -> Workload:
    return Workload(
        name=name,
        service_account=draw(st.sampled_from(("a", "b"))),
        node=draw(st.sampled_from((NODE, NODE, "node-2"))),
        labels=draw(st.sampled_from(({}, {"app": "x"}))),
        addresses=draw(some(tuple(f"10.0.0.{i}" for i in range(8)))),
        network_namespace="ns",
        enrolled=draw(st.booleans()),
        ready=draw(st.integers(0, 3)) > 0,
        backing=tuple(Backing(service, draw(ports)) for service in draw(some(SERVICES))),
        policies=draw(some((*POLICIES, "default/missing"))),
        zone=draw(st.sampled_from(("", "z1", "z2"))),
        weight=draw(st.integers(1, 2)),
    )


@st.composite
def services(draw: st.DrawFn, name: str) -> Service:
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
def routes(draw: st.DrawFn, name: str) -> Route:
    backends = st.builds(Backend, st.sampled_from(SERVICES), st.sampled_from(PORTS), st.integers(0, 2), st.sampled_from(("", "", "gone")))
    rules = tuple(harness.rule(*draw(st.lists(backends, max_size=2))) for _ in range(draw(st.integers(0, 2))))
    parents = draw(st.lists(st.tuples(st.sampled_from(SERVICES), st.sampled_from((0, 80))), max_size=2))
    return Route(name, tuple(parents), (), rules, 0)


@st.composite
def policies(draw: st.DrawFn, name: str) -> Policy:
    sources = st.sampled_from(
        ((), (Source(labels=(("app", "x"),)),), (Source(namespaces=("default",)),), (Source(not_principals=("*/sa/a",)),))
    )
    operations = st.sampled_from(((), (Operation(ports=(8080,)),), (Operation(methods=("GET",)),), (Operation(paths=("/x",)),)))
    rules = tuple(PolicyRule(draw(sources), draw(operations)) for _ in range(draw(st.integers(0, 2))))
    return Policy(name, draw(st.sampled_from(Action)), rules)


_KINDS: Mapping[str, tuple[tuple[str, ...], Any]] = {
    "workloads": (WORKLOADS, workloads),
    "services": (SERVICES, services),
    "routes": (ROUTES, routes),
    "policies": (POLICIES, policies),
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
    delta = Delta(before.version, *(frozenset(difference.get(kind, ())) for kind in _KINDS)) if before.version else None
    return Snapshot(version, **tables, delta=delta)


def enrolled(snapshot: Snapshot, absent: str) -> list[LocalWorkload]:
    found = sorted(snapshot.workloads.items())
    return [LocalWorkload(w, 1, f"/netns/{name}") for name, w in found if w.node == NODE and w.enrolled and name != absent]


def zone_of(snapshot: Snapshot) -> str:
    return node_zone(snapshot.workloads.values(), NODE)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_differences_lead_where_everything_leads(data: st.DataObject) -> None:
    builder = Builder(NODE, harness.TRUST_DOMAIN)
    in_force = changed(Snapshot(), "0", data.draw(differences(all_of_it=True)))
    here = residents(NODE, in_force, Snapshot(), {})
    for number in range(data.draw(st.integers(1, 8))):
        snapshot = changed(in_force, str(number + 1), data.draw(differences()))
        fate = data.draw(st.sampled_from(("applied",) * 5 + ("refused", "unknown", "again")))
        if fate == "unknown":
            snapshot = replace(snapshot, delta=None)
        elif fate == "again":
            snapshot = in_force
        assert builder.needs_inbound(snapshot) == Builder(NODE, harness.TRUST_DOMAIN).needs_inbound(snapshot)
        if fate == "refused":
            continue
        here = residents(NODE, snapshot, in_force, here)
        in_force = snapshot
        assert here == {name: w for name, w in snapshot.workloads.items() if w.node == NODE}
        local = enrolled(snapshot, data.draw(st.sampled_from(("", "", *WORKLOADS))))
        full = build(snapshot, local, trust_domain=harness.TRUST_DOMAIN)
        assert builder.build(snapshot, local, zone_of(snapshot)) == {kind: found for kind, found in full.items() if kind != names.RUNTIME}


L7 = Policy("default/l7", Action.ALLOW, (PolicyRule(operations=(Operation(methods=("GET",)),)),))


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


def test_who_has_which_address_is_asked_again_only_if_it_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = _Steady()
    steady.change(replace(steady.snapshot.workloads["default/caller"], policies=(L7.name,)))
    asked: list[object] = []

    class Callers(rbac.Callers):
        def __init__(self, *rest: Any) -> None:
            asked.append(rest)
            super().__init__(*rest)

    monkeypatch.setattr(rbac, "Callers", Callers)
    steady.unready("default/c1")
    assert not asked
    steady.change(replace(steady.snapshot.workloads["default/c0"], addresses=("10.0.3.9",)))
    assert len(asked) == 1


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
