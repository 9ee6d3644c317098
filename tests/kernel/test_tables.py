"""A difference leads to the same rows as everything anew, whatever changed and in whatever order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from agent.bpf import manifest as m
from agent.bpf.maps import Mirror
from agent.bpf.tables import Namespace, Tables
from agent.errors import KernelRefused
from agent.ids import Ids
from agent.model import Action, Backing, Delta, LocalWorkload, Mtls, Policy, PolicyRule, Service, ServicePort, Snapshot, Source, Workload
from tests.kernel.programs import loaded

NODES = ("here", "there")
NUMBER = 0xFFFFFFFF  # the part of a word that is not the owner
POLICIES = {
    p.name: p
    for p in (
        Policy("shop/a", Action.ALLOW, (PolicyRule((Source(service_accounts=("shop/one",)),)),)),
        Policy("shop/d", Action.DENY, (PolicyRule((Source(labels=(("app", "x"),)), Source(ip_blocks=("10.0.0.0/24",)))),)),
    )
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tables]:
    """The tables of a data path that is loaded and attached to nothing."""
    with loaded(tmp_path_factory.mktemp("tables")) as (config, datapath):
        yield Tables(datapath.maps, Ids(config.run_dir / "ids"), "mesh.local", "here")


modes = st.sampled_from([Mtls.DISABLE, *Mtls])
names = st.sampled_from([f"shop/w{i}" for i in range(5)])
services = st.sampled_from(["shop/s0", "shop/s1"])
workloads = st.builds(
    Workload,
    names,
    st.sampled_from(["one", "two"]),
    st.sampled_from(NODES),
    st.sampled_from([{}, {"app": "x"}, {"app": "y"}]),
    st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.1.1", "fd00::1"]), max_size=2, unique=True).map(tuple),
    st.just("netns"),
    st.booleans(),
    st.booleans(),
    st.lists(
        st.builds(Backing, services, st.sampled_from([{}, {80: 8080}, {80: 8081, 81: 9}]), st.sampled_from([{}, {53: 53}])),
        max_size=2,
        unique_by=lambda b: b.service,
    ).map(tuple),
    st.sampled_from([(), ("shop/a",), ("shop/a", "shop/d"), ("shop/gone",)]),
    st.sampled_from(["", "north", "south"]),
    st.sampled_from([1, 1, 3, 7]),
    mtls=modes,
    mtls_ports=st.lists(st.tuples(st.sampled_from([80, 8080, 9]), modes), max_size=2, unique_by=lambda pair: pair[0]).map(tuple),
    egress_deny=st.booleans(),
    probe_ports=st.sampled_from([(), (8080,), (80, 9)]),
)
ports = st.lists(
    st.builds(
        ServicePort, st.sampled_from([53, 80, 81]), st.just(""), st.sampled_from(["TCP", "UDP"]), st.just(""), st.booleans(), st.just("")
    ),
    max_size=3,
    unique_by=lambda p: (p.port, p.protocol),
).map(tuple)
offers = st.builds(
    lambda name, vips, *rest: Service(
        name, tuple(vip + name[-1] for vip in vips), *rest
    ),  # an address is one service's: controller.conflicts
    services,
    st.sampled_from([("10.96.0.1",), ("10.96.0.2", "fd96::2"), ()]),
    ports,
    st.sampled_from(["", "PreferSameNode", "PreferSameZone"]),
    st.sampled_from([0, 0, 60]),
    st.sampled_from(["", "least-connections"]),
)


@dataclass(frozen=True)
class Moved:
    """A workload's namespace came, went, or has other addresses; cookie 0: gone."""

    name: str
    cookie: int
    addresses: tuple[str, ...]


moves = st.builds(
    Moved, names, st.integers(0, 4), st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "10.9.9.9"]), max_size=2, unique=True).map(tuple)
)


@dataclass(frozen=True)
class Acknowledged:
    """The identities that have a tunnel now."""

    numbers: tuple[tuple[str, int], ...]


IDENTITIES = tuple(f"spiffe://mesh.local/ns/shop/sa/{name}" for name in ("one", "two"))
tunnels = st.builds(
    Acknowledged, st.lists(st.tuples(st.sampled_from(IDENTITIES), st.integers(256, 258)), max_size=2, unique_by=lambda p: p[0]).map(tuple)
)
steps = st.one_of(workloads, workloads, offers, moves, tunnels, names, services, st.just(POLICIES["shop/d"]))


