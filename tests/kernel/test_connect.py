"""What connect() does in an enrolled pod: load balancing, policy, errnos; and that nobody else is touched."""

from __future__ import annotations

import socket
import subprocess
from collections import Counter
from dataclasses import replace

import pytest

from agent.bpf.manifest import Direction, EventKind, Reason, Verdict
from agent.model import Action, Operation, Policy, PolicyRule, Snapshot
from tests.kernel import datanode
from tests.kernel.datanode import ALLOW_CALLER, FAMILIES, VIP4, VIP6, VIP_EMPTY, DataNode, address_of, snapshot, workload


def shop(*, policies: tuple[Policy, ...] = (), waypoint: bool = False, ready: bool = True) -> Snapshot:
    protected = tuple(p.name for p in policies)
    return snapshot(
        workload("caller"),
        workload("other"),
        workload("server-a", policies=protected, ready=ready),
        workload("server-b", policies=protected, ready=ready),
        policies=policies,
        waypoint=waypoint,
    )


@pytest.mark.parametrize(
    "address", [pytest.param(VIP4, id="ipv4"), pytest.param(VIP6, id="ipv6"), pytest.param(f"::ffff:{VIP4}", id="mapped")]
)
def test_a_service_address_leads_to_each_backend(node: DataNode, address: str) -> None:
    node.enforce(shop())
    seen = Counter(node.connect("caller", address, 80) for _ in range(23))
    assert len(seen) == 2
    assert all(answer.startswith("ok ") for answer in seen)


def test_the_server_sees_the_callers_own_address(node: DataNode) -> None:
    node.enforce(shop())
    code = "import socket; s=socket.create_server(('',9000)); print('ready',flush=True); print(s.accept()[1][0],flush=True)"
    call = f"import socket; socket.create_connection(('{address_of('server-a')}',9000))"
    with node.program("server-a", ["python3", "-c", code]) as server:
        node.lab.exec("caller", ["python3", "-c", call], check=True)
        out, _ = server.communicate(timeout=5)
    assert out.strip() == address_of("caller")


def test_a_service_without_ready_endpoints_refuses_at_once(node: DataNode) -> None:
    node.enforce(shop())
    with node.events() as events:
        assert node.connect("caller", VIP_EMPTY, 80) == "ECONNREFUSED"
    assert [(e.kind, e.reason, e.service) for e in events] == [(EventKind.DENIED, Reason.NO_BACKEND, "default/empty:80")]


def test_an_endpoint_that_is_not_ready_gets_no_new_connection(node: DataNode) -> None:
    node.enforce(shop(ready=False))
    assert node.connect("caller", VIP4, 80) == "ECONNREFUSED"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denied_connection_fails_at_once_with_the_rule_named(node: DataNode, family: socket.AddressFamily) -> None:
    node.enforce(shop(policies=(ALLOW_CALLER,)))
    before = node.verdicts().get(("default/other", "default/server-a", "default/p: no rule matches"), 0)
    with node.events() as events:
        assert node.connect("other", address_of("server-a", family), 8080) == "EPERM"
    (event,) = events
    assert (event.kind, event.verdict, event.direction) == (EventKind.DENIED, Verdict.DENY, Direction.OUTBOUND)
    assert (event.source, event.target, event.rule) == ("default/other", "default/server-a", "default/p: no rule matches")
    assert event.command.startswith("python3")
    assert node.verdicts()["default/other", "default/server-a", "default/p: no rule matches"] == before + 1
    assert node.connect("caller", address_of("server-a", family), 8080).startswith("ok")


def test_a_port_rule_holds_for_its_port_only(node: DataNode) -> None:
    only_8080 = Policy("default/ports", Action.ALLOW, (PolicyRule((), (Operation(ports=(8080,)),)),))
    node.enforce(shop(policies=(only_8080,)))
    assert node.connect("other", address_of("server-a"), 8080).startswith("ok")
    assert node.connect("other", address_of("server-a"), 8081) == "EPERM"


def test_a_changed_policy_holds_for_the_next_connection(node: DataNode) -> None:
    node.enforce(shop(policies=(ALLOW_CALLER,)))
    assert node.connect("other", VIP4, 80) == "EPERM"
    node.enforce(shop())
    assert node.connect("other", VIP4, 80).startswith("ok")
    node.enforce(shop(policies=(ALLOW_CALLER,)))
    assert node.connect("other", VIP4, 80) == "EPERM"


