"""mTLS between nodes, the kernel's half: what is led into a tunnel, what the waypoint learns of it, and what a STRICT port refuses."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from agent.bpf.manifest import Direction, EventKind, Reason, Verdict
from agent.model import NO_DIRECT, Action, Delta, Direct, Mtls, Operation, Policy, PolicyRule, Snapshot, Workload
from agent.tunnels import Tunnels
from tests.kernel import datanode
from tests.kernel.datanode import ADDRESSES, ALLOW_CALLER, CALL, ECHO, VIP4, VIP6, DataNode, snapshot, until, workload
from tests.kernel.test_udp import PORT as UDP_PORT
from tests.kernel.test_udp import SERVER as UDP_SERVER
from tests.kernel.test_udp import ask

REMOTE, REMOTE6 = ADDRESSES["remote"]
SERVER, SERVER6 = ADDRESSES["server-a"]
NUMBER, LOOPBACK = 0x0A0B0C, "127.10.11.12"
# Envoy's place: listens in the pod's namespace, says what it can know of a connection as Envoy asks for it, and answers itself.
WAYPOINT = """
import json, socket, struct, sys, threading
def original(c, size):
    try: r = c.getsockopt(0 if c.family == socket.AF_INET else 41, 80, size)
    except OSError as e: return e.errno
    family, port = struct.unpack_from("=H", r)[0], struct.unpack_from("!H", r, 2)[0]
    return [socket.inet_ntop(family, r[4:8] if family == socket.AF_INET else r[8:24]), port]
def talk(c):
    local = c.getsockname()[:2]
    kind = c.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
    print(json.dumps({"local": local, "original": original(c, 28), "short": original(c, 16), "type": kind}), flush=True)
    with c:
        try:
            while data := c.recv(65536): c.sendall(data)
        except OSError: pass
def serve(s):
    while True: threading.Thread(target=talk, args=(s.accept()[0],), daemon=True).start()
for where, port in (w.rsplit(",", 1) for w in sys.argv[1:]):
    s = socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET)
    if ":" in where: s.setsockopt(41, 26, int(where == "::"))
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind(("::" if where == "both:" else where, int(port))); s.listen()
    threading.Thread(target=serve, args=(s,)).start()
print("ready", flush=True)
"""
# An application that wants what is the waypoint's.
TAKER = ECHO.replace("(8080, 8081)", "(15008,)").replace("backlog=64", "backlog=64, reuse_port=True") + "print('ready', flush=True)"
CLOSED = Policy("default/closed", Action.ALLOW)
L7 = Policy("default/l7", Action.DENY, (PolicyRule(operations=(Operation(paths=("/admin*",)),)),))


def remote(mtls: Mtls, ports: tuple[tuple[int, Mtls], ...] = (), policies: tuple[str, ...] = ()) -> Workload:
    return replace(workload("remote", policies=policies), mtls=mtls, mtls_ports=ports)


def server(mtls: Mtls, ports: tuple[tuple[int, Mtls], ...] = (), policies: tuple[str, ...] = ()) -> Workload:
    return replace(workload("server-a", policies=policies), mtls=mtls, mtls_ports=ports)


def shop(*workloads: Workload, policies: tuple[Policy, ...] = (), waypoint: bool = False) -> Snapshot:
    return snapshot(workload("caller"), workload("other"), *workloads, policies=policies, waypoint=waypoint)


def numbers(node: DataNode, *names: str) -> dict[str, int]:
    """Tunnels to these service accounts."""
    return {f"spiffe://{node.config.trust_domain}/ns/default/sa/{name}": NUMBER + i for i, name in enumerate(names or ("remote",))}


def inside(node: DataNode, place: str, argv: list[str]) -> list[str]:
    """A command of the waypoint: in its cgroup, in the pod's network namespace."""
    enter = ["nsenter", f"--net={node.lab.netns(place)}", *argv]
    return ["sh", "-c", f'echo $$ > {node.config.waypoint_cgroup}/cgroup.procs && exec "$@"', "sh", *enter]


