"""Who may not go out: what connect() and sendto() refuse, what they never refuse, and where connections to ExternalServices are led."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from agent.bpf.manifest import Direction, EventKind, Reason
from agent.external import External
from agent.l7.externals import MARK
from agent.model import Service, ServicePort, Snapshot
from tests.kernel.datanode import ADDRESSES, VIP4, VIP6, DataNode, snapshot, workload

OUT4, OUT6 = ADDRESSES["remote"]
"""Of a pod that no Workload describes in these tests: a destination that nobody declared."""
OUTSIDE = [pytest.param(OUT4, id="ipv4"), pytest.param(OUT6, id="ipv6"), pytest.param(f"::ffff:{OUT4}", id="mapped")]
# CALL: connect or sendto with a protocol and perhaps a mark; prints "ok" or the errno. A connection that is refused at the other end got there.
CALL = """
import errno, socket, sys
address, port, how, mark = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
kind, protocol = {"tcp": (1, 6), "mptcp": (1, 262), "sctp": (1, 132), "ping": (2, 1), "udp": (2, 17), "sendto": (2, 17), "sendmsg": (2, 17)}[how]
try:
    s = socket.socket(family, kind, protocol)
    s.settimeout(2)
    if mark: s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    if how == "sendto": s.sendto(b"x", (address, port))
    elif how == "sendmsg": s.connect((address, port)); s.sendmsg([b"x"])
    else: s.connect((address, port))
    print("ok")
