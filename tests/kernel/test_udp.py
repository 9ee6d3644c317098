"""Datagrams: balanced, policed at both ends and counted, with connected and unconnected sockets, and answers come from what was dialled."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from agent.bpf.manifest import Direction, EventKind, Reason
from agent.model import Action, Backing, Operation, Policy, PolicyRule, Service, ServicePort, Snapshot, Source
from tests.kernel.datanode import ADDRESSES, VIP4, VIP6, DataNode, snapshot, until, workload

PORT = 5300
SERVER = f"""
import socket, sys, threading
def bound(family, address):
    s = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((address, {PORT}))
    return s
def serve(s):
    while True:
        data, peer = s.recvfrom(65536)
        s.sendto(socket.gethostname().encode() + b" " + sys.argv[1].encode() + b" " + data, peer)
both = bound(socket.AF_INET, "0.0.0.0"), bound(socket.AF_INET6, "::")
print("ready", flush=True)
threading.Thread(target=serve, args=both[:1]).start()
serve(both[1])
"""
CLIENT = """
import errno, socket, sys
address, port, how, count = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
for attempt in range(int(sys.argv[5])):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(1)
    seen = []
    try:
        if how == "connected":
            s.connect((address, port))
            assert s.getpeername()[:2] == (address, port), s.getpeername()
        if how == "bound":
            s.bind(("", 0))
        for i in range(count):
            if how == "connected":
                s.send(b"%d" % i); data, peer = s.recvfrom(100)
            else:
                s.sendto(b"%d" % i, (address, port)); data, peer = s.recvfrom(100)
            assert peer[:2] == (address, port), peer
            assert data.split()[2] == b"%d" % i
            seen.append(data.split()[1].decode())
        assert len(set(seen)) == 1, seen
        print(seen[0])
    except TimeoutError: print("timeout")
    except OSError as e: print(errno.errorcode.get(e.errno, e))
    s.close()
"""
CALLERS = Policy("default/callers", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/caller",)),)),))


@pytest.fixture(scope="module")
def node(node: DataNode) -> Iterator[DataNode]:
    with contextlib.ExitStack() as servers:
        for name in ("server-a", "server-b", "remote"):
            servers.enter_context(node.program(name, ["python3", "-c", SERVER, name]))
        yield node


def model(*, policies: tuple[Policy, ...] = (), ready_b: bool = True, affinity_s: int = 0) -> Snapshot:
    names = tuple(p.name for p in policies)
    backing = (Backing("default/names", {}, {53: PORT}),)
    servers = [
        replace(workload("server-a", policies=names), backing=backing),
        replace(workload("server-b", policies=names, ready=ready_b), backing=backing),
    ]
    found = snapshot(*servers, workload("caller"), workload("other"), policies=policies)
    port = ServicePort(53, "", "UDP", "", False, "test")
    services = {"default/names": Service("default/names", (VIP4, VIP6), (port,), affinity_s=affinity_s)}
    return replace(found, services=services)


def ask(
    node: DataNode, place: str, address: str, port: int = 53, *, how: str = "unconnected", count: int = 3, sockets: int = 1
) -> list[str]:
    """Who answered each socket's datagrams, or the errno."""
    run = node.lab.exec(place, ["python3", "-c", CLIENT, address, str(port), how, str(count), str(sockets)])
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize("how", ["connected", "unconnected", "bound"])
@pytest.mark.parametrize("address", [pytest.param(VIP4, id="ipv4"), pytest.param(VIP6, id="ipv6")])
def test_each_socket_keeps_one_endpoint_and_is_answered_by_the_service_address(node: DataNode, address: str, how: str) -> None:
    node.enforce(model())
    seen = Counter(ask(node, "caller", address, how=how, sockets=24))
    assert seen.keys() == {"server-a", "server-b"}


def test_an_endpoint_that_becomes_unready_loses_the_flow(node: DataNode) -> None:
    node.enforce(model(ready_b=False))
    assert set(ask(node, "caller", VIP4, sockets=12)) == {"server-a"}


@pytest.mark.parametrize("how", ["connected", "unconnected"])
def test_a_caller_that_no_rule_allows_is_refused_at_once(node: DataNode, how: str) -> None:
    node.enforce(model(policies=(CALLERS,)))
    with node.events() as events:
        assert ask(node, "other", VIP4, how=how) == ["EPERM"]
        assert ask(node, "caller", VIP4, how=how) != ["EPERM"]
    denied = [e for e in events if e.kind is EventKind.DENIED]
    assert [(e.source, e.protocol, e.rule) for e in denied] == [("default/other", "UDP", "default/callers: no rule matches")]


