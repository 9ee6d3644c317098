"""What reaches an enrolled pod: the same policy, for callers that no connect hook has seen."""

from __future__ import annotations

import socket

import pytest

from agent.bpf.manifest import Direction, Reason, Verdict
from agent.model import Action, Operation, Policy, PolicyRule, Snapshot, Source
from tests.kernel.datanode import FAMILIES, DataNode, address_of, snapshot, workload

ALLOW_MESH = Policy("default/p", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/caller", "default/remote")),)),))
L7 = Policy("default/l7", Action.DENY, (PolicyRule(operations=(Operation(paths=("/admin*",)),)),))


def protected(*policies: Policy) -> Snapshot:
    names = tuple(p.name for p in policies)
    return snapshot(
        workload("caller"),
        workload("other"),
        workload("server-a", policies=names),
        workload("server-b"),
        workload("remote"),
        policies=policies,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["client", "stranger"])
def test_a_caller_outside_the_mesh_is_stopped_at_a_protected_pod_only(node: DataNode, place: str, family: socket.AddressFamily) -> None:
    node.enforce(protected(ALLOW_MESH))
    with node.events() as events:
        assert node.connect(place, address_of("server-a", family), 8080) == "ECONNREFUSED"
    assert {(e.target, e.rule, e.direction) for e in events} == {("default/server-a", "default/p: no rule matches", Direction.INBOUND)}
    assert node.connect(place, address_of("server-b", family), 8080).startswith("ok")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_allowed_caller_of_the_same_node_and_of_another_node_gets_in(node: DataNode, family: socket.AddressFamily) -> None:
    node.enforce(protected(ALLOW_MESH))
    assert node.connect("caller", address_of("server-a", family), 8080).startswith("ok")
    assert node.connect("remote", address_of("server-a", family), 8080).startswith("ok")  # its node has no agent: only the receiver decides
    assert node.connect("other", address_of("server-a", family), 8080) == "EPERM"


def test_a_process_outside_a_pod_cannot_use_its_address(node: DataNode) -> None:
    """A stranger on the same bridge takes the allowed caller's address, while that pod is cut off."""
    node.enforce(protected(ALLOW_MESH))
    address = address_of("caller")
    spoof = ["ip", "address", "add", f"{address}/32", "dev", "eth0"]
    node.lab.exec("stranger", spoof, check=True)
    code = (
        f"import socket,errno\ns=socket.socket(); s.settimeout(2); s.bind(('{address}',0))\n"
        f"try: s.connect(('{address_of('server-a')}',8080)); print('in')\n"
        "except TimeoutError: print('timeout')\n"
        "except OSError as e: print(errno.errorcode[e.errno])\n"
    )
    try:
        with node.events() as events:
            answer = node.lab.exec("stranger", ["python3", "-c", code]).stdout.strip()
        assert answer != "in"
        assert {Reason(e.reason) for e in events} == {Reason.SPOOFED}
    finally:
        node.lab.exec("stranger", ["ip", "address", "del", f"{address}/32", "dev", "eth0"], check=True)
        node.lab.exec("server-a", ["ip", "neigh", "flush", "all"], check=True)


def test_an_address_that_the_workload_does_not_declare_is_no_way_round(node: DataNode) -> None:
    node.enforce(protected(ALLOW_MESH))
    node.lab.exec("server-a", ["ip", "address", "add", "10.77.1.99/32", "dev", "eth0"], check=True)
    node.lab.exec("stranger", ["ip", "route", "add", "10.77.1.99", "via", address_of("server-a")], check=True)
    try:
        with node.events() as events:
            assert node.connect("stranger", "10.77.1.99", 8080) == "ECONNREFUSED"
        assert {Reason(e.reason) for e in events} == {Reason.UNKNOWN_ADDRESS}
        node.enforce(protected(ALLOW_MESH))  # found in the namespace: now it is the workload's
        with node.events() as events:
            assert node.connect("stranger", "10.77.1.99", 8080) == "ECONNREFUSED"
        assert {e.rule for e in events} == {"default/p: no rule matches"}
    finally:
        node.lab.exec("stranger", ["ip", "route", "del", "10.77.1.99"], check=True)
        node.lab.exec("server-a", ["ip", "address", "del", "10.77.1.99/32", "dev", "eth0"], check=True)


def test_an_l7_policy_without_its_waypoint_is_closed(node: DataNode) -> None:
    node.enforce(protected(L7))
    with node.events() as events:
        assert node.connect("client", address_of("server-a"), 8080) == "ECONNREFUSED"
    assert {(Reason(e.reason), e.verdict) for e in events} == {(Reason.NO_LISTENER, Verdict.DENY)}
    assert node.connect("caller", address_of("server-a"), 8080) == "ECONNREFUSED"


def test_the_waypoints_ports_are_closed_to_everybody(node: DataNode) -> None:
    node.enforce(protected())
    code = "import socket; s=socket.create_server(('',15006)); print('ready',flush=True); s.accept()"
    with node.program("server-b", ["python3", "-c", code]):
        for place in ("client", "caller", "server-b"):
            assert node.connect(place, address_of("server-b"), 15006) == "ECONNREFUSED"


def test_an_address_that_another_pod_gives_itself_stays_with_its_owner(node: DataNode) -> None:
    """A pod that may change its own addresses must not take the policy, or the identity, of another."""
    model = protected(ALLOW_MESH)
    node.enforce(model)
    take = ["ip", "address", "add", f"{address_of('server-a')}/32", "dev", "lo"]
    node.lab.exec("server-b", take, check=True)
    try:
        node.enforce(model)
        assert node.connect("client", address_of("server-a"), 8080) == "ECONNREFUSED"
        assert node.connect("other", address_of("server-a"), 8080) == "EPERM"
        assert node.connect("caller", address_of("server-a"), 8080).startswith("ok")
    finally:
        node.lab.exec("server-b", ["ip", "address", "del", f"{address_of('server-a')}/32", "dev", "lo"], check=True)


def test_an_address_that_two_pods_gave_themselves_is_nobodys(node: DataNode) -> None:
    pods = ("server-a", "server-b")
    for pod in pods:
        node.lab.exec(pod, ["ip", "address", "add", "172.17.0.1/32", "dev", "lo"], check=True)
    node.lab.exec("stranger", ["ip", "route", "add", "172.17.0.1", "via", address_of("server-b")], check=True)
    try:
        node.enforce(protected())
        with node.events() as events:
            assert node.connect("stranger", "172.17.0.1", 8080) == "ECONNREFUSED"
        assert {Reason(e.reason) for e in events} == {Reason.UNKNOWN_ADDRESS}
    finally:
        node.lab.exec("stranger", ["ip", "route", "del", "172.17.0.1"], check=True)
        for pod in pods:
            node.lab.exec(pod, ["ip", "address", "del", "172.17.0.1/32", "dev", "lo"], check=True)


def test_many_denials_are_counted_but_not_all_reported(node: DataNode) -> None:
    node.enforce(protected(ALLOW_MESH))
    rule = ("default/other", "default/server-a", "default/p: no rule matches")
    before, suppressed = node.verdicts().get(rule, 0), node.datapath.counters()["event_suppressed"]
    flood = (
        "import socket\n"
        "for _ in range(499):\n"
        f"  s=socket.socket()\n  try: s.connect(('{address_of('server-a')}',8080))\n  except PermissionError: pass\n  s.close()\n"
    )
    with node.events() as events:
        node.lab.exec("other", ["python3", "-c", flood], check=True)
    assert node.verdicts()[rule] == before + 499
    assert len(events) < 499
    assert node.datapath.counters()["event_suppressed"] - suppressed == 499 - len(events)