class World:
    """What the controller and the node say, step by step."""

    def __init__(self) -> None:
        self.snapshot = Snapshot("0", {}, {}, {}, dict(POLICIES))
        self.namespaces: dict[str, Moved] = {}
        self.inbound: frozenset[str] = frozenset()
        self.tunnels: dict[str, int] = {}

    def take(self, step: object) -> None:
        """One change; the snapshot says what differs from the one before."""
        before = self.snapshot
        delta = Delta(before.version)
        found = replace(before, version=str(int(before.version) + 1))
        if isinstance(step, Acknowledged):
            self.tunnels = dict(step.numbers)
            return
        if isinstance(step, Moved):
            self.namespaces = {**self.namespaces, step.name: step}
            self.inbound = self.inbound ^ {step.name}
            return
        if isinstance(step, Workload):
            found = replace(found, workloads={**before.workloads, step.name: step})
            delta = replace(delta, workloads=frozenset({step.name}))
        elif isinstance(step, Service):
            found = replace(found, services={**before.services, step.name: step})
            delta = replace(delta, services=frozenset({step.name}))
        elif isinstance(step, Policy):
            policies = {
                **before.policies,
                step.name: replace(step, action=Action.ALLOW if step == before.policies[step.name] else Action.DENY),
            }
            found = replace(found, policies=policies)
            delta = replace(delta, policies=frozenset({step.name}))
        else:
            found = replace(
                found,
                workloads={n: w for n, w in before.workloads.items() if n != step},
                services={n: s for n, s in before.services.items() if n != step},
            )
            delta = replace(
                delta, workloads=frozenset({str(step)} & before.workloads.keys()), services=frozenset({str(step)} & before.services.keys())
            )
        self.snapshot = replace(found, delta=delta)

    def local(self) -> list[Namespace]:
        """The enrolled workloads of this node that are in a namespace; a namespace belongs to one of them."""
        taken: set[int] = set()
        bound = []
        for name, moved in sorted(self.namespaces.items()):
            workload = self.snapshot.workloads.get(name)
            if workload and workload.node == "here" and workload.enrolled and moved.cookie and moved.cookie not in taken:
                taken.add(moved.cookie)
                bound.append(Namespace(LocalWorkload(workload, moved.cookie, ""), moved.addresses))
        return bound


def meaning(tables: Tables) -> dict[str, object]:
    """What the rows say: policy sets by what they decide for everybody who is known, because sets may hold more rows than are needed."""
    tables.remove_retired()
    counted = {name: mirror.count for name, mirror in tables.mirrors.items()}
    rows = {name: mirror.read() for name, mirror in tables.mirrors.items()}
    assert counted == {name: len(found) for name, found in rows.items()}
    maps = {name: mirror.map.layout for name, mirror in tables.mirrors.items()}
    known = {
        name: {key: maps[name].value.unpack(row) for key, row in rows[name].items()}
        for name in ("mesh_address", "mesh_workload", "mesh_block")
    }
    identities = {0} | {row["identity"][0] & NUMBER for found in known.values() for row in found.values()}
    key = maps["mesh_policy"].key

    def decide(policy: int, identity: int, protocol: int, port: int) -> bytes | None:
        for who, where in ((identity, port), (identity, 0), (0xFFFFFFFF, port), (0xFFFFFFFF, 0)):
            row = rows["mesh_policy"].get(key.pack(policy=policy, identity=who, port=where, protocol=protocol))
            if row is not None:
                return row
        return None

    found: dict[str, object] = {name: rows[name] for name in ("mesh_backend", "mesh_member", "mesh_service", "mesh_block", "mesh_mtls")}
    for name in ("mesh_address", "mesh_workload"):
        for raw, row in known[name].items():
            assert row["identity"][0] == row["identity"][1]
            assert row["policy"][0] == row["policy"][1]
            found[f"{name} {raw.hex()}"] = (
                row["netns_cookie"],
                row["id"],
                row["flags"],
                row["tunnel"],
                row["identity"],
                {(i, p, port): decide(row["policy"][0] & NUMBER, i, p, port) for i in identities for p in (6, 17) for port in (80, 9)},
            )
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(steps, min_size=3, max_size=25))
def test_a_difference_leads_where_everything_leads(tables: Tables, changes: list[object]) -> None:
    world = World()
    tables.sync(world.snapshot, [], frozenset())
    for step in changes:
        world.take(step)
        local = world.local()
        tables.sync(world.snapshot, local, world.inbound, tunnels=world.tunnels)
        by_difference = meaning(tables)
        tables._snapshot = None
        tables.sync(world.snapshot, local, world.inbound, tunnels=world.tunnels)
        assert meaning(tables) == by_difference, step
        event(type(step).__name__)


