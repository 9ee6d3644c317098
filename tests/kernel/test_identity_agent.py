"""A real agent that joins a real controller with a token: certificates, the workload socket, a restart without the controller, and where keys are."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import cgroup, mounts
from lab import netns as lab_netns
from tests.kernel.shop import takes
from tests.kernel.test_workload_identity import calling, entering
from tests.ports import free_ports

CART = "spiffe://mesh.local/ns/shop/sa/cart"
WORKLOAD = """
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {{name: cart, namespace: shop}}
spec: {{node: n1, addresses: [10.99.1.2], networkNamespace: {space}, serviceAccount: cart}}
"""


class Machine:
    """A controller and an agent of their own, with everything that they need."""

    def __init__(self, top: Path, space: str, place: Path) -> None:
        self.top, self.space, self.cgroup = top, space, place
        self.port, self.join_port, self.metrics_port = free_ports(3)
        self.processes: list[subprocess.Popen[bytes]] = []
        (top / "src").mkdir()
        (top / "src" / "w.yaml").write_text(WORKLOAD.format(space=space))
        self.controller = self.start(
            "mesh-controller", "run", "--directory", top / "src", "--socket", top / "c.sock", "--listen", f"127.0.0.1:{self.port}",
            "--join-listen", f"127.0.0.1:{self.join_port}", "--ca-directory", top / "ca",
        )  # fmt: skip
        self.places = ["--run-dir", top / "run", "--state-dir", top / "state", "--pin-dir", top / "bpf" / "m", "--cgroup", place]
        takes((top / "ca" / "trust.json").exists, 40)
        (top / "token").write_text(self.said("mesh-controller", "token", "create", "--ca-directory", top / "ca", "--node", "n1"))
        self.agent = self.start_agent()

    def start(self, program: str, *arguments: object) -> subprocess.Popen[bytes]:
        with (self.top / f"{program}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen([Path(sys.executable).with_name(program), *map(str, arguments)], stderr=log, stdout=log)
        self.processes.append(process)
        return process

    def start_agent(self) -> subprocess.Popen[bytes]:
        return self.start(
            "meshagent", "run", "--node", "n1", "--controller", f"127.0.0.1:{self.port}", "--join", f"127.0.0.1:{self.join_port}",
            "--join-token-file", self.top / "token", *self.places, "--metrics-address", "127.0.0.1", "--metrics-port", self.metrics_port,
            "--no-names", "--log-level", "debug",
        )  # fmt: skip

    def said(self, program: str, *arguments: object) -> str:
        done = subprocess.run(
            [Path(sys.executable).with_name(program), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout

    def identities(self) -> dict[str, Any]:
        text = self.said("meshagent", "identity", "list", "-o", "json", "--run-dir", self.top / "run")
        found: dict[str, Any] = json.loads(text) if text else {"workloads": []}
        return found

    def serial(self) -> str:
        return next((str(one["serial"]) for one in self.identities()["workloads"]), "")

    def call(self, *, inside: bool) -> dict[str, Any]:
        """What the independent client says in the workload's namespace, in the agent's cgroup or not."""

        join = ["sh", "-c", 'echo $$ > "$0"; exec "$@"', f"{self.cgroup}/pods/cgroup.procs"] if inside else []
        command = [*join, *entering(self.space), *calling(self.top / "run-workload" / "workload.sock", "x509")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            line = process.stdout.readline()
            process.kill()
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            process.wait(20)


@pytest.fixture(scope="module")
def real() -> Iterator[Machine]:
    name = f"meshid-{secrets.token_hex(4)}"
    top = Path(tempfile.mkdtemp(prefix="mesh-", dir="/dev/shm"))
    place = cgroup.mount_point() / name
    (place / "pods").mkdir(parents=True)
    (top / "bpf").mkdir()
    mounted = mounts.mount_bpffs(top / "bpf")
    lab_netns.create(name)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    running = None
    try:
        running = Machine(top, name, place)
        yield running
    finally:
        if running is not None:
            running.close()
            running.said("meshagent", "uninstall", *running.places)
        lab_netns.delete(name)
        if mounted:
            mounts.unmount_bpffs(top / "bpf")
        for directory in (place / "pods", place):
            directory.rmdir()
        left = [str(path.relative_to(top)) for path in (top / "run", top / "state", top / "run-workload") if path.exists()]
        shutil.rmtree(top, ignore_errors=True)
        assert left == []


def test_a_node_joins_and_its_workload_gets_its_identity_from_the_kernel(real: Machine) -> None:
    takes(real.serial, 40)
    found = real.identities()
    assert (found["mode"], found["connected"], found["node"]["problem"]) == ("on", True, "")
    assert real.call(inside=True)["id"] == CART
    assert "runs outside of cgroup" in real.call(inside=False)["refused"]
    status = json.loads(real.said("meshagent", "status", "-o", "json", "--run-dir", real.top / "run"))
    assert status["problems"] == []


def test_a_restart_while_the_controller_is_away_keeps_the_identity(real: Machine) -> None:
    takes(real.serial, 40)
    before = real.serial()
    real.controller.kill()
    real.agent.kill()
    real.agent.wait()
    real.agent = real.start_agent()
    takes(real.serial, 40)
    assert real.serial() == before
    assert real.call(inside=True)["id"] == CART
    assert real.identities()["connected"] is False


def test_the_key_is_in_one_file_that_only_root_may_read_and_the_process_leaves_no_core(real: Machine) -> None:
    takes(real.serial, 40)
    file = real.top / "run" / "identity" / "svids.json"
    assert file.stat().st_mode & 0o777 == 0o600
    key = json.loads(file.read_bytes())["svids"]["shop/cart"]["key"]
    secret = base64.b64decode(key)[36:68]  # the number itself: RFC 5915 inside of RFC 5208
    text = {key[-60:].encode(), secret, secret.hex().encode(), base64.b64encode(secret)[4:40]}
    files = [path for path in real.top.rglob("*") if path.is_file() and not {"netns", "bpf"} & set(path.parts)]
    holding = [path for path in files if any(t in path.read_bytes() for t in text)]
    assert holding == [file]
    real.agent.send_signal(signal.SIGABRT)
    real.agent.wait()
    assert not any(path.name.startswith("core") for path in Path.cwd().iterdir())
