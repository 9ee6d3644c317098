"""WireGuard between nodes, by the agent's own code, on kernels that have it: `make test-kernels ARGS="--suite wireguard"` runs it on Debian's."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.config import HBONE_PORT
from agent.model import Node
from agent.wireguard import device
from lab import netns
from tests.kernel import wgnodes
from tests.kernel.wgnodes import Mesh, ask, bulk, call, dial, exchange, listening, pod, serving, workload

FAMILIES = (pytest.param(socket.AF_INET, id="ipv4"), pytest.param(socket.AF_INET6, id="ipv6"))
SECRET = b"a word that only pods may read " * 3


@pytest.fixture(scope="module")
def wires() -> Iterator[None]:
    if reason := wgnodes.unavailable():
        pytest.skip(reason)
    wgnodes.tear_down()
    wgnodes.build()
    try:
        yield
    finally:
        wgnodes.tear_down()


@pytest.fixture
def mesh(wires: None, tmp_path: Path) -> Iterator[Mesh]:  # noqa: ARG001  needs the namespaces
    """Three nodes that encrypt; without their devices afterwards."""
    found = Mesh(tmp_path)
    try:
        found.settle(found.model())
        yield found
    finally:
        for node in found.nodes.values():
            node.inside(node.part._device.remove)


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("family", FAMILIES)
def test_pods_of_two_nodes_talk_and_the_wire_shows_no_byte_of_it(family: int) -> None:
    with serving(2), serving(1), listening(SECRET) as seen:
        call(1, 2, family, SECRET * 23)
        call(2, 1, family, SECRET * 23)
        assert ask(1, 2, family, SECRET)
        assert ask(2, 1, family, SECRET)
    assert (seen.plain, seen.encrypted > 8) == (0, True)


def test_the_listener_on_the_wire_would_have_seen_it(mesh: Mesh) -> None:
    mesh.apply(replace(mesh.model(), nodes={}))
    with serving(2), listening(SECRET) as seen:
        call(1, 2, socket.AF_INET, SECRET)
    assert seen.plain > 0
    assert not any(wgnodes.is_there(node) for node in mesh.nodes.values())
    node = mesh.nodes[1]
    assert (node.inside(node.part._device.sources), node.inside(node.part._device.routes)) == (frozenset(), frozenset())
    assert "15008" not in node.ip("rule show")


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("family", FAMILIES)
def test_large_transfers_arrive_whole(family: int) -> None:
    with serving(2), listening(SECRET) as seen:
        bulk(1, 2, family, 4 << 20, SECRET)
        for size in (1300, 1372, 1392, 1400, 1440, 1472, 4000):  # around the MTU, and fragments
            assert ask(1, 2, family, (SECRET * 60)[:size]), size
    assert seen.plain == 0


def test_a_node_with_another_key_than_it_announced_gets_nothing_and_gives_nothing(mesh: Mesh) -> None:
    wgnodes.rekeyed_behind(mesh.nodes[3])
    with serving(1), serving(3), listening(SECRET) as seen:
        assert not ask(3, 1, socket.AF_INET, SECRET, timeout=4)
        assert not ask(1, 3, socket.AF_INET, SECRET, timeout=4)
    assert seen.plain == 0


def test_a_node_that_is_removed_loses_access(mesh: Mesh) -> None:
    with serving(1):
        with dial(3, 1, socket.AF_INET) as connection:
            exchange(connection, SECRET)
            model = mesh.model(workload(1), workload(2), nodes={n: node for n, node in mesh.model().nodes.items() if n != "node-3"})
            mesh.apply(model, 1, 2)
            connection.settimeout(3)
            with pytest.raises(TimeoutError):
                exchange(connection, SECRET)
        assert not ask(3, 1, socket.AF_INET, SECRET, timeout=3)
        assert ask(2, 1, socket.AF_INET, SECRET)
    assert mesh.nodes[1].part.direct.nodes == {"node-2"}


def test_a_node_cannot_use_the_addresses_of_another_nodes_workloads(mesh: Mesh) -> None:
    """Node 3 makes its pod send with the address of node 2's: it is encrypted with node 3's key, and so dropped."""
    stolen = pod(2)
    wgnodes.ip(wgnodes.pod_netns(3), f"address add {stolen}/32 dev eth0")
    mesh.nodes[3].ip(f"route add {stolen}/32 dev pod0", f"rule add from {stolen} priority 701 lookup 51871")
    try:
        heard = netns.inside(wgnodes.pod_netns(1), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with heard, listening(SECRET) as seen:
            heard.bind(("", 7777))
            heard.settimeout(3)
            assert not ask(3, 1, socket.AF_INET, SECRET, timeout=2, bound=stolen)
            with pytest.raises(TimeoutError):
                heard.recv(1 << 16)
            sent = seen.encrypted
        assert sent > 0  # it left node 3, encrypted
        assert seen.plain == 0
    finally:
        wgnodes.ip(wgnodes.pod_netns(3), f"address del {stolen}/32 dev eth0")
        mesh.nodes[3].ip(f"rule del from {stolen} priority 701 lookup 51871", f"route del {stolen}/32 dev pod0")


def test_an_agent_that_starts_anew_takes_the_device_over_and_live_connections_go_on(mesh: Mesh) -> None:
    node = mesh.nodes[1]
    before = node.said
    model = mesh.model()
    with serving(2), dial(1, 2, socket.AF_INET6) as connection, listening(SECRET) as seen:
        exchange(connection, SECRET)
        index = node.inside(lambda: socket.if_nametoindex(device.DEVICE))
        node.start()
        exchange(connection, SECRET)  # without an agent
        node.apply(model)
        assert node.part.direct.nodes == {"node-2", "node-3"}  # at once: no connection has to take a tunnel
        exchange(connection, SECRET)
        assert (node.said, node.inside(lambda: socket.if_nametoindex(device.DEVICE))) == (before, index)
    assert seen.plain == 0


def test_a_key_is_replaced_while_connections_live(mesh: Mesh) -> None:
    node = mesh.nodes[1]
    with serving(1), serving(2), dial(1, 2, socket.AF_INET) as connection, listening(SECRET) as seen:
        exchange(connection, SECRET)
        before = node.said
        node.part.rotate()
        assert node.announced == 1
        after = node.said
        assert after != before
        model = mesh.model()
        began = time.monotonic()
        mesh.apply(model)
        exchange(connection, SECRET)
        took = time.monotonic() - began
        mesh.settle(model)
        call(2, 1, socket.AF_INET, SECRET)
    assert seen.plain == 0
    assert took < 15  # emulation is slow
    state = node.inside(lambda: node.part._device.read(allowed=False))
    assert state is not None
    assert after.wireguard is not None
    assert state.public_key == after.wireguard.public_key
    print(f"a connection waited {took:.2f} s for the new key")


def test_without_the_device_packets_are_refused_and_never_sent_as_they_are(mesh: Mesh) -> None:
    node = mesh.nodes[1]
    model = mesh.model()
    node.apply(model)
    with serving(2):
        with listening(SECRET) as seen:
            node.ip("link delete mesh-wg0")
            with pytest.raises(OSError, match=r"unreachable|No route") as refused:
                call(1, 2, socket.AF_INET, SECRET, timeout=5)
            assert refused.value.errno in {errno.EHOSTUNREACH, errno.ENETUNREACH}
            assert not ask(1, 2, socket.AF_INET6, SECRET, timeout=2)
            assert node.look()
            node.apply(model)
            mesh.settle(model)
            call(1, 2, socket.AF_INET, SECRET)
        assert seen.plain == 0


@pytest.mark.usefixtures("mesh")
def test_hbone_goes_round_the_device() -> None:
    """It is encrypted already, and has to work when WireGuard does not."""
    with serving(2, HBONE_PORT), listening(SECRET) as seen:
        call(1, 2, socket.AF_INET, SECRET, port=HBONE_PORT)
        call(1, 2, socket.AF_INET6, SECRET, port=HBONE_PORT)
    assert seen.plain >= 4


@pytest.mark.usefixtures("mesh")
def test_what_is_no_workload_goes_the_way_it_always_went() -> None:
    stranger = pod(1, socket.AF_INET, 3)
    wgnodes.ip(wgnodes.pod_netns(1), f"address add {stranger}/24 dev eth0")
    with serving(2), listening(SECRET) as seen:
        assert ask(1, 2, socket.AF_INET, SECRET, bound=stranger)
    assert seen.plain > 0


def test_a_node_without_wireguard_is_reached_as_before(mesh: Mesh) -> None:
    said = mesh.model().nodes
    mesh.apply(mesh.model(nodes={**said, "node-3": Node("node-3")}))
    assert mesh.nodes[1].part.direct.nodes == {"node-2"}
    with serving(3), serving(2):
        with listening(SECRET) as seen:
            assert ask(1, 3, socket.AF_INET, SECRET), wgnodes.describe(mesh)
        assert seen.plain > 0
        with listening(SECRET) as seen:
            assert ask(1, 2, socket.AF_INET, SECRET)
        assert seen.plain == 0


def test_a_workload_that_moves_takes_its_address_with_it(mesh: Mesh) -> None:
    """Node 1 lets node 3 use what was node 2's, and no one else, in one step; and gives it back."""
    key = {name: node.wireguard.public_key for name, node in mesh.model().nodes.items() if node.wireguard}

    def holder() -> set[bytes]:
        state = mesh.nodes[1].inside(mesh.nodes[1].part._device.read)
        assert state is not None
        return {public for public, found in state.peers.items() if pod(2) in found.allowed}

    assert holder() == {key["node-2"]}
    mesh.apply(mesh.model(workload(1), workload(2, node=3), workload(3)), 1)
    assert holder() == {key["node-3"]}
    mesh.apply(mesh.model(workload(1), workload(3)), 1)
    assert holder() == set()
    mesh.apply(mesh.model(), 1)
    assert holder() == {key["node-2"]}


def test_what_somebody_else_changes_is_repaired(mesh: Mesh) -> None:
    node = mesh.nodes[1]
    model = mesh.model()
    node.apply(model)
    for damage in (f"route del {pod(2)} table 51871 metric 1", f"rule del from {pod(1)} priority 701 lookup 51871"):
        node.ip(damage)
        node.part._verified = 0.0
        assert node.look(), damage
        node.apply(model)
        assert not node.look(), damage
    with serving(2), listening(SECRET) as seen:
        call(1, 2, socket.AF_INET, SECRET)
    assert seen.plain == 0


@pytest.mark.usefixtures("wires")
def test_somebody_elses_device_is_left_alone_and_said(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    node = mesh.nodes[1]
    node.ip("link add mesh-wg0 type wireguard")
    try:
        node.apply(mesh.model())
        assert node.part.direct.nodes == frozenset()
        assert any("mesh-wg0 is not this agent's" in text for text in node.part.problems())
        assert not node.inside(node.part._device.remove)
        assert "mesh-wg0" in node.ip("link show")
    finally:
        node.ip("link delete mesh-wg0")
        for other in mesh.nodes.values():
            other.inside(other.part._device.remove)
