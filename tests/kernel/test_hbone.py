"""mTLS between nodes as applications and eavesdroppers see it: traffic, the wire, the modes, outages."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab import mesh, paths, resources
from lab.errors import StartFailed
from lab.lab import Lab
from lab.topology import Node, Outside, Pod, Topology
from tests.kernel import shop, streams
from tests.kernel.wire import listening

pytestmark = pytest.mark.kernel

STREAMS = Path(streams.__file__)
NODES = ("node-1", "node-2")
# /flaky is a 503 in one pod; /ws switches protocols and gives back what comes; everything else gives back the body and says who answered.
WEB = """
import http.server, os, socket
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path == "/ws":
            self.send_response(101); self.send_header("Upgrade", "websocket"); self.send_header("Connection", "Upgrade"); self.end_headers()
            while data := self.connection.recv(65536):
                self.connection.sendall(data)
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(503 if self.path.startswith("/flaky") and os.environ["POD_NAME"] == "web-a" else 200)
        self.send_header("Content-Length", str(len(body))); self.send_header("Secret", self.headers.get("Secret", ""))
        self.send_header("Pod", os.environ["POD_NAME"]); self.send_header("Peer", self.client_address[0].removeprefix("::ffff:"))
        self.end_headers(); self.wfile.write(body)
    do_POST = do_GET
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 512
Server(("::", 8080), Handler).serve_forever()
"""
GRPC_SERVER = """
import grpc
from concurrent import futures
def echo(messages, context):
    for message in messages:
        yield message
class Any(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.stream_stream_rpc_method_handler(echo)
server = grpc.server(futures.ThreadPoolExecutor(8))
server.add_generic_rpc_handlers((Any(),))
server.add_insecure_port("[::]:50051")
server.start()
server.wait_for_termination()
"""
GRPC_CLIENT = """
import grpc, sys, queue
said = queue.Queue()
with grpc.insecure_channel(sys.argv[1]) as channel:
    answers = channel.stream_stream("/any/Echo")(iter(said.get, None))
    for number in range(50):
        said.put(b"%d" % number * 1000)
        assert next(answers) == b"%d" % number * 1000
    said.put(None)
    assert list(answers) == []
print("all", answers.code())
"""
WEBSOCKET = """
import socket, sys
with socket.create_connection((sys.argv[1], 80), timeout=10) as connection:
    connection.sendall(b"GET /ws HTTP/1.1\\r\\nHost: web\\r\\nConnection: Upgrade\\r\\nUpgrade: websocket\\r\\nSec-WebSocket-Version: 13\\r\\n"
                       b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\n\\r\\n")
    head = b""
    while b"\\r\\n\\r\\n" not in head:
        head += connection.recv(1)
    for number in range(50):
        connection.sendall(b"%d" % number)
        assert connection.recv(64) == b"%d" % number
    print(head.split()[1].decode())
"""
SERVE = ("python3", str(STREAMS), "serve")
SERVED = (streams.ECHO, streams.GREETER, streams.SINK, streams.SOURCE, streams.LISTENER)
WEB_COMMAND = ("python3", "-c", WEB)


def pod(name: str, node: int, host: int, *command: str, ports: tuple[int, ...] = ()) -> Pod:
    return Pod(
        name, f"node-{node}", (f"10.77.{node}.{host}", f"fd77:0:0:{node}::{host}"), command=command, ports=ports, service_account=name,
        labels={"app": name.partition("-")[0]},
    )  # fmt: skip


PODS = (
    pod("near", 1, 10, *SERVE, ports=SERVED),
    pod("far", 2, 20, *SERVE, ports=SERVED),
    pod("beside", 2, 21),  # on the node of everything that is called
    pod("redis", 2, 22, "redis-server", "--port", "6379", "--protected-mode", "no", "--save", "", "--appendonly", "no", ports=(6379,)),
    pod("web-a", 2, 23, *WEB_COMMAND, ports=(8080,)),
    pod("web-b", 2, 24, *WEB_COMMAND, ports=(8080,)),
    pod("stream", 2, 25, sys.executable, "-c", GRPC_SERVER, ports=(50051,)),
)
TOPOLOGY = Topology(
    (Node("node-1", 1), Node("node-2", 2)), PODS, (Outside("client", ("10.77.255.200", "fd77:0:0:ff::200")),), identity=True
)
FAR, FAR6 = PODS[1].addresses
MAPPED = f"::ffff:{FAR}"
FAR_VIP, FAR_VIP6 = "10.96.0.20", "fd96::20"
SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  clusterIPs: ["10.96.0.{host}", "fd96::{host}"]
  ipFamilyPolicy: RequireDualStack
  selector: {{app: {name}}}
  ports: [{ports}]
---
"""
ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}}}
spec:
  parentRefs: [{{group: "", kind: Service, name: {name}}}]
  rules: [{{backendRefs: [{{name: {name}, port: {port}}}], retry: {{codes: [503], attempts: 5, backoff: 10ms}}}}]
