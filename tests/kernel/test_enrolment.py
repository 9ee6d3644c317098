"""Pods that come and go, change their addresses or their cgroups; and what the agent says when the kernel does not do what it should."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent import drift, netns, probe
from agent.bpf.manifest import Reason
from agent.model import Action, Policy, Snapshot, Workload
from lab import cgroup, paths
from lab import netns as lab_netns
from tests.kernel import datanode
from tests.kernel.datanode import DataNode, address_of, snapshot, until, workload
from tests.kernel.programs import foreign

CLOSED = Policy("default/p", Action.ALLOW)


@pytest.fixture
def empty(node: DataNode) -> Iterator[DataNode]:
    node.enforce(snapshot())
    yield node
    node.enforce(snapshot())


@pytest.fixture
def spaces() -> Iterator[Callable[[str], str]]:
    """Makes network namespaces by name."""
    made: list[str] = []

    def make(name: str) -> str:
        full = f"{paths.PREFIX}-{name}"
        lab_netns.create(full)
        up(full)
        made.append(full)
        return full

    yield make
    for name in made:
        lab_netns.delete(name)


def up(namespace: str) -> None:
    subprocess.run(["ip", "-n", namespace, "link", "set", "lo", "up"], check=True)


def give(namespace: str, address: str, action: str = "add") -> None:
    subprocess.run(["ip", "-n", namespace, "address", action, f"{address}/32", "dev", "lo"], check=True)


def pod(name: str, namespace: str, address: str, policies: tuple[str, ...] = ()) -> Workload:
    return Workload(f"default/{name}", name, datanode.NODE, {}, (address,), namespace, enrolled=True, ready=True, policies=policies)


def owners(node: DataNode) -> dict[str, tuple[str, int]]:
    """Address -> (workload, netns cookie) as the kernel holds it, of IPv4 addresses."""
    table = node.datapath.maps["mesh_address"]
    found = {}
    for key, values in table.items():
        raw = key[-16:] if len(key) >= 16 else key
        row = table.layout.value.unpack(values[0])
        found[".".join(map(str, raw[12:16]))] = (node.ids.name(row["id"]), row["netns_cookie"])
    return found


def belongings(node: DataNode) -> dict[str, object]:
    """Everything that enrolment makes in the kernel and in this process."""
    return {
        "descriptors": sorted(kinds(Path("/proc/self/fd"))),
        "mounts": sorted(p.name for p in netns.held(node.config.netns_dir)),
        "files": sorted(p.name for p in node.config.netns_dir.glob("*")),
        "links": sorted(p.name for p in (node.config.pin_dir / "links").glob("netns-*")),
        "workloads": sum(1 for _ in node.datapath.maps["mesh_workload"].items()),
        "addresses": sum(1 for _ in node.datapath.maps["mesh_address"].items()),
    }


def kinds(descriptors: Path) -> Iterator[str]:
    """What each descriptor is: "socket", "anon_inode" or a path."""
    for descriptor in descriptors.iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            yield str(descriptor.readlink()).partition(":")[0]


def test_two_hundred_pods_in_a_row_leave_nothing_behind(empty: DataNode) -> None:
    before = belongings(empty)
    alive: list[Workload] = []
    try:
        for i in range(200):
            name = f"{paths.PREFIX}-churn-{i}"
            lab_netns.create(name)
            up(name)
            give(name, f"10.78.0.{i + 1}")
            alive.append(pod(f"churn-{i}", name, f"10.78.0.{i + 1}"))
            if len(alive) > 3:  # three live beside each other; one goes with its namespace first, the next one with its resource first
                old = alive.pop(0)
                if i % 2:
                    lab_netns.delete(old.network_namespace)
                    enrolled = empty.enrolment.enforce(snapshot(old, *alive), frozenset())
                    assert [name for name, _ in enrolled.missing] == [old.name]
                empty.enforce(snapshot(*alive))
                lab_netns.delete(old.network_namespace)
            empty.enforce(snapshot(*alive))
            assert owners(empty)[f"10.78.0.{i + 1}"][0] == f"default/churn-{i}"
        assert belongings(empty) != before
        empty.enforce(snapshot())
        assert belongings(empty) == before
    finally:
        for left in lab_netns.names(f"{paths.PREFIX}-churn-"):
            lab_netns.delete(left)


CALLS = """
import signal, socket, struct, sys
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
answered = refused = 0
print("ready", flush=True)
while not ended:
    try:
        with socket.create_connection((sys.argv[1], 8080), timeout=5) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # else there are no more ports after a while
            answered += 1
    except OSError:
        refused += 1
