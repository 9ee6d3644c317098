"""Connections that the node remembers to have translated, in a network namespace of the test's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernel

RULES = """
table ip t {
    chain o {
        type nat hook output priority -100;
        ip daddr 127.0.0.9 tcp dport 80 dnat to 127.0.0.1:8099
    }
}
table ip6 t {
    chain o {
        type nat hook output priority -100;
        ip6 daddr fd00::9 tcp dport 80 dnat to [fd00::1]:8099
    }
}
"""
PROGRAM = """
import socket, struct, sys
from agent import conntrack

def call(host, port, caller):
    client = socket.create_connection((host, port), 5, source_address=(caller, 0))
    accepted, _ = server.accept()
    return client, accepted

def end(client, accepted):
    accepted.close()
    client.recv(1)
    client.close()

def reset(client, accepted):
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()

server = socket.create_server(("::", 8099), family=socket.AF_INET6, dualstack_ipv6=True)
end(*call("127.0.0.9", 80, "127.0.0.5"))
end(*call("127.0.0.9", 80, "127.0.0.6"))
end(*call("127.0.0.1", 8099, "127.0.0.5"))
lives = call("127.0.0.9", 80, "127.0.0.5")
print(conntrack.forget_translated(["127.0.0.7", "::1"]))
print(conntrack.forget_translated(["127.0.0.5"]))
print(conntrack.forget_translated(["127.0.0.5"]))
lives[0].sendall(b"x")
print(lives[1].recv(1).decode())
print(conntrack.forget_translated(["127.0.0.5", *(f"127.0.0.{n}" for n in range(6, 7 + conntrack.FEW))]))
"""

_BEGINNING = PROGRAM.partition("end(*call")[0]
ENDINGS = f"""{_BEGINNING}
for ending in (end, reset):
    for host, caller in (("127.0.0.9", "127.0.0.5"), ("fd00::9", "fd00::5")):
        ending(*call(host, 80, caller))
        lives = call(host, 80, caller)
        print(conntrack.forget_translated([caller]))
        ending(*lives)
        print(conntrack.forget_translated([caller, *("10.0.0.%d" % n for n in range(conntrack.FEW))]))
"""


def run(program: str, rules: Path) -> list[str]:
    rules.write_text(RULES)
    network = "ip link set lo up && for n in 1 5; do ip addr add fd00::$n dev lo; done && ip route add fd00::9 dev lo"
    script = network + ' && nft -f "$1" && exec "$2" -c "$3"'
    argv = ["unshare", "--net", "sh", "-ec", script, "sh", str(rules), sys.executable, program]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr
    return said.stdout.split()


def test_translations_of_a_caller_s_connections_that_are_over_are_forgotten_and_no_others(tmp_path: Path) -> None:
    """Nobody's; one of two that are over and translated; it is gone then; what lives goes on; the other caller's, who is one of many."""
    assert run(PROGRAM, tmp_path / "rules") == ["0", "1", "0", "x", "1"]


def test_a_connection_is_over_when_it_was_closed_or_reset_over_either_family(tmp_path: Path) -> None:
    """The other one of the caller lives, until it ends too; Linux is asked about one caller, then about many. Nobody else's is forgotten."""
    assert run(ENDINGS, tmp_path / "rules") == ["1", "1"] * 4


def test_a_kernel_that_tracks_nothing_has_nothing_to_forget() -> None:
    argv = [
        "unshare",
        "--net",
        sys.executable,
        "-c",
        "from agent import conntrack; print(conntrack.forget_translated(['10.0.0.1', 'fd00::1']))",
    ]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.strip() == "0"
