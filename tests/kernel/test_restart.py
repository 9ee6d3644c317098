"""What survives the agent: pins, links and tables; and what an upgrade and an uninstall do with them."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from agent import files, netns
from agent.addresses import packed
from agent.bpf import attached, libbpf, source, upgrade
from agent.bpf.datapath import DataPath
from agent.bpf.manifest import HOOKED, Direction, Program
from agent.bpf.migrate import Migration
from agent.errors import EnvironmentUnfit, KernelRefused, LayoutMismatch
from agent.uninstall import uninstall
from tests.kernel import datanode
from tests.kernel.datanode import ALLOW_CALLER, DataNode, address_of, compile_from, snapshot, workload
from tests.kernel.programs import foreign, ids, open_program, pinned, receive, running

MODEL = snapshot(workload("caller"), workload("other"), workload("server-a", policies=("default/p",)), policies=(ALLOW_CALLER,))


@pytest.fixture
def node() -> Iterator[DataNode]:
    with datanode.running() as started:
        started.enforce(MODEL)
        yield started


def test_a_program_that_the_agent_in_force_never_had_is_no_drift(node: DataNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """`meshagent check` of a newer version beside it. What the agent has and runs no more is drift all the same."""
    assert attached.drifted(node.config) == []
    monkeypatch.setattr(attached, "HOOKED", (*HOOKED, replace(HOOKED[0], name="mesh_newer")))
    assert attached.drifted(node.config) == []
    links = node.config.pin_dir / "links"
    (links / "mesh_sysctl").unlink()
    assert [one.name for one in attached.drifted(node.config)] == ["mesh_sysctl"]
    for link in links.iterdir():
        link.unlink()
    assert len(attached.drifted(node.config)) == len([one for one in HOOKED if one.where != "namespace"])


def test_a_restart_takes_over_programs_links_and_rows_without_loading(node: DataNode) -> None:
    before, maps = pinned(node.config.pin_dir), ids(node.datapath.pins.maps)
    rows = {name: mirror.read() for name, mirror in node.enrolment.tables.mirrors.items()}
    node.open()
    assert node.datapath.loader_s == 0
    assert node.in_force()
    node.enforce(MODEL)
    assert (pinned(node.config.pin_dir), ids(node.datapath.pins.maps)) == (before, maps)
    assert {name: mirror.read() for name, mirror in node.enrolment.tables.mirrors.items()} == rows
    assert all(h.effective for h in node.datapath.hooks())


def test_the_policy_stays_in_force_while_no_agent_runs(node: DataNode) -> None:
    for table in node.datapath.maps.values():
        table.close()
    assert node.in_force()
    node.open()


@contextlib.contextmanager
def hammered(node: DataNode, stop: Path) -> Iterator[dict[str, int]]:
    """`caller` and `other` connect to server-a again and again within the block; the one is always let in, the other always denied: how often, after it."""
    hammer = (
        "import socket,os,collections,time\n"
        "seen=collections.Counter()\n"
        f"while not os.path.exists({str(stop)!r}):\n"
        "  s=socket.socket()\n"
        f"  try: s.connect(({address_of('server-a')!r},8080)); seen['in']+=1\n"
        "  except PermissionError: seen['denied']+=1\n"
        "  except OSError as e: seen[str(e)]+=1\n"
        "  s.close(); time.sleep(0.001)\n"
        "print(dict(seen))\n"
    )
    hammers = [node.lab.popen(place, ["python3", "-c", hammer]) for place in ("caller", "other")]
    found: dict[str, int] = {}
    try:
        yield found
    finally:
        stop.touch()
        results = [ast.literal_eval(h.communicate(timeout=10)[0]) for h in hammers]
    assert [result.keys() for result in results] == [{"in"}, {"denied"}], results
    found.update(results[0], **results[1])


MOVED = ("mesh_flow", "mesh_origdst", "mesh_peer", "mesh_affinity", "mesh_sock", "mesh_stats", "mesh_workload")


def edited(tmp_path: Path, what: str) -> Path:
    """A copy of the C source with other programs, or with a member in front of those that many records have."""
    changed = tmp_path / "bpf_src"
    shutil.copytree(source.BPF_SRC, changed)
    if what == "programs":
        (changed / "mesh_connect.c").write_text((changed / "mesh_connect.c").read_text() + "\nint mesh_unused(void *ctx) { return 0; }\n")
        return changed
    text = (changed / "mesh_types.h").read_text()
    for name in MOVED:
        assert text.count(f"struct {name} {{\n") == 1
        text = text.replace(f"struct {name} {{\n", f"struct {name} {{\n\t__u64 added;\n")
    (changed / "mesh_types.h").write_text(text)
    return changed


@pytest.mark.parametrize("what", ["programs", "records"])
def test_changed_programs_and_records_replace_the_old_ones_without_a_gap(
    node: DataNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before = pinned(node.config.pin_dir)
    node.datapath.accelerate()  # nobody wants it any more when the others take over
    compile_from(monkeypatch, edited(tmp_path, what))
    with hammered(node, tmp_path / "stop") as calls:
        node.open()
        node.enforce(MODEL)
        node.datapath.forget_other_versions()
    assert min(calls.values()) > 100
    assert not {*pinned(node.config.pin_dir), *running(node.config.pin_dir).values()} & set(before)
    assert all(h.effective for h in node.datapath.hooks())
    assert len(list(node.config.pin_dir.glob("programs-*"))) == 1


def test_an_upgrade_that_is_killed_half_way_is_finished_by_the_next_start(
    node: DataNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        assert node.in_force()
    before = node.stats("default/caller", "default/server-a", Direction.OUTBOUND)["opened"]
    compile_from(monkeypatch, edited(tmp_path, "records"))
    link, left = DataPath._link, 0

    def dies(programs: Path, program: Program, pin: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KernelRefused("killed")
        link(programs, program, pin, target)

    with hammered(node, tmp_path / "stop") as calls:
        monkeypatch.setattr(DataPath, "_link", staticmethod(dies))
        for steps in (3, 15, 40):  # links that change before it dies: none is changed twice in one run
            left = steps
            node.open()
            with contextlib.suppress(KernelRefused):
                node.enforce(MODEL)
        monkeypatch.setattr(DataPath, "_link", staticmethod(link))
        node.open()
        node.enforce(MODEL)
        node.datapath.forget_other_versions()
    after = node.stats("default/caller", "default/server-a", Direction.OUTBOUND)["opened"]
    # One that is counted while its row is being added up, or whose socket record was of the other layout for too long, is missed.
    assert before + calls["in"] - 3 <= after <= before + calls["in"]
    assert all(h.effective for h in node.datapath.hooks())


class Killed(Exception):
    """Here the agent was killed: nobody handles it."""


def outbound(node: DataNode) -> int:
    """Connections of caller to server-a, as the open maps count them."""
    return node.stats("default/caller", "default/server-a", Direction.OUTBOUND)["opened"]


def start(
    node: DataNode, monkeypatch: pytest.MonkeyPatch, capacities: Mapping[str, int], *, links: int | None = None, bridge: bool = False
) -> bool:
    """An agent with maps of these capacities; it is killed after so many links to its programs, or to those between, if it is told how many.

    True if caller gets in then. Links of more than two versions do not know all of each other's connections: who may can be refused.
    """
    link = DataPath._link

    def dies(programs: Path, program: Program, pin: Path, target: Path) -> None:
        nonlocal links
        if links is not None and programs == (node.datapath.pins.bridge if bridge else node.datapath.pins.programs):
            links -= 1
            if links < 0:
                raise Killed
        link(programs, program, pin, target)

    for table in node.datapath.maps.values():
        table.close()
    node.config = replace(node.config, map_capacities=capacities)
    node.open()
    monkeypatch.setattr(DataPath, "_link", staticmethod(dies))
    with contextlib.nullcontext() if links is None else pytest.raises(Killed):
        node.enforce(MODEL)
    monkeypatch.setattr(DataPath, "_link", staticmethod(link))
    assert node.connect("other", address_of("server-a"), 8080) == "EPERM"
    return node.connect("caller", address_of("server-a"), 8080).startswith("ok")


def test_counters_survive_an_agent_that_is_killed_after_the_last_link(node: DataNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """No map of connections changes, so there are no programs between: all links change, and then the counters are added up."""

    def dies(_: Migration) -> int:
        raise Killed

    for _ in range(3):
        assert node.in_force()
    before = outbound(node)
    node.config = replace(node.config, map_capacities={"mesh_stats": 1024})
    node.open()
    with monkeypatch.context() as patched:
        patched.setattr(Migration, "add", dies)
        with pytest.raises(Killed):
            node.enforce(MODEL)
    assert not node.datapath.pins.bridge.exists()
    assert all(h.effective for h in node.datapath.hooks())
    for _ in range(2):  # nobody has forgotten the old maps: it is done again
        node.open()
        assert not node.datapath.awaits_tables
        node.enforce(MODEL)
        assert outbound(node) == before
    node.datapath.forget_other_versions()
    assert [path.name for path in node.config.pin_dir.glob("maps-*")] == [node.datapath.pins.maps.name]


def test_versions_that_are_killed_one_after_the_other_lose_no_counter(node: DataNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first one, when it comes back, goes on with its own maps, as soon as its tables say what those in force do."""

    def asked(*_: object) -> None:
        raise KernelRefused("asked")

    assert node.in_force()
    before, maps = outbound(node), ids(node.datapath.pins.maps)
    second, third = {"mesh_stats": 1024, "mesh_flow": 1024, "mesh_policy": 1024}, {"mesh_verdicts": 1024}
    made = [
        start(node, monkeypatch, second, links=0),  # all links run the programs between
        start(
            node, monkeypatch, third, links=10, bridge=True
        ),  # its mesh_sockops counts, in a map that is like the first one's, and not the same
        start(node, monkeypatch, second, links=7, bridge=True),
    ]
    assert node.datapath.loader_s == 0
    first = replace(node.config, map_capacities={})
    monkeypatch.setattr(upgrade, "run_loader", asked)
    assert upgrade.check(first).refusal == "asked", "other programs are in force"
    node.config = first
    node.open()
    assert node.datapath.loader_s == 0
    assert node.datapath.awaits_tables
    made.append(start(node, monkeypatch, {}, links=5))
    node.datapath.pins.manifest.unlink()
    made.append(start(node, monkeypatch, {}))
    assert node.datapath.loader_s > 0
    node.datapath.forget_other_versions()
    assert ids(node.datapath.pins.maps) == maps
    assert (made[0], made[-1]) == (True, True)
    assert outbound(node) == before + sum(made)
    assert all(h.effective for h in node.datapath.hooks())


