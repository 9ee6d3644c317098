"""A node that has booted: its pods run before its agent does, outside the mesh. What they began and may not do ends as soon as there is one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from lab import mesh
from lab.lab import Lab
from tests.kernel import shop

pytestmark = pytest.mark.kernel

NODE, REDIS = "node-1", "10.77.1.40"
HOLD = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], 6379), timeout=5)
print("connected", flush=True)
try:
    while True:
        s.sendall(b"PING\\r\\n")
        assert s.recv(100) == b"+PONG\\r\\n"
        time.sleep(0.05)
except Exception as error: print(type(error).__name__, flush=True)
"""


@contextmanager
def connected(lab: Lab, place: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has a connection to redis, by its own address: there is nobody who knows names of services."""
    process = lab.popen(place, ["python3", "-c", HOLD, REDIS])
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_what_pods_began_before_their_agent_came_and_may_not_do_ends(lab: Lab) -> None:
    lab.stop_agent(NODE)
    assert mesh.uninstall(NODE) == ""  # as after a boot: no program, no map, no Envoy, nothing in /run
    with ExitStack() as stack:
        allowed, forbidden = (stack.enter_context(connected(lab, place)) for place in ("frontend", "cart-v1-1"))
        lab.start_agent(NODE)
        took = shop.takes(lambda: forbidden.poll() is not None, 10)
        assert forbidden.communicate()[0] in {"ConnectionAbortedError\n", "ConnectionResetError\n", "AssertionError\n"}
        print(f"the forbidden connection ended {took:.2f} s after the agent was ready")
        assert shop.ping(lab, "cart-v1-1") != "PONG"
        assert shop.ping(lab, "frontend") == "PONG"
        assert allowed.poll() is None
    status = shop.status(NODE)
    assert (status["problems"], [one for one in status["workloads"] if not one["redirected"]]) == ([], [])
