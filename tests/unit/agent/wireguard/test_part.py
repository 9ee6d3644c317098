"""What the agent says of WireGuard, to the controller and to people. What it does in a kernel that has it: tests/kernel/test_wireguard.py."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.config import Config
from agent.errors import EnvironmentUnfit
from agent.model import NO_DIRECT, Entity, Node, Snapshot, WireGuardEnd, Workload, decode
from agent.wireguard import device
from agent.wireguard.keys import KeyPair
from agent.wireguard.part import FILE, PATIENCE_S, WireGuard, _Mirror
from meshapi import discovery_pb2 as pb

KEY = bytes(range(32))
HERE = Node("n1", WireGuardEnd(KEY, 51871, ("192.0.2.1",)))


def part(tmp_path: Path, controller: str = "unix:/run/c.sock", *addresses: str, kernel: str = "") -> WireGuard:
    """On a kernel with WireGuard (""), or one that lacks it (why)."""
    config = Config(node="n1", controller=controller, run_dir=tmp_path, wireguard_addresses=addresses, wireguard_port=1234)

    async def changed() -> None:
        raise EnvironmentUnfit("not in these tests")

    found = WireGuard(config, changed, lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "unavailable", lambda: kernel)
        asyncio.run(found.start())
    return found


def test_a_key_pair_shows_its_public_half_only() -> None:
    pair = KeyPair(KEY)
    assert pair.public == X25519PrivateKey.from_private_bytes(KEY).public_key().public_bytes_raw()
    assert KeyPair().public != KeyPair().public
    assert KEY.hex() not in repr(pair)
    assert repr(KEY) not in repr(pair)
    with pytest.raises(TypeError):
        pickle.dumps(pair)


def test_a_key_is_announced_with_the_addresses_that_the_operator_gave(tmp_path: Path) -> None:
    said = part(tmp_path, "unix:/run/c.sock", "192.0.2.1", "2001:db8::1").announcement()
    assert said is not None
    assert (len(said.public_key), said.port, list(said.endpoints)) == (32, 1234, ["192.0.2.1", "2001:db8::1"])


def test_a_key_that_is_to_be_replaced_is_announced_before_it_is_used(tmp_path: Path) -> None:
    found = part(tmp_path, "unix:/run/c.sock", "192.0.2.1")
    before = found.announcement()
    found.rotate()
    after = found.announcement()
    assert before is not None
    assert after is not None
    assert before.public_key == found._public != after.public_key


def test_no_private_key_reaches_a_file(tmp_path: Path) -> None:
    found = part(tmp_path, "unix:/run/c.sock", "192.0.2.1")
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert found._pair is not None
    content = (tmp_path / FILE).read_bytes()
    assert found._pair.private() not in content
    assert float(content) > 0


@pytest.mark.parametrize(
    ("controller", "reason"),
    [
        pytest.param("unix:/run/c.sock", "its controller is on this machine", id="local"),
        pytest.param("127.0.0.1:15010", "it reaches its controller from 127.0.0.1", id="loopback"),
        pytest.param("[::1]:15010", "it reaches its controller from ::1", id="loopback6"),
        pytest.param("no-such-host.invalid:15010", "no address of its own leads to the controller", id="unknown"),
    ],
)
def test_a_node_that_others_cannot_find_announces_no_key_and_says_so(tmp_path: Path, controller: str, reason: str) -> None:
    found = part(tmp_path, controller)
    assert found.announcement() is None
    found._snapshot = Snapshot("1", nodes={"n1": Node("n1")})
    assert found.status().mode == "unavailable"
    (problem,) = found.problems()
    assert reason in problem
    assert "--wireguard-address" in problem


def test_a_kernel_without_wireguard_is_said_where_the_mesh_uses_it_and_nothing_is_announced(tmp_path: Path) -> None:
    found = part(tmp_path, "unix:/run/c.sock", "192.0.2.1", kernel="Linux 1.2.3 has no WireGuard: why")
    assert found.announcement() is None

    async def apply(nodes: Mapping[str, Node]) -> None:
        await found.prepare(Snapshot("1", nodes=nodes))
        await found.finish()

    asyncio.run(apply({}))
    assert (found.status().mode, found.problems()) == ("off", [])
    asyncio.run(apply({"n1": Node("n1"), "n2": replace(HERE, name="n2")}))
    assert (found.status().mode, found.status().reason, found.direct) == ("unavailable", "Linux 1.2.3 has no WireGuard: why", NO_DIRECT)
    (problem,) = found.problems()
    assert problem == (
        "WireGuard, with which this mesh encrypts between nodes, is not available here: Linux 1.2.3 has no WireGuard: why; "
        "TCP from and to other nodes goes through HBONE instead, UDP between nodes is not encrypted"
    )


class Recorder(device.Device):
    """A device that only notes what would be taken from the kernel's."""

    def __init__(self) -> None:
        super().__init__("tests")
        self.gone: dict[str, set[str | bytes]] = {}

    def _note(self, what: str, which: Iterable[str | bytes]) -> None:
        self.gone.setdefault(what, set()).update(which)

    def put_peer(self, key: bytes, endpoint: tuple[str, int]) -> None:
        pass

    def allow(self, key: bytes, addresses: Iterable[str]) -> None:
        pass

    def lead(self, addresses: Iterable[str]) -> None:
        pass

    def serve(self, addresses: Iterable[str]) -> None:
        pass

    def disallow(self, addresses: Collection[str]) -> None:
        self._note("allowed", addresses)

    def remove_peer(self, key: bytes) -> None:
        self._note("peers", [key])

    def leave(self, addresses: Iterable[str]) -> None:
        self._note("routes", addresses)

    def ignore(self, addresses: Iterable[str]) -> None:
        self._note("sources", addresses)

    def remove(self) -> bool:
        self._note("device", ["all"])
        return True


