"""The mesh's own programs in a lab: one controller, one agent a node, and the `meshagent` command. Called by `lab.lab` and `lab.teardown`.

The only place that knows how these programs are called. They are run as a user runs them, by their commands; nothing is imported.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import netns, paths, pki, process
from lab.errors import LabError, StartFailed
from lab.process import Process, Seat
from lab.topology import CONTROLLER_ADDRESSES, Node, Topology

CONTROLLER_PORT = 15010
METRICS_PORT = 15020
CONTROLLER_METRICS_PORT = 15021
POLL_S = 0.05
"""How often something that announces nothing (a socket, an HTTP endpoint) is asked again."""
_CONTROLLER = f"{CONTROLLER_ADDRESSES[0]}:{CONTROLLER_PORT}"


def program(name: str) -> str:
    """Return the command `name` of this very installation."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise LabError(f"{path} does not exist: scripts/setup installs it")
    return str(path)


def prepare(topology: Topology) -> None:
    """Make the directories and credentials that controller and agents are told about."""
    for directory in (paths.RESOURCES, paths.AGENT_STATE, paths.AGENT_RUN):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    pki.write(paths.PKI, [node.name for node in topology.nodes], CONTROLLER_ADDRESSES)


def start_controller(*, identity: bool, wireguard: bool = False, options: Sequence[str] = ()) -> Process:
    """Start the controller, with a certificate authority or without, perhaps with WireGuard and more options; `wait_controller` says when it serves."""
    argv = [program("mesh-controller"), "run", "--directory", str(paths.RESOURCES), "--socket", str(paths.CONTROLLER_SOCKET)]
    argv += ["--listen", _CONTROLLER, "--tls-cert", str(paths.PKI / "controller.crt"), "--tls-key", str(paths.PKI / "controller.key")]
    argv += ["--tls-client-ca", str(paths.PKI / "ca.crt"), "--jwks-ca", str(paths.PKI / "ca.crt"), "--jwks-refresh", "1"]
    argv += ["--metrics-address", CONTROLLER_ADDRESSES[0], "--metrics-port", str(CONTROLLER_METRICS_PORT)]
    argv += ["--page-listen", f"unix:{paths.PAGE_SOCKET}"]
    if identity:
        argv += ["--ca-directory", str(paths.CA)]
    if wireguard:
        argv += ["--encryption", "wireguard"]
    argv += options
    seat = Seat(paths.controller_cgroup(), netns.path(paths.CONTROLLER_NETNS))
    return process.start("controller", seat, argv, {}, Path("/"), paths.log("controller"))


def wait_controller(controller: Process, timeout: float) -> None:
    """Wait until the controller accepts connections on its unix socket."""

    def accepts() -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(paths.CONTROLLER_SOCKET)) == 0

    wait_ready(controller, accepts, timeout)


def start_agent(node: Node, options: Sequence[str] = ()) -> Process:
    """Start a node's agent, perhaps with more options; `wait_agent` says when it is ready."""
    argv = [program("meshagent"), "run", "--node", node.name, "--controller", _CONTROLLER]
    argv += ["--tls-ca", str(paths.PKI / "ca.crt"), "--tls-cert", str(paths.PKI / f"{node.name}.crt")]
    argv += ["--tls-key", str(paths.PKI / f"{node.name}.key"), *agent_directories(node.name)]
    argv += ["--metrics-address", node.gateways[0], "--metrics-port", str(METRICS_PORT), *options]
    seat = Seat(paths.agent_cgroup(node.name), paths.node_netns(node))
    name = f"agent-{node.name}"
    return process.start(name, seat, argv, {}, Path("/"), paths.log(name))


def wait_agent(node: Node, agent: Process, timeout: float) -> None:
    """Wait until the agent's /readyz answers 200."""

    def ready() -> bool:
        try:
            return http_get(node, "/readyz")[0] == 200
        except OSError:
            return False

    wait_ready(agent, ready, timeout)


def agent_directories(node: str) -> list[str]:
    """Return the options that say where an agent keeps its things."""
    return [
        *("--cgroup", str(paths.node_cgroup(node))),
        *("--pin-dir", str(paths.agent_pins(node))),
        *("--run-dir", str(paths.agent_run(node))),
        *("--state-dir", str(paths.agent_state(node))),
    ]


def agent_command(node: str, command: str, *args: str) -> list[str]:
    """Return the command line that asks the agent of a node (`status`, `trace`)."""
    return [program("meshagent"), command, "--run-dir", str(paths.agent_run(node)), *args]


def apply_command(files: Sequence[str]) -> list[str]:
    """Return the command line that gives files and directories to the lab's controller."""
    return [
        program("meshagent"),
        "apply",
        "--controller",
        f"unix://{paths.CONTROLLER_SOCKET}",
        *(arg for file in files for arg in ("-f", file)),
    ]


def uninstall(node: str, timeout: float = 60.0) -> str:
    """Remove everything that a node's agent made; return "" or why that failed."""
    try:
        run = subprocess.run(
            [program("meshagent"), "uninstall", *agent_directories(node)], capture_output=True, text=True, timeout=timeout, check=False
        )
    except (LabError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if run.returncode == 0 else f"exit code {run.returncode}: {(run.stderr or run.stdout).strip()}"


def http_get(node: Node, path: str, timeout: float = 5.0) -> tuple[int, str]:
    """GET from the agent's HTTP endpoint, from inside its node's namespace; OSError if it does not answer."""
    connection = http.client.HTTPConnection(node.gateways[0], METRICS_PORT, timeout=timeout)

    def connect() -> None:
        connection.connect()

    netns.inside(paths.place_netns(node), connect)
    return _fetch(connection, path)


def envoy_get(node: str, path: str, timeout: float = 5.0) -> tuple[int, str]:
    """GET from the admin socket of a node's Envoy; OSError if it does not answer."""
    connection = http.client.HTTPConnection("envoy", timeout=timeout)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(timeout)
    try:
        connection.sock.connect(str(paths.agent_run(node) / "envoy-admin.sock"))
    except OSError:
        connection.close()
        raise
    return _fetch(connection, path)


def parse_envoy_stats(text: str) -> dict[str, int]:
    """Return the counters and gauges of Envoy's /stats?format=json; histograms and texts are left out."""
    rows = json.loads(text)["stats"]
    return {row["name"]: row["value"] for row in rows if isinstance(row.get("value"), int)}


def wait_ready(target: Process, ready: Callable[[], bool], timeout: float) -> None:
    """Poll `ready` until it holds; StartFailed with the end of the log if the process dies or time runs out."""
    deadline = time.monotonic() + timeout
    while not ready():
        if target.wait(min(POLL_S, process.deadline_left(deadline))):  # this is the pause as well: it ends early if the process does
            raise StartFailed(f"{target.name} ended before it was ready", process.tail(target.log))
        if process.deadline_left(deadline) == 0:
            raise StartFailed(f"{target.name} is not ready after {timeout:.0f} s", process.tail(target.log))


def _fetch(connection: http.client.HTTPConnection, path: str) -> tuple[int, str]:
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except http.client.HTTPException as error:
        raise ConnectionError(f"no HTTP answer: {error}") from error
    finally:
        connection.close()
