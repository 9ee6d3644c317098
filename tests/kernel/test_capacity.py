"""Maps that are full: a table refuses the new state as a whole, a counter folds, an LRU map forgets and so closes; a denial stays one."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from agent import addresses, files
from agent.bpf import libbpf, migrate, sets, upgrade
from agent.bpf.manifest import Direction, EventKind
from agent.errors import KernelRefused
from agent.model import Action, Mtls, Policy, PolicyRule, Snapshot, Source
from tests.kernel.datanode import VIP4, DataNode, address_of, snapshot, workload
from tests.kernel.programs import open_program, receive, running

CALLERS = Policy("default/callers", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/caller",)),)),))
OTHERS = Policy("default/others", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/other",)),)),))
LINKS = PolicyRule((Source(ip_blocks=("192.0.2.0/24",)), Source(ip_blocks=("198.51.100.0/24",))))
BLOCKS = Policy("default/callers", Action.ALLOW, (*CALLERS.rules, LINKS))
FEW = snapshot(workload("caller"), workload("other"), workload("server-a", policies=("default/callers",)), policies=(CALLERS,))
MORE = snapshot(
    *(workload(name) for name in ("caller", "other", "remote", "stranger")),
    workload("server-a", policies=("default/callers",)),
    replace(workload("server-b", policies=("default/others",)), mtls_ports=((1, Mtls.STRICT), (2, Mtls.STRICT))),
    policies=(BLOCKS, OTHERS),
)
DENIALS = 40
"""More than a ring buffer of one page can hold events about."""


def large() -> Snapshot:
    """More of everything that FEW has."""
    service = MORE.services["default/echo"]
    again = replace(service, name="default/again", addresses=("10.96.0.77",))
    return replace(MORE, services={**MORE.services, again.name: again})


@pytest.fixture(scope="module")
def node(node: DataNode) -> DataNode:
    node.enforce(FEW)
    return node


def resize(node: DataNode, **capacities: int) -> None:
    """Take over with maps of other capacities, as an agent that is started with --map-capacity."""
    for table in node.datapath.maps.values():
        table.close()
    node.config = replace(node.config, map_capacities=capacities)
    node.open()
    node.enforce(FEW)
    node.datapath.forget_other_versions()


@pytest.mark.parametrize(
    "name", ["mesh_workload", "mesh_address", "mesh_service", "mesh_backend", "mesh_policy", "mesh_block", "mesh_mtls"]
)
def test_a_table_that_is_too_small_keeps_the_previous_state_in_force(node: DataNode, name: str) -> None:
    rows = max(1, len(node.enrolment.tables.mirrors[name].read()))
    resize(node, **{name: rows})
    assert node.datapath.maps[name].capacity == rows
    assert node.in_force()
    held = {n: mirror.read() for n, mirror in node.enrolment.tables.mirrors.items()}
    with pytest.raises(
        KernelRefused, match=rf"map {name} holds at most {rows} rows, .* the previous state stays in force.*--map-capacity {name}=N"
    ):
        node.enrolment.enforce(large(), frozenset())
    assert {n: mirror.read() for n, mirror in node.enrolment.tables.mirrors.items()} == held
    assert node.in_force()


DECIDING = ("mesh_block", "mesh_address", "mesh_workload", "mesh_service")


@pytest.mark.parametrize("name", ["mesh_service", "mesh_block"])
def test_a_table_with_room_for_one_state_only_is_found_out_before_anything_is_switched(node: DataNode, name: str) -> None:
    """Also who leaves the mesh with the refused state is not without the receiver's check for a moment: it would have to be linked anew."""
    resize(node)
    before = replace(FEW, policies={CALLERS.name: BLOCKS})
    node.enforce(before)
    rows = len(node.enrolment.tables.mirrors[name].read())
    resize(node, **{name: rows})
    node.enforce(before)
    held = {n: node.enrolment.tables.mirrors[n].read() for n in DECIDING}
    epoch = node.datapath.maps["mesh_epoch"].get(bytes(4))
    links = {pin.name: pin.stat().st_ino for pin in (node.config.pin_dir / "links").glob("netns-*")}
    service = replace(FEW.services["default/echo"], addresses=("10.96.0.78", "fd96::78"))
    elsewhere = PolicyRule((Source(ip_blocks=("203.0.113.0/24",)), Source(ip_blocks=("198.18.0.0/15",))))
    after = {
        "mesh_service": replace(OTHERS, name=CALLERS.name),
        "mesh_block": replace(CALLERS, rules=(*OTHERS.rules, elsewhere)),
    }[name]
    model = snapshot(workload("caller"), workload("other"), policies=(after,))
    model = replace(model, services={service.name: service} if name == "mesh_service" else FEW.services)
    with pytest.raises(KernelRefused, match=rf"map {name} holds at most {rows} rows, .* the previous state stays in force"):
        node.enrolment.enforce(model, frozenset())
    assert {n: node.enrolment.tables.mirrors[n].read() for n in DECIDING} == held
    assert node.datapath.maps["mesh_epoch"].get(bytes(4)) == epoch
    assert len(links) == 3
    assert {pin.name: pin.stat().st_ino for pin in (node.config.pin_dir / "links").glob("netns-*")} == links
    assert node.in_force()


