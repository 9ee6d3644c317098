"""`meshagent check` on a real kernel: nothing installed, a node that is well, others at the same hooks, programs that were taken away."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import features
from agent.bpf import probes
from lab import cgroup, mesh, mounts, paths
from lab.lab import Lab
from tests.kernel.programs import foreign

pytestmark = pytest.mark.kernel

NODE = "node-1"
CHAINS = {
    "iptables-legacy": [["iptables-legacy", "-t", "nat", "-N", "PROXY_INIT_REDIRECT"]],
    "iptables-nft": [["iptables-nft", "-t", "nat", "-N", "PROXY_INIT_REDIRECT"]],
    "nft": [["nft", "add table ip other; add chain ip other PROXY_INIT_REDIRECT"]],
}
LISTEN = "import socket, time; s = socket.create_server(('127.0.0.1', 15003)); print('ready', flush=True); time.sleep(60)"
Findings = list[dict[str, str]]


def outcome(argv: list[str], run: Callable[[list[str]], subprocess.CompletedProcess[str]]) -> tuple[int, Findings]:
    done = run([mesh.program("meshagent"), "check", "-o", "json", *argv])
    assert done.stderr == ""
    report = json.loads(done.stdout)
    findings: Findings = report["findings"]
    assert report["scope"] == "node"
    assert all(one["severity"] == "ok" or one["nextStep"] for one in findings)
    assert (done.returncode == 1) == any(one["severity"] == "error" for one in findings)
    return done.returncode, findings


def check(lab: Lab) -> tuple[int, Findings]:
    """In the network namespace of a node, as the agent's pod is."""
    return outcome(mesh.agent_directories(NODE), lambda argv: lab.exec(NODE, argv, timeout=60))


