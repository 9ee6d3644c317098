"""Nodes' WireGuard keys at the controller: who may say them, what is taken, and what becomes of them."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from controller import wireguard
from controller.errors import ControllerError
from controller.identity.ca import CaSettings
from controller.identity.directory import Directory
from controller.identity.plane import IdentitySettings
from controller.main import main
from controller.server import Controller, Settings
from controller.store import of_node
from controller.wireguard import FILE, BadKey, NodeKeys, check
from meshapi import discovery_pb2 as pb
from tests.tasks import beside, until
from tests.unit.controller.harness import SHOP
from tests.unit.controller.identity.shared import Replica, State
from tests.unit.controller.test_discovery import Stream, names, stream

ONE, TWO, THREE = (bytes([number]) * 32 for number in (1, 2, 3))
TWO_NODES = SHOP + "---" + SHOP.replace("cart", "tea").replace("n1", "n2").replace("10.96.0.1", "10.96.0.9").replace("10.0.1.2", "10.0.2.2")


def end(key: bytes = ONE, port: int = 51871, *endpoints: str) -> pb.WireGuard:
    return pb.WireGuard(public_key=key, port=port, endpoints=endpoints or ("192.0.2.1",))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        pytest.param(end(b"short"), "32 bytes", id="short-key"),
        pytest.param(end(bytes(32)), "not all zero", id="zero-key"),
        pytest.param(end(ONE, 0), "no UDP port", id="no-port"),
        pytest.param(end(ONE, 65536), "no UDP port", id="large-port"),
        pytest.param(end(ONE, 1, "host"), "no IP address", id="a-name"),
        pytest.param(end(ONE, 1, "127.0.0.1"), "cannot be reached", id="loopback"),
        pytest.param(end(ONE, 1, "::"), "cannot be reached", id="any"),
        pytest.param(end(ONE, 1, "ff02::1"), "cannot be reached", id="multicast"),
        pytest.param(end(ONE, 1, "fe80::1%eth0"), "cannot be reached", id="link-local"),
        pytest.param(end(ONE, 1, "192.0.2.1", "192.0.2.2"), "each family", id="two-of-a-family"),
        pytest.param(pb.WireGuard(public_key=ONE, port=1), "one at least", id="nowhere"),
    ],
)
def test_what_cannot_be_used_is_refused(said: pb.WireGuard, reason: str) -> None:
    with pytest.raises(BadKey, match=reason):
        check(said)


def keys(directory: Path, barred: Mapping[str, int] | None = None, known: Mapping[str, int] | None = None) -> NodeKeys:
    found = NodeKeys(Directory(directory), lambda: barred or {}, lambda: (barred if known is None else known) or {})
    found.start()
    return found


def known(found: NodeKeys, *nodes: str) -> dict[str, bytes]:
    model = {f"workload/d/{node}": pb.Entity(workload=pb.Workload(namespace="d", name=node, node=node)) for node in nodes}
    return {name.partition("/")[2]: entity.node.wireguard.public_key for name, entity in found.entities(model).items()}


def test_a_node_is_told_to_all_if_it_has_workloads_with_its_key_if_it_has_one(tmp_path: Path) -> None:
    found = keys(tmp_path)
    asyncio.run(found.announce("n1", end()))
    asyncio.run(found.announce("idle", end(TWO)))
    assert known(found, "n1", "n2") == {"n1": ONE, "n2": b""}


def test_keys_outlive_the_controller_and_go_when_the_node_says_so(tmp_path: Path) -> None:
    asyncio.run(keys(tmp_path).announce("n1", end()))
    again = keys(tmp_path)
    assert known(again, "n1") == {"n1": ONE}
    asyncio.run(again.announce("n1", None))
    assert known(keys(tmp_path), "n1") == {"n1": b""}


def test_a_key_is_one_nodes(tmp_path: Path) -> None:
    found = keys(tmp_path)
    asyncio.run(found.announce("n1", end()))
    with pytest.raises(BadKey, match="node n1's"):
        asyncio.run(found.announce("n2", end(ONE, 51871, "192.0.2.2")))
    assert known(found, "n1", "n2") == {"n1": ONE, "n2": b""}


def test_a_revoked_node_loses_its_key_until_it_announces_it_again_however_often_it_is_revoked(tmp_path: Path) -> None:
    barred: dict[str, int] = {}
    found = keys(tmp_path, barred)
    asyncio.run(found.announce("n1", end()))
    for at in (1000, 1001):
        barred["n1"] = at
        assert found.forget_barred()
        assert not found.forget_barred()
        assert known(found, "n1") == {"n1": b""}
        asyncio.run(found.announce("n1", end(TWO)))  # the gate let it in again
        assert not found.forget_barred()
        assert known(found, "n1") == {"n1": TWO}
        assert known(keys(tmp_path, barred), "n1") == {"n1": TWO}, "a controller that starts anew takes nothing away"


def test_a_key_that_a_revoked_node_announces_before_it_is_shut_out_goes_and_the_same_one_later_stays(tmp_path: Path) -> None:
    lagging, current = keys(tmp_path, {"n1": 1000}, {}), keys(tmp_path, {"n1": 1000})
    asyncio.run(lagging.announce("n1", end()))
    assert current.read()
    assert current.forget_barred()
    assert known(current, "n1") == {"n1": b""}
    asyncio.run(lagging.announce("n1", None))
    asyncio.run(lagging.announce("n1", end()))
    assert current.read()
    asyncio.run(current.announce("n1", end()))
    assert not current.forget_barred()
    assert not keys(tmp_path, {"n1": 1000}).forget_barred()
    assert known(current, "n1") == {"n1": ONE}


def test_a_key_that_a_node_announced_after_a_revocation_stays_when_an_earlier_release_writes_keys_and_one_that_is_announced_there_goes(
    tmp_path: Path,
) -> None:
    barred = {"n1": 1000}
    asyncio.run(keys(tmp_path, barred).announce("n1", end()))

    def earlier(name: str, said: pb.WireGuard) -> None:
        """As the release does that knows of nothing but keys."""
        document = json.loads((tmp_path / FILE).read_text())
        assert document.keys() == {"nodes"}
        document["nodes"][name] = base64.b64encode(said.SerializeToString(deterministic=True)).decode()
        (tmp_path / FILE).write_text(json.dumps({"nodes": document["nodes"]}))

    earlier("n2", end(TWO))
    found = keys(tmp_path, barred)
    assert known(found, "n1", "n2") == {"n1": ONE, "n2": TWO}
    asyncio.run(found.announce("n3", end(THREE)))
    assert known(keys(tmp_path, barred), "n1", "n2", "n3") == {"n1": ONE, "n2": TWO, "n3": THREE}
    earlier("n1", end(bytes([4]) * 32))  # it may not know of the revocation
    assert known(keys(tmp_path, barred), "n1") == {"n1": b""}
    assert json.loads((tmp_path / wireguard.SINCE).read_text()) == {"nodes": {}}


def test_since_when_a_node_was_barred_is_read_where_it_stood_before(tmp_path: Path) -> None:
    content = {"nodes": {"n1": base64.b64encode(end().SerializeToString(deterministic=True)).decode()}, "since": {"n1": 1000}}
    Directory(tmp_path).write(FILE, json.dumps(content))
    assert known(keys(tmp_path, {"n1": 1000}), "n1") == {"n1": ONE}
    assert known(keys(tmp_path, {"n1": 1001}), "n1") == {"n1": b""}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"nodes": []}',
        '{"nodes": {"n1": 1000}}',
        '{"nodes": {"n1": {"key": "", "since": Infinity}}}',
        '{"nodes": {"n1": {"key": "", "since": "x"}}}',
    ],
)
def test_damage_to_what_says_since_when_nodes_were_barred_lets_no_key_of_a_revoked_node_stay_and_no_other_go(
    tmp_path: Path, content: str
) -> None:
    found = keys(tmp_path, {"n1": 1000})
    asyncio.run(found.announce("n1", end()))
    asyncio.run(found.announce("n2", end(TWO)))
    Directory(tmp_path).write(wireguard.SINCE, content)
    assert known(keys(tmp_path, {"n1": 1000}), "n1", "n2") == {"n1": b"", "n2": TWO}


def test_a_key_of_a_node_that_has_left_goes_where_it_is_shared_and_stays_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wireguard, "DEPARTED_S", 0.2)
    shared, alone = Replica(State()), keys(tmp_path)
    found = NodeKeys(shared, dict, dict, shared.groups)
    found.start()
    for each in (found, alone):
        asyncio.run(each.announce("n1", end()))
        asyncio.run(each.announce("n2", end(TWO, 51871, "192.0.2.2")))
    shared.change(lambda documents: documents.write("issued.jsonl", "x"), of_node("n1"))  # a certificate in force
    began = time.monotonic()
    while known(found, "n2")["n2"]:
        assert time.monotonic() < began + 20
        found.forget_barred()
        alone.forget_barred()
    assert time.monotonic() > began + 0.2
    assert known(found, "n1") == {"n1": ONE}
    assert known(alone, "n1", "n2") == {"n1": ONE, "n2": TWO}


def test_a_look_that_cannot_write_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barred: dict[str, int] = {}
    found = keys(tmp_path, barred)
    asyncio.run(found.announce("n1", end()))
    barred["n1"] = 1000

    def away(*_: object) -> None:
        raise ControllerError("the API server is away")

    with monkeypatch.context() as patch:
        patch.setattr(Directory, "change", away)
        assert not found.forget_barred()
        assert known(found, "n1") == {"n1": ONE}
    assert found.forget_barred()
    assert known(found, "n1") == {"n1": b""}


@pytest.mark.parametrize("news", ["foreign", "fresh"])
def test_a_revoked_node_loses_its_key_also_while_there_is_news_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, news: str
) -> None:
    monkeypatch.setattr(wireguard, "LOOK_S", 1.0)
    monkeypatch.setattr(wireguard, "SETTLE_S", 0.005)
    barred: dict[str, int] = {}

    async def check_it() -> None:
        found = NodeKeys(Directory(tmp_path), lambda: barred, dict)
        await asyncio.to_thread(found.start)
        await found.announce("n1", end())

        async def go_on() -> None:
            for number in itertools.count(1):
                if news == "foreign":
                    found.look()
                else:
                    await found.announce("n2", end(TWO, number % 60000 + 1, "192.0.2.2"))
                await asyncio.sleep(0.001)

        async def publish() -> None:
            while True:
                await found.changed()

        async with beside(go_on()), beside(publish()):
            barred["n1"] = 1000
            await until(lambda: not known(found, "n1")["n1"])

    asyncio.run(check_it())


def test_an_endpoint_that_is_another_nodes_workload_is_told_to_nobody_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = keys(tmp_path)
    asyncio.run(found.announce("n2", end(TWO, 51871, "192.0.2.2")))
    asyncio.run(found.announce("n3", end(THREE, 51871, "192.0.2.3", "fd00:2::2")))

    def told(*addresses: str, enrolled: bool = True) -> dict[str, bytes]:
        model = {
            f"workload/d/{name}": pb.Entity(workload=pb.Workload(namespace="d", name=name, node=node, addresses=has, enrolled=enrolled))
            for name, node, has in (("b", "n2", addresses), ("c", "n3", ["192.0.2.3"]))
        }
        return {name.partition("/")[2]: entity.node.wireguard.public_key for name, entity in found.entities(model).items()}

    caplog.set_level("INFO", logger="controller.wireguard")
    caplog.clear()  # what was announced is told too, if another test wanted to know
    assert told("10.0.2.2") == {"n2": TWO, "n3": THREE}
    assert told("10.0.2.2", "FD00:2:0::2", enrolled=False) == {"n2": TWO, "n3": THREE}
    assert told("192.0.2.2") == {"n2": TWO, "n3": THREE}  # host network: its own node's address
    assert not caplog.records
    for _ in range(2):
        assert told("10.0.2.2", "FD00:2:0::2") == {"n2": TWO, "n3": b""}
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert (record.__dict__["node"], record.__dict__["endpoint"]) == ("n3", "fd00:2::2")
    assert (record.__dict__["workload"], record.__dict__["workload_node"]) == ("d/b", "n2")
    assert told("10.0.2.2") == {"n2": TWO, "n3": THREE}
    assert "not kept from the others any more" in caplog.records[-1].message


@pytest.mark.parametrize("content", ["", "{}", '{"nodes": {"n1": "###"}}', json.dumps({"nodes": {"n1": "AAAA"}})])
def test_a_damaged_list_stops_the_controller_and_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ControllerError, match=r"wireguard\.json cannot be used.*backup"):
        keys(tmp_path)
    assert (tmp_path / FILE).read_text() == content


def test_without_a_certificate_authority_there_is_no_wireguard(tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["run", "--directory", str(tmp_path), "--encryption", "wireguard"])
    assert run.exit_code == 2
    assert "--encryption wireguard needs --ca-directory" in run.output


def run_mesh(tmp_path: Path, directory: Path, *, wireguard: bool) -> Controller:
    (directory / "a.yaml").write_text(TWO_NODES)
    identity = IdentitySettings(CaSettings(tmp_path / "ca"))
    return Controller(Settings(directory, tmp_path / "c.sock", identity=identity, wireguard=wireguard))


async def greet(agent: Stream, node: str, said: pb.WireGuard | None) -> pb.DiscoveryResponse:
    await agent._call.write(pb.DiscoveryRequest(node=node, wireguard=said))
    return await agent.receive()


def test_a_key_reaches_the_other_agents_and_one_that_is_refused_does_not(tmp_path: Path, directory: Path) -> None:
    async def check_it() -> None:
        controller, stopping = run_mesh(tmp_path, directory, wireguard=True), asyncio.Event()
        await controller.start()
        task = asyncio.create_task(controller.run(stopping))
        target = f"unix:{tmp_path}/c.sock"
        async with stream(target) as first, stream(target) as second, stream(target) as thief:
            response = await greet(first, "n1", end())
            found = {r.name: pb.Entity.FromString(r.entity).node for r in response.resources if r.name.startswith("node/")}
            assert set(found) == {"node/n1", "node/n2"}
            await first.answer(response)
            if not found["node/n1"].HasField("wireguard"):
                response = await first.receive()
                await first.answer(response)
            await second.answer(await greet(second, "n2", end(TWO, 51871, "192.0.2.2")))
            news = await first.receive()
            assert names(news) == ["node/n2"]
            assert pb.Entity.FromString(news.resources[0].entity).node.wireguard == end(TWO, 51871, "192.0.2.2")
            await first.answer(news)
            with pytest.raises(ConnectionError, match="INVALID_ARGUMENT: the WireGuard key of node n2 is refused"):
                await greet(thief, "n2", end(ONE, 51871, "192.0.2.3"))
        stopping.set()
        await task
        await controller.stop()

    asyncio.run(check_it())


def test_in_other_meshes_keys_are_not_told(tmp_path: Path, directory: Path) -> None:
    async def check_it() -> None:
        controller = run_mesh(tmp_path, directory, wireguard=False)
        await controller.start()
        async with stream(f"unix:{tmp_path}/c.sock") as agent:
            assert not [name for name in names(await greet(agent, "n1", end())) if name.startswith("node/")]
        await controller.stop()

    asyncio.run(check_it())
