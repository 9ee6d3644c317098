"""Which endpoint a connection goes to: weights, distance, load and affinity, and endpoints that come and go."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from dataclasses import replace

import pytest

from agent.model import Service, Snapshot
from tests.kernel.datanode import ADDRESSES, REAL, VIP4, DataNode, snapshot, until, workload

A, B, REMOTE = (ADDRESSES[name][0] for name in ("server-a", "server-b", "remote"))
MANY = f"""{REAL}
import socket, sys
held, seen = [], []
for _ in range(int(sys.argv[2])):
    s = socket.create_connection((sys.argv[1], 80), timeout=2)
    seen.append(real(s))
    (held.append if sys.argv[3] == "hold" else socket.socket.close)(s)
print(seen)
"""


def model(*, ready: tuple[str, ...] = ("server-a", "server-b", "remote"), **change: object) -> Snapshot:
    """The service `echo` with three endpoints, one of them on the other node and in another zone; `change` is of the service."""
    zones = {"server-a": "north", "server-b": "north", "remote": "south", "caller": "north", "other": "north"}
    found = snapshot(*(replace(workload(n, ready=n in (*ready, "caller", "other")), zone=z) for n, z in zones.items()))
    service: Service = replace(found.services["default/echo"], **change)  # type: ignore[arg-type]
    return replace(found, services={**found.services, service.name: service})


def calls(node: DataNode, number: int, *, place: str = "caller", hold: bool = False) -> list[str]:
    """Where a pod's connections to the service really went, in order."""
    run = node.lab.exec(place, ["python3", "-c", MANY, VIP4, str(number), "hold" if hold else "close"], timeout=300)
    assert run.returncode == 0, run.stderr
    return list(ast.literal_eval(run.stdout))


def under_way(node: DataNode) -> int:
    """How many connections the kernel counts, of all endpoints."""
    table = node.datapath.maps["mesh_load"]
    return sum(table.layout.value.unpack(value[0])[""] for _, value in table.items())


def test_shares_follow_weights(node: DataNode) -> None:
    found = model()
    weights = {"server-a": 6, "server-b": 3, "remote": 1}
    changed = {f"default/{n}": replace(found.workloads[f"default/{n}"], weight=w) for n, w in weights.items()}
    node.enforce(replace(found, workloads={**found.workloads, **changed}))
    seen = Counter(calls(node, 1000))
    # Six standard deviations: once in five hundred million runs by chance.
    for address, share in ((A, 0.6), (B, 0.3), (REMOTE, 0.1)):
        assert abs(seen[address] - 1000 * share) < 6 * (1000 * share * (1 - share)) ** 0.5, seen


def test_equal_weights_are_equal_shares(node: DataNode) -> None:
    node.enforce(model())
    seen = Counter(calls(node, 900))
    assert all(abs(seen[address] - 300) < 6 * 200**0.5 for address in (A, B, REMOTE)), seen


@pytest.mark.parametrize(
    ("ready", "distribution", "expected"),
    [
        pytest.param(("server-a", "remote"), "PreferSameNode", {A}, id="same-node"),
        pytest.param(("remote",), "PreferSameNode", {REMOTE}, id="same-node-has-none"),
        pytest.param(("server-a", "server-b", "remote"), "PreferSameZone", {A, B}, id="same-zone"),
        pytest.param(("remote",), "PreferSameZone", {REMOTE}, id="same-zone-has-none"),
        pytest.param(("server-a", "remote"), "", {A, REMOTE}, id="no-preference"),
    ],
)
def test_traffic_distribution_prefers_what_is_near(node: DataNode, ready: tuple[str, ...], distribution: str, expected: set[str]) -> None:
    node.enforce(model(ready=ready, traffic_distribution=distribution))
    assert set(calls(node, 60)) == expected


def test_the_less_loaded_of_two_endpoints_is_chosen(node: DataNode) -> None:
    node.enforce(model(ready=("server-a",), load_balancing="least-connections"))
    holding = MANY + "import time; print('ready', flush=True); time.sleep(60)"
    with node.program("other", ["python3", "-c", holding, VIP4, "40", "hold"]):
        node.enforce(model(ready=("server-a", "server-b"), load_balancing="least-connections"))
        # Two draws of two: server-a, with 40 more, is chosen only if both draws are server-a. Half of 100 times: 6 standard deviations.
        seen = Counter(calls(node, 100))
        assert seen[B] > seen[A], seen
    assert until(lambda: under_way(node) == 0), "those of the one who held them have ended"
    balanced = Counter(calls(node, 200, hold=True))
    assert abs(balanced[A] - balanced[B]) <= 20, balanced


