"""Agents that die and agents of another version: clients do not retry, no request fails, nobody denied gets in, no counter falls."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.bpf.manifest import FORMAT
from agent.bpf.source import BPF_SRC
from lab import mesh, paths, process
from lab.lab import Lab
from tests.kernel import shop
from tests.kernel.test_mesh_faults import DENIED, EVIL, NODES, pids, unharmed

pytestmark = pytest.mark.kernel

KILLS = 23
START_S = 20.0
UPGRADE_S = 60.0
# A member in front or in the middle moves those behind it; the room of mesh_sock is there to be taken.
LARGER = (
    ("mesh_types.h", "struct mesh_flow {\n", "struct mesh_flow {\n\t__u32 added[2];\n"),
    ("mesh_types.h", "struct mesh_origdst {\n", "struct mesh_origdst {\n\t__u64 added;\n"),
    ("mesh_types.h", "struct mesh_stats {\n\t__u64 opened;", "struct mesh_stats {\n\t__u64 added;\n\t__u64 opened;"),
    ("mesh_types.h", "struct mesh_workload {\n", "struct mesh_workload {\n\t__u64 added;\n"),
    ("mesh_types.h", "__u64 spare[3];", "__u64 added;\n\t__u64 spare[2];"),
    ("mesh_maps.h", "u32, u64, mesh_counter, MESH_COUNT_MAX,", "u32, u64, mesh_counter, MESH_COUNT_MAX + 1,"),
)
OTHER_SOCKETS = (
    ("mesh_types.h", "struct mesh_sock {\n", "struct mesh_sock {\n\t__u64 added;\n"),
    ("mesh_maps.h", "struct mesh_affinity, mesh_affinity, 65536", "struct mesh_affinity, mesh_affinity, 4096"),
)
OTHER_LISTENERS = (("mesh_types.h", "struct mesh_listener_key {\n", "struct mesh_listener_key {\n\t__u64 added;\n"),)
REFUSED = (
    ("mesh_sk_lookup.c", "\tif (ctx->protocol != IPPROTO_TCP &&", "\tbpf_get_netns_cookie(ctx);\n\tif (ctx->protocol != IPPROTO_TCP &&"),
)
SLOW = (("datapath.py", "libbpf.link_update(fd, code)\n", "libbpf.link_update(fd, code); time.sleep(0.1)\n"),)
"""Of the package agent.bpf: whoever changes the links is held up after each."""
NEWER = (("manifest.py", "\nFORMAT = 1\n", "\nFORMAT = 2\n"),)
Edits = tuple[tuple[str, str, str], ...]


def version(tmp_path: Path, edits: Edits, loader: Edits = ()) -> Path:
    """`meshagent` of another version: this one with an edited C source, and perhaps edited files of agent.bpf."""
    root = Path(mesh.__file__).parents[1]
    for package in ("agent", "meshapi"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(BPF_SRC, tmp_path / "bpf_src")
    places = [*((tmp_path / "bpf_src", edit) for edit in edits), *((tmp_path / "agent" / "bpf", edit) for edit in loader)]
    for directory, (name, old, new) in places:
        file = directory / name
        text = file.read_text()
        assert text.count(old) == 1, (name, old)
        file.write_text(text.replace(old, new))
    script = tmp_path / "meshagent"
    script.write_text(f'#!/bin/sh\ncd {tmp_path} && PYTHONPATH={tmp_path} exec {sys.executable} -m agent.cli.main "$@"\n')
    script.chmod(0o755)
    return script


@contextmanager
def installed(script: Path | None) -> Iterator[None]:
    """The lab's `meshagent` is this one within the block; None: the one that is installed."""
    program = mesh.program
    with pytest.MonkeyPatch.context() as patched:
        if script is not None:
            patched.setattr(mesh, "program", lambda name: str(script) if name == "meshagent" else program(name))
        yield


def replace_agents(lab: Lab, script: Path | None) -> None:
    """SIGKILL each agent and start this version in its place; None: the one that is installed."""
    with installed(script):
        for node in NODES:
            lab.kill_agent(node)
            lab.start_agent(node, timeout=UPGRADE_S)


def opened(lab: Lab) -> dict[str, float]:
    """The counter of connections of each node, at callers and receivers."""
    return {node: shop.samples(lab, node, "mesh_tcp_connections_opened_total") for node in NODES}