def test_a_pod_reaches_itself_whatever_the_policy(node: DataNode) -> None:
    node.enforce(shop(policies=(Policy("default/nobody", Action.ALLOW),)))
    assert node.connect("server-a", address_of("server-a"), 8080).startswith("ok")
    assert node.connect("server-a", "127.0.0.1", 8080).startswith("ok")


def test_an_unenrolled_pod_is_not_redirected(node: DataNode) -> None:
    node.enforce(shop())
    assert node.connect("stranger", address_of("server-a"), 8080).startswith("ok")
    assert not node.connect("stranger", VIP4, 80).startswith("ok")


def test_an_l7_service_is_closed_while_there_is_no_waypoint(node: DataNode) -> None:
    node.enforce(shop(waypoint=True))
    assert node.connect("caller", VIP4, 80) == "ECONNREFUSED"
    assert node.connect("caller", VIP6, 80) == "ECONNREFUSED"


CALLS = [pytest.param(VIP4, id="ipv4"), pytest.param(VIP6, id="ipv6"), pytest.param(f"::ffff:{VIP4}", id="mapped")]
L7 = Policy("default/l7", Action.ALLOW, (PolicyRule(operations=(Operation(paths=("/items",)),)),))
LISTENS = "import socket\ns=socket.create_server(('127.0.0.1',15001)); print('ready',flush=True)\nwhile True: s.accept()[0].close()"


def opened(model: Snapshot) -> Snapshot:
    """The same with fail mode `open`."""
    return replace(model, services={name: replace(s, fail_open=True) for name, s in model.services.items()})


def past(node: DataNode) -> int:
    """Connections that went past an absent waypoint so far."""
    return node.datapath.counters()["fail_open"]


@pytest.mark.parametrize("address", CALLS)
def test_an_l7_service_whose_fail_mode_is_open_is_l4_while_there_is_no_waypoint(node: DataNode, address: str) -> None:
    node.enforce(opened(shop(waypoint=True)))
    before = past(node)
    assert node.connect("caller", address, 80).startswith("ok")
    with node.program("caller", ["python3", "-c", LISTENS]):
        assert not node.connect("caller", address, 80).startswith("ok"), "it went to the waypoint, which answers nothing here"
        assert past(node) == before + 1
    assert node.connect("caller", address, 80).startswith("ok")
    assert past(node) == before + 2


@pytest.mark.parametrize("address", CALLS)
def test_open_does_not_go_past_a_policy(node: DataNode, address: str) -> None:
    before = past(node)
    node.enforce(opened(shop(waypoint=True, policies=(ALLOW_CALLER,))))
    assert node.connect("other", address, 80) == "EPERM"
    node.enforce(opened(shop(waypoint=True, policies=(L7,))))
    assert node.connect("caller", address, 80) == "ECONNREFUSED", "only the request could decide"
    node.enforce(opened(shop(waypoint=True, ready=False)))
    assert node.connect("caller", address, 80) == "ECONNREFUSED", "no endpoint"
    assert past(node) == before


def test_a_traced_call_past_the_waypoint_says_so(node: DataNode) -> None:
    node.enforce(opened(shop(waypoint=True)))
    table = node.datapath.maps["mesh_trace"]
    row = table.layout.key.pack(source=node.ids.number("workload", "default/caller"), service=node.ids.number("service", "default/echo:80"))
    waypoint = node.config.waypoint_cgroup.stat().st_ino
    table.put(row, table.layout.value.pack(**{"": 1}))
    node.datapath.configure(waypoint_cgroup_id=waypoint, tracing=1)
    try:
        with node.events() as events:
            assert node.connect("caller", VIP4, 80).startswith("ok")
    finally:
        node.datapath.configure(waypoint_cgroup_id=waypoint, tracing=0)
        table.prune(set())
    assert [Reason(e.reason) for e in events if e.kind is EventKind.CONNECT] == [Reason.FAIL_OPEN]


