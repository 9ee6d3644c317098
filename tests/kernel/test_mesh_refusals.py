"""`meshagent run` where it cannot: one line that says what and what to do, exit code 1, no traceback, and nothing that runs is touched."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cgroup, mesh, paths
from lab.lab import Lab
from tests.kernel import shop

pytestmark = pytest.mark.kernel


@pytest.fixture
def places(lab: Lab, tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Where an agent of its own could keep its things."""
    assert lab.topology.nodes
    found = {
        "cgroup": cgroup.create(paths.cgroup_root() / "spare"),
        "pin-dir": paths.BPF / "meshagent-spare",
        "run-dir": tmp_path / "run",
        "state-dir": tmp_path / "state",
    }
    yield found
    subprocess.run([mesh.program("meshagent"), "uninstall", *options(found)], check=True, capture_output=True)
    cgroup.remove(found["cgroup"])


def options(values: dict[str, Path]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def run(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    argv = [*prefix, mesh.program("meshagent"), "run", "--node", "node-9", "--metrics-address", "127.0.0.1", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that it says to people; the log, one JSON object a line, may say more."""
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    assert line.startswith("Error: ")
    assert result.stdout == ""
    return line.removeprefix("Error: ")


def test_a_second_agent_for_a_node_refuses_to_start_and_names_the_first(lab: Lab) -> None:
    pid, envoy, programs = lab.agent_pid("node-1"), shop.status("node-1")["waypoint"]["pid"], shop.program_ids("node-1")
    with shop.loads(lab, ("frontend", "redis://redis:6379"), ("other", "redis://redis:6379")) as calls:
        said = complaint(run(*mesh.agent_directories("node-1")))
    assert f"an agent already runs for {paths.agent_run('node-1')} (pid {pid}): stop it" in said
    assert lab.status("node-1")["ready"] is True
    assert (lab.agent_pid("node-1"), shop.status("node-1")["waypoint"]["pid"], shop.program_ids("node-1")) == (pid, envoy, programs)
    assert [shop.outcomes(found).keys() for found in calls] == [{"PONG"}, {"EPERM"}]


def test_a_cgroup_that_is_none_is_refused_with_the_one_that_is(places: dict[str, Path], tmp_path: Path) -> None:
    said = complaint(run(*options({**places, "cgroup": tmp_path})))
    assert said == f"{tmp_path} is not in a cgroup2 file system: pass --cgroup {cgroup.mount_point()}"


def test_a_cgroup_that_does_not_exist_is_refused(places: dict[str, Path]) -> None:
    said = complaint(run(*options({**places, "cgroup": places["cgroup"] / "absent"})))
    assert said == f"cgroup {places['cgroup']}/absent does not exist: create it, or pass another --cgroup"


def test_a_pin_directory_outside_a_bpf_file_system_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    said = complaint(run(*options({**places, "pin-dir": tmp_path})))
    assert said == f"{tmp_path} is not in a BPF file system: mount it: mount -t bpf bpf /sys/fs/bpf"
    assert not places["run-dir"].exists(), "nothing was touched"


def test_an_agent_without_root_is_refused(places: dict[str, Path]) -> None:
    said = complaint(run(*options(places), prefix=("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")))
    assert said == "this needs root: run it with sudo, or as user 0 in a container"


@pytest.mark.parametrize("envoy", ["/nonexistent/envoy", "/etc/passwd"])
def test_an_envoy_that_is_missing_or_no_program_is_refused(places: dict[str, Path], envoy: str) -> None:
    said = complaint(run(*options(places), "--envoy", envoy))
    assert envoy in said
    assert "--envoy" in said
    assert not places["pin-dir"].exists(), "nothing was loaded"


def test_a_metrics_port_that_is_taken_is_refused(places: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = complaint(run(*options(places), "--metrics-port", str(port)))
    assert said == f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --metrics-port or --metrics-address"


def test_a_controller_over_tcp_without_credentials_is_misuse(places: dict[str, Path]) -> None:
    result = run(*options(places), "--controller", "127.0.0.1:15010")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "Error: controller 127.0.0.1:15010 is reached over TCP: --tls-ca, --tls-cert and --tls-key are needed,"
        " or a token to join with (--join-token-file)"
    )


def test_some_of_the_credentials_are_misuse(places: dict[str, Path]) -> None:
    ca = paths.PKI / "ca.crt"
    result = run(*options(places), "--controller", "127.0.0.1:15010", "--tls-ca", str(ca))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "Error: --tls-ca, --tls-cert and --tls-key belong together"


def test_a_controller_that_is_not_there_leaves_an_agent_waiting_and_saying_so(places: dict[str, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [mesh.program("meshagent"), "run", "--node", "node-9", "--controller", f"unix:{tmp_path}/absent.sock", *options(places)]
    with subprocess.Popen(
        [*argv, "--metrics-address", "127.0.0.1", "--metrics-port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as agent:
        try:
            shop.takes((places["run-dir"] / "agent.sock").exists, 15)
            ask = [mesh.program("meshagent"), "status", "--run-dir", str(places["run-dir"])]
            said = subprocess.run(ask, capture_output=True, text=True, check=False)
            assert said.returncode == 1
            assert "not ready" in said.stdout
            reason = f"no configuration yet: controller unix:{tmp_path}/absent.sock has not answered"
            assert reason in said.stdout
            curl = ["curl", "-s", "-w", "%{stderr}%{http_code}"]
            asked = [f"http://127.0.0.1:{port}/{path}" for path in ("readyz", "healthz")]
            ready, healthy = (subprocess.run([*curl, url], capture_output=True, text=True, check=True) for url in asked)
            assert (ready.stderr, healthy.stderr) == ("503", "200")
            assert reason in ready.stdout
        finally:
            agent.terminate()
            assert agent.wait(10) == 0


def test_a_machine_without_bcc_says_which_package_is_missing(places: dict[str, Path], tmp_path: Path) -> None:
    """A stand-in for a venv that does not see Debian's packages: a module of that name that cannot be imported."""
    (tmp_path / "bcc.py").write_text("raise ModuleNotFoundError(\"No module named 'bcc'\")\n")
    said = complaint(run(*options(places), prefix=("env", f"PYTHONPATH={tmp_path}")))
    assert "install Debian's python3-bpfcc" in said
    shutil.rmtree(places["pin-dir"], ignore_errors=True)
