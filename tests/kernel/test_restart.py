"""What survives the agent: pins, links and tables; and what an upgrade and an uninstall do with them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import netns
from agent.bpf import libbpf, loader, source
from agent.bpf.datapath import DataPath
from agent.errors import EnvironmentUnfit, KernelRefused, LayoutMismatch, MeshError
from agent.model import Action, Policy, PolicyRule, Source
from agent.uninstall import uninstall
from lab import paths
from tests.kernel import datanode
from tests.kernel.datanode import DataNode, address_of, program_ids, snapshot, workload

ALLOW_CALLER = Policy("default/p", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/caller",)),)),))
MODEL = snapshot(workload("caller"), workload("other"), workload("server-a", policies=("default/p",)), policies=(ALLOW_CALLER,))


@pytest.fixture
def node() -> Iterator[DataNode]:
    with datanode.running() as running:
        running.enforce(MODEL)
        yield running


def in_force(node: DataNode) -> bool:
    return (
        node.connect("caller", address_of("server-a"), 8080).startswith("ok")
        and node.connect("other", address_of("server-a"), 8080) == "EPERM"
    )


def test_a_restart_takes_over_programs_links_and_rows_without_loading(node: DataNode) -> None:
    before = program_ids(node)
    node.open()
    assert node.datapath.loader_s == 0
    assert in_force(node)
    assert node.enrolment.tables.sync(MODEL, [], frozenset()) >= 0
    node.enforce(MODEL)
    assert program_ids(node) == before
    assert all(h.effective for h in node.datapath.hooks())


def test_the_policy_stays_in_force_while_no_agent_runs(node: DataNode) -> None:
    for table in node.datapath.maps.values():
        table.close()
    assert in_force(node)
    node.open()


def test_changed_programs_replace_the_old_ones_without_a_gap(node: DataNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = program_ids(node)
    stop = tmp_path / "stop"
    address = address_of("server-a")
    hammer = (
        "import socket,os,collections\n"
        "seen=collections.Counter()\n"
        f"while not os.path.exists({str(stop)!r}):\n"
        "  s=socket.socket()\n"
        f"  try: s.connect(({address!r},8080)); seen['in']+=1\n"
        "  except PermissionError: seen['denied']+=1\n"
        "  except OSError as e: seen[str(e)]+=1\n"
        "  s.close()\n"
        "print(dict(seen))\n"
    )
    hammers = [node.lab.popen(place, ["python3", "-c", hammer]) for place in ("caller", "other")]
    changed = tmp_path / "bpf_src"
    subprocess.run(["cp", "-r", str(source.BPF_SRC), str(changed)], check=True)
    (changed / "mesh_connect.c").write_text((changed / "mesh_connect.c").read_text() + "\nint mesh_unused(void *ctx) { return 0; }\n")
    read = source.read
    monkeypatch.setattr(source, "read", lambda flags=(): read(changed, flags))
    monkeypatch.setattr(DataPath, "_run_loader", _load_here)
    node.open()
    node.enforce(MODEL)
    node.datapath.forget_other_versions()
    stop.touch()
    results = [h.communicate(timeout=10)[0].strip() for h in hammers]
    assert ast.literal_eval(results[0]).keys() == {"in"}
    assert ast.literal_eval(results[1]).keys() == {"denied"}
    assert not set(program_ids(node)) & set(before)
    assert all(h.effective for h in node.datapath.hooks())
    assert len(list(node.config.pin_dir.glob("programs-*"))) == 1


async def _load_here(self: DataPath) -> None:
    """The loader's own work in this process, so that it sees the patched source."""
    loader.load(self._maps_dir, self._programs_dir, self._manifest, self._flags)


def test_a_program_that_the_verifier_refuses_leaves_the_previous_set_in_force(
    node: DataNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = program_ids(node)
    broken = tmp_path / "bpf_src"
    subprocess.run(["cp", "-r", str(source.BPF_SRC), str(broken)], check=True)
    text = (broken / "mesh_sk_lookup.c").read_text()
    (broken / "mesh_sk_lookup.c").write_text(
        text.replace("	if (ctx->protocol != IPPROTO_TCP &&", "	bpf_get_netns_cookie(ctx);\n	if (ctx->protocol != IPPROTO_TCP &&")
    )
    read = source.read
    monkeypatch.setattr(source, "read", lambda flags=(): read(broken, flags))
    monkeypatch.setattr(DataPath, "_run_loader", _load_refusing)
    with pytest.raises(KernelRefused, match="mesh_sk_lookup"):
        node.open()
    monkeypatch.undo()
    assert program_ids(node) == before
    assert in_force(node)


async def _load_refusing(self: DataPath) -> None:
    try:
        loader.load(self._maps_dir, self._programs_dir, self._manifest, self._flags)
    except MeshError as error:
        raise KernelRefused(str(error)) from error


def test_a_map_of_another_size_stops_the_agent_before_it_attaches(node: DataNode) -> None:
    manifest = next(node.config.run_dir.glob("manifest-*.json"))
    manifest.write_text(manifest.read_text().replace('"value_size": 24', '"value_size": 32', 1))
    with pytest.raises(LayoutMismatch, match="24"):
        node.open()
    assert in_force(node)


def test_a_full_table_keeps_the_previous_state(node: DataNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.enrolment.tables.mirrors["mesh_address"].map, "capacity", 6)
    bigger = snapshot(
        *(workload(n) for n in ("caller", "other", "server-b", "remote", "stranger")),
        workload("server-a", policies=("default/p",)),
        policies=(ALLOW_CALLER,),
    )
    with pytest.raises(KernelRefused, match="holds at most 6 rows"):
        node.enforce(bigger)
    assert in_force(node)


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
    foreign = paths.BPF / "foreign"
    code = (
        "import sys; sys.path.append('/usr/lib/python3/dist-packages')\n"
        "from bcc import BPF\n"
        "import os,tempfile,pathlib\n"
        "from agent.bpf import shim,libbpf\n"
        "t=tempfile.mkdtemp(); shim.build(pathlib.Path(t)); os.environ['BCC_KERNEL_SOURCE']=t\n"
        "b=BPF(text='int foreign(struct bpf_sock_addr *c){return 1;}')\n"
        "f=b.load_func('foreign',18,attach_type=10)\n"
        f"libbpf.pin(f.fd,pathlib.Path({str(foreign)!r}))\n"
        f"BPF.attach_func(f,os.open({str(node.config.cgroup)!r},os.O_RDONLY),10,2)\n"  # BPF_F_ALLOW_MULTI
        "print(libbpf.program_id(f.fd))\n"
    )
    try:
        number = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        node.open()
        node.enforce(MODEL)
        cgroup = os.open(node.config.cgroup, os.O_RDONLY)
        try:
            assert number in libbpf.effective_programs(cgroup, "cgroup_inet4_connect")
        finally:
            os.close(cgroup)
        assert in_force(node)
    finally:
        foreign.unlink(missing_ok=True)


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
    assert in_force(node)
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