---
"""
SERVICES = "".join(
    (
        SERVICE.format(name="far", host=20, ports=", ".join(f"{{name: p{port}, port: {port}}}" for port in SERVED)),
        SERVICE.format(name="redis", host=22, ports="{name: redis, port: 6379}"),
        SERVICE.format(name="web", host=23, ports="{name: http, port: 80, targetPort: 8080, appProtocol: http}"),
        SERVICE.format(name="stream", host=25, ports="{name: grpc, port: 50051, appProtocol: kubernetes.io/h2c}"),
        ROUTE.format(name="web", port=80),
        ROUTE.format(name="stream", port=50051),
    )
)
MODE = """
apiVersion: meshagent.io/v1alpha1
kind: PeerAuthentication
metadata: {{name: {name}}}
spec: {{{spec}}}
"""
STRICT = MODE.format(name="all", spec="mtls: {mode: STRICT}")
DISABLE = MODE.format(name="all", spec="mtls: {mode: DISABLE}")
FAR_STRICT = MODE.format(name="far", spec="selector: {matchLabels: {app: far}}, mtls: {mode: STRICT}")
ECHO_STRICT = MODE.format(
    name="far", spec=f"selector: {{matchLabels: {{app: far}}}}, portLevelMtls: {{'{streams.ECHO}': {{mode: STRICT}}}}"
)
MTLS, PLAIN = "mTLS between nodes (HBONE)", "none: plaintext between nodes"
WORKS = (("near", "redis://redis:6379"), ("near", "http://web/"), ("beside", "redis://redis:6379"), ("beside", "http://web/"))
"""Calls between nodes and within one, over L4 and over L7."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes with certificates; everything that is called is on the second."""
    running = Lab(TOPOLOGY)
    try:
        running.up()
    except StartFailed as error:
        pytest.fail(f"{error}\n{error.log}")
    try:
        running.apply("---\n".join(json.dumps(resources.workload(one)) + "\n" for one in PODS), SERVICES)
        running.settle()
        shop.takes(lambda: all(shop.status(node)["identity"]["mode"] == "on" for node in NODES), 30)
        shop.takes(lambda: tunnelled(running, FAR) and tunnelled(running, "web"), 30)
        yield running
    finally:
        left = running.down()
    assert left == []


def run(lab: Lab, place: str, what: str, host: str, port: int, *more: object, timeout: float = 60) -> dict[str, Any]:
    """A client of streams.py."""
    done = lab.exec(place, ["python3", str(STREAMS), what, host, str(port), *map(str, more)], timeout=timeout)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def stats(node: str, pattern: str) -> dict[str, int]:
    """Envoy's counters and gauges whose names match."""
    return {k: v for k, v in mesh.parse_envoy_stats(mesh.envoy_get(node, "/stats?format=json")[1]).items() if re.search(pattern, k)}