def test_the_waypoint_learns_what_was_dialled_and_nobody_else_does(node: DataNode) -> None:
    """A stand-in for Envoy in its cgroup: listens on 15001 in the pod's namespace and asks SO_ORIGINAL_DST."""
    node.enforce(shop(waypoint=True))
    ask = (
        "import socket,struct\n"
        "s=socket.create_server(('127.0.0.1',15001)); print('up',flush=True)\n"
        "c,_=s.accept()\n"
        "try: r=c.getsockopt(0,80,16); print(socket.inet_ntoa(r[4:8]),struct.unpack('!H',r[2:4])[0],flush=True)\n"
        "except OSError as e: print(e.errno,flush=True)\n"
    )
    inside = ["nsenter", f"--net={node.lab.netns('caller')}", "python3", "-c", ask]
    for cgroup, expected in ((node.config.waypoint_cgroup, f"{VIP4} 80"), (None, None)):
        command = inside if cgroup is None else ["sh", "-c", f'echo $$ > {cgroup}/cgroup.procs && exec "$@"', "sh", *inside]
        listener = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert listener.stdout is not None
        assert listener.stdout.readline() == "up\n"
        connect = f"import socket; s=socket.create_connection(('{VIP4}',80)); s.recv(1)"
        node.lab.exec("caller", ["python3", "-c", connect])
        answer = listener.communicate(timeout=5)[0].strip()
        if expected:
            assert answer == expected
        else:
            assert answer in {"2", "92"}  # ENOENT or ENOPROTOOPT: no netfilter state, and not the waypoint


def test_bytes_are_counted_exactly_at_both_ends(node: DataNode) -> None:
    node.enforce(shop())
    size = 100_003
    outbound = node.stats("default/caller", "default/server-a", Direction.OUTBOUND)
    inbound = node.stats("default/caller", "default/server-a", Direction.INBOUND)
    node.connect("caller", address_of("server-a"), 8080, size=size)
    assert datanode.until(lambda: node.stats("default/caller", "default/server-a", Direction.INBOUND)["closed"] == inbound["closed"] + 1)
    assert datanode.until(lambda: node.stats("default/caller", "default/server-a", Direction.OUTBOUND)["closed"] == outbound["closed"] + 1)
    for before, direction in ((outbound, Direction.OUTBOUND), (inbound, Direction.INBOUND)):
        after = node.stats("default/caller", "default/server-a", direction)
        after["received_bytes"] -= direction is Direction.OUTBOUND  # this end closed first: the peer's FIN counts (bpf_src/mesh_sockops.c)
        assert {k: after[k] - before[k] for k in after} == {
            "opened": 1, "sent_bytes": size, "received_bytes": size, "closed": 1, "failed": 0, "reset": 0,
        }  # fmt: skip


def test_a_connection_that_nobody_accepts_is_counted_as_failed(node: DataNode) -> None:
    node.enforce(shop())
    before = node.stats("default/caller", "default/server-a", Direction.OUTBOUND)["failed"]
    assert node.connect("caller", address_of("server-a"), 9999) == "ECONNREFUSED"
    assert datanode.until(lambda: node.stats("default/caller", "default/server-a", Direction.OUTBOUND)["failed"] == before + 1)


def test_a_socket_that_is_connected_again_is_decided_again(node: DataNode) -> None:
    node.enforce(shop())
    before = node.stats("default/caller", "default/server-b", Direction.OUTBOUND)["opened"]
    code = (
        "import socket\ns=socket.socket()\n"
        f"try: s.connect(('{address_of('server-a')}',9999))\nexcept ConnectionRefusedError: pass\n"
        f"s.connect(('{address_of('server-b')}',8080)); print(s.getpeername()[0])\n"
    )
    assert node.lab.exec("caller", ["python3", "-c", code]).stdout.strip() == address_of("server-b")
    assert node.stats("default/caller", "default/server-b", Direction.OUTBOUND)["opened"] == before + 1


def test_nothing_is_left_of_a_connection_that_ended(node: DataNode) -> None:
    """Who takes its addresses and port later must not be taken for the caller."""
    node.enforce(shop())
    assert node.connect("caller", VIP4, 80).startswith("ok")
    assert node.connect("caller", VIP6, 80).startswith("ok")
    assert node.connect("caller", address_of("server-a"), 9999) == "ECONNREFUSED"
    node.enforce(shop(waypoint=True))
    assert node.connect("caller", VIP4, 80) == "ECONNREFUSED"
    assert datanode.until(lambda: not list(node.datapath.maps["mesh_flow"].items()))
    assert datanode.until(lambda: not list(node.datapath.maps["mesh_origdst"].items()))


def test_no_rare_event_was_counted(node: DataNode) -> None:
    counters = {name: count for name, count in node.datapath.counters().items() if not name.startswith("event") and name != "fail_open"}
    assert counters == dict.fromkeys(counters, 0)
