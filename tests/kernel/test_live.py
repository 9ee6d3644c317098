"""Connections while they live: counted to the byte, and closed when a new policy forbids them."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent import revocation as revocation_module
from agent import telemetry
from agent.bpf import acceleration
from agent.bpf.manifest import WORKLOAD_ACCELERATE, Direction
from agent.bpf.sockets import LiveSocket, Sockets
from agent.model import Action, Operation, Policy, PolicyRule, Snapshot
from agent.revocation import Revocation, Rules
from tests.kernel import datanode
from tests.kernel.datanode import ALLOW_CALLER, FAMILIES, VIP_EMPTY, DataNode, address_of, snapshot, workload

pytestmark = pytest.mark.kernel

TALK = """
import errno, socket, sys, threading
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
print(s.getsockname()[1], flush=True)
for line in sys.stdin:
    size = int(line)
    try:
        sender = threading.Thread(target=s.sendall, args=(b"x" * (size - 1),))
        s.sendall(b"x")  # what fails, fails here
        sender.start()
        left = size
        while left:
            got = len(s.recv(min(left, 1 << 20)))
            if not got:
                raise ConnectionResetError(errno.ECONNRESET, "")
            left -= got
        sender.join()
        print("ok", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
s.shutdown(socket.SHUT_WR)
while s.recv(65536):
    pass
"""
SIZE = 5_000_011
READS = Policy("default/p", Action.ALLOW, (PolicyRule((), (Operation(methods=("GET",)),)),))


def shop(*policies: Policy) -> Snapshot:
    protected = tuple(p.name for p in policies)
    return snapshot(
        workload("caller"), workload("other"), workload("server-a", policies=protected), workload("server-b"), policies=policies
    )


class Talker:
    """A connection to an echo server that a test keeps open."""

    def __init__(self, node: DataNode, place: str, address: str, port: int = 8080) -> None:
        self._process = subprocess.Popen(
            node.lab.command(place, ["python3", "-c", TALK, address, str(port)]),
            env=node.lab.environment(node.lab.topology.place(place)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def exchange(self, size: int = 5) -> str:
        """Send that much and get it back: "ok" or the name of the errno."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{size}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """Close this end first, as most clients do."""
        self._process.communicate(timeout=5)


@contextmanager
def talking(node: DataNode, *connections: tuple[str, str]) -> Iterator[list[Talker]]:
    """Living connections (place, address)."""
    talkers = [Talker(node, place, address) for place, address in connections]
    try:
        yield talkers
    finally:
        for talker in talkers:
            talker._process.kill()
            talker._process.communicate()


class Page:
    """What a scrape says. One object over a test: counters must not fall from one reading to the next."""

    def __init__(self, node: DataNode) -> None:
        self._metrics = telemetry.FlowMetrics(node.datapath, node.ids, lambda: node.enrolled)

    def text(self) -> str:
        return "".join(self._metrics.text())

    def read(self, source: str, destination: str, direction: str, port: int = 8080, **labels: str) -> dict[str, float]:
        """Sums of a pair's samples by name, without histograms' buckets."""
        wanted = {"source_workload": source, "destination_workload": destination, "direction": direction, "port": str(port), **labels}
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.text()):
            for sample in family.samples:
                if wanted.items() <= sample.labels.items() and "le" not in sample.labels:
                    name = sample.name.removeprefix("mesh_tcp_").removeprefix("connections_").removesuffix("_total")
                    found[name] = found.get(name, 0) + sample.value
        return found


def sockets(node: DataNode, place: str) -> list[LiveSocket]:
    return list(Sockets(node.datapath.maps).dump(Path(node.lab.netns(place))))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transfer_is_counted_to_the_byte_while_it_lives_and_when_it_has_ended(node: DataNode, family: socket.AddressFamily) -> None:
    node.enforce(shop())
    page = Page(node)
    Talker(node, "caller", address_of("server-a", family)).close()  # the pair is known from now on

    def grown() -> dict[str, dict[str, float]]:
        now = {d: page.read("caller", "server-a", d) for d in ("outbound", "inbound")}
        return {d: {k: now[d][k] - before[d][k] for k in ("opened", "active", "closed", "sent_bytes", "received_bytes")} for d in now}

    before = {d: page.read("caller", "server-a", d) for d in ("outbound", "inbound")}
    with talking(node, ("caller", address_of("server-a", family))) as (talker,):
        assert talker.exchange(SIZE) == "ok"
        expected = {"opened": 1, "active": 1, "closed": 0, "sent_bytes": SIZE, "received_bytes": SIZE}
        assert datanode.until(lambda: grown() == {"outbound": expected, "inbound": expected}), grown()
        assert talker.exchange(SIZE) == "ok"
        expected |= {"sent_bytes": 2 * SIZE, "received_bytes": 2 * SIZE}
        assert datanode.until(lambda: grown() == {"outbound": expected, "inbound": expected}), grown()
        talker.close()
        expected |= {"active": 0, "closed": 1}
        assert datanode.until(lambda: grown()["inbound"] == expected), grown()
        # This end closed first: the peer's FIN counts as a byte (bpf_src/mesh_sockops.c, mesh_payload).
        assert datanode.until(lambda: grown()["outbound"] == {**expected, "received_bytes": 2 * SIZE + 1}), grown()


def test_bytes_that_go_past_tcp_are_counted_while_their_connection_lives(node: DataNode) -> None:
    node.enforce(shop())
    page = Page(node)
    Talker(node, "caller", address_of("server-a")).close()
    before = {d: page.read("caller", "server-a", d) for d in ("outbound", "inbound")}
    for name in ("mesh_workload", "mesh_address"):
        table = node.datapath.maps[name]
        for key, (row,) in list(table.items()):
            table.put(key, table.layout.value.pack(**{**table.layout.value.unpack(row), "flags": WORKLOAD_ACCELERATE}))
    (programs,) = node.config.pin_dir.glob("programs-*")
    acceleration.attach(programs, node.datapath.pins.maps)

    def grown() -> dict[str, tuple[float, float]]:
        now = {d: page.read("caller", "server-a", d) for d in before}
        return {d: (now[d]["sent_bytes"] - before[d]["sent_bytes"], now[d]["received_bytes"] - before[d]["received_bytes"]) for d in before}

    with talking(node, ("caller", address_of("server-a"))) as (talker,):
        assert talker.exchange(100_003) == "ok"
        (row,) = [values[0] for _, values in node.datapath.maps["mesh_pair"].items()]
        assert sum(node.datapath.maps["mesh_pair"].layout.value.unpack(row)["bytes"]) > 100_003, "most of it went past TCP"
        assert datanode.until(lambda: grown() == dict.fromkeys(before, (100_003, 100_003))), grown()


def test_no_counter_falls_while_connections_come_and_go(node: DataNode) -> None:
    node.enforce(shop())
    page = Page(node)
    names = ("opened", "closed", "sent_bytes", "received_bytes", "retransmits")
    busy = "import socket\nfor _ in range(400):\n  s=socket.create_connection(('{}',8080)); s.sendall(b'x'*1000); s.recv(1000); s.close()\n"
    client = node.lab.popen("caller", ["python3", "-c", busy.format(address_of("server-b"))])
    last: dict[str, float] = {}
    looks = 0
    while client.poll() is None:
        now = page.read("caller", "server-b", "outbound")
        assert all(now.get(name, 0) >= last.get(name, 0) for name in names), (last, now)
        last, looks = now, looks + 1
    client.communicate()
    assert looks > 1
    assert datanode.until(lambda: page.read("caller", "server-b", "outbound")["active"] == 0)
    now = page.read("caller", "server-b", "outbound")
    assert now["opened"] == now["closed"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_counted_of_a_living_connection_is_what_ss_says(node: DataNode, family: socket.AddressFamily) -> None:
    node.enforce(shop())
    with talking(node, ("other", address_of("server-b", family))) as (talker,):
        assert talker.exchange(SIZE) == "ok"
        for place, syn in (("other", 1), ("server-b", 0)):  # the kernel counts the SYN of the end that called

            def agree(place: str = place, syn: int = syn) -> bool:
                said = node.lab.exec(place, ["ss", "-tinH", f"sport = :{talker.port} or dport = :{talker.port}"], check=True).stdout
                (found,) = [s for s in sockets(node, place) if talker.port in {port for _, port in s.ends}]
                numbers = {name: int(value) for name, value in re.findall(r"(bytes_acked|bytes_received):(\d+)", said)}
                return numbers == {"bytes_acked": found.sent_bytes + syn, "bytes_received": found.received_bytes}

            assert datanode.until(agree)


@pytest.mark.skipif(shutil.which("iperf3") is None, reason="iperf3 is not installed")
def test_totals_agree_with_iperf3(node: DataNode) -> None:
    node.enforce(shop())
    page = Page(node)
    block = 16 << 10
    command = ["iperf3", "-c", address_of("server-a"), "-p", "5201", "-n", "20M", "-l", str(block), "-b", "200M", "-J"]
    with node.program("server-a", ["iperf3", "-s", "-1", "-p", "5201", "--forceflush"], says="listening") as server:
        run = node.lab.exec("caller", command, check=True)
        server.communicate(timeout=5)
    said = json.loads(run.stdout)["end"]
    for direction in ("outbound", "inbound"):  # its control connection, and the data
        assert datanode.until(lambda d=direction: page.read("caller", "server-a", d, 5201).get("closed") == 2)
    sent = page.read("caller", "server-a", "outbound", 5201)["sent_bytes"]
    received = page.read("caller", "server-a", "inbound", 5201)["received_bytes"]
    # What is not data: a cookie of 37 bytes on each connection, and the parameters and results in JSON on the control connection, 0.5 kB in all.
    # When the client says that it is done the server closes the data connection, with blocks unread or even under way: what was not acknowledged
    # then is not counted as sent.
    assert received - (64 << 10) <= sent <= said["sum_sent"]["bytes"] + 1024
    assert 2 * 37 <= received - said["sum_received"]["bytes"] <= block + 1024


FULL = """
import socket, time
s = socket.create_server(("", 9001), backlog=0)
c = socket.create_connection(("127.0.0.1", 9001))
print("ready", flush=True)
time.sleep(60)
"""


def test_failures_are_told_apart_by_errno(node: DataNode) -> None:
    node.enforce(shop(ALLOW_CALLER))
    page = Page(node)

    def failed(destination: str, error: str, port: int | str = 9001, source: str = "caller") -> float:
        found = 0.0
        for family in text_string_to_metric_families(page.text()):
            for s in family.samples:
                ends = (s.labels.get("source_workload"), s.labels.get("destination_workload"), s.labels.get("port"), s.labels.get("errno"))
                if s.name == "mesh_tcp_connections_failed_total" and ends == (source, destination, str(port), error):
                    found += s.value
        return found

    with node.program("server-a", ["python3", "-c", FULL]):
        run = (
            "import socket,errno\ns=socket.socket(); s.setsockopt(6,7,1)\n"  # TCP_SYNCNT
            f"try: s.connect(('{address_of('server-a')}',9001))\nexcept OSError as e: print(errno.errorcode[e.errno])\n"
        )
        assert node.lab.exec("caller", ["python3", "-c", run], check=True).stdout.strip() == "ETIMEDOUT"
        assert datanode.until(lambda: failed("server-a", "ETIMEDOUT") == 1)
        give_up = (
            f"import socket\ns=socket.socket(); s.setblocking(False); print(s.connect_ex(('{address_of('server-a')}',9001))); s.close()"
        )
        node.lab.exec("caller", ["python3", "-c", give_up], check=True)
        assert datanode.until(lambda: failed("server-a", "ECANCELED") == 1)
    assert node.connect("caller", address_of("server-a"), 9999) == "ECONNREFUSED"
    assert datanode.until(lambda: failed("server-a", "ECONNREFUSED", 9999) == 1)
    assert node.connect("other", address_of("server-a"), 8080) == "EPERM"
    assert failed("server-a", "EPERM", "", "other") == 1, "the mesh's own refusal"
    assert node.connect("caller", VIP_EMPTY, 80) == "ECONNREFUSED"
    assert failed("", "ECONNREFUSED", 80) == 1, "a service without endpoints"


def test_the_page_has_every_sample_once_and_every_family_in_one_piece(node: DataNode) -> None:
    page = Page(node).text()
    kinds = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds))
    samples = [line.rpartition(" ")[0] for line in page.splitlines() if not line.startswith("#")]
    assert samples
    assert len(samples) == len(set(samples))
    if shutil.which("promtool"):
        run = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_policy_closes_exactly_the_connections_that_it_forbids(
    node: DataNode, family: socket.AddressFamily, caplog: pytest.LogCaptureFixture
) -> None:
    node.enforce(shop())
    revocation = Revocation(node.config, node.datapath, node.ids)
    revocation.changed(Rules(shop(), node.enrolled))
    assert revocation.close_forbidden() == 0
    a, b = address_of("server-a", family), address_of("server-b", family)
    with talking(node, ("caller", a), ("other", b), ("other", a), ("stranger", a), ("remote", a), ("server-a", a)) as talkers:
        before = [t.exchange() for t in talkers]
        assert before == ["ok"] * 6
        node.enforce(shop(ALLOW_CALLER))
        revocation.changed(Rules(shop(ALLOW_CALLER), node.enrolled))
        assert revocation.close_forbidden() == 3
        assert [t.exchange() for t in talkers] == ["ok", "ok", "ECONNABORTED", "ECONNRESET", "ECONNRESET", "ok"]
        assert revocation.close_forbidden() == 0
        assert revocation.closed == 3
    said = [r.__dict__ for r in caplog.records if r.message == "a connection was closed: a policy forbids it now"]
    assert {(s["source"], s["destination"], s["rule"]) for s in said} == {
        (source, "default/server-a", "default/p: no rule matches")
        for source in ("default/other", address_of("stranger", family), address_of("remote", family))
    }


def test_changes_lead_to_a_look_by_themselves_and_with_the_option_to_none(node: DataNode) -> None:
    for keep in (True, False):
        node.enforce(shop())
        revocation = Revocation(replace(node.config, keep_connections=keep), node.datapath, node.ids)

        async def change(revocation: Revocation = revocation) -> str:
            running = asyncio.create_task(revocation.run())
            node.enforce(shop(ALLOW_CALLER))
            revocation.changed(Rules(shop(ALLOW_CALLER), node.enrolled))
            await asyncio.sleep(0.5)
            running.cancel()
            return talker.exchange()

        with talking(node, ("other", address_of("server-a"))) as (talker,):
            assert talker.exchange() == "ok"
            assert asyncio.run(change()) == ("ok" if keep else "ECONNABORTED")


def test_what_a_waypoint_may_have_in_a_pool_has_time_to_end(node: DataNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy needs the request: applications end at once, and strangers; the waypoint of another node is given time, and no more."""
    monkeypatch.setattr(revocation_module, "LET_GO_S", 1.0)
    monkeypatch.setattr(revocation_module, "SETTLE_S", 0.2)
    monkeypatch.setattr(revocation_module, "PAUSE_S", 0.1)

    def known(*policies: Policy) -> Snapshot:
        server = workload("server-a", policies=tuple(p.name for p in policies))
        return snapshot(workload("caller"), workload("remote"), server, policies=policies)

    node.enforce(known())
    revocation = Revocation(node.config, node.datapath, node.ids)
    revocation.changed(Rules(known(), node.enrolled))
    a = address_of("server-a")

    async def change() -> list[list[str]]:
        running = asyncio.create_task(revocation.run())
        node.enforce(known(READS))
        revocation.changed(Rules(known(READS), node.enrolled))
        seen = []
        for pause in (0.5, 1.5):
            await asyncio.sleep(pause)
            seen.append([talker.exchange() for talker in talkers])
        running.cancel()
        return seen

    with talking(node, ("caller", a), ("stranger", a), ("remote", a)) as talkers:
        assert [talker.exchange() for talker in talkers] == ["ok"] * 3
        assert asyncio.run(change()) == [["ECONNABORTED", "ECONNRESET", "ok"], ["EPIPE", "EPIPE", "ECONNRESET"]]


def test_a_connection_that_was_closed_by_policy_is_counted_as_reset(node: DataNode) -> None:
    node.enforce(shop())
    resets = node.stats("default/other", "default/server-a", Direction.OUTBOUND)["reset"]
    with talking(node, ("other", address_of("server-a"))):
        node.enforce(shop(ALLOW_CALLER))
        revocation = Revocation(node.config, node.datapath, node.ids)
        revocation.changed(Rules(shop(ALLOW_CALLER), node.enrolled))
        assert revocation.close_forbidden() == 1
        assert datanode.until(lambda: node.stats("default/other", "default/server-a", Direction.OUTBOUND)["reset"] == resets + 1)