def checked(lab: Lab, node: str, script: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and document of `meshagent upgrade-check`."""
    with installed(script):
        run = lab.meshagent("upgrade-check", *mesh.agent_directories(node), "-o", "json")
    return run.returncode, json.loads(run.stdout)


def test_agents_that_are_killed_23_times_fail_no_request_and_let_nobody_in(lab: Lab) -> None:
    programs, envoys, before = [shop.program_ids(node) for node in NODES], pids(lab), opened(lab)
    with unharmed(lab):
        for _ in range(KILLS):
            for node in NODES:
                lab.kill_agent(node)
            assert max(lab.start_agent(node) for node in NODES) < START_S
    assert [shop.program_ids(node) for node in NODES] == programs
    assert pids(lab) == envoys
    assert all(opened(lab)[node] > before[node] for node in NODES)


def test_a_changed_layout_fails_no_request_lets_nobody_in_and_counters_go_on(lab: Lab, tmp_path: Path) -> None:
    larger = version(tmp_path, LARGER)
    assert shop.codes(lab, "frontend", "http://cart/items?[1-23]") == {"200": 23}  # both nodes have something to lose
    kept, envoys, counts = shop.map_ids("node-1"), pids(lab), opened(lab)
    for script in (larger, None):  # there and back again
        if script is not None:
            code, found = checked(lab, "node-1", script)
            assert (code, found["losses"]) == (0, [])
            assert [change["name"] for change in found["maps"] if change["fate"] == "carried"] == ["mesh_flow", "mesh_origdst"]
        with unharmed(lab):
            replace_agents(lab, script)
            now = shop.map_ids("node-1")
            assert {name for name in now if now[name] != kept[name]} == {
                *("mesh_flow", "mesh_origdst", "mesh_accepted", "mesh_stats", "mesh_blank", "mesh_counter"),
                *("mesh_config", "mesh_epoch", "mesh_workload", "mesh_address", "mesh_service", "mesh_backend", "mesh_member"),
                *("mesh_block", "mesh_mtls", "mesh_resolver", "mesh_policy", "mesh_trace"),
            }
            after = opened(lab)
            assert all(after[node] >= counts[node] > 0 for node in NODES)
        counts, kept = after, now
        assert [shop.status(node)["problems"] for node in NODES] == [[], []]
        assert len(list(paths.agent_pins("node-1").glob("programs-*"))) == 1
    assert pids(lab) == envoys, "the running Envoy was adopted"


def test_a_changeover_that_is_held_up_between_any_two_hooks_fails_no_request(lab: Lab, tmp_path: Path) -> None:
    """What one hook has written is found by the next, although one is new and the other old: by 0.1 s here, by as long as a busy machine takes elsewhere."""
    slow = version(tmp_path, LARGER, SLOW)
    with shop.loads(lab, *[("frontend", "http://cart/items")] * 4, *[("frontend", "redis://redis:6379")] * 2, *EVIL) as calls:
        replace_agents(lab, slow)
    assert [shop.outcomes(found).keys() for found in calls] == [*[{"200"}] * 4, *[{"PONG"}] * 2, *DENIED]
    replace_agents(lab, None)


def test_every_connection_is_counted_once_while_layouts_change(lab: Lab, tmp_path: Path) -> None:
    larger = version(tmp_path, LARGER)

    pair = {"source_workload": "frontend", "destination_workload": "redis", "direction": "outbound"}

    def to_redis() -> float:
        return shop.samples(lab, "node-1", "mesh_tcp_connections_opened_total", **pair)

    for script in (larger, None):
        assert shop.ping(lab, "frontend") == "PONG"
        before = to_redis()
        assert before > 0
        with shop.loads(lab, ("frontend", "redis://redis:6379")) as calls:
            replace_agents(lab, script)
        assert shop.outcomes(calls[0]).keys() == {"PONG"}
        assert to_redis() - before == len(calls[0])


def test_another_record_of_sockets_fails_no_request(lab: Lab, tmp_path: Path) -> None:
    other = version(tmp_path, OTHER_SOCKETS)
    code, found = checked(lab, "node-1", other)
    assert code == 2, found
    assert any("uncounted" in str(loss) and "does not close them" in str(loss) for loss in found["losses"])
    envoys = pids(lab)
    for script in (other, None):
        with unharmed(lab):
            replace_agents(lab, script)
    assert pids(lab) == envoys


def test_envoy_is_replaced_when_its_listeners_need_another_map(lab: Lab, tmp_path: Path) -> None:
    other = version(tmp_path, OTHER_LISTENERS)
    code, found = checked(lab, "node-1", other)
    assert code == 2, found
    assert any("Envoy" in str(loss) for loss in found["losses"])
    envoys = pids(lab)
    with shop.loads(lab, ("frontend", "redis://redis:6379"), ("other", "redis://redis:6379")) as calls:
        replace_agents(lab, other)
    assert [shop.outcomes(found).keys() for found in calls] == [{"PONG"}, {"EPERM"}]
    assert not set(pids(lab)) & set(envoys)
    replace_agents(lab, None)
    shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items") == {"200": 1}, 5)


def test_a_program_that_the_kernel_refuses_is_found_out_before_the_upgrade_and_harms_nothing_after_it(lab: Lab, tmp_path: Path) -> None:
    refused = version(tmp_path, REFUSED)
    programs, kept = shop.program_ids("node-1"), shop.map_ids("node-1")
    code, found = checked(lab, "node-1", refused)
    assert code == 1, found
    assert "mesh_sk_lookup" in str(found["refusal"])
    with unharmed(lab):
        lab.kill_agent("node-1")
        run = lab.meshagent("status", "--run-dir", str(paths.agent_run("node-1")))
        assert run.returncode != 0
        lab.start_agent("node-1")
    assert (shop.program_ids("node-1"), shop.map_ids("node-1")) == (programs, kept)
    assert [path.name for path in paths.agent_pins("node-1").glob("check-*")] == []


def test_an_agent_that_does_not_understand_what_is_in_force_leaves_it_alone(lab: Lab, tmp_path: Path) -> None:
    newer = version(tmp_path, LARGER, NEWER)
    code, _ = checked(lab, "node-1", newer)
    assert code == 0
    with installed(newer):
        lab.kill_agent("node-1")
        lab.start_agent("node-1", timeout=UPGRADE_S)
    before = shop.program_ids("node-1"), shop.map_ids("node-1"), shop.running_ids("node-1")
    (manifest,) = paths.agent_run("node-1").glob("manifest-*.json")
    written = manifest.read_text()
    with unharmed(lab):
        lab.kill_agent("node-1")
        for text in (written, written[:-100], "[]"):  # of a newer version, torn, something else
            manifest.write_text(text)
            agent = mesh.start_agent(lab.topology.node("node-1"))
            assert agent.wait(START_S)
            assert "does not start; start that version again" in process.tail(paths.log("agent-node-1"), 5)
            code, found = checked(lab, "node-1", Path(mesh.program("meshagent")))
            assert (code, "does not understand" in found["refusal"]) == (1, True)
            assert (shop.program_ids("node-1"), shop.map_ids("node-1"), shop.running_ids("node-1")) == before
        manifest.write_text(written)
        with installed(newer):
            lab.start_agent("node-1", timeout=UPGRADE_S)
        assert shop.running_ids("node-1") == before[2]
        manifest.write_text(json.dumps({**json.loads(written), "format": FORMAT}))
        replace_agents(lab, None)
    assert shop.status("node-1")["problems"] == []


def test_without_a_last_good_configuration_the_previous_programs_stay_until_one_came(lab: Lab, tmp_path: Path) -> None:
    larger = version(tmp_path, LARGER)
    programs = shop.program_ids("node-1")
    with unharmed(lab):
        lab.controller_stop()
        lab.kill_agent("node-1")
        for journal in paths.agent_state("node-1").glob("snapshot*"):
            journal.rename(journal.with_name(f"away-{journal.name}"))
        with installed(larger):
            lab._remember(mesh.start_agent(lab.topology.node("node-1")))
        shop.takes(lambda: lab.status("node-1"), UPGRADE_S)
        assert shop.status("node-1")["ready"] is False
        assert shop.running_ids("node-1") <= set(programs)
        lab.controller_start()
        shop.takes(lambda: lab.agent_ready("node-1"), 20)
        assert not shop.running_ids("node-1") & set(programs)
    replace_agents(lab, None)