OTHER = Node("n2", WireGuardEnd(KEY[::-1], 51871, ("192.0.2.2",)))
LOCAL = Workload("d/here", "d", "n1", {}, ("10.0.1.2",), "here", enrolled=True, ready=True)
REMOTE = Workload("d/there", "d", "n2", {}, ("10.0.2.2",), "there", enrolled=True, ready=True)
BOTH = Snapshot("1", {w.name: w for w in (LOCAL, REMOTE)}, nodes={"n1": HERE, "n2": OTHER})


@pytest.mark.parametrize(
    ("then", "at_once", "at_last"),
    [
        pytest.param(
            replace(BOTH, version="2", workloads={w.name: w for w in (LOCAL, replace(REMOTE, addresses=("127.0.0.1",)))}),
            {},
            {"allowed": {"10.0.2.2"}, "routes": {"10.0.2.2"}},
            id="a-workload-becomes-unfit",
        ),
        pytest.param(
            replace(BOTH, version="2", workloads={w.name: w for w in (replace(LOCAL, addresses=("127.0.0.1",)), REMOTE)}),
            {},
            {"allowed": {"10.0.2.2"}, "peers": {KEY[::-1]}, "routes": {"10.0.2.2"}, "sources": {"10.0.1.2"}},
            id="this-node-gives-up",
        ),
        pytest.param(
            replace(BOTH, version="2", nodes={"n1": HERE, "n2": Node("n2")}),
            {"peers": {KEY[::-1]}},
            {"peers": {KEY[::-1]}, "routes": {"10.0.2.2"}},
            id="a-node-is-revoked",
        ),
        pytest.param(replace(BOTH, version="2", nodes={}), {}, {"device": {"all"}}, id="switched-off-for-all"),
    ],
)
def test_what_envoy_may_still_dial_keeps_its_route_until_envoy_has_let_go_of_it(
    tmp_path: Path, then: Snapshot, at_once: Mapping[str, object], at_last: Mapping[str, object]
) -> None:
    """Only a key that nobody announces any more goes at once: behind its route packets are then refused, not sent as they are."""
    found, recorder = part(tmp_path, "unix:/run/c.sock", "192.0.2.1"), Recorder()
    found._device, found._mirror, found._made = recorder, _Mirror(), True

    async def scenario() -> None:
        await found.prepare(BOTH)
        await found.finish(dialled=True)
        assert (recorder.gone, found._keeps_since) == ({}, None)
        await found.prepare(then)
        await found.finish(dialled=True)
        assert recorder.gone == at_once
        assert found._keeps_since is not None
        assert not any("until Envoy has acknowledged" in text for text in found.problems())
        found._keeps_since -= PATIENCE_S
        await found.finish(dialled=True)
        assert any("until Envoy has acknowledged" in text for text in found.problems())
        await found.finish()
        assert recorder.gone == at_last
        assert not any("until Envoy has acknowledged" in text for text in found.problems())

    asyncio.run(scenario())


def test_a_node_that_announces_another_nodes_workload_is_a_problem_that_names_it(tmp_path: Path) -> None:
    found = part(tmp_path, "unix:/run/c.sock", "192.0.2.1")
    found._device, found._mirror, found._made = Recorder(), _Mirror(), True
    thief = Node("n3", WireGuardEnd(bytes(reversed(range(1, 33))), 51871, ("10.0.2.2",)))
    asyncio.run(found.prepare(replace(BOTH, nodes={**BOTH.nodes, "n3": thief})))
    assert found._mirror.allowed == {"10.0.2.2": KEY[::-1]}
    (problem,) = [text for text in found.problems() if "is no WireGuard peer" in text]
    assert problem.startswith(
        "node n3 is no WireGuard peer: the agent of node n3 announces 10.0.2.2, which is the address of workload d/there of node n2: "
    )


def test_a_node_whose_key_the_controller_keeps_back_says_where_to_look(tmp_path: Path) -> None:
    found = part(tmp_path, "unix:/run/c.sock", "192.0.2.1")
    asyncio.run(found.prepare(replace(BOTH, nodes={**BOTH.nodes, "n1": Node("n1")})))
    assert any(text.startswith("the controller does not tell other nodes this one's WireGuard key") for text in found.problems())


def test_a_node_travels_as_an_entity() -> None:
    end = pb.WireGuard(public_key=KEY, port=51871, endpoints=["192.0.2.1"])
    found: Entity = decode(pb.Entity(node=pb.Node(name="n1", wireguard=end)).SerializeToString())
    assert found == HERE
    assert decode(pb.Entity(node=pb.Node(name="n2")).SerializeToString()) == Node("n2")


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(pb.WireGuard(public_key=b"short", port=1, endpoints=["192.0.2.1"]), id="key"),
        pytest.param(pb.WireGuard(public_key=KEY, port=70000, endpoints=["192.0.2.1"]), id="port"),
        pytest.param(pb.WireGuard(public_key=KEY, port=1), id="nowhere"),
        pytest.param(pb.WireGuard(public_key=KEY, port=1, endpoints=["name"]), id="a-name"),
    ],
)
def test_a_node_that_cannot_be_a_peer_is_no_entity(end: pb.WireGuard) -> None:
    with pytest.raises(ValueError, match=r"usable|does not appear"):
        decode(pb.Entity(node=pb.Node(name="n1", wireguard=end)).SerializeToString())