def test_the_receiver_refuses_strangers_and_lets_answers_in(node: DataNode) -> None:
    node.enforce(model(policies=(CALLERS,)))
    with node.events() as events:
        assert ask(node, "stranger", ADDRESSES["server-a"][0], PORT) == ["timeout"]  # a datagram that is dropped makes no noise
    assert {Reason(e.reason) for e in events if e.direction is Direction.INBOUND} == {Reason.POLICY}
    # The server itself calls out, from an unconnected socket, to somebody who is no workload: the answer is let in.
    assert ask(node, "server-a", ADDRESSES["remote"][0], PORT) == ["remote"]


def test_a_stranger_is_let_in_and_answered_where_nothing_protects(node: DataNode) -> None:
    node.enforce(model())
    assert ask(node, "stranger", ADDRESSES["server-a"][0], PORT) == ["server-a"]


def test_a_protected_client_gets_its_answers(node: DataNode) -> None:
    closed = Policy("default/closed", Action.ALLOW)
    found = model()
    caller = replace(workload("caller"), policies=("default/closed",))
    node.enforce(replace(found, workloads={**found.workloads, caller.name: caller}, policies={closed.name: closed}))
    assert set(ask(node, "caller", VIP4, sockets=6)) <= {"server-a", "server-b"}
    assert ask(node, "caller", VIP4, how="connected") != ["timeout"]
    assert ask(node, "other", ADDRESSES["caller"][0], PORT) == ["EPERM"]


def test_a_policy_for_udp_says_nothing_about_tcp(node: DataNode) -> None:
    closed = Policy("default/no-udp", Action.DENY, (PolicyRule((), (Operation(protocols=("UDP",)),)),))
    node.enforce(model(policies=(closed,)))
    assert ask(node, "caller", ADDRESSES["server-a"][0], PORT) == ["EPERM"]
    assert node.connect("caller", ADDRESSES["server-a"][0], 8080).startswith("ok")


def test_another_pods_address_on_a_packet_is_not_its_identity(node: DataNode) -> None:
    node.enforce(model(policies=(CALLERS,)))
    target, claimed = ADDRESSES["server-a"][0], ADDRESSES["caller"][0]
    code = (
        "import socket,struct\n"
        "s=socket.socket(socket.AF_INET,socket.SOCK_RAW,socket.IPPROTO_RAW)\n"
        f"src,dst=socket.inet_aton({claimed!r}),socket.inet_aton({target!r})\n"
        f"udp=struct.pack('!HHHH',20000,{PORT},9,0)+b'x'\n"  # no port that the kernel gives to sockets: a flow of it may be remembered
        "ip=struct.pack('!BBHHHBBH4s4s',0x45,0,20+len(udp),0,0,64,17,0,src,dst)\n"
        f"s.sendto(ip+udp,({target!r},0))\n"
    )
    with node.events() as events:
        run = node.lab.exec("other", ["python3", "-c", code])
        assert run.returncode == 0, run.stderr
        assert until(lambda: ("default/caller", "default/server-a", "") in node.verdicts())
    assert {Reason(e.reason) for e in events if e.direction is Direction.INBOUND} == {Reason.SPOOFED}


def test_flows_are_counted_once_at_each_end(node: DataNode) -> None:
    node.enforce(model(ready_b=False))
    flows = node.datapath.maps[
        "mesh_flow"
    ]  # a port that a socket of an earlier test had is no new flow, and of 28,000 each may be chosen again
    flows.remove([key for key, _ in flows.items()])
    before = [node.stats("default/caller", "default/server-a", d)["opened"] for d in (Direction.OUTBOUND, Direction.INBOUND)]
    ask(node, "caller", VIP4, sockets=5, count=7)
    ask(node, "caller", VIP4, how="connected", sockets=2, count=7)
    after = [node.stats("default/caller", "default/server-a", d)["opened"] for d in (Direction.OUTBOUND, Direction.INBOUND)]
    assert after[0] - before[0] == 7
    assert after[1] - before[1] == 7


def test_no_endpoint_is_refused_at_once(node: DataNode) -> None:
    found = model()
    node.enforce(replace(found, workloads={n: replace(w, ready=False) for n, w in found.workloads.items()}))
    assert ask(node, "caller", VIP4) == ["ECONNREFUSED"]
    assert ask(node, "caller", VIP4, how="connected") == ["ECONNREFUSED"]
    assert ask(node, "caller", VIP4, 99) == ["ECONNREFUSED"]


def test_those_who_are_not_enrolled_are_left_alone(node: DataNode) -> None:
    found = model()
    node.enforce(replace(found, workloads={n: w for n, w in found.workloads.items() if n != "default/other"}))
    assert ask(node, "other", ADDRESSES["remote"][0], PORT) == ["remote"]