def named(findings: Findings, name: str, severity: str) -> Findings:
    return [one for one in findings if (one["check"], one["severity"]) == (name, severity)]


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A cgroup that no agent has, and options for places that do not exist yet."""
    mounted = mounts.mount_bpffs(paths.BPF)
    place = cgroup.create(paths.cgroup_root() / "bare")
    pins, run, state = paths.BPF / f"check-{tmp_path.name}", tmp_path / "run", tmp_path / "state"
    try:
        yield (
            place,
            ["--cgroup", str(place), "--pin-dir", str(pins), "--run-dir", str(run), "--state-dir", str(state), "--metrics-port", "15029"],
        )
        assert [path for path in (pins, run, state) if path.exists()] == []
    finally:
        cgroup.remove(place)
        if mounted:
            assert mounts.unmount_bpffs(paths.BPF)


def alone(argv: list[str]) -> tuple[int, Findings]:
    return outcome(argv, lambda line: subprocess.run(line, capture_output=True, text=True, timeout=60, check=False))


def test_this_kernel_has_every_piece_that_is_tried() -> None:
    wanted = set() if features.kernel_version() >= features.SET_RETVAL_KERNEL else {"set_retval"}
    assert {lack.name for lack in probes.lacking()} == wanted


def test_a_piece_that_is_not_there_is_told_from_one_that_is() -> None:
    assert probes.helper(18, "cgroup_inet4_connect", 122) == ""
    assert "bpf_get_netns_cookie#122" in probes.helper(30, "sk_lookup", 122)  # which does not exist for that type
    assert "unknown" in probes.helper(18, "cgroup_inet4_connect", 9999)
    assert probes.program(18, "cgroup_inet4_connect") == ""
    assert probes.program(9999, "cgroup_inet4_connect") == "Invalid argument"


def test_who_may_not_ask_is_told_so_once() -> None:
    code = "import os; from agent.bpf import probes; os.setresuid(65534, 65534, 65534); probes.lacking()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "agent.errors.EnvironmentUnfit: the kernel does not let this process use bpf(2): CAP_BPF is missing, or the kernel is locked down"
    )


def test_a_machine_with_nothing_installed_passes_and_nothing_stays(bare: tuple[Path, list[str]]) -> None:
    _, options = bare
    code, found = alone(options)
    assert code == 0, found
    assert [one["what"] for one in named(found, "programs", "ok")] == ["the kernel takes every program and map of this version"]
    assert {one["check"] for one in found} == {
        "kernel", "cgroup", "bpffs", "capabilities", "btf", "limits", "features", "programs", "wireguard", "envoy", "ports", "clock",
        "programs of others", "packet filter",
    }  # fmt: skip


def test_who_has_a_port_of_the_node_is_named(bare: tuple[Path, list[str]]) -> None:
    _, options = bare
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, found = alone([*options, "--metrics-port", str(taken.getsockname()[1])])
    (one,) = named(found, "ports", "error")
    assert code == 1
    assert one["where"].startswith(f"process {os.getpid()} (")


def test_a_program_that_lets_nobody_be_beside_it_is_an_error(bare: tuple[Path, list[str]]) -> None:
    place, options = bare
    with foreign(place, linked=False, alone=True) as number:
        code, found = alone(options)
    (one,) = named(found, "programs of others", "error")
    assert code == 1
    assert f"bpftool prog show id {number}" in one["where"]


def test_chains_of_iptables_legacy_are_read_without_raw_sockets() -> None:
    if shutil.which("iptables-legacy") is None:
        pytest.skip("there is no iptables-legacy: it belongs to Debian's iptables")
    code = "from agent.check import chains; print(*(name for _, name in chains.here()))"
    script = f'iptables-legacy -t nat -N PROXY_INIT_REDIRECT && setpriv --bounding-set=-net_raw {sys.executable} -c "{code}"'
    done = subprocess.run(["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert ("PROXY_INIT_REDIRECT" in done.stdout.split(), done.stderr) == (True, "")


def test_names_are_refused_where_name_servers_cannot_run() -> None:
    """As in the chart's container."""
    argv = [mesh.program("meshagent"), "run", "--node", "n", "--names"]
    done = subprocess.run(["setpriv", "--bounding-set=-setuid,-kill", *argv], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: --names needs KILL, SETUID, which this process lacks")
    assert "Leave --names away" in done.stderr


def test_without_a_bpf_file_system_it_says_what_to_mount(tmp_path: Path, bare: tuple[Path, list[str]]) -> None:
    place, _ = bare
    code, found = alone(["--cgroup", str(place), "--pin-dir", str(tmp_path), "--run-dir", str(tmp_path / "run")])
    assert code == 1
    assert "mount -t bpf" in named(found, "bpffs", "error")[0]["nextStep"]


def test_a_node_that_is_well_passes(lab: Lab) -> None:
    code, found = check(lab)
    assert code == 0, found
    for name in (
        "redirect drift",
        "agent",
        "waypoint",
        "controller",
        "certificates",
        "programs",
        "programs of others",
        "packet filter",
        "ports",
    ):
        assert len(named(found, name, "ok")) == 1, (name, found)
    assert named(found, "problems", "warning") == []
    assert named(found, "programs", "ok")[0]["what"] == "those in force are of this version"


def test_several_agents_are_not_mixed_up(lab: Lab) -> None:
    run = lab.meshagent("check", "--run-dir", str(paths.AGENT_RUN))
    assert (run.returncode, "give --run-dir" in run.stderr) == (2, True)


def test_somebody_elses_connect_program_is_named_with_its_place(lab: Lab) -> None:
    place = lab.cgroup("redis")
    with foreign(place, linked=True) as number:
        code, found = check(lab)
    (one,) = named(found, "programs of others", "warning")
    assert code == 0
    assert one["what"] == "program foreign of somebody else at cgroup_inet4_connect"
    assert str(place) in one["where"]
    assert f"id {number}" in one["where"]


@pytest.mark.parametrize("tool", CHAINS)
def test_chains_of_another_mesh_in_a_pod_are_named(lab: Lab, tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"there is no {tool}: it belongs to Debian's iptables or nftables")
    inside = ["nsenter", f"--net={lab.netns('redis')}"]
    try:
        for argv in CHAINS[tool]:
            subprocess.run([*inside, *argv], check=True)
        _, found = check(lab)
    finally:
        subprocess.run([*inside, "nft", "flush", "ruleset"], check=True)
        if tool == "iptables-legacy":
            subprocess.run([*inside, tool, "-t", "nat", "-X", "PROXY_INIT_REDIRECT"], check=True)
    (one,) = named(found, "packet filter", "warning")
    assert "chains of Linkerd" in one["what"]
    assert "linkerd.io/inject" in one["nextStep"]
    _, found = check(lab)
    assert named(found, "packet filter", "warning") == []


def test_a_program_that_listens_on_a_port_of_the_mesh_is_named(lab: Lab) -> None:
    with lab.popen("redis", [sys.executable, "-c", LISTEN]) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
            _, found = check(lab)
        finally:
            program.kill()
    (one,) = named(found, "ports", "warning")
    assert "port 15003" in one["what"]
    assert "(python" in one["where"]


def test_a_program_that_was_taken_away_is_drift_until_the_agent_is_restarted(lab: Lab) -> None:
    link = paths.agent_pins(NODE) / "links" / "mesh_connect6"
    link.unlink()
    try:
        code, found = check(lab)
        (one,) = [one for one in named(found, "redirect drift", "error") if "mesh_connect6" in one["what"]]
        assert code == 1
        assert one["where"] == str(link)
        assert "somebody removed it" in one["cause"]
    finally:
        lab.stop_agent(NODE)
        lab.start_agent(NODE)
    lab.settle()
    code, found = check(lab)
    assert (code, named(found, "redirect drift", "error")) == (0, [])


def test_programs_without_an_agent_are_an_error_that_says_so(lab: Lab) -> None:
    lab.kill_agent(NODE)
    try:
        code, found = check(lab)
    finally:
        lab.start_agent(NODE)
    lab.settle()
    assert code == 1
    assert len(named(found, "redirect drift", "ok")) == 1  # they are in force all the same
    assert "no agent answers" in named(found, "agent", "error")[0]["what"]