def test_what_was_held_is_counted_back_when_it_ends(node: DataNode) -> None:
    node.enforce(model(ready=("server-a", "server-b"), load_balancing="least-connections"))
    calls(node, 20)
    assert until(lambda: under_way(node) == 0)


def test_a_caller_stays_with_its_endpoint(node: DataNode) -> None:
    node.enforce(model(affinity_s=3600))
    first = {place: set(calls(node, 12, place=place)) for place in ("caller", "other")}
    assert all(len(seen) == 1 for seen in first.values())
    node.enforce(model(affinity_s=3600))
    assert set(calls(node, 4)) == first["caller"]


def test_affinity_ends_when_the_endpoint_does_and_survives_the_others(node: DataNode) -> None:
    node.enforce(model(affinity_s=3600))
    (kept,) = set(calls(node, 3))
    names = {A: "server-a", B: "server-b", REMOTE: "remote"}
    others = tuple(n for a, n in names.items() if a != kept)
    node.enforce(model(affinity_s=3600, ready=(names[kept], others[0])))
    assert set(calls(node, 6)) == {kept}
    node.enforce(model(affinity_s=3600, ready=others))
    (moved,) = set(calls(node, 6))
    assert moved != kept


def test_affinity_ends_with_its_time(node: DataNode) -> None:
    node.enforce(model(affinity_s=1))
    seen = set()
    for _ in range(4):
        seen |= set(calls(node, 1))
        node.lab.exec("caller", ["sleep", "1.1"])
    node.enforce(model())
    assert len(seen) > 1 or len(set(calls(node, 30))) == 3  # one endpoint four times in a row: once in 27 runs


def test_an_unready_endpoint_gets_no_new_connection_and_keeps_its_old_ones(node: DataNode) -> None:
    node.enforce(model(ready=("server-a",)))
    code = (
        "import socket,sys\n"
        f"s=socket.create_connection(({VIP4!r},80)); print('open',flush=True)\n"
        "input(); s.sendall(b'still'); print(s.recv(9).decode(),flush=True)\n"
    )
    command, environment = node.lab.command("caller", ["python3", "-uc", code]), node.lab.environment(node.lab.topology.place("caller"))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as old:
        assert old.stdout is not None
        assert old.stdin is not None
        assert old.stdout.readline() == "open\n"
        node.enforce(model(ready=("server-b",)))
        assert set(calls(node, 12)) == {B}
        old.stdin.write("\n")
        old.stdin.flush()
        assert old.stdout.readline() == "still\n"


def test_a_list_outlives_its_service_until_no_program_can_be_on_its_way_to_it(node: DataNode) -> None:
    table = node.datapath.maps["mesh_backend"]
    node.enforce(model(ready=("server-a",)))
    node.enrolment.tables.remove_retired()
    before = dict(table.items())
    node.enforce(model(ready=("server-b",)))
    after = dict(table.items())
    assert before.items() < after.items()
    node.enrolment.tables.remove_retired()
    assert dict(table.items()) == {key: row for key, row in after.items() if key not in before}


def test_nothing_is_refused_or_strays_while_lists_of_endpoints_change(node: DataNode) -> None:
    ways = [("server-a",), ("server-b",), ("server-a", "server-b")]
    node.enforce(model(ready=ways[0]))
    changes = 0
    with node.program("caller", ["python3", "-c", f"print('ready', flush=True)\n{MANY}", VIP4, "1500", "close"]) as calling:
        while calling.poll() is None:
            changes += 1
            node.enforce(model(ready=ways[changes % len(ways)]))
        output = calling.stdout.read() if calling.stdout else ""
    assert calling.returncode == 0
    assert changes > 10
    assert Counter(ast.literal_eval(output)).keys() == {A, B}


def test_a_row_that_becomes_anothers_while_it_is_read_leads_nowhere(node: DataNode) -> None:
    """As in test_policy.py: the memory of a row may be another service's by the time that it is read."""
    node.enforce(model())
    table = node.datapath.maps["mesh_service"]
    rows = {key: (row, table.layout.value.unpack(row)) for key, (row,) in table.items()}
    for key, (_, own) in rows.items():
        table.put(key, table.layout.value.pack(**{**own, "list": own["list"] ^ (1 << 40)}))
    assert node.connect("caller", VIP4, 80) == "ECONNREFUSED"
    for key, (row, _) in rows.items():
        table.put(key, row)
    assert node.connect("caller", VIP4, 80).startswith("ok")