def test_programs_whose_manifest_is_lost_decide_until_the_tables_are_filled(node: DataNode) -> None:
    node.datapath.pins.manifest.unlink()
    node.config = replace(node.config, map_capacities={"mesh_workload": 1024})
    report = upgrade.check(node.config)
    assert report.code == upgrade.LOSSY
    assert f"programs are in force whose manifest is missing in {node.config.run_dir}" in report.losses[0]
    node.open()
    assert node.datapath.awaits_tables
    assert node.in_force()
    node.enforce(MODEL)
    assert not node.datapath.awaits_tables
    assert node.in_force()


def test_a_link_that_an_agent_had_no_time_to_name_is_the_one_that_stays(node: DataNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise Killed

    links = node.config.pin_dir / "links"
    node.config.waypoint_cgroup.rmdir()
    node.config.waypoint_cgroup.mkdir()
    node.open()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dies)
        with pytest.raises(Killed):
            node.enforce(MODEL)
    (made,) = links.glob("*-new")
    (links / "mesh_connect4").rename(links / "mesh_connect4-new")
    left = ids(links)
    node.open()
    node.enforce(MODEL)
    found = ids(links)
    assert {name: found[name] for name in ("mesh_connect4", made.name.removesuffix("-new"))} == {
        "mesh_connect4": left["mesh_connect4-new"],
        made.name.removesuffix("-new"): left[made.name],
    }
    assert not list(links.glob("*-new"))
    assert all(h.effective for h in node.datapath.hooks())