def streams_of(node: str) -> int:
    """Connections and requests that this node has sent through tunnels so far."""
    return sum(stats(node, r"^cluster\.tunnel/.*\.upstream_rq_total$").values())


def tunnels_of(node: str) -> int:
    """TLS connections that this node has opened so far."""
    return sum(stats(node, r"^cluster\.tunnel/.*\.upstream_cx_total$").values())


@contextmanager
def through_tunnels(node: str, least: int = 1) -> Iterator[None]:
    """At least so many connections go through tunnels within the block."""
    before = streams_of(node)
    yield
    assert streams_of(node) - before >= least


def tunnelled(lab: Lab, destination: str) -> bool:
    """Does a call that is made now take a tunnel?"""
    before = streams_of("node-1")
    if destination == "web":
        assert shop.codes(lab, "near", "http://web/").keys() <= {"200", "503", "404", "curl 6", "curl 7"}
    else:
        run(lab, "near", "say", destination, streams.ECHO)
    return streams_of("node-1") > before


# L4


@pytest.mark.parametrize("host", [FAR, FAR6, MAPPED, FAR_VIP, FAR_VIP6, f"::ffff:{FAR_VIP}"])
def test_whoever_speaks_first_a_connection_to_another_node_works_and_its_peer_is_what_was_dialled(lab: Lab, host: str) -> None:
    with through_tunnels("node-1", 2):
        assert run(lab, "near", "say", host, streams.ECHO, "ping") == {"peer": [host, streams.ECHO], "answer": "ping", "end": "end"}
        assert run(lab, "near", "greet", host, streams.GREETER) == {
            "peer": [host, streams.GREETER], "first": "220 welcome\r\n", "second": "250 EHLO\r\n",
        }  # fmt: skip


def test_what_goes_through_a_tunnel_is_counted_as_mutual_tls(lab: Lab) -> None:
    def opened(policy: str, **labels: str) -> float:
        return shop.samples(lab, "node-1", "mesh_tcp_connections_opened_total", security_policy=policy, **labels)

    calls = {"source_workload": "near", "destination_workload": "far", "port": str(streams.ECHO), "direction": "outbound"}
    before = {policy: opened(policy, **calls) for policy in ("mutual_tls", "none")}
    for _ in range(7):
        run(lab, "near", "say", FAR, streams.ECHO)
    assert {policy: opened(policy, **calls) - count for policy, count in before.items()} == {"mutual_tls": 7, "none": 0}
    assert opened("mutual_tls", direction="from_waypoint", port="15008") > 0
    assert opened("none", port="15008") == 0


def test_redis_answers_by_service_and_by_address(lab: Lab) -> None:
    hosts = ("redis", "10.96.0.22", "fd96::22", *PODS[3].addresses)
    with through_tunnels("node-1", len(hosts)):
        assert {host: shop.ping(lab, "near", host) for host in hosts} == dict.fromkeys(hosts, "PONG")
    assert shop.ping(lab, "beside") == "PONG"


def test_a_port_that_nobody_listens_on_ends_the_connection(lab: Lab) -> None:
    """A tunnel is accepted before the far end is asked, so this is no refusal of connect()."""
    found = run(lab, "near", "say", FAR, 9999)
    assert "error" in found or (found["answer"], found["end"]) in {("", "end"), ("", "ECONNRESET")}
    assert run(lab, "near", "say", FAR, streams.ECHO)["answer"] == "hello"


def test_a_client_that_ends_first_still_receives(lab: Lab) -> None:
    with through_tunnels("node-1"):
        found = run(lab, "near", "upload", FAR, streams.SINK, 3_000_000)
    assert (found["ok"], found["length"], found["end"]) == (True, 3_000_000, "end")


