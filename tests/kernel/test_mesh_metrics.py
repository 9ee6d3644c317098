"""/metrics, /healthz and /readyz of an agent whose pods do known work: the counters grow by exactly that."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.bpf.manifest import HOOKED
from lab import mesh, paths
from lab.lab import Lab
from tests.kernel import shop

pytestmark = pytest.mark.kernel

CALLS = 23
ENDS = {"source_workload": "frontend", "destination_workload": "redis", "destination_service": "default/redis", "port": "6379"}
COUNTERS = ("mesh_tcp_connections_opened_total", "mesh_tcp_connections_closed_total", "mesh_tcp_connections_failed_total",
            "mesh_tcp_retransmits_total", "mesh_tcp_connect_duration_seconds_count", "mesh_tcp_rtt_seconds_count")  # fmt: skip
# Each connection: PING and its answer, and one more octet where this end closed first and the peer's FIN came later (bpf_src/mesh_sockops.c).
SEND = (
    "import socket\nfor _ in range({}):\n  s = socket.create_connection(('redis', 6379)); s.sendall(b'PING\\r\\n'); s.recv(9); s.close()\n"
)

# redis-cli would try twice.
TRY = "import socket\nfor _ in range({}):\n  s = socket.socket()\n  try: s.connect(('{}', 6379))\n  except OSError: pass\n  s.close()\n"


@contextmanager
def growth(lab: Lab, direction: str) -> Iterator[dict[str, float]]:
    """How much the counters of frontend -> redis grow within the block, read when every connection has ended."""

    def read() -> dict[str, float]:
        return {name: shop.samples(lab, "node-1", name, direction=direction, **ENDS) for name in COUNTERS}

    def ended() -> bool:
        now = read()
        return now["mesh_tcp_connections_opened_total"] == sum(now[f"mesh_tcp_connections_{how}_total"] for how in ("closed",))

    before = read()
    found: dict[str, float] = {}
    yield found
    shop.takes(ended, 5)
    found.update({name: value - before[name] for name, value in read().items()})


def test_the_page_is_what_prometheus_reads(lab: Lab) -> None:
    shop.ping(lab, "frontend")
    for node in lab.topology.nodes:
        families = {f.name: f for f in text_string_to_metric_families(lab.metrics(node.name))}
        assert all(f.documentation and f.type != "unknown" for f in families.values())
        assert {"mesh_tcp_connections_opened", "mesh_policy_verdicts", "mesh_hook_effective", "mesh_ready"} <= families.keys()
        assert {s.labels["hook"]: s.value for s in families["mesh_hook_effective"].samples} == dict.fromkeys((p.name for p in HOOKED), 1)
        for family in families.values():
            names = [(s.name, tuple(sorted(s.labels.items()))) for s in family.samples]
            assert len(names) == len(set(names)), f"{family.name} has a sample twice"


def test_promtool_finds_no_fault_with_the_page(lab: Lab) -> None:
    run = subprocess.run(["promtool", "check", "metrics"], input=lab.metrics("node-1"), capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_connections_of_one_node_are_counted_exactly_at_both_ends(lab: Lab) -> None:
    with growth(lab, "outbound") as outbound, growth(lab, "inbound") as inbound:
        lab.exec("frontend", ["python3", "-c", SEND.format(CALLS)], check=True)
    expected = dict.fromkeys(COUNTERS, CALLS) | {"mesh_tcp_connections_failed_total": 0, "mesh_tcp_retransmits_total": 0}
    assert outbound == expected
    assert inbound == expected | {"mesh_tcp_connect_duration_seconds_count": 0}, "a receiver knows no connect time"


def test_bytes_are_counted_at_close(lab: Lab) -> None:
    def read() -> tuple[float, float]:
        sent, received = (
            shop.samples(lab, "node-1", f"mesh_tcp_{d}_bytes_total", direction="outbound", **ENDS) for d in ("sent", "received")
        )
        return sent, received

    before = read()
    with growth(lab, "outbound") as grown:
        lab.exec("frontend", ["python3", "-c", SEND.format(CALLS)], check=True)
    sent, received = (after - was for after, was in zip(read(), before, strict=True))
    assert grown["mesh_tcp_connections_closed_total"] == CALLS
    assert sent == CALLS * len("PING\r\n")
    assert CALLS * len("+PONG\r\n") <= received <= CALLS * (len("+PONG\r\n") + 1)


def test_histograms_are_cumulative_and_end_with_their_count(lab: Lab) -> None:
    shop.ping(lab, "frontend")
    labels = {**ENDS, "direction": "outbound"}
    families = {f.name: f for f in text_string_to_metric_families(lab.metrics("node-1"))}
    for name in ("mesh_tcp_connect_duration_seconds", "mesh_tcp_rtt_seconds"):
        samples = [s for s in families[name].samples if labels.items() <= s.labels.items()]
        buckets = [(float(s.labels["le"]), s.value) for s in samples if s.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
        assert [count for _, count in buckets] == sorted(count for _, count in buckets)
        (count,) = (s.value for s in samples if s.name.endswith("_count"))
        (total,) = (s.value for s in samples if s.name.endswith("_sum"))
        assert buckets[-1] == (float("inf"), count)
        assert 0 < total / count < 1, "seconds"


@pytest.mark.parametrize(
    ("place", "labels"),
    [
        pytest.param(
            "frontend", {"verdict": "allow", "rule": "default/redis-clients[0]", "direction": "outbound"}, id="allowed-at-connect"
        ),
        pytest.param(
            "frontend", {"verdict": "allow", "rule": "default/redis-clients[0]", "direction": "inbound"}, id="allowed-at-receiver"
        ),
        pytest.param("other", {"verdict": "deny", "rule": "default/redis-clients: no rule matches", "direction": "outbound"}, id="denied"),
    ],
)
def test_verdicts_are_counted_by_rule(lab: Lab, place: str, labels: dict[str, str]) -> None:
    labels = {"source_workload": place, "destination_workload": "redis", "reason": "policy", **labels}
    before = shop.samples(lab, "node-1", "mesh_policy_verdicts_total", **labels)
    lab.exec(place, ["python3", "-c", TRY.format(CALLS, "redis")], check=True)
    assert shop.samples(lab, "node-1", "mesh_policy_verdicts_total", **labels) == before + CALLS


def test_a_strangers_denial_is_counted_at_the_receiver(lab: Lab) -> None:
    labels = {"source_workload": "unknown", "destination_workload": "redis", "verdict": "deny", "direction": "inbound"}
    assert shop.ping(lab, "client", "10.77.1.40").startswith("Could not connect")
    before = shop.samples(lab, "node-1", "mesh_policy_verdicts_total", **labels)
    lab.exec("client", ["python3", "-c", TRY.format(CALLS, "10.77.1.40")], check=True)
    assert shop.samples(lab, "node-1", "mesh_policy_verdicts_total", **labels) == before + CALLS


def test_a_node_that_is_healthy_and_ready_says_so(lab: Lab) -> None:
    for node in lab.topology.nodes:
        assert mesh.http_get(node, "/healthz") == (200, "the event loop answers\n")
        assert mesh.http_get(node, "/readyz") == (200, "ready\n")
        assert shop.samples(lab, node.name, "mesh_ready") == 1


def test_other_paths_are_not_found(lab: Lab) -> None:
    code, text = mesh.http_get(lab.topology.node("node-1"), "/")
    assert code == 404
    assert "/metrics" in text


def test_a_node_whose_envoy_does_not_run_is_not_ready_and_says_why(lab: Lab) -> None:
    """Stopped, not killed: the supervisor would start another one before anybody could look."""
    node = lab.topology.node("node-1")
    pid = shop.status("node-1")["waypoint"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        shop.takes(lambda: mesh.http_get(node, "/readyz", 15)[0] == 503, 20)
        assert "the waypoint is not ready" in mesh.http_get(node, "/readyz")[1]
        assert mesh.http_get(node, "/healthz")[0] == 200
        assert shop.samples(lab, "node-1", "mesh_ready") == 0
        assert shop.ping(lab, "frontend") == "PONG", "L4 goes on"
        assert lab.ask("node-1", "status").returncode == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    shop.takes(lambda: mesh.http_get(node, "/readyz")[0] == 200, 10)
    assert shop.status("node-1")["waypoint"]["pid"] == pid


def test_a_node_whose_program_was_detached_says_which_and_a_restart_attaches_it(lab: Lab) -> None:
    node = lab.topology.node("node-1")
    (paths.agent_pins("node-1") / "links" / "mesh_connect4").unlink()
    shop.takes(lambda: mesh.http_get(node, "/readyz")[0] == 503, 2)
    assert mesh.http_get(node, "/readyz")[1].startswith("mesh_connect4 does not run: ")
    assert shop.samples(lab, "node-1", "mesh_hook_effective", hook="mesh_connect4") == 0
    hooks = {hook["name"]: (hook["attached"], hook["effective"]) for hook in shop.status("node-1")["hooks"]}
    assert [name for name, state in hooks.items() if state != (True, True)] == ["mesh_connect4"]
    assert lab.stop_agent("node-1")
    lab.start_agent("node-1")
    assert shop.samples(lab, "node-1", "mesh_hook_effective", hook="mesh_connect4") == 1
    assert shop.status("node-1")["problems"] == []