def test_a_start_with_a_table_too_small_for_what_is_in_force_changes_nothing(node: DataNode) -> None:
    resize(node)
    programs = running(node.config.pin_dir)
    config, node.config = node.config, replace(node.config, map_capacities={"mesh_policy": 1})
    report = upgrade.check(node.config)
    assert (report.code, report.refusal.partition(",")[0]) == (upgrade.IMPOSSIBLE, "map mesh_policy would hold at most 1 rows")
    node.open()
    with pytest.raises(KernelRefused, match="mesh_policy holds at most 1 rows"):
        node.enrolment.enforce(FEW, frozenset())
    assert running(node.config.pin_dir) == programs
    assert node.in_force()
    node.config = config
    node.open()
    node.enforce(FEW)


def test_full_counters_fold_and_say_so_and_denials_stay(node: DataNode) -> None:
    resize(node, mesh_stats=1, mesh_verdicts=1)
    before = node.datapath.counters()
    for _ in range(3):
        assert node.in_force()
        assert node.connect("stranger", address_of("server-a"), 8080) == "ECONNREFUSED"
    counters = {name: value - before[name] for name, value in node.datapath.counters().items()}
    assert counters["stats_folded"] > 0
    assert counters["verdict_folded"] > 0
    table = node.datapath.maps["mesh_stats"]
    ((key, values),) = list(table.items())
    assert key == bytes(table.layout.key.size)
    assert sum(table.layout.value.unpack(value)["opened"] for value in values) >= 3


def test_a_flow_that_was_pushed_out_is_refused_by_a_protected_receiver(node: DataNode) -> None:
    resize(node, mesh_flow=64)
    table = node.datapath.maps["mesh_flow"]
    caller, server = address_of("caller"), address_of("server-a")
    local = next(n for n in node.enrolment.enforce(FEW, frozenset()).local if n.workload.name == "default/caller")

    def flow(port: int) -> None:
        key = table.layout.key.pack(
            source=addresses.packed(caller), destination=addresses.packed(server), source_port=port, destination_port=8080, protocol=6
        )
        table.put(key, table.layout.value.pack(netns_cookie=local.netns_cookie, workload=1))

    flow(1000)  # not looked at: what was looked at is kept longer
    for port in range(2000, 2000 + 64 * 64):
        flow(port)
    assert table.count() <= 64
    with files.closing(open_program(node.datapath.pins.programs, "mesh_sk_lookup")) as program:
        assert receive(program, 6, (caller, port), (server, 8080))
        assert not receive(program, 6, (caller, 1000), (server, 8080)), "closed: the address alone is no proof"
    assert node.in_force()


def test_a_full_map_of_loads_is_counted_and_balancing_goes_on(node: DataNode) -> None:
    resize(node, mesh_load=1)
    service = replace(FEW.services["default/echo"], load_balancing="least-connections")
    both = snapshot(workload("caller"), workload("server-a"), workload("server-b"))
    node.enforce(replace(both, services={**both.services, service.name: service}))
    before = node.datapath.counters()["load_failed"]
    for _ in range(DENIALS):
        assert node.connect("caller", VIP4, 80).startswith("ok")
    assert node.datapath.counters()["load_failed"] > before
    node.enforce(FEW)


def test_a_full_ring_buffer_drops_events_counts_them_and_denials_stay(node: DataNode) -> None:
    resize(node, mesh_events=4096)
    before = node.datapath.counters()["event_dropped"]
    with node.events() as events:
        for _ in range(DENIALS):
            assert node.connect("other", address_of("server-a"), 8080) == "EPERM"
    dropped = node.datapath.counters()["event_dropped"] - before
    assert dropped > 0
    assert len([event for event in events if event.kind is EventKind.DENIED]) + dropped >= DENIALS


def test_rows_and_counters_go_on_when_capacities_change(node: DataNode) -> None:
    resize(node)
    for _ in range(3):
        assert node.in_force()
    stats = {d: node.stats("default/caller", "default/server-a", d) for d in (Direction.OUTBOUND, Direction.INBOUND)}
    verdicts = node.verdicts()
    assert stats[Direction.OUTBOUND]["opened"] >= 3
    resize(node, mesh_stats=1024, mesh_verdicts=1024, mesh_flow=1024)
    assert {d: node.stats("default/caller", "default/server-a", d) for d in stats} == stats
    assert node.verdicts() == verdicts


def test_a_counter_that_is_no_more_is_added_to_no_other(node: DataNode) -> None:
    table = node.datapath.maps["mesh_counter"]
    before = node.datapath.counters()
    key, amounts = table.layout.key.pack(**{"": table.capacity}), [table.layout.value.pack(**{"": 5})] * libbpf.possible_cpus()
    assert not migrate._add_row(table, key, amounts)
    assert node.datapath.counters() == before


def test_what_a_killed_check_has_left_goes_with_other_versions(node: DataNode) -> None:
    left, running = (node.config.pin_dir / f"{sets.SCRATCH}{pid}" for pid in (1 << 30, os.getpid()))
    for directory in (left, running):
        (directory / "maps").mkdir(parents=True)
    node.datapath.forget_other_versions()
    assert not left.exists()
    (running / "maps").rmdir()
    running.rmdir()