def test_who_asks_is_told_once_before_the_first_row_says_something_else(tables: Tables) -> None:
    world = World()
    deciding = ("mesh_block", "mesh_address", "mesh_workload", "mesh_service")
    steps = (  # everything at first, then differences
        Workload("shop/w0", "one", "here", {}, ("10.0.0.1",), "netns", True, True, (Backing("shop/s0", {80: 8080}),)),
        Moved("shop/w0", 1, ("10.0.0.1",)),
        Service("shop/s0", ("10.96.0.1",), (ServicePort(80, "", "TCP", "", False, ""),)),
        Moved("shop/w0", 2, ("10.0.0.1",)),
    )

    def rows() -> dict[str, dict[bytes, bytes]]:
        return {name: tables.mirrors[name].read() for name in deciding}

    for step in steps:
        world.take(step)
        before, seen = rows(), []
        tables.sync(world.snapshot, world.local(), frozenset(), switching=lambda: seen.append(rows()))  # noqa: B023  called at once
        assert seen == [before]
        assert rows() != before


def test_a_small_change_is_a_difference(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    for number in range(5):
        world.take(
            Workload(
                f"shop/w{number}", "one", "there", {}, (f"10.0.1.{number}",), "", True, True, (Backing("shop/s0", {80: 8080}),), ("shop/a",)
            )
        )
    world.take(Service("shop/s0", ("10.96.0.1",), (ServicePort(80, "", "TCP", "", False, ""),)))
    tables.sync(world.snapshot, [], frozenset())
    monkeypatch.setattr(tables, "_everything", None)
    world.take(replace(world.snapshot.workloads["shop/w3"], ready=False))
    assert tables.sync(world.snapshot, [], frozenset()) < 20


def modes_of(tables: Tables, *names: str) -> dict[str, tuple[int, int, dict[int, int]]]:
    """Flags, number and ports of workloads by address."""
    maps = {name: tables.mirrors[name].map.layout for name in ("mesh_address", "mesh_mtls")}
    ports: dict[int, dict[int, int]] = {}
    for key, row in tables.mirrors["mesh_mtls"].read().items():
        where = maps["mesh_mtls"].key.unpack(key)
        ports.setdefault(where["workload"], {})[where["port"]] = maps["mesh_mtls"].value.unpack(row)[""] & NUMBER
    found = {}
    for known in map(maps["mesh_address"].value.unpack, tables.mirrors["mesh_address"].read().values()):
        found[tables._ids.name(known["id"])] = (known["flags"], known["tunnel"], ports.get(known["id"], {}))
    return {name: found[name] for name in names}


def remote(number: int, mode: Mtls = Mtls.DISABLE, ports: tuple[tuple[int, Mtls], ...] = (), node: str = "there") -> Workload:
    account = ("one", "two")[number % 2]
    return Workload(f"shop/w{number}", account, node, {}, (f"10.0.1.{number}",), "", True, True, mtls=mode, mtls_ports=ports)


def world_of(tables: Tables, *found: Workload) -> World:
    """These workloads, in force: what was there before is gone."""
    world = World()
    for workload in found:
        world.take(workload)
    tables._snapshot = None
    tables.sync(world.snapshot, [], frozenset())
    tables.remove_retired()
    return world


TUNNEL, STRICT, PORTS = m.WORKLOAD_TUNNEL, m.WORKLOAD_STRICT, m.WORKLOAD_MTLS_PORTS


def test_a_mode_is_a_flag_and_an_identity_that_has_a_tunnel_is_a_number(tables: Tables) -> None:
    """To callers of this node a workload of another one is reached through the tunnel; of its own the node only refuses plaintext."""
    world = world_of(
        tables,
        remote(0),
        remote(2, Mtls.PERMISSIVE),
        remote(4, Mtls.STRICT, ((80, Mtls.DISABLE), (81, Mtls.PERMISSIVE))),
        remote(3, Mtls.DISABLE, ((80, Mtls.STRICT),)),
        remote(6, Mtls.STRICT, ((80, Mtls.PERMISSIVE),), node="here"),
    )
    names = [f"shop/w{i}" for i in (0, 2, 4, 3, 6)]
    ports = [{}, {}, {80: 0, 81: TUNNEL}, {80: TUNNEL | STRICT}, {80: 0}]
    flags = [0, TUNNEL, TUNNEL | STRICT | PORTS, PORTS, STRICT | PORTS]
    for known, numbers in (({}, [0] * 5), ({IDENTITIES[0]: 300}, [0, 300, 300, 0, 0]), ({IDENTITIES[1]: 301}, [0, 0, 0, 301, 0])):
        tables.sync(world.snapshot, [], frozenset(), tunnels=known)
        assert modes_of(tables, *names) == dict(zip(names, zip(flags, numbers, ports, strict=True), strict=True))


def test_an_identity_that_comes_or_goes_writes_its_workloads_addresses_and_nothing_else(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = (Backing("shop/s0", {80: 8080}),)
    strict = [replace(remote(i, Mtls.STRICT, ((80, Mtls.PERMISSIVE),)), backing=back) for i in range(6)]
    world = world_of(tables, *strict, remote(8))
    world.take(Service("shop/s0", ("10.96.0.1",), (ServicePort(80, "", "TCP", "", False, ""),)))
    tables.sync(world.snapshot, [], frozenset())
    written: list[tuple[str, int]] = []
    write = Mirror.write

    def watched(mirror: Mirror, rows: Mapping[bytes, bytes]) -> int:
        written.extend([(mirror.map.name, len(rows))] if rows else [])
        return write(mirror, rows)

    monkeypatch.setattr(Mirror, "write", watched)
    monkeypatch.setattr(tables, "_everything", None)
    assert tables.sync(world.snapshot, [], frozenset(), tunnels={IDENTITIES[0]: 300}) == 3
    assert tables.sync(world.snapshot, [], frozenset(), tunnels={IDENTITIES[0]: 300}) == 0
    assert tables.sync(world.snapshot, [], frozenset(), tunnels={IDENTITIES[0]: 300, "spiffe://mesh.local/ns/x/sa/y": 301}) == 0
    assert written == [("mesh_address", 3)]


def test_a_ports_row_is_there_before_it_is_pointed_to_and_goes_after_it(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each write of an address, whichever row a program has, the old or the new one, the ports that it points to have rows."""
    world = world_of(tables, remote(0))
    both, one = remote(0, Mtls.DISABLE, ((80, Mtls.STRICT), (81, Mtls.STRICT))), remote(0, Mtls.STRICT, ((81, Mtls.PERMISSIVE),))
    number = tables._ids.number("workload", "shop/w0")
    write, seen = Mirror.write, []

    def watched(mirror: Mirror, rows: Mapping[bytes, bytes]) -> int:
        if mirror.map.name == "mesh_address":
            seen.append({port for port in (80, 81) if tables.mirrors["mesh_mtls"].map.get(tables._rows.mtls_key(number, port))})
        return write(mirror, rows)

    monkeypatch.setattr(Mirror, "write", watched)
    for step in (both, one, both, remote(0), both):
        world.take(step)
        tables.sync(world.snapshot, [], frozenset())
    assert seen == [{80, 81}] * 5
    tables.remove_retired()
    assert modes_of(tables, "shop/w0") == {"shop/w0": (PORTS, 0, {80: TUNNEL | STRICT, 81: TUNNEL | STRICT})}


@pytest.mark.parametrize("name", ["mesh_address", "mesh_workload", "mesh_service", "mesh_backend", "mesh_mtls"])
def test_a_difference_that_does_not_fit_leaves_the_previous_state_in_force(
    tables: Tables, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    world = World()
    server = Workload("shop/w0", "one", "here", {}, ("10.0.0.1",), "netns", True, True, (Backing("shop/s0", {80: 8080}),))
    server = replace(server, mtls_ports=((80, Mtls.STRICT),))
    offer = Service("shop/s0", ("10.96.0.1",), (ServicePort(80, "", "TCP", "", False, ""),))
    for step in (server, Moved("shop/w0", 1, ("10.0.0.1",)), offer):
        world.take(step)
    tables.sync(world.snapshot, world.local(), frozenset(), tunnels=world.tunnels)
    tables.remove_retired()
    monkeypatch.setattr(tables.mirrors[name].map, "capacity", len(tables.mirrors[name].read()))
    steps = {
        "mesh_address": replace(server, name="shop/w1", addresses=("10.0.0.2",)),
        "mesh_workload": Moved("shop/w1", 2, ()),
        "mesh_service": Service("shop/s1", ("10.96.0.2",), offer.ports),
        "mesh_backend": replace(server, name="shop/w1", addresses=("10.0.0.2",), backing=(Backing("shop/s0", {80: 8080}),)),
        "mesh_mtls": replace(server, mtls_ports=((80, Mtls.DISABLE), (81, Mtls.STRICT))),
    }
    if name == "mesh_workload":
        world.take(replace(server, name="shop/w1", addresses=()))
        tables.sync(world.snapshot, world.local(), frozenset(), tunnels=world.tunnels)
    before = {n: mirror.read() for n, mirror in tables.mirrors.items()}
    world.take(steps[name])
    seen: list[object] = []

    def switching() -> None:
        seen.append({n: mirror.read() for n, mirror in tables.mirrors.items()} == before)

    with pytest.raises(KernelRefused, match=rf"map {name} holds at most \d+ rows.*--map-capacity {name}=N"):
        tables.sync(world.snapshot, world.local(), frozenset(), tunnels=world.tunnels, switching=switching)
    assert {n: mirror.read() for n, mirror in tables.mirrors.items()} == before
    assert not seen
    monkeypatch.undo()
    tables.sync(world.snapshot, world.local(), frozenset(), tunnels=world.tunnels)
    assert tables.mirrors[name].count > len(before[name])