except TimeoutError: print("ok")
except OSError as e: print({111: "ok"}.get(e.errno) or errno.errorcode.get(e.errno, e))
"""


def model(*, deny: bool = True, externals: tuple[Service, ...] = ()) -> Snapshot:
    found = snapshot(*(replace(workload(name), egress_deny=deny) for name in ("caller", "server-a")), workload("other"))
    return replace(found, services={**found.services, **{one.name: one for one in externals}})


def call(node: DataNode, place: str, address: str, port: int, how: str) -> str:
    run = node.lab.exec(place, ["python3", "-c", CALL, address, str(port), how, "0"])
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def as_waypoint(node: DataNode, address: str, port: int, mark: int = 0, how: str = "tcp") -> str:
    """What a program in the waypoint's cgroup gets from inside the caller's namespace."""
    inside = ["nsenter", f"--net={node.lab.netns('caller')}", "python3", "-c", CALL, address, str(port), how, str(mark)]
    command = ["sh", "-c", f'echo $$ > {node.config.waypoint_cgroup}/cgroup.procs && exec "$@"', "sh", *inside]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("address", OUTSIDE)
def test_a_destination_that_nobody_declared_is_refused_at_once_with_the_reason(node: DataNode, address: str) -> None:
    node.enforce(model())
    before = sum(node.verdicts().values())
    with node.events() as events:
        assert node.connect("caller", address, 8080) == "EPERM"
    (event,) = events
    assert (event.kind, event.reason, event.direction, event.source, event.target) == (
        *(EventKind.DENIED, Reason.EGRESS, Direction.OUTBOUND, "default/caller", ""),
    )
    assert event.dialled.startswith("[" if address == OUT6 else OUT4)
    assert sum(node.verdicts().values()) == before + 1
    assert node.connect("other", address, 8080).startswith("ok"), "who may go out does"


@pytest.mark.parametrize("address", OUTSIDE)
@pytest.mark.parametrize("how", ["udp", "sendto", "sendmsg"])
def test_datagrams_are_refused_as_well(node: DataNode, how: str, address: str) -> None:
    node.enforce(model())
    with node.events() as events:
        assert call(node, "caller", address, 9999, how) == "EPERM"
    assert [(e.reason, e.protocol) for e in events if e.kind is EventKind.DENIED] == [(Reason.EGRESS, "UDP")]
    assert call(node, "other", address, 9999, how) == "ok"


@pytest.mark.parametrize("how", ["mptcp"])
def test_another_protocol_is_no_way_out(node: DataNode, how: str) -> None:
    node.enforce(model(deny=False))
    if (able := call(node, "caller", OUT4, 8080, how)) != "ok":
        pytest.skip(f"{how}: {able}")
    node.enforce(model())
    assert call(node, "caller", OUT4, 8080, how) == "EPERM"


def test_services_workloads_and_oneself_are_never_out(node: DataNode) -> None:
    node.enforce(model())
    for address in (VIP4, VIP6, f"::ffff:{VIP4}"):
        assert node.connect("caller", address, 80).startswith("ok")
    for place in ("server-a", "other"):
        for address in ADDRESSES[place]:
            for how in ("tcp", "udp", "sendto"):
                assert call(node, "caller", address, 8080, how) == "ok"
    for address in ("127.0.0.1", "127.1.2.3", "::1", "0.0.0.0", "::", "::ffff:0.0.0.0", *ADDRESSES["caller"]):
        for how in ("tcp", "udp", "sendto"):
            assert call(node, "caller", address, 8080, how) == "ok", (address, how)


def test_resolvers_of_the_workload_may_be_asked_and_nothing_else_of_them(node: DataNode) -> None:
    node.enforce(model())
    (cookie,) = [one.netns_cookie for one in node.enrolled.local if one.workload.name == "default/caller"]
    tables = node.enrolment.tables
    tables.allow_resolvers([(cookie, OUT4)])
    try:
        for how in ("tcp", "udp", "sendto"):
            assert call(node, "caller", OUT4, 53, how) == "ok"
            assert call(node, "caller", OUT4, 5353, how) == "EPERM"
            assert call(node, "caller", OUT6, 53, how) == "EPERM", "another resolver"
        tables.set_resolvers([])
        assert call(node, "caller", OUT4, 53, "sendto") == "ok", "whom the name server stands in for is another matter"
    finally:
        tables.allow_resolvers([])
    assert call(node, "caller", OUT4, 53, "sendto") == "EPERM"


def test_a_change_holds_for_the_next_connection(node: DataNode) -> None:
    for deny in (False, True, False):
        node.enforce(model(deny=deny))
        assert node.connect("caller", OUT4, 8080).startswith("EPERM" if deny else "ok")


def test_whoever_was_let_in_is_answered(node: DataNode) -> None:
    node.enforce(model())
    assert node.connect("stranger", ADDRESSES["server-a"][0], 8080).startswith("ok")
    server = (
        "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('',5353)); print('ready',flush=True)\n"
        "d,p=s.recvfrom(9); s.sendto(d,p)"
    )
    ask = (
        "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(2)\n"
        f"s.sendto(b'hi',('{ADDRESSES['server-a'][0]}',5353)); print(s.recv(9).decode())"
    )
    with node.program("server-a", ["python3", "-c", server]):
        assert node.lab.exec("stranger", ["python3", "-c", ask]).stdout.strip() == "hi"


def test_the_waypoint_goes_out_but_no_name_leads_it_inside(node: DataNode) -> None:
    node.enforce(model())
    for address in (OUT4, OUT6):
        assert as_waypoint(node, address, 8080) == "ok"
        assert as_waypoint(node, address, 8080, MARK) == "ok"
    within = ("127.0.0.1", "::1", "0.0.0.0", "::", "169.254.169.254", "fe80::1", VIP4, VIP6, *ADDRESSES["server-a"], *ADDRESSES["other"])
    for address in within:
        assert as_waypoint(node, address, 8080, MARK) == "EPERM", address
    for address in ("127.0.0.1", *ADDRESSES["server-a"]):
        assert as_waypoint(node, address, 8080) == "ok", "unmarked: to a service's endpoint"


def outside(protocol: str, *, fixed: bool = False) -> Service:
    addresses = (OUT4, OUT6) if fixed else ("240.240.0.9", "fd24:240:240::9")
    return Service(
        "default/api.example.com",
        addresses,
        (ServicePort(443, "", "TCP", protocol, True, "test"),),
        fail_open=True,
        external=External("api", ("api.example.com",), fixed, True, ()),
    )


LISTENS = (
    "import socket\ns=socket.create_server(('127.0.0.1',{port})); print('ready',flush=True)\nwhile True: s.accept()[0].send(b'{port}')"
)
ASKS = "import socket,sys\ns=socket.create_connection((sys.argv[1],443),2); print(s.recv(9).decode(), s.getpeername()[0])"


@pytest.mark.parametrize(("protocol", "port"), [("http", 15001), ("tls", 15003), ("tcp", 15003)])
def test_an_external_service_is_the_waypoints_and_closed_without_it(node: DataNode, protocol: str, port: int) -> None:
    node.enforce(model(externals=(outside(protocol),)))
    assert node.connect("caller", "240.240.0.9", 443) == "ECONNREFUSED", "fail mode open would go nowhere"
    with node.program("caller", ["python3", "-c", LISTENS.format(port=port)]):
        run = node.lab.exec("caller", ["python3", "-c", ASKS, "240.240.0.9"])
    assert run.stdout.split() == [str(port), "240.240.0.9"]
    with node.events() as events:
        assert node.connect("caller", "240.240.0.9", 80) == "ECONNREFUSED"
    assert [e.reason for e in events if e.kind is EventKind.DENIED] == [Reason.NO_PORT]


def test_an_addresss_other_ports_are_what_they_were(node: DataNode) -> None:
    node.enforce(model(deny=False, externals=(outside("tcp", fixed=True),)))
    assert node.connect("caller", OUT4, 443) == "ECONNREFUSED"
    assert node.connect("caller", OUT4, 8080).startswith("ok")
    node.enforce(model(externals=(outside("tcp", fixed=True),)))
    assert node.connect("caller", OUT4, 443) == "ECONNREFUSED"
    assert node.connect("caller", OUT4, 8080) == "EPERM"


def test_nobody_enters_the_waypoints_port_from_elsewhere(node: DataNode) -> None:
    node.enforce(model())
    with node.program(
        "server-a", ["python3", "-c", "import socket\ns=socket.create_server(('',15003)); print('ready',flush=True)\ns.accept()"]
    ):
        assert node.connect("other", ADDRESSES["server-a"][0], 15003) == "ECONNREFUSED"