def test_a_server_that_ends_first_is_heard_and_hears_nothing_more(lab: Lab) -> None:
    """Envoy 1.40 ends both directions of a tunnel then (https://github.com/envoyproxy/envoy/pull/47378). The client notices: nothing is lost silently."""
    with through_tunnels("node-1"):
        found = run(lab, "near", "late", FAR, streams.LISTENER, 3_000_000)
    assert (found["heard"], found["sent"] in {"EPIPE", "ECONNRESET"}) == (3, True)
    assert found["length"] < 3_000_000


@pytest.mark.parametrize("host", [FAR, FAR_VIP6])
def test_a_hundred_megabytes_arrive_whole_each_way(lab: Lab, host: str) -> None:
    with through_tunnels("node-1", 2):
        up = run(lab, "near", "upload", host, streams.SINK, 100_000_000)
        down = run(lab, "near", "download", host, streams.SOURCE, 100_000_000)
    assert [(one["ok"], one["length"], one["end"]) for one in (up, down)] == [(True, 100_000_000, "end")] * 2


@pytest.mark.parametrize("host", [FAR, FAR_VIP])
def test_answers_of_servers_that_end_first_arrive_whole(lab: Lab, host: str) -> None:
    for length, count in ((100, 300), (100_000, 100), (1_000_000, 50)):
        assert run(lab, "near", "answers", host, streams.SOURCE, length, count)["outcomes"] == {"ok": count}


def test_who_is_late_to_read_from_a_server_that_ends_first_gets_what_fits_into_a_window(lab: Lab) -> None:
    found = run(lab, "near", "drain", FAR, streams.SOURCE, 15_000_000, 0, 1)
    assert (found["ok"], found["end"]) == (True, "end")


@pytest.mark.parametrize(("length", "pause", "nap"), [(200_000_000, 0, 0), (200_000_000, 0.001, 0), (30_000_000, 0, 1)])
def test_who_reads_more_than_a_window_from_a_server_that_ends_first_never_takes_a_part_for_all(
    lab: Lab, length: int, pause: float, nap: float
) -> None:
    """When the server ends while the reader lags by more than 16 MiB, Envoy 1.40 drops what is queued (https://github.com/envoyproxy/envoy/pull/47378)."""
    found = run(lab, "near", "drain", FAR, streams.SOURCE, length, pause, nap)
    print(found)
    assert found["end"] == ("end" if found["ok"] else "ECONNRESET")


def test_a_socket_for_ipv6_alone_is_refused_and_not_let_by_in_plaintext(lab: Lab) -> None:
    """There is one IPv6 loopback address only (bpf_src/mesh_connect.c)."""
    code = (
        "import errno, socket\ns = socket.socket(socket.AF_INET6); s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)\n"
        f"print(errno.errorcode.get(s.connect_ex(({FAR6!r}, {streams.ECHO})), 'connected'))"
    )
    assert lab.exec("near", ["python3", "-c", code]).stdout.strip() == "ENETUNREACH"


def test_thousands_of_short_connections_share_a_few_tunnels(lab: Lab) -> None:
    before = tunnels_of("node-1")
    with through_tunnels("node-1", 12_000):
        found = run(lab, "near", "many", FAR, streams.ECHO, 10_000, timeout=100)
        print("10,000:", found)
        crowd = run(lab, "near", "many", FAR_VIP, streams.ECHO, 2_000, 100, timeout=100)
        print("100 at once:", crowd)
    assert (found["outcomes"], crowd["outcomes"]) == ({"ok": 10_000}, {"ok": 2_000})
    print("tunnels", tunnels_of("node-1") - before)
    assert tunnels_of("node-1") - before <= 8


# The wire


def whispered(lab: Lab, marker: str) -> None:
    """Send a marker there and back over L4 and over L7."""
    for host in (FAR, FAR6, FAR_VIP):
        assert run(lab, "near", "say", host, streams.ECHO, marker)["answer"] == marker
    for host in ("web", "[fd96::23]"):
        answer = lab.exec(
            "near", ["curl", "-sS", "-i", "--max-time", "10", "-H", f"Secret: {marker}", "--data", marker, f"http://{host}/{marker}"]
        )
        assert answer.stdout.count(marker) == 2, answer.stderr