class Waypoint:
    """What a stand-in for Envoy has accepted."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def accepted(self) -> dict[str, Any]:
        """The next connection."""
        assert self._process.stdout is not None
        found = json.loads(self._process.stdout.readline())
        assert found.pop("type") == 1  # SOCK_STREAM: other options are answered by the kernel
        return dict(found)

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """It accepts nothing for a while; the kernel completes handshakes without it."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


@contextmanager
def waypoint(node: DataNode, place: str, *listeners: str) -> Iterator[Waypoint]:
    process = subprocess.Popen(inside(node, place, ["python3", "-c", WAYPOINT, *listeners]), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Waypoint(process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def envoy(node: DataNode) -> Iterator[Waypoint]:
    """Tunnel and outbound listener of `caller`."""
    with waypoint(node, "caller", "0.0.0.0,15002", "127.0.0.1,15001", "::1,15001") as running:
        yield running


def mapped(address: str) -> str:
    return f"::ffff:{address}"


def refused(node: DataNode, place: str, address: str, port: int) -> set[Reason]:
    """Why a call is refused, which it is at once."""
    with node.events() as events:
        assert node.connect(place, address, port) == "ECONNREFUSED"
    assert {e.verdict for e in events} == {Verdict.DENY}
    return {Reason(e.reason) for e in events}


@pytest.mark.parametrize(
    ("address", "port", "backend"),
    [
        pytest.param(REMOTE, 8080, REMOTE, id="ipv4"),
        pytest.param(REMOTE6, 8080, REMOTE6, id="ipv6"),
        pytest.param(mapped(REMOTE), 8080, REMOTE, id="mapped"),
        pytest.param(VIP4, 80, REMOTE, id="service-ipv4"),
        pytest.param(VIP6, 80, REMOTE6, id="service-ipv6"),
        pytest.param(mapped(VIP4), 80, REMOTE, id="service-mapped"),
    ],
)
@pytest.mark.parametrize("mode", [Mtls.STRICT, Mtls.PERMISSIVE])
def test_a_call_to_another_node_goes_to_the_loopback_address_of_its_identity(
    node: DataNode, envoy: Waypoint, address: str, port: int, backend: str, mode: Mtls
) -> None:
    """And the waypoint learns the endpoint, the application sees what it dialled (datanode.CALL asks getpeername)."""
    node.enforce(shop(remote(mode)), tunnels=numbers(node))
    before = node.stats("default/caller", "default/remote", Direction.OUTBOUND)
    real = mapped("127.10.11.12") if ":" in address else LOOPBACK
    seen = node.connect("caller", address, port, size=777).split()
    assert seen[0] == "ok"
    assert seen[1] in {real, "::ffff:7f0a:b0c" if ":" in address else real}
    short = errno.ENOENT if ":" in backend else [backend, 8080]  # a buffer without room for an IPv6 address
    found = envoy.accepted()
    assert found["short"] == short or (":" in backend and found["short"] in {errno.ENOENT, errno.ENOPROTOOPT, errno.EINVAL})
    assert (found["local"], found["original"]) == ([LOOPBACK, 15002], [backend, 8080])

    def closed() -> bool:
        after = node.stats("default/caller", "default/remote", Direction.OUTBOUND)
        return after["closed"] == before["closed"] + 1 and after["sent_bytes"] == before["sent_bytes"] + 777

    assert until(closed)


@pytest.mark.usefixtures("envoy")
@pytest.mark.parametrize("before", ["s.setsockopt(41,26,1)", f"s.bind(({ADDRESSES['caller'][1]!r},0))"], ids=["v6only", "bound"])
def test_an_ipv6_socket_that_cannot_reach_ipv4_loopback_fails_closed(node: DataNode, before: str) -> None:
    """One that is bound to an IPv6 address is IPV6_V6ONLY too (net/ipv6/af_inet6.c, __inet6_bind)."""
    node.enforce(shop(remote(Mtls.STRICT)), tunnels=numbers(node))
    code = (
        f"import socket,errno\ns=socket.socket(socket.AF_INET6); {before}\n"
        f"try: s.connect(({REMOTE6!r},8080)); print('in')\nexcept OSError as e: print(errno.errorcode[e.errno])\n"
    )
    assert node.lab.exec("caller", ["python3", "-c", code]).stdout.strip() == "ENETUNREACH"


@pytest.mark.parametrize("policy", [pytest.param(None, id="tunnel"), pytest.param(L7, id="waypoint")])
def test_a_socket_that_is_bound_to_its_pods_address_reaches_the_waypoint_too(
    node: DataNode, envoy: Waypoint, policy: Policy | None
) -> None:
    policies = (policy,) if policy else ()
    node.enforce(shop(remote(Mtls.STRICT, policies=tuple(p.name for p in policies)), policies=policies), tunnels=numbers(node))
    code = (
        f"import socket,errno\ns=socket.socket(socket.AF_INET); s.bind(({ADDRESSES['caller'][0]!r},0))\n"
        f"try: s.connect(({REMOTE!r},8080)); print(s.getpeername()[0])\nexcept OSError as e: print(errno.errorcode[e.errno])\n"
    )
    before = node.stats("default/caller", "default/caller", Direction.INBOUND)["opened"]
    assert node.lab.exec("caller", ["python3", "-c", code]).stdout.strip() == REMOTE
    assert envoy.accepted()["original"] == [REMOTE, 8080]
    assert node.stats("default/caller", "default/caller", Direction.INBOUND)["opened"] == before


@pytest.mark.parametrize("policy", [pytest.param(None, id="tunnel"), pytest.param(L7, id="waypoint")])
@pytest.mark.parametrize("address", [pytest.param(REMOTE, id="ipv4"), pytest.param(REMOTE6, id="ipv6")])
def test_a_caller_that_sends_and_closes_at_once_is_known_to_a_waypoint_that_accepts_later(
    node: DataNode, envoy: Waypoint, address: str, policy: Policy | None
) -> None:
    policies = (policy,) if policy else ()
    node.enforce(shop(remote(Mtls.STRICT, policies=tuple(p.name for p in policies)), policies=policies), tunnels=numbers(node))
    code = f"import socket\nwith socket.create_connection(({address!r},8080)) as s: s.sendall(b'gone')\nprint('sent')"
    with envoy.asleep():
        assert node.lab.exec("caller", ["python3", "-c", code]).stdout.strip() == "sent"
        assert until(lambda: not list(node.datapath.maps["mesh_origdst"].items()))
    assert envoy.accepted()["original"] == [address, 8080]


def test_one_port_of_a_caller_can_have_several_tunnels(node: DataNode, envoy: Waypoint) -> None:
    """They differ by their loopback address only."""
    ghost = replace(remote(Mtls.STRICT), name="default/ghost", service_account="ghost", addresses=("10.77.2.99",), backing=())
    node.enforce(shop(remote(Mtls.STRICT), ghost), tunnels=numbers(node, "remote", "ghost"))
    code = (
        "import socket\n"
        "def dial(to, port):\n"
        "  s=socket.socket(); s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1); s.bind(('',port)); s.connect((to,8080)); return s\n"
        f"a=dial({REMOTE!r},0); b=dial('10.77.2.99',a.getsockname()[1])\n"
        "print(a.getsockname()[1]==b.getsockname()[1])\n"
    )
    assert node.lab.exec("caller", ["python3", "-c", code]).stdout.strip() == "True"
    found = [envoy.accepted() for _ in range(2)]
    assert {(f["local"][0], f["original"][0]) for f in found} == {(LOOPBACK, REMOTE), ("127.10.11.13", "10.77.2.99")}


def test_nobody_but_the_waypoint_is_told_and_of_other_connections_nothing(node: DataNode, envoy: Waypoint) -> None:
    unanswered = {errno.ENOENT, errno.ENOPROTOOPT}  # the kernel's own answer, with and without connection tracking
    node.enforce(shop(remote(Mtls.STRICT)), tunnels=numbers(node))
    assert node.connect("caller", "127.0.0.1", 15002).startswith("ok")
    assert envoy.accepted()["original"] in unanswered
    with node.program("other", ["python3", "-c", WAYPOINT, "0.0.0.0,15002"]) as application:
        assert node.connect("other", REMOTE, 8080).startswith("ok")
        found = Waypoint(application).accepted()
        assert (found["local"], found["original"] in unanswered, found["short"] in unanswered) == ([LOOPBACK, 15002], True, True)


@pytest.mark.usefixtures("envoy")
def test_a_port_may_have_a_mode_of_its_own(node: DataNode) -> None:
    for mode, own in ((Mtls.STRICT, Mtls.DISABLE), (Mtls.DISABLE, Mtls.STRICT), (Mtls.DISABLE, Mtls.PERMISSIVE)):
        node.enforce(shop(remote(mode, ((8081, own),))), tunnels=numbers(node))
        for port, found in ((8080, mode), (8081, own)):
            real = REMOTE if found is Mtls.DISABLE else LOOPBACK
            assert node.connect("caller", REMOTE, port) == f"ok {real}", (port, found)


@pytest.mark.usefixtures("envoy")
def test_a_changed_mode_and_an_identity_that_comes_or_goes_hold_for_the_next_call(node: DataNode) -> None:
    """The difference way (agent.bpf.tables): each snapshot says what it changes."""
    plain, tunnel, none = f"ok {REMOTE}", f"ok {LOOPBACK}", "ECONNREFUSED"
    model = replace(shop(remote(Mtls.DISABLE)), version="0")
    node.enforce(model)
    steps = [
        (Mtls.DISABLE, (), False, plain, plain),
        (Mtls.PERMISSIVE, (), False, plain, plain),
        (Mtls.PERMISSIVE, (), True, tunnel, tunnel),
        (Mtls.STRICT, (), True, tunnel, tunnel),
        (Mtls.STRICT, (), False, none, none),
        (Mtls.STRICT, ((8081, Mtls.PERMISSIVE),), False, none, plain),
        (Mtls.STRICT, ((8081, Mtls.PERMISSIVE),), True, tunnel, tunnel),
        (Mtls.PERMISSIVE, ((8081, Mtls.STRICT),), False, plain, none),
        (Mtls.PERMISSIVE, (), True, tunnel, tunnel),
        (Mtls.DISABLE, (), True, plain, plain),
    ]
    for number, (mode, ports, ready, first, second) in enumerate(steps, 1):
        changed = remote(mode, ports)
        delta = Delta(model.version, workloads=frozenset({changed.name}))
        model = replace(model, version=str(number), workloads={**model.workloads, changed.name: changed}, delta=delta)
        node.enforce(model, tunnels=numbers(node) if ready else {})
        assert (node.connect("caller", REMOTE, 8080), node.connect("caller", VIP4, 80), node.connect("caller", REMOTE, 8081)) == (
            first, first, second,
        ), steps[number - 1]  # fmt: skip


@pytest.mark.usefixtures("envoy")
def test_what_wireguard_encrypts_takes_no_tunnel_unless_the_port_is_strict(node: DataNode) -> None:
    plain, tunnel = f"ok {REMOTE}", f"ok {LOOPBACK}"
    model = replace(shop(remote(Mtls.PERMISSIVE, ((8081, Mtls.STRICT),))), version="0")
    far = next(w for w in model.workloads.values() if w.node != node.config.node)
    on, off = Direct(frozenset({far.node})), Direct(frozenset({far.node}), frozenset({far.name}))
    for direct, first in ((NO_DIRECT, tunnel), (on, plain), (off, tunnel), (on, plain), (NO_DIRECT, tunnel)):
        node.enforce(model, tunnels=numbers(node), direct=direct)
        assert (node.connect("caller", REMOTE, 8080), node.connect("caller", REMOTE, 8081)) == (first, tunnel), direct


@pytest.mark.usefixtures("envoy")
def test_the_numbers_of_an_agent_are_those_of_the_addresses(node: DataNode) -> None:
    found = Tunnels(node.config)
    (identity,) = numbers(node)
    found.mark_ready([identity])
    node.enforce(shop(remote(Mtls.STRICT)), tunnels=found.usable())
    assert node.connect("caller", REMOTE, 8080) == f"ok {found.loopback(found.number(identity))}"


@pytest.mark.usefixtures("envoy")
@pytest.mark.parametrize("address", [REMOTE, REMOTE6, VIP4])
def test_without_its_identity_a_strict_call_is_refused_and_a_permissive_one_goes_in_plaintext(node: DataNode, address: str) -> None:
    port = 80 if address == VIP4 else 8080
    node.enforce(shop(remote(Mtls.STRICT)))
    assert refused(node, "caller", address, port) == {Reason.NO_TUNNEL}
    node.enforce(shop(remote(Mtls.PERMISSIVE)))
    assert node.connect("caller", address, port) == f"ok {REMOTE6 if ':' in address else REMOTE}"


def test_policy_comes_first_and_l7_goes_to_the_outbound_listener(node: DataNode, envoy: Waypoint) -> None:
    node.enforce(shop(remote(Mtls.STRICT, policies=(ALLOW_CALLER.name,)), policies=(ALLOW_CALLER,)), tunnels=numbers(node))
    assert node.connect("other", REMOTE, 8080) == "EPERM"
    assert node.connect("caller", REMOTE, 8080) == f"ok {LOOPBACK}"
    assert envoy.accepted()["original"] == [REMOTE, 8080]
    node.enforce(shop(remote(Mtls.STRICT, policies=(L7.name,)), policies=(L7,)), tunnels=numbers(node))
    assert node.connect("caller", REMOTE, 8080) == "ok 127.0.0.1"
    assert envoy.accepted() == {"local": ["127.0.0.1", 15001], "original": [REMOTE, 8080], "short": [REMOTE, 8080]}
    node.enforce(shop(remote(Mtls.STRICT), waypoint=True), tunnels=numbers(node))
    assert node.connect("caller", VIP6, 80) == "ok ::1"
    found = envoy.accepted()
    assert (found["local"], found["original"]) == (["::1", 15001], [VIP6, 80])


@pytest.mark.usefixtures("envoy")
def test_the_waypoint_itself_the_same_node_and_those_not_enrolled_take_no_tunnel(node: DataNode) -> None:
    node.enforce(shop(remote(Mtls.STRICT), server(Mtls.STRICT)), tunnels=numbers(node, "remote", "server-a"))
    run = subprocess.run(
        inside(node, "caller", ["python3", "-c", CALL, REMOTE, "8080", "5", "2"]), capture_output=True, text=True, check=True, timeout=20
    )
    assert run.stdout.strip() == f"ok {REMOTE}"
    assert node.connect("caller", SERVER, 8080) == f"ok {SERVER}"
    assert node.connect("caller", SERVER6, 8080).startswith("ok fd77")
    assert node.connect("stranger", REMOTE, 8080) == f"ok {REMOTE}"


def test_datagrams_take_no_tunnel(node: DataNode) -> None:
    node.enforce(shop(remote(Mtls.STRICT)), tunnels=numbers(node))
    with node.program("remote", ["python3", "-c", UDP_SERVER, "remote"]):
        for how in ("connected", "unconnected"):
            assert ask(node, "caller", REMOTE, UDP_PORT, how=how) == ["remote"]


@pytest.mark.usefixtures("envoy")
def test_open_connections_count_for_the_endpoint_behind_a_tunnel(node: DataNode) -> None:
    found = shop(remote(Mtls.STRICT))
    service = replace(found.services["default/echo"], load_balancing="least-connections")
    node.enforce(replace(found, services={**found.services, service.name: service}), tunnels=numbers(node))
    table = node.datapath.maps["mesh_load"]
    key = table.layout.key.pack(workload=node.ids.number("workload", "default/remote"), port=8080)

    def load() -> int:
        values = table.get(key)
        return int(table.layout.value.unpack(values[0])[""]) if values else 0

    code = (
        f"import socket,sys\ns=[socket.create_connection(({VIP4!r},80)) for _ in range(3)]\nprint('ready',flush=True); sys.stdin.read()\n"
    )
    with node.program("caller", ["python3", "-c", code]):
        assert load() == 3
    assert until(lambda: load() == 0)


def test_the_tunnel_listener_is_open_to_its_own_namespace_only(node: DataNode) -> None:
    node.enforce(shop(workload("server-b")))
    address = ADDRESSES["server-b"][0]
    with waypoint(node, "server-b", "0.0.0.0,15002"):
        for place in ("client", "caller", "server-b", "stranger"):
            assert refused(node, place, address, 15002) == {Reason.WAYPOINT_PORT}


@pytest.mark.parametrize("address", [SERVER, SERVER6])
def test_the_hbone_port_is_the_waypoints_whatever_the_application_does_and_whatever_its_policy(node: DataNode, address: str) -> None:
    node.enforce(shop(server(Mtls.STRICT, policies=(CLOSED.name,)), workload("remote"), policies=(CLOSED,)))
    with node.program("server-a", ["python3", "-c", TAKER]):
        for place in ("remote", "client", "stranger"):
            assert refused(node, place, address, 15008) == {Reason.NO_LISTENER}
        with waypoint(node, "server-a", f"{SERVER},15008", f"{SERVER6},15008") as envoy:
            for place in ("remote", "client", "stranger"):
                for _ in range(4):
                    assert node.connect(place, address, 15008).startswith("ok")
                    assert envoy.accepted()["local"] == [address, 15008]
        assert refused(node, "client", address, 15008) == {Reason.NO_LISTENER}
    # What steers plain connections is another listener.
    with waypoint(node, "server-a", "0.0.0.0,15006"):
        assert refused(node, "client", SERVER, 15008) == {Reason.NO_LISTENER}


def test_an_undeclared_address_has_no_hbone_port(node: DataNode) -> None:
    node.enforce(shop(server(Mtls.STRICT)))
    node.lab.exec("server-a", ["ip", "address", "add", "10.77.1.98/32", "dev", "eth0"], check=True)
    node.lab.exec("stranger", ["ip", "route", "add", "10.77.1.98", "via", SERVER], check=True)
    try:
        with waypoint(node, "server-a", "0.0.0.0,15008"):
            assert refused(node, "stranger", "10.77.1.98", 15008) == {Reason.UNKNOWN_ADDRESS}
    finally:
        node.lab.exec("stranger", ["ip", "route", "del", "10.77.1.98"], check=True)
        node.lab.exec("server-a", ["ip", "address", "del", "10.77.1.98/32", "dev", "eth0"], check=True)


@pytest.mark.parametrize("address", [SERVER, SERVER6])
def test_a_strict_port_refuses_plaintext_from_outside_the_node_only(node: DataNode, address: str) -> None:
    model = shop(server(Mtls.STRICT, ((8081, Mtls.PERMISSIVE),)), workload("remote"))
    node.enforce(model)
    rule = ("default/remote", "default/server-a", "")
    before = node.verdicts().get(rule, 0)
    for place in ("remote", "client", "stranger"):
        assert refused(node, place, address, 8080) == {Reason.PLAINTEXT}
        assert node.connect(place, address, 8081).startswith("ok")
    assert node.verdicts()[rule] > before
    for place in ("caller", "server-a"):
        assert node.connect(place, address, 8080).startswith("ok")
    run = subprocess.run(
        inside(node, "caller", ["python3", "-c", CALL, address, "8080", "5", "2"]), capture_output=True, text=True, check=True, timeout=20
    )
    assert run.stdout.startswith("ok")
    relaxed = server(Mtls.PERMISSIVE, ((8081, Mtls.STRICT),))
    delta = Delta(model.version, workloads=frozenset({relaxed.name}))
    node.enforce(replace(model, version="later", workloads={**model.workloads, relaxed.name: relaxed}, delta=delta))
    for place in ("remote", "client", "stranger"):
        assert node.connect(place, address, 8080).startswith("ok")
        assert refused(node, place, address, 8081) == {Reason.PLAINTEXT}


def test_a_strict_port_holds_local_callers_to_policy(node: DataNode) -> None:
    node.enforce(shop(server(Mtls.STRICT, policies=(ALLOW_CALLER.name,)), policies=(ALLOW_CALLER,)))
    assert node.connect("other", SERVER, 8080) == "EPERM"
    assert node.connect("caller", SERVER, 8080).startswith("ok")


def test_a_strict_port_takes_no_datagrams_from_outside_the_node_and_gets_its_answers(node: DataNode) -> None:
    node.enforce(shop(server(Mtls.STRICT), workload("remote")))
    with (
        node.program("server-a", ["python3", "-c", UDP_SERVER, "server-a"]),
        node.program("remote", ["python3", "-c", UDP_SERVER, "remote"]),
    ):
        for place in ("remote", "client", "stranger"):
            with node.events() as events:
                assert ask(node, place, SERVER, UDP_PORT) == ["timeout"]
            assert {(Reason(e.reason), e.protocol, e.kind) for e in events} == {(Reason.PLAINTEXT, "UDP", EventKind.DENIED)}
        for how in ("connected", "unconnected"):
            assert ask(node, "caller", SERVER, UDP_PORT, how=how) == ["server-a"]
            assert ask(node, "server-a", REMOTE, UDP_PORT, how=how) == ["remote"]


def test_an_address_of_this_node_without_its_socket_is_no_way_into_a_strict_port(node: DataNode) -> None:
    """Without STRICT nothing protects this pod, and it would be let in."""
    node.enforce(shop(server(Mtls.STRICT)))
    spoof = ["ip", "address", "add", f"{ADDRESSES['other'][0]}/32", "dev", "eth0"]
    node.lab.exec("stranger", spoof, check=True)
    code = (
        f"import socket,errno\ns=socket.socket(); s.settimeout(2); s.bind(('{ADDRESSES['other'][0]}',0))\n"
        f"try: s.connect(('{SERVER}',8080)); print('in')\n"
        "except TimeoutError: print('timeout')\n"
        "except OSError as e: print(errno.errorcode[e.errno])\n"
    )
    try:
        with node.events() as events:
            assert node.lab.exec("stranger", ["python3", "-c", code]).stdout.strip() != "in"
        assert {Reason(e.reason) for e in events} == {Reason.SPOOFED}
    finally:
        node.lab.exec("stranger", ["ip", "address", "del", f"{ADDRESSES['other'][0]}/32", "dev", "eth0"], check=True)
        node.lab.exec("server-a", ["ip", "neigh", "flush", "all"], check=True)


@pytest.mark.usefixtures("envoy")
def test_nothing_is_left_of_tunnels_that_ended_and_no_rare_event_was_counted(node: DataNode) -> None:
    node.enforce(shop(remote(Mtls.STRICT)), tunnels=numbers(node))
    assert node.connect("caller", REMOTE, 8080).startswith("ok")
    assert datanode.until(lambda: not list(node.datapath.maps["mesh_origdst"].items()))
    counters = {name: count for name, count in node.datapath.counters().items() if not name.startswith("event")}
    assert counters == dict.fromkeys(counters, 0)