print(answered, refused)
"""


def test_connections_are_not_refused_while_a_server_and_its_callers_go_out_of_the_mesh_and_into_it(node: DataNode) -> None:
    """A stranger calls a server that admits everybody, and one that a policy admits calls one that comes and goes with it.

    One whose SYN is between both hooks while the server comes in may be refused: once in 60 times.
    """
    inside = snapshot(
        workload("server-a"), workload("server-b", policies=("default/p",)), workload("caller"), policies=(datanode.ALLOW_CALLER,)
    )
    outside = snapshot(*(workload(name, enrolled=False) for name in ("server-a", "server-b", "caller")), policies=(datanode.ALLOW_CALLER,))
    node.enforce(inside)
    calls = (("stranger", "server-a"), ("caller", "server-b"))
    with contextlib.ExitStack() as running:
        callers = [running.enter_context(node.program(place, [sys.executable, "-c", CALLS, address_of(server)])) for place, server in calls]
        for _ in range(30):
            for model in (outside, inside):
                time.sleep(0.01)
                node.enforce(model)
        for caller in callers:
            caller.terminate()
        counts = [tuple(map(int, caller.communicate(timeout=30)[0].split())) for caller in callers]
    assert all(answered > 100 for answered, _ in counts)
    assert sum(refused for _, refused in counts) <= 3


def test_it_is_seen_on_which_ports_somebody_listens_in_a_namespace(node: DataNode) -> None:
    listens = "import socket, time; s = socket.create_server(('127.0.0.1', 15001)); print('ready', flush=True); time.sleep(60)"
    place = lab_netns.path(workload("stranger").network_namespace)
    before = netns.listening(place)
    with node.program("stranger", [sys.executable, "-c", listens]):
        assert netns.listening(place) - before == {15001}


def test_a_namespace_that_vanished_is_released_at_once(empty: DataNode, spaces: Callable[[str], str]) -> None:
    name = spaces("gone")
    model = snapshot(pod("gone", name, "10.78.1.1"))
    empty.enforce(model)
    inode = lab_netns.path(name).stat().st_ino
    assert not empty.enrolment.namespaces_changed(model)
    lab_netns.delete(name)
    assert empty.enrolment.namespaces_changed(model)
    empty.enrolment.enforce(model, frozenset())
    assert belongings(empty)["links"] == []
    assert belongings(empty)["mounts"] == []
    assert f"net:[{inode}]" not in Path("/proc/self/mountinfo").read_text()


def test_a_namespace_is_linked_before_its_loopback_is_up_and_complete_as_soon_as_it_is(empty: DataNode) -> None:
    """What container runtimes do: the namespace first, its configuration a moment later."""
    name = f"{paths.PREFIX}-bare"
    lab_netns.create(name)
    try:
        model = snapshot(pod("bare", name, "10.78.1.8"))
        found = empty.enrolment.enforce(model, frozenset())
        assert (found.local, belongings(empty)["links"]) == ((), [f"netns-{netns.cookie(lab_netns.path(name))}"])
        assert not empty.enrolment.namespaces_changed(model)
        up(name)
        assert empty.enrolment.namespaces_changed(model)
        assert [item.workload.name for item in empty.enrolment.enforce(model, frozenset()).local] == ["default/bare"]
    finally:
        lab_netns.delete(name)


def test_an_address_that_is_added_later_is_known_and_one_that_goes_is_forgotten(empty: DataNode, spaces: Callable[[str], str]) -> None:
    name = spaces("late")
    give(name, "10.78.1.1")
    model = snapshot(pod("late", name, "10.78.1.1"))
    empty.enforce(model)
    assert not empty.enrolment.namespaces_changed(model)
    give(name, "10.78.1.2")
    assert empty.enrolment.namespaces_changed(model)
    empty.enforce(model)
    assert owners(empty)["10.78.1.2"][0] == "default/late"
    assert not empty.enrolment.namespaces_changed(model)
    give(name, "10.78.1.2", "del")
    assert empty.enrolment.namespaces_changed(model)
    empty.enforce(model)
    assert "10.78.1.2" not in owners(empty)


def test_the_event_loop_is_told_of_names_and_addresses(empty: DataNode, spaces: Callable[[str], str]) -> None:
    name = f"{paths.PREFIX}-told"
    model = snapshot(pod("told", name, "10.78.1.3"))
    assert [n for n, _ in empty.enrolment.enforce(model, frozenset()).missing] == ["default/told"]
    watch = empty.enrolment.watch

    def told() -> bool:
        return bool(select.select([watch.fileno()], [], [], 1)[0])

    spaces("told")
    assert told()
    assert empty.enrolment.namespaces_changed(model)
    assert watch.eager
    empty.enforce(model)
    give(name, "10.78.1.3")
    assert told()
    assert empty.enrolment.namespaces_changed(model)
    empty.enforce(model)
    lab_netns.delete(name)
    assert told()


def test_an_address_that_is_reused_never_carries_the_first_ones_identity(empty: DataNode, spaces: Callable[[str], str]) -> None:
    """The create comes first, the delete after it: both workloads name the address, one namespace has it."""
    old, new = spaces("reuse-a"), spaces("reuse-b")
    address = "10.78.1.4"
    a, b = pod("a", old, address, ("default/p",)), pod("b", new, address)
    give(old, address)
    empty.enforce(snapshot(a, policies=(CLOSED,)))
    assert owners(empty)[address][0] == "default/a"
    lab_netns.delete(old)
    give(new, address)
    for model in (snapshot(a, b, policies=(CLOSED,)), snapshot(b, policies=(CLOSED,))):
        empty.enrolment.enforce(model, frozenset())
        cookie = netns.cookie(lab_netns.path(new))
        assert owners(empty)[address] == ("default/b", cookie)


def test_an_address_that_moved_while_both_pods_live_belongs_to_the_one_that_has_it(empty: DataNode, spaces: Callable[[str], str]) -> None:
    old, new = spaces("move-a"), spaces("move-b")
    address = "10.78.1.5"
    model = snapshot(pod("a", old, address, ("default/p",)), pod("b", new, address), policies=(CLOSED,))
    give(old, address)
    empty.enforce(model)
    assert owners(empty)[address][0] == "default/a"
    give(old, address, "del")
    give(new, address)
    assert empty.enrolment.namespaces_changed(model)
    empty.enforce(model)
    assert owners(empty)[address][0] == "default/b"


def test_an_address_whose_pod_was_deleted_first_is_nobodys_until_the_next_has_it(empty: DataNode, spaces: Callable[[str], str]) -> None:
    old, new = spaces("first-a"), spaces("first-b")
    address = "10.78.1.6"
    give(old, address)
    empty.enforce(snapshot(pod("a", old, address)))
    empty.enforce(snapshot())
    assert address not in owners(empty)
    give(new, address)
    empty.enforce(snapshot(pod("b", new, address)))
    assert owners(empty)[address][0] == "default/b"


def enrolled(node: DataNode, model: Snapshot) -> drift.Drift:
    found = node.enrolment.enforce(model, frozenset())
    node.datapath.attach(node.config.waypoint_cgroup)
    return drift.scan(node.config, node.datapath, found.local)


SERVER = snapshot(workload("server-a"), workload("caller"))


def test_pods_that_are_as_they_should_be_do_not_drift(node: DataNode) -> None:
    found = enrolled(node, SERVER)
    assert (dict(found.reasons), found.unlinked, found.foreign) == ({}, frozenset(), ())


def test_a_process_outside_of_the_agents_cgroup_is_named(node: DataNode) -> None:
    outside = cgroup.create(paths.cgroup_root() / "outside" / "stray")
    code = f"open({str(outside / 'cgroup.procs')!r},'w').write('0')\nprint('ready',flush=True)\nimport time; time.sleep(60)"
    try:
        with node.program("server-a", [sys.executable, "-c", code]):
            found = enrolled(node, SERVER)
        assert list(found.reasons) == ["default/server-a"]
        reason = found.reasons["default/server-a"]
        assert f"runs in cgroup {outside}, outside of --cgroup {node.config.cgroup}" in reason
    finally:
        cgroup.remove(outside)


def test_a_link_that_somebody_removed_is_a_drift_and_is_made_again(node: DataNode) -> None:
    model = SERVER
    found = node.enrolment.enforce(model, frozenset())
    victim = next(item for item in found.local if item.workload.name == "default/server-a")
    (node.config.pin_dir / "links" / f"netns-{victim.netns_cookie}").unlink()
    seen = drift.scan(node.config, node.datapath, found.local)
    assert seen.unlinked == {victim.netns_cookie}
    assert "not linked to its network namespace" in seen.reasons["default/server-a"]
    node.enrolment.doubt(seen.unlinked)
    assert node.enrolment.namespaces_changed(model)
    assert enrolled(node, model).reasons == {}


def test_a_program_that_does_not_run_for_a_pod_is_named(node: DataNode) -> None:
    enrolled(node, SERVER)
    (node.config.pin_dir / "links" / "mesh_connect4").unlink()  # the kernel detaches it a moment later (kernel/bpf/inode.c, bpf_free_inode)
    local = node.enrolment.enforce(SERVER, frozenset()).local
    says = "mesh_connect4 does not run for cgroup"
    try:
        assert until(lambda: says in drift.scan(node.config, node.datapath, local).reasons.get("default/server-a", ""))
    finally:
        node.datapath.attach(node.config.waypoint_cgroup)
    assert enrolled(node, SERVER).reasons == {}


def test_a_foreign_program_is_named(node: DataNode) -> None:
    place = node.lab.cgroup("server-a")
    with foreign(place, linked=True) as number:
        found = enrolled(node, SERVER)
    assert found.reasons == {}
    ((program),) = found.foreign
    assert (program.id, program.name, program.attach_type) == (number, "foreign", "cgroup_inet4_connect")
    assert program.place == str(place)
    assert until(lambda: enrolled(node, SERVER).foreign == ())


@pytest.fixture
def prober(node: DataNode) -> Iterator[probe.Probe]:
    made = probe.Probe(node.config)
    made.prepare()
    yield made
    made.close()


def test_the_probe_is_refused_by_the_programs(node: DataNode, prober: probe.Probe) -> None:
    local = node.enrolment.enforce(prober.extend(SERVER), frozenset()).local
    node.datapath.attach(node.config.waypoint_cgroup)
    with node.events() as events:
        assert [prober.run(local) for _ in range(5)] == [probe.Result(works=True)] * 5
    assert {(e.source, Reason(e.reason)) for e in events} == {(probe.NAME, Reason.NO_BACKEND), (probe.NAME, Reason.POLICY)}


@pytest.mark.parametrize(("pin", "says"), [("mesh_connect4", "ENETUNREACH"), ("netns-", "policy does not hold at receivers")])
def test_the_probe_notices_a_hook_that_does_not_run(node: DataNode, prober: probe.Probe, pin: str, says: str) -> None:
    local = node.enrolment.enforce(prober.extend(SERVER), frozenset()).local
    node.datapath.attach(node.config.waypoint_cgroup)
    assert prober.run(local).works
    cookie = next(item.netns_cookie for item in local if item.workload.name == probe.NAME)
    (node.config.pin_dir / "links" / (pin if pin != "netns-" else f"netns-{cookie}")).unlink()
    assert until(lambda: not prober.run(local).works)
    assert says in prober.run(local).problem
    node.datapath.attach(node.config.waypoint_cgroup)
    node.enrolment.doubt({cookie})
    local = node.enrolment.enforce(prober.extend(SERVER), frozenset()).local
    assert prober.run(local) == probe.Result(works=True)


def test_the_probe_finds_its_cgroup_again(node: DataNode, prober: probe.Probe) -> None:
    local = node.enrolment.enforce(prober.extend(SERVER), frozenset()).local
    node.datapath.attach(node.config.waypoint_cgroup)
    assert prober.run(local).works
    probe.remove(node.config)
    assert prober.run(local).works
    assert (node.config.cgroup / "meshagent-probe").is_dir()


def test_a_pod_is_linked_soon_after_its_namespace_is_made(empty: DataNode, spaces: Callable[[str], str]) -> None:
    took = []
    for i in range(5):  # the best of some: the machine may be busy
        model = snapshot(pod(f"soon-{i}", f"{paths.PREFIX}-soon-{i}", f"10.78.2.{i}"))
        empty.enrolment.enforce(model, frozenset())
        spaces(f"soon-{i}")
        started = time.perf_counter()
        assert empty.enrolment.namespaces_changed(model)
        empty.enforce(model)
        took.append(time.perf_counter() - started)
    assert min(took) < 0.1


def test_a_change_that_concerns_no_pod_here_costs_little_besides_the_tables(node: DataNode, monkeypatch: pytest.MonkeyPatch) -> None:
    enrolled(node, SERVER)
    monkeypatch.setattr(node.enrolment.tables, "sync", lambda *_, **__: 0)
    best = 1.0
    for i in range(20):
        model = replace(SERVER, version=f"v{i}")
        started = time.perf_counter()
        node.enrolment.enforce(model, frozenset())
        best = min(best, time.perf_counter() - started)
    assert best < 0.001, best


def test_the_address_of_a_pod_is_answered_for(node: DataNode) -> None:
    enrolled(node, SERVER)
    assert node.connect("caller", address_of("server-a"), 8080).startswith("ok")