@pytest.mark.parametrize("mode", ["", STRICT], ids=["permissive", "strict"])
def test_nothing_that_is_said_between_nodes_can_be_read_on_the_wire(lab: Lab, mode: str) -> None:
    with applied(lab, mode), listening(b"swordfish") as wire:
        whispered(lab, "swordfish")
    assert (wire.marked, wire.plain) == (0, {})
    assert wire.tunnelled > 0


def test_with_mtls_disabled_all_works_and_can_be_read_on_the_wire(lab: Lab) -> None:
    with applied(lab, DISABLE):
        assert (encryption(lab, "far"), encryption(lab, "web")) == (PLAIN, PLAIN)
        # Idle tunnels of before say goodbye, and answer pings until then.
        shop.takes(
            lambda: not any(sum(stats(node, r"^cluster\.tunnel/.*\.upstream_cx_active$").values()) for node in ("node-1", "node-2")), 30
        )
        before = streams_of("node-1")
        with listening(b"swordfish") as wire:
            whispered(lab, "swordfish")
        assert streams_of("node-1") == before
    assert wire.marked >= 2 * 5
    assert (wire.tunnelled, wire.plain.total() > 0) == (0, True)
    assert encryption(lab, "far") == MTLS


def applied(lab: Lab, document: str) -> contextlib.AbstractContextManager[None]:
    return shop.applied(lab, document) if document else contextlib.nullcontext()


def encryption(lab: Lab, destination: str, source: str = "near", node: str = "node-1") -> str:
    """What the plan of a trace says."""
    return str(shop.plan(lab, node, source, destination)["encryption"])


# Modes


def outside(lab: Lab, port: int = streams.ECHO, host: str = FAR) -> str:
    """What a host that is not in the mesh gets."""
    found = run(lab, "client", "say", host, port)
    return str(found.get("error", found.get("answer")))


@pytest.mark.parametrize(
    ("mode", "echo", "other", "redis"),
    [
        pytest.param("", "hello", "hello", "PONG", id="permissive"),
        pytest.param(STRICT, "ECONNREFUSED", "ECONNREFUSED", "refused", id="strict-namespace"),
        pytest.param(FAR_STRICT, "ECONNREFUSED", "ECONNREFUSED", "PONG", id="strict-workload"),
        pytest.param(ECHO_STRICT, "ECONNREFUSED", "hello", "PONG", id="strict-port"),
        pytest.param(DISABLE, "hello", "hello", "PONG", id="disable"),
    ],
)
def test_a_mode_is_for_its_ports_and_only_those_outside_the_mesh_notice(lab: Lab, mode: str, echo: str, other: str, redis: str) -> None:
    with applied(lab, mode):
        for host in (FAR, FAR6):
            started = time.monotonic()
            assert outside(lab, host=host) == echo
            assert time.monotonic() - started < 5, "at once"
        greeted = run(lab, "client", "greet", FAR, streams.GREETER)
        assert greeted.get("error", "hello") == other
        said = shop.ping(lab, "client", PODS[3].addresses[0])
        assert redis in said
        with through_tunnels("node-1", 0 if mode == DISABLE else 2):
            for place in ("near", "beside"):
                assert run(lab, place, "say", FAR, streams.ECHO)["answer"] == "hello"
                assert shop.ping(lab, place) == "PONG"
                assert shop.codes(lab, place, "http://web/") == {"200": 1}
        assert encryption(lab, "far") == (PLAIN if mode == DISABLE else MTLS)
        assert encryption(lab, "far", "beside", "node-2") == "none: both ends are on one node"