def seen_at_each_step(node: DataNode, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Enforce, and after each link that changes connect to a protected pod: (program, who may, who may not, who is not in the mesh)."""
    link = DataPath._link
    found: list[tuple[str, ...]] = []
    server = address_of("server-a")

    def step(programs: Path, program: Program, pin: Path, target: Path) -> None:
        link(programs, program, pin, target)
        outcomes = [node.connect(place, server, 8080) for place in ("caller", "other", "stranger")]
        found.append((f"{programs.name}/{pin.name}", *outcomes))

    monkeypatch.setattr(DataPath, "_link", staticmethod(step))
    node.enforce(MODEL)
    monkeypatch.setattr(DataPath, "_link", staticmethod(link))
    return found


def test_at_each_step_of_a_change_over_who_may_gets_in_and_nobody_else(
    node: DataNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_from(monkeypatch, edited(tmp_path, "records"))
    node.open()
    found = seen_at_each_step(node, monkeypatch)
    assert len(found) == 1 + 2 * (len(MODEL.workloads) + len([p for p in HOOKED if p.where != "namespace"])), (
        "mesh_sockops before all others"
    )
    assert {seen[1:] for seen in found} == {(f"ok {address_of('server-a')}", "EPERM", "ECONNREFUSED")}, found


def test_without_the_programs_between_some_step_would_refuse_who_may(
    node: DataNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why they are there. Even so nobody gets in who may not."""
    compile_from(monkeypatch, edited(tmp_path, "records"))
    node.open()
    shutil.rmtree(node.datapath.pins.bridge)
    found = seen_at_each_step(node, monkeypatch)
    assert "ECONNREFUSED" in {seen[1] for seen in found}
    assert {seen[2:] for seen in found} == {("EPERM", "ECONNREFUSED")}
    assert node.in_force()


def test_a_flow_written_by_the_old_programs_is_known_to_the_programs_between_and_moves_with_the_last_link(
    node: DataNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = node.datapath.maps["mesh_flow"]
    local = next(n for n in node.enrolment.enforce(MODEL, frozenset()).local if n.workload.name == "default/caller")
    compile_from(monkeypatch, edited(tmp_path, "records"))
    node.open()
    node.enrolment.enforce(MODEL, frozenset())  # tables only
    new, ends = node.datapath.maps["mesh_flow"], (address_of("caller"), address_of("server-a"))
    key = old.layout.key.pack(source=packed(ends[0]), destination=packed(ends[1]), source_port=1000, destination_port=8080, protocol=6)
    with files.closing(open_program(node.datapath.pins.bridge, "mesh_sk_lookup")) as program:
        assert not receive(program, 6, (ends[0], 1000), (ends[1], 8080))
        old.put(key, old.layout.value.pack(netns_cookie=local.netns_cookie, workload=5, service=7))
        assert receive(program, 6, (ends[0], 1000), (ends[1], 8080))
    assert old.get(key) is not None, "a hook that is still an old one may want it"
    row = new.layout.value.unpack((new.get(key) or [b""])[0])
    assert {name: row[name] for name in ("netns_cookie", "workload", "service", "added")} == {
        "netns_cookie": local.netns_cookie,
        "workload": 5,
        "service": 7,
        "added": 0,
    }
    node.datapath.attach(node.config.waypoint_cgroup)
    assert old.get(key) is None


def test_at_each_step_of_a_change_over_a_connection_leaves_no_row_for_who_comes_after_it(
    node: DataNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row says who calls from an address and a port: nobody may live on it who takes them later."""
    old, link = node.datapath.maps["mesh_flow"], DataPath._link
    compile_from(monkeypatch, edited(tmp_path, "records"))
    node.open()
    new, left = node.datapath.maps["mesh_flow"], list[tuple[str, int, int]]()

    def step(programs: Path, program: Program, pin: Path, target: Path) -> None:
        link(programs, program, pin, target)
        assert node.connect("caller", address_of("server-a"), 8080) == f"ok {address_of('server-a')}"
        left.append((f"{programs.name}/{pin.name}", len(list(old.items())), len(list(new.items()))))

    monkeypatch.setattr(DataPath, "_link", staticmethod(step))
    node.enforce(MODEL)
    assert len(left) > len(HOOKED)
    assert [step for step in left if step[1:] != (0, 0)] == []


def test_programs_between_write_for_those_before_and_after_them(node: DataNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller outside is remembered at its first datagram; the answer may pass an old program."""
    old = node.datapath.maps["mesh_flow"]
    compile_from(monkeypatch, edited(tmp_path, "records"))
    node.open()
    node.enrolment.enforce(MODEL, frozenset())  # tables only
    new = node.datapath.maps["mesh_flow"]
    with files.closing(open_program(node.datapath.pins.bridge, "mesh_sk_lookup")) as program:
        assert receive(program, 17, ("192.0.2.9", 1000), (address_of("other"), 5353))
    rows = [[of.layout.value.unpack(values[0]) for _, values in of.items()] for of in (old, new)]
    assert [[row["flags"] for row in found] for found in rows] == [[rows[1][0]["flags"]], [rows[1][0]["flags"]]]
    assert rows[1][0]["added"] == 0
    node.datapath.attach(node.config.waypoint_cgroup)
    assert list(old.items()) == []
    assert len(list(new.items())) == 1


def test_a_program_that_the_verifier_refuses_leaves_the_previous_set_in_force(
    node: DataNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pinned(node.config.pin_dir)
    broken = tmp_path / "bpf_src"
    subprocess.run(["cp", "-r", str(source.BPF_SRC), str(broken)], check=True)
    text = (broken / "mesh_sk_lookup.c").read_text()
    (broken / "mesh_sk_lookup.c").write_text(
        text.replace("	if (ctx->protocol != IPPROTO_TCP &&", "	bpf_get_netns_cookie(ctx);\n	if (ctx->protocol != IPPROTO_TCP &&")
    )
    compile_from(monkeypatch, broken)
    with pytest.raises(KernelRefused, match="mesh_sk_lookup"):
        node.open()
    monkeypatch.undo()
    assert pinned(node.config.pin_dir) == before
    assert node.in_force()


def test_a_map_of_another_size_stops_the_agent_before_it_attaches(node: DataNode) -> None:
    manifest = next(node.config.run_dir.glob("manifest-*.json"))
    manifest.write_text(manifest.read_text().replace('"value_size": 24', '"value_size": 32', 1))
    with pytest.raises(LayoutMismatch, match="24"):
        node.open()
    assert node.in_force()


def test_uninstall_leaves_nothing_and_can_run_twice(node: DataNode) -> None:
    assert uninstall(node.config)
    assert not node.config.pin_dir.exists()
    assert not node.config.run_dir.exists()
    assert not node.config.waypoint_cgroup.exists()
    assert str(node.config.run_dir) not in Path("/proc/self/mounts").read_text()
    assert uninstall(node.config) == []
    assert node.connect("other", address_of("server-a"), 8080).startswith("ok")


def test_other_peoples_programs_stay_attached(node: DataNode) -> None:
    """A foreign program on the same cgroup, attached without a link, before and after ours."""
    with foreign(node.config.cgroup, linked=False) as number:
        node.open()
        node.enforce(MODEL)
        with files.closing(os.open(node.config.cgroup, os.O_RDONLY)) as cgroup:
            assert number in libbpf.effective_programs(cgroup, "cgroup_inet4_connect")
        assert node.in_force()


def test_a_waypoint_cgroup_that_was_made_anew_gets_its_programs(node: DataNode) -> None:
    """A link to a cgroup that is gone still names the right program: what counts is where it is attached."""
    node.config.waypoint_cgroup.rmdir()
    node.config.waypoint_cgroup.mkdir()
    assert not all(h.effective for h in node.datapath.hooks())
    node.open()
    node.enforce(MODEL)
    assert all(h.effective for h in node.datapath.hooks())


def test_a_namespace_that_cannot_be_looked_at_keeps_its_protection(node: DataNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> netns.Seen:
        raise OSError(24, f"too many open files: {path}")

    monkeypatch.setattr("agent.netns.look", fails)
    node.enrolment.doubt({item.netns_cookie for item in node.enrolment.enforce(MODEL, frozenset()).local})
    enrolled = node.enrolment.enforce(MODEL, frozenset())
    assert {name for name, _ in enrolled.missing} == set(MODEL.workloads)
    assert len(enrolled.local) == len(MODEL.workloads)
    assert node.in_force()
    assert node.connect("stranger", address_of("server-a"), 8080) == "ECONNREFUSED"
    monkeypatch.setattr("agent.enrolment.RETRY_S", 0.0)
    node.enrolment.enforce(MODEL, frozenset())
    assert node.enrolment.namespaces_changed(MODEL)
    monkeypatch.undo()
    node.enforce(MODEL)
    assert not node.enrolment.namespaces_changed(MODEL)


def test_the_nodes_own_namespace_cannot_be_enrolled(node: DataNode) -> None:
    own = Path("/proc/self/ns/net")
    cookie = netns.cookie(own)
    with pytest.raises(EnvironmentUnfit, match="the node's own"):
        netns.hold(own, cookie, node.config.netns_dir)


def test_lost_numbers_are_not_given_again_under_rows_that_stay(node: DataNode) -> None:
    rows = node.datapath.maps["mesh_address"]
    held = {rows.layout.value.unpack(value[0])["id"] for _, value in rows.items()}
    (node.config.run_dir / "ids").unlink()
    node.open()
    assert node.ids.number("workload", "default/new") > max(held)
