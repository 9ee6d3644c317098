"""A virtual machine beside a node of tests: a network namespace with an agent of this package, and behind it a namespace for each of its workloads.

It is reached from the node's network, and reaches pods, by routes alone. It shares the node's kernel: its processes have a cgroup of their own, which its agent
serves; the node's agent, whose programs see them too, knows nothing of them.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import cgroup
from tests.kubernetes.install import BPF
from tests.kubernetes.mesh import program

NODE_SIDE, OWN, GATEWAY, WORKLOADS = "10.9.0.1", "10.9.0.2", "10.9.1.1", "10.9.1.0/24"
_NETNS = "mesh-vm"
_INTO = 'echo 0 > "$0/cgroup.procs" && exec "$@"'


@dataclass(slots=True)
class Machine:
    """See the module. `addresses`: of each workload, by name."""

    name: str
    top: Path
    addresses: dict[str, str]
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def _cgroup(self) -> Path:
        return cgroup.mount_point() / _NETNS

    def netns(self, workload: str = "") -> str:
        """The namespace of a workload, or the machine's own."""
        return f"/run/netns/{_NETNS}-{workload}" if workload else f"/run/netns/{_NETNS}"

    def wire(self) -> None:
        """Make its networks, from the node's."""
        _ip("netns", "add", _NETNS)
        _ip("link", "add", "vm", "type", "veth", "peer", "name", "eth0", "netns", _NETNS)
        _ip("address", "add", f"{NODE_SIDE}/24", "dev", "vm")
        _ip("link", "set", "vm", "up")
        inside = ("-n", _NETNS)
        for command in ("link set lo up", f"address add {OWN}/24 dev eth0", "link set eth0 up", f"route add default via {NODE_SIDE}"):
            _ip(*inside, *command.split())
        _ip("route", "add", WORKLOADS, "via", OWN)
        subprocess.run(["nsenter", f"--net={self.netns()}", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"], check=True)
        for name, address in self.addresses.items():
            own = f"{_NETNS}-{name}"
            _ip("netns", "add", own)
            _ip(*inside, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", own)
            for command in (f"address add {GATEWAY}/32 dev {name}", f"link set {name} up", f"route add {address} dev {name}"):
                _ip(*inside, *command.split())
            for command in ("link set lo up", f"address add {address}/32 dev eth0", "link set eth0 up", f"route add {GATEWAY} dev eth0"):
                _ip("-n", own, *command.split())
            _ip("-n", own, "route", "add", "default", "via", GATEWAY)

    def serve(self, workload: str, directory: Path) -> None:
        """Have a workload answer for files over HTTP, on port 8080."""
        self._start(workload, ["/usr/bin/python3", "-m", "http.server", "8080", "--directory", str(directory)], workload)

    def start_agent(self, controller: str, join: str, token: str) -> None:
        """As `meshagent.service` does, with a token of the controller."""
        (self.top / "token").write_text(token)
        argv = [str(program("meshagent")), "run", "--node", self.name, "--controller", controller, "--join", join]
        argv += ["--join-token-file", str(self.top / "token"), *self._places(), "--metrics-address", OWN, "--no-names"]
        self._start("agent", argv)

    def _start(self, name: str, argv: Sequence[str], workload: str = "") -> None:
        seat = ["sh", "-c", _INTO, str(cgroup.create(self._cgroup / name)), "nsenter", f"--net={self.netns(workload)}"]
        with (self.top / f"{name}.log").open("ab") as log:
            self._running.append(subprocess.Popen([*seat, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _places(self) -> list[str]:
        run, state = (str(self.top / name) for name in ("run", "state"))
        return ["--run-dir", run, "--state-dir", state, "--pin-dir", str(BPF / _NETNS), "--cgroup", str(self._cgroup)]

    def run(self, workload: str, *command: str) -> str:
        """What a command says that runs as a workload, or, without a name, as nobody on the machine."""
        seat = ["sh", "-c", _INTO, str(cgroup.create(self._cgroup / (workload or "shell"))), "nsenter", f"--net={self.netns(workload)}"]
        return subprocess.run([*seat, *command], capture_output=True, text=True, timeout=60, check=False).stdout

    def meshagent(self, command: str, *arguments: str) -> str:
        """Ask its agent."""
        argv = [str(program("meshagent")), command, *arguments, "--run-dir", str(self.top / "run")]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False).stdout

    def status(self) -> dict[str, Any]:
        text = self.meshagent("status", "-o", "json")
        found: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
        return found

    def log(self) -> str:
        """The end of what its agent says."""
        return (self.top / "agent.log").read_text(errors="replace")[-3000:]

    def close(self) -> None:
        """End its processes, take the mesh off it, and take it away."""
        for process in reversed(self._running):
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        subprocess.run([program("meshagent"), "uninstall", *self._places()], check=False, timeout=60)
        cgroup.kill(self._cgroup)
        for folder in sorted((path for path in [self._cgroup, *self._cgroup.rglob("*")] if path.is_dir()), reverse=True):
            with suppress(OSError):
                folder.rmdir()
        for name in (*(f"{_NETNS}-{one}" for one in self.addresses), _NETNS):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        shutil.rmtree(self.top, ignore_errors=True)


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True)


@contextmanager
def beside(name: str, top: Path, addresses: dict[str, str]) -> Iterator[Machine]:
    """A machine on the network of the node of this thread; nobody runs on it yet."""
    top.mkdir()
    found = Machine(name, top, addresses)
    try:
        found.wire()
        yield found
    finally:
        found.close()