def test_a_mode_that_becomes_strict_and_permissive_again_fails_no_call_and_leaves_nothing_readable(lab: Lab) -> None:
    with listening() as wire, shop.loads(lab, *WORKS) as calls:
        for _ in range(3):
            with shop.applied(lab, STRICT):
                time.sleep(0.5)  # some calls
            time.sleep(0.5)
    assert [shop.outcomes(found).keys() for found in calls] == [{"PONG"}, {"200"}] * 2
    assert (wire.plain, wire.tunnelled > 0) == ({}, True)


def test_a_mode_that_becomes_disabled_and_permissive_again_fails_no_call(lab: Lab) -> None:
    with shop.loads(lab, *WORKS) as calls:
        for _ in range(2):
            with shop.applied(lab, DISABLE):
                time.sleep(0.5)  # some calls
            time.sleep(0.5)
    assert [shop.outcomes(found).keys() for found in calls] == [{"PONG"}, {"200"}] * 2


def test_a_mode_that_becomes_strict_ends_connections_in_plaintext_and_no_others(lab: Lab) -> None:
    with shop.applied(lab, DISABLE):
        plain = holding(lab, "near")
    with holding(lab, "client") as stranger, holding(lab, "near") as caller, holding(lab, "beside") as neighbour, plain as early:
        with shop.applied(lab, FAR_STRICT):
            shop.takes(lambda: stranger.poll() is not None and early.poll() is not None)
            assert (ended(stranger)["end"] in CUT, ended(early)["end"] in CUT) == (True, True)
            assert run(lab, "near", "say", FAR, streams.ECHO)["answer"] == "hello"
        for one in (caller, neighbour):
            one.terminate()
            assert ended(one)["end"] == "open"


def test_a_mode_that_becomes_disabled_and_permissive_again_ends_no_connection(lab: Lab) -> None:
    with holding(lab, "near") as tunnel:
        with shop.applied(lab, DISABLE), holding(lab, "near") as plain:
            assert run(lab, "near", "say", FAR, streams.ECHO)["answer"] == "hello"
            time.sleep(1)  # some use
            plain.terminate()
            assert ended(plain)["end"] == "open"
        tunnel.terminate()
        assert ended(tunnel)["end"] == "open"


CUT = {"end", "ECONNRESET", "ECONNABORTED", "EPIPE"}


