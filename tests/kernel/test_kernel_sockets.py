"""Connections that the kernel itself opens inside an enrolled namespace: never denied at the caller, still decided at the receiver.

The kernel opens one when a peer of a Multipath TCP connection announces another address: its worker thread joins there (RFC 8684, 3.4.1).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.model import Action, Policy, PolicyRule, Snapshot
from tests.kernel.datanode import ADDRESSES, DataNode, snapshot, until, workload

CLOSED = Policy("default/closed", Action.DENY, (PolicyRule(),))
SERVER = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
s.bind(("0.0.0.0", 9300)); s.listen()
print("ready", flush=True)
c, _ = s.accept()
while data := c.recv(100): c.send(data)
"""
CLIENT = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
s.settimeout(3)
s.connect((sys.argv[1], 9300)); s.send(b"a"); print(s.recv(10).decode(), flush=True)
s.settimeout(None); s.recv(1)
"""
pytestmark = pytest.mark.skipif(not Path("/proc/sys/net/mptcp/enabled").exists(), reason="this kernel has no Multipath TCP")


def model() -> Snapshot:
    return snapshot(workload("caller"), workload("server-a"), workload("server-b", policies=(CLOSED.name,)), policies=(CLOSED,))


def test_a_worker_thread_of_the_kernel_is_not_denied_at_the_caller(node: DataNode) -> None:
    node.enforce(model())
    for place in ("caller", "server-a"):
        node.lab.exec(place, ["ip", "mptcp", "limits", "set", "subflow", "4", "add_addr_accepted", "4"], check=True)
    node.lab.exec("server-a", ["ip", "mptcp", "endpoint", "add", ADDRESSES["server-b"][0], "signal"], check=True)
    before = node.datapath.counters()["kernel_socket"]
    client = ["python3", "-c", CLIENT, ADDRESSES["server-a"][0]]
    with node.program("server-a", ["python3", "-c", SERVER]), node.program("caller", client, says="a"):
        assert until(lambda: node.datapath.counters()["kernel_socket"] == before + 1)
        # It was let go, and refused where it arrived.
        assert until(lambda: node.verdicts().get(("default/caller", "default/server-b", "default/closed[0]"), 0) >= 1)


def test_a_process_that_calls_itself_a_worker_is_denied(node: DataNode) -> None:
    node.enforce(model())
    before = node.datapath.counters()["kernel_socket"]
    code = (
        "import ctypes,socket,errno\n"
        "ctypes.CDLL(None).prctl(15,b'kworker/0:1')\n"
        "try: socket.create_connection(({!r},8080),timeout=2); print('ok')\n"
        "except OSError as e: print(errno.errorcode[e.errno])\n"
    ).format(ADDRESSES["server-b"][0])
    assert node.lab.exec("caller", ["python3", "-c", code]).stdout == "EPERM\n"
    assert node.datapath.counters()["kernel_socket"] == before
