"""The lab itself, without a mesh: its network works, its programs run where they should, and it leaves nothing behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cgroup, paths, teardown
from lab.errors import LabError, StartFailed
from lab.lab import Lab
from lab.topology import Node, Outside, Pod, Topology

pytestmark = pytest.mark.kernel

SERVE = (sys.executable, "-m", "http.server", "--bind", "::", "8000")
NODES = (Node("alpha", 1), Node("beta", 2))
SERVER = Pod("server", "beta", ("10.77.2.10", "fd77:0:0:2::10"), command=SERVE, ports=(8000,))
NEAR = Pod("near", "beta", ("10.77.2.11", "fd77:0:0:2::11"))
FAR = Pod("far", "alpha", ("10.77.1.12", "fd77:0:0:1::12"), env={"COLOUR": "green"})
TOPOLOGY = Topology(NODES, (SERVER, NEAR, FAR), (Outside("stranger", ("10.77.255.201", "fd77:0:0:ff::c9")),), Path("/usr/share"))


def machine_state() -> dict[str, object]:
    """What a lab could leave behind: namespaces, links, cgroups, mounts, directories."""
    return {
        "namespaces": sorted(path.name for path in Path("/run/netns").glob("*")),
        "links": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "cgroup": paths.cgroup_root().exists(),
        "pins": sorted(str(path) for path in paths.PINS.glob("*")),
        "mounts": sorted(line for line in Path("/proc/self/mounts").read_text().splitlines() if "mesh" in line),
        "run": sorted(path.name for path in Path("/run").iterdir()),
    }


@pytest.fixture(scope="module")
def bare() -> Iterator[Lab]:
    """A lab without a mesh that is up."""
    with Lab(TOPOLOGY, mesh=False) as running:
        yield running


@pytest.mark.parametrize("client", ["near", "far", "stranger", "alpha", "beta"])
@pytest.mark.parametrize("address", ["10.77.2.10", "[fd77:0:0:2::10]"])
def test_a_pod_is_reached_from_everywhere_over_both_families(bare: Lab, client: str, address: str) -> None:
    run = bare.exec(client, ["curl", "-sS", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}", f"http://{address}:8000/"])
    assert (run.stdout, run.stderr) == ("200", "")


def test_a_pod_that_comes_does_not_change_the_gateway_that_the_others_know(bare: Lab) -> None:
    command = ["ip", "-brief", "link", "show", "dev", "br0"]
    before = bare.exec("beta", command).stdout.split()[2]
    pods = [Pod(f"late-{n}", "beta", (f"10.77.2.{100 + n}",)) for n in range(7)]
    for pod in pods:
        bare.add_pod(pod)
    try:
        assert bare.exec("beta", command).stdout.split()[2] == before
    finally:
        for pod in pods:
            bare.remove_pod(pod.name)


@pytest.mark.parametrize("address", ["10.96.0.10", "[fd96::10]"])
def test_a_virtual_address_fails_at_once_without_a_mesh(bare: Lab, address: str) -> None:
    run = bare.exec("far", ["curl", "-sS", "--max-time", "5", "-w", "%{time_total}", f"http://{address}/"])
    assert run.returncode == 7
    assert float(run.stdout) < 0.5


def test_a_pods_own_address_is_what_others_see(bare: Lab) -> None:
    seen = bare.exec("far", ["sh", "-c", "ip -json route get 10.77.2.10"])
    assert json.loads(seen.stdout)[0]["prefsrc"] == "10.77.1.12"


@pytest.mark.parametrize("code", [0, 7, 255])
def test_exec_hands_on_the_exit_code(bare: Lab, code: int) -> None:
    assert bare.exec("far", ["sh", "-c", f"exit {code}"]).returncode == code


def test_exec_runs_in_the_pods_cgroup_with_its_name_and_environment(bare: Lab) -> None:
    script = "cat /proc/self/cgroup /etc/hosts; echo host=$(hostname) pod=$POD_NAME colour=$COLOUR home=$CALLERS"
    os.environ["CALLERS"] = "leaked"
    try:
        run = bare.exec("far", ["sh", "-c", script], check=True)
    finally:
        del os.environ["CALLERS"]
    lines = run.stdout.splitlines()
    assert "0::/meshlab/alpha/pods/default_far" in lines
    assert "10.77.1.12 far" in lines
    assert lines[-1] == "host=far pod=far colour=green home="


def test_exec_passes_standard_input(bare: Lab) -> None:
    assert bare.exec("near", ["cat"], input="23 events\n").stdout == "23 events\n"


def test_the_pid_of_a_command_in_a_pod_is_the_callers_child(bare: Lab) -> None:
    with bare.popen("near", ["sh", "-c", "echo $$; exec sleep 60"]) as child:
        try:
            assert child.stdout is not None
            assert int(child.stdout.readline()) == child.pid
            assert str(child.pid) in (bare.cgroup("near") / "cgroup.procs").read_text().split()
        finally:
            child.kill()


def test_an_unknown_pod_is_named(bare: Lab) -> None:
    with pytest.raises(LabError, match="no pod is called default/fra: did you mean default/far"):
        bare.exec("fra", ["true"])


def test_a_second_lab_is_refused_and_the_first_lives_on(bare: Lab) -> None:
    with pytest.raises(LabError, match="a lab is up already"):
        Lab(TOPOLOGY, mesh=False).up()
    assert bare.exec("far", ["true"]).returncode == 0


def test_pods_come_and_go_at_run_time(bare: Lab) -> None:
    late = Pod("late", "alpha", ("10.77.1.30", "fd77:0:0:1::30"), namespace="shop", command=SERVE, ports=(8000,))
    for _ in range(3):  # the same name and address again, at once
        bare.add_pod(late)
        run = bare.exec(
            "near", ["curl", "-sS", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}", "http://[fd77:0:0:1::30]:8000/"]
        )
        assert run.stdout == "200"
        where = bare.cgroup("shop/late")
        bare.remove_pod("shop/late")
        assert not where.exists()
        assert not Path("/run/netns/meshlab-shop_late").exists()
    links = json.loads(bare.exec("alpha", ["ip", "-json", "link"]).stdout)
    assert "shop/late" not in [link.get("ifalias") for link in links]
    with pytest.raises(LabError, match="no pod is called shop/late"):
        bare.exec("shop/late", ["true"])


def test_another_process_sees_the_same_lab(bare: Lab) -> None:
    attached = Lab.attach()
    assert attached.topology == bare.topology
    assert attached.exec("far", ["hostname"]).stdout == "far\n"


def run_cli(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    code = "from lab.cli import lab; lab(prog_name='meshagent lab')"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, check=False, input=stdin)


def test_the_command_line_execs_like_a_shell(bare: Lab) -> None:
    run = run_cli("exec", "far", "--", "sh", "-c", "cat; hostname; echo wrong >&2; exit 23", stdin="in ")
    assert (run.returncode, run.stdout, run.stderr) == (23, "in far\n", "wrong\n")
    assert bare.exec("far", ["true"]).returncode == 0


def test_status_tells_what_runs(bare: Lab) -> None:
    run = run_cli("status", "-o", "json")
    report = json.loads(run.stdout)
    assert run.returncode == 0
    assert report["ready"] is True
    assert report["mesh"] is False
    assert {pod["name"]: pod.get("alive") for pod in report["pods"]} == {"server": True, "near": None, "far": None}
    assert run_cli("status").returncode == 0
    assert len(bare.topology.nodes) == len(report["nodes"])


def test_misuse_of_the_command_line_is_exit_code_2() -> None:
    assert run_cli("exec", "far").returncode == 2


@pytest.fixture
def no_lab() -> None:
    """Leave the machine to a lab that the test makes itself; the module's own has done its work by then."""
    if paths.STATE.exists():
        Lab.attach().down()