def holding(lab: Lab, place: str) -> subprocess.Popen[str]:
    """Somebody who uses one connection to `FAR` all the time."""
    process = lab.popen(place, ["python3", str(STREAMS), "hold", FAR, str(streams.ECHO)])
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    return process


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What became of it."""
    out, error = process.communicate(timeout=20)
    assert process.returncode == 0, error
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_strict_workload_gets_no_datagram_from_outside_its_node(lab: Lab) -> None:
    for place in ("near", "beside", "client"):
        assert run(lab, place, "datagram", FAR, streams.DATAGRAMS)["outcomes"] == {"ping": 5}
    with shop.applied(lab, FAR_STRICT):
        for host in (FAR, FAR6):
            for place in ("near", "client"):
                assert "ping" not in run(lab, place, "datagram", host, streams.DATAGRAMS)["outcomes"]
            assert run(lab, "beside", "datagram", host, streams.DATAGRAMS)["outcomes"] == {"ping": 5}


# Outages


@contextmanager
def unharmed(lab: Lab, *, but: str = "") -> Iterator[None]:
    """No call fails within the block, and not one goes over the wire in plaintext, except with an address that is new: PERMISSIVE until there is a tunnel."""
    with listening() as wire, shop.loads(lab, *WORKS) as calls:
        yield
    assert [shop.outcomes(found).keys() for found in calls] == [{"PONG"}, {"200"}] * 2
    assert min(map(len, calls)) > 10
    assert ({ends for ends in wire.plain if but not in ends}, wire.tunnelled > 0) == (set(), True)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("mode", ["", STRICT], ids=["permissive", "strict"])
def test_an_agent_that_is_killed_and_started_fails_no_call_and_nothing_becomes_readable(lab: Lab, node: str, mode: str) -> None:
    with applied(lab, mode), unharmed(lab):
        for _ in range(2):
            lab.kill_agent(node)
            time.sleep(0.3)
            lab.start_agent(node)
    shop.takes(lambda: not shop.status(node)["problems"])


def test_a_controller_that_is_away_while_agents_restart_fails_no_call_and_nothing_becomes_readable(lab: Lab) -> None:
    with unharmed(lab):
        lab.controller_stop()
        for node in NODES:
            lab.kill_agent(node)
            lab.start_agent(node)
        time.sleep(1)
        lab.controller_start()
        shop.takes(lambda: all(shop.status(node)["controller"]["connected"] for node in NODES), 20)
    shop.takes(lambda: not any(shop.status(node)["problems"] for node in NODES), 20)


def test_an_agent_that_keeps_its_keys_has_the_same_certificates_after_a_restart_without_the_controller(lab: Lab) -> None:
    """Kept in memory that outlives it, a tmpfs; the other tests' agents keep theirs nowhere, and Envoy has them."""

    def serials() -> dict[str, str]:
        return {one["workload"]: one["serial"] for one in shop.status("node-1")["identity"]["workloads"]}

    def restart() -> None:
        lab.kill_agent("node-1")
        lab.start_agent("node-1")

    directory = paths.agent_run("node-1") / "identity"
    directory.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0700", "mesh-keys", str(directory)], check=True)
    try:
        restart()
        shop.takes(lambda: (directory / "svids.json").exists() and all(serials().values()) and not shop.status("node-1")["problems"], 30)
        with unharmed(lab):
            before = serials()
            lab.controller_stop()
            restart()
            shop.takes(lambda: serials() == before, 20)
            assert "default/near" in before
            time.sleep(1)  # of calls
            lab.controller_start()
            shop.takes(lambda: shop.status("node-1")["controller"]["connected"], 20)
        shop.takes(lambda: not any(shop.status(node)["problems"] for node in NODES), 20)
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)
        restart()
    shop.takes(lambda: not shop.status("node-1")["problems"] and all(serials().values()), 30)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("mode", ["", STRICT], ids=["permissive", "strict"])
def test_without_envoy_calls_between_nodes_fail_and_are_not_readable_and_work_again_soon(lab: Lab, node: str, mode: str) -> None:
    with applied(lab, mode), listening() as wire, shop.loads(lab, *WORKS) as calls:
        before = shop.status(node)["waypoint"]["pid"]
        os.kill(before, signal.SIGKILL)
        shop.takes(lambda: (found := shop.status(node)["waypoint"])["ready"] and found["pid"] != before)
        took = shop.takes(lambda: shop.ping(lab, "near") == "PONG" and shop.codes(lab, "near", "http://web/") == {"200": 1})
        print(f"{node} works again {took:.1f} s after its Envoy was ready")
    assert (wire.plain, wire.tunnelled > 0) == ({}, True)
    print([shop.outcomes(found) for found in calls])
    assert shop.outcomes(calls[2]).keys() == {"PONG"}, "L4 within a node needs no Envoy"
    closed = {"ECONNREFUSED", "ECONNRESET", "RemoteDisconnected", "", "EPIPE", "503", "ETIMEDOUT"}
    for found, good in zip(calls, ("PONG", "200", "PONG", "200"), strict=True):
        assert shop.outcomes(found).keys() <= closed | {good}
        assert found[-1].outcome == good


def roots() -> list[str]:
    """The stages of the controller's roots."""
    shown = subprocess.run(
        [mesh.program("mesh-controller"), "ca", "show", "--ca-directory", str(paths.CA), "-o", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(root["stage"] for root in json.loads(shown.stdout)["roots"])


def test_a_rotated_root_drops_no_connection_and_new_certificates_are_believed(lab: Lab) -> None:
    late = pod("late", 2, 40, *SERVE, ports=SERVED)
    with unharmed(lab, but=late.addresses[0]):
        held = holding(lab, "near")
        rotate = [mesh.program("mesh-controller"), "ca", "rotate", "--ca-directory", str(paths.CA), "--wait", "0s"]
        subprocess.run(rotate, check=True, capture_output=True)
        print("the new root signs after", shop.takes(lambda: roots() == ["retired", "signing"], 30))
        lab.add_pod(late)
        try:
            with shop.applied(lab, json.dumps(resources.workload(late))):
                shop.takes(lambda: certificate("late"))
                with through_tunnels("node-1"):
                    shop.takes(lambda: tunnelled(lab, late.addresses[0]))
                    assert run(lab, "near", "say", late.addresses[0], streams.ECHO)["answer"] == "hello"
                with through_tunnels("node-2"):
                    assert run(lab, "late", "say", PODS[0].addresses[1], streams.ECHO)["answer"] == "hello"
        finally:
            lab.remove_pod("late")
        held.terminate()
        found = ended(held)
    assert (found["end"], found["count"] > 10) == ("open", True)


def certificate(name: str) -> bool:
    """Has node-2 a certificate for a workload?"""
    return any(one["workload"] == f"default/{name}" and one["serial"] for one in shop.status("node-2")["identity"]["workloads"])


# L7


@contextmanager
def unreadable() -> Iterator[None]:
    """There are tunnels on the wire, and nothing else."""
    with listening() as wire:
        yield
    assert (wire.plain, wire.tunnelled > 0) == ({}, True)


def test_a_request_to_another_node_goes_through_a_tunnel_and_is_retried_at_another_endpoint(lab: Lab) -> None:
    with unreadable():
        answer = shop.get(lab, "near", "http://web/", "-H", "Secret: x")
        assert (answer["status"], answer["headers"]["secret"]) == (200, ["x"])
        assert answer["headers"]["peer"][0] in {*PODS[4].addresses, *PODS[5].addresses}, "its own: the tunnel ends in its pod"
        assert shop.codes(lab, "near", "http://web/?[1-50]") == {"200": 50}
        assert shop.codes(lab, "near", "http://web/flaky?[1-20]") == {"200": 20}
    assert sum(stats("node-1", r"^cluster\.service/default/web/80\.upstream_rq_retry$").values()) > 0


def test_a_websocket_between_nodes_goes_both_ways(lab: Lab) -> None:
    with unreadable():
        for host in ("web", "10.96.0.23"):
            done = lab.exec("near", ["python3", "-c", WEBSOCKET, host])
            assert done.stdout.strip() == "101", done.stderr


def test_a_grpc_stream_between_nodes_goes_both_ways(lab: Lab) -> None:
    with unreadable():
        done = lab.exec("near", [sys.executable, "-c", GRPC_CLIENT, "10.96.0.25:50051"])
    assert done.stdout.strip() == "all StatusCode.OK", done.stderr


# Certificates


def test_a_workload_that_appears_has_a_certificate_at_once(lab: Lab) -> None:
    took = []
    for number in range(3):
        new = pod(f"new-{number}", 2, 50 + number)
        lab.add_pod(new)
        try:
            document = json.dumps(resources.workload(new))
            lab.apply(document)
            started = time.monotonic()
            shop.takes(partial(certificate, new.name))
            took.append(time.monotonic() - started)
            shop.delete(lab, document)
        finally:
            lab.remove_pod(new.name)
    print("certificate after", took)
    assert max(took) < 2


@pytest.mark.usefixtures("lab")
def test_agents_and_envoys_complain_of_nothing() -> None:
    for node in NODES:
        assert shop.status(node)["problems"] == []
        complaints = Counter(
            line for line in paths.log(f"agent-{node}").read_text().splitlines() if '"level": "error"' in line and "envoy died" not in line
        )
        assert complaints == {}