@pytest.mark.usefixtures("no_lab")
def test_up_and_down_leave_nothing() -> None:
    before = machine_state()
    running = Lab(TOPOLOGY, mesh=False)
    running.up()
    assert teardown.leftovers()
    server = running.state.processes["default_server"]
    assert server.alive()
    assert running.down() == []
    assert not server.alive()
    assert teardown.leftovers() == []
    assert machine_state() == before
    assert running.down() == [], "down is idempotent"


@pytest.mark.usefixtures("no_lab")
def test_a_lab_that_cannot_come_up_shows_why_and_leaves_nothing() -> None:
    before = machine_state()
    broken = Pod("broken", "alpha", ("10.77.1.9",), command=("sh", "-c", "echo this pod is broken; exit 3"), ports=(80,))
    with pytest.raises(StartFailed, match="default_broken ended") as failure:
        Lab(Topology(NODES, (broken,)), mesh=False).up()
    assert failure.value.log == "this pod is broken"
    assert machine_state() == before


@pytest.mark.usefixtures("no_lab")
def test_down_works_after_a_crash_of_up_and_without_a_state_file() -> None:
    before = machine_state()
    Lab(TOPOLOGY, mesh=False).up()
    paths.STATE.unlink()
    run = run_cli("down")
    assert (run.returncode, run.stderr.splitlines()[-1]) == (0, "the lab is down")
    assert machine_state() == before
    assert run_cli("down").stderr.splitlines()[-1] == "no lab was up"


def _bring_up_and_be_killed() -> None:
    Lab(TOPOLOGY, mesh=False).up()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("no_lab")
def test_a_lab_whose_processes_were_all_killed_makes_room_for_the_next() -> None:
    before = machine_state()
    first = multiprocessing.get_context("spawn").Process(target=_bring_up_and_be_killed)
    first.start()
    first.join(60)
    assert first.exitcode == -signal.SIGKILL
    with pytest.raises(LabError, match="a lab is up already"):
        Lab(TOPOLOGY, mesh=False).up()  # its pods live
    cgroup.kill(paths.cgroup_root())
    with Lab(TOPOLOGY, mesh=False) as second:
        assert second.exec("far", ["true"]).returncode == 0
    assert machine_state() == before


@pytest.mark.usefixtures("no_lab")
def test_commands_without_a_lab_say_so() -> None:
    run = run_cli("status")
    assert (run.returncode, run.stderr) == (1, "Error: no lab is up: `meshagent lab up` brings one up\n")
