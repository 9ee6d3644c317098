"""What controllers remember together, at the level of what they remember: two of them on a real API server."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from controller import metrics, readiness
from controller.errors import ControllerError
from controller.identity import ledger
from controller.identity.lapse import Lapse
from controller.identity.ledger import SharedLedger
from controller.kubernetes import store as stores
from controller.kubernetes.part import opened
from controller.kubernetes.store import ClusterStore
from controller.readiness import Place, Readiness, SharedMemory
from controller.store import Documents, of_node
from controller.wireguard import NodeKeys
from meshapi import discovery_pb2 as pb
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.remembered import NOW, issued, soon
from tests.kubernetes.samples import namespace
from tests.tasks import beside, until

OWN = "remembered"


@pytest.fixture
def two(plane: ControlPlane) -> Iterator[tuple[ClusterStore, ClusterStore]]:
    """What two controllers have open."""
    plane.apply(namespace(OWN, "none"))
    with ExitStack() as stack:
        stack.callback(lambda: plane.kubectl("delete", "controllerstates", "--all", "-n", OWN))
        one, other = (stack.enter_context(opened(plane.kubeconfig(), "", OWN)) for _ in range(2))
        yield one, other


def test_a_change_that_meets_another_is_done_again_with_what_that_wrote(two: tuple[ClusterStore, ClusterStore]) -> None:
    one, other = two
    met: list[bytes | None] = []

    def work(documents: Documents) -> None:
        met.append(documents.read("x"))
        if len(met) == 1:
            other.change(lambda theirs: theirs.write("y", "theirs"))
        documents.write("x", "ours")

    one.change(work)
    assert len(met) == 2
    soon(lambda: (other.read("x"), other.read("y")) == (b"ours", b"theirs"))


def test_what_raises_changes_nothing(two: tuple[ClusterStore, ClusterStore]) -> None:
    def work(documents: Documents) -> None:
        documents.write("x", "1")
        raise ControllerError("no")

    with pytest.raises(ControllerError, match="no"):
        two[0].change(work)
    assert two[1].change(lambda documents: documents.read("x")) is None


def test_certificates_of_a_node_are_on_record_for_all_and_go_with_the_last_of_them(two: tuple[ClusterStore, ClusterStore]) -> None:
    now = [float(NOW)]
    lapse = Lapse(lambda: now[0], time.monotonic, 0.0)
    one, other = (SharedLedger(store, lapse) for store in two)
    one.append([issued(1), issued(2, "n2", NOW + 10)])
    other.append([issued(3)])
    other.append([issued(3)])  # an answer that was lost: said again
    for found in (one, other):
        soon(lambda found=found: sorted(record.serial for record in found.live(NOW)) == ["1", "2", "3"])  # type: ignore[misc]
    assert ledger.issued(two[0]) == ledger.issued(two[1])
    now[0] = NOW + 50
    one.compact()
    soon(lambda: set(two[1].groups()) == {of_node("n1")})
    now[0] = NOW + 200
    other.compact()
    soon(lambda: two[0].groups() == {})
    assert list(one.live(0)) == []


def test_names_of_nodes_that_the_api_server_does_not_take_have_records_too(two: tuple[ClusterStore, ClusterStore]) -> None:
    lapse = Lapse(lambda: NOW, time.monotonic, 0.0)
    found = SharedLedger(two[0], lapse)
    names = ["Node_1", "a" * 240, "a..b", "authority", "controllers", "", "n-1.example.com"]
    found.append([issued(number, name) for number, name in enumerate(names, 1)])
    assert {record.node for record in found.live(NOW)} == set(names)
    assert len(two[0].groups()) == len(names)


def test_a_document_without_room_is_refused_and_what_stands_there_stays(
    two: tuple[ClusterStore, ClusterStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "MOST", 1000)
    two[0].change(lambda documents: documents.write("x", "x" * 900))
    with pytest.raises(ControllerError, match=r"ControllerState remembered/authority has no room .* nothing was written"):
        two[0].change(lambda documents: documents.write("y", "x" * 200))
    assert two[1].change(lambda documents: (documents.read("x"), documents.read("y"))) == (b"x" * 900, None)
    monkeypatch.setattr(stores, "MOST", 500)
    two[0].change(lambda documents: documents.write("x", "x" * 800))  # who takes away is not told that there is too much
    with pytest.raises(ControllerError, match="no room"):
        two[0].change(lambda documents: documents.write("x", "x" * 801))


def test_where_nothing_else_has_room_any_more_revocations_have_and_an_operator_has_heard_of_it_before(
    two: tuple[ClusterStore, ClusterStore], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ControllerError, match="no room for more than 1024 KiB, this would be 1228"):
        two[0].change(lambda documents: documents.write("x", '"' * (stores.MOST * 6 // 10)))  # two bytes each, in JSON
    two[0].change(lambda documents: documents.write("x", "x" * (stores.MOST - 100)))
    soon(lambda: two[1].read("x") is not None)
    assert metrics.SHARED_STATE._value.get() > stores.MOST - 100
    (said,) = {record.__dict__["largest"] for record in caplog.records if "is nearly full" in record.message}
    assert said == "x 1023 KiB"
    with pytest.raises(ControllerError, match="no room for more than 1024 KiB"):
        two[0].change(lambda documents: documents.write("tokens.json", "x" * 200))
    for name in ("revoked.json", "lists.json"):
        two[0].change(lambda documents, name=name: documents.write(name, "x" * (stores.RESERVE // 2 - 100)))  # type: ignore[misc]
    soon(lambda: len(two[1].read("lists.json") or b"") == stores.RESERVE // 2 - 100)
    with pytest.raises(ControllerError, match="no room for more than 1408 KiB"):
        two[0].change(lambda documents: documents.write("revoked.json", "x" * (stores.RESERVE // 2 + 400)))


def test_who_may_not_write_is_told_which_right_is_missing(plane: ControlPlane, two: tuple[ClusterStore, ClusterStore]) -> None:
    rule = {"apiGroups": ["meshagent.io"], "resources": ["controllerstates"], "verbs": ["get", "list", "watch"]}
    plane.allow("reads", rule)
    two[0].change(lambda documents: documents.write("x", "1"))
    with opened(plane.kubeconfig("reads"), "", OWN) as reader:
        assert reader.read("x") == b"1"
        with pytest.raises(ControllerError, match=r"403 Forbidden.*see the Role of whoever does this: get, list, watch, create, update"):
            reader.change(lambda documents: documents.write("x", "2"))
    with pytest.raises(ControllerError, match="nothing was read, and nothing was changed: the API server does not let"):
        opened(plane.kubeconfig("nobody"), "", OWN).__enter__()


def test_a_report_is_of_a_pod_and_not_of_its_name_and_a_replica_that_lags_takes_nothing_back(
    two: tuple[ClusterStore, ClusterStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "LOOK_S", 0.1)
    before, after = Place("shop/cart", "n1", "uid-1"), Place("shop/cart", "n1", "uid-2")

    def awaits(found: Readiness, uid: str) -> bool:
        entity = pb.Entity(workload=pb.Workload(namespace="shop", name="cart", node="n1", pod_uid=uid, enrolled=True))
        return bool(found.awaiting({"workload/shop/cart": entity}))

    async def changed() -> None:
        pass

    async def check() -> None:
        one, lagging = (Readiness(SharedMemory(store)) for store in two)
        loop = asyncio.get_running_loop()
        for found, store in zip((one, lagging), two, strict=True):
            await asyncio.to_thread(found.load)
            store.listen(functools.partial(loop.call_soon_threadsafe, found.look))
            found.follow({before.name: before})
        async with beside(one.run(changed)), beside(lagging.run(changed)):
            assert one.report("n1", ["shop/cart"], {before.name: before}) == 1
            await until(lambda: not awaits(lagging, "uid-1"))
            one.follow({after.name: after})
            assert awaits(one, "uid-2"), "another pod"
            one.report("n1", ["shop/cart"], {after.name: after})
            await until(lambda: not awaits(lagging, "uid-2"))
            lagging.follow({})  # only now it hears that the first pod has gone
            await asyncio.sleep(0.5)
            assert not awaits(one, "uid-2")
            lagging.follow({after.name: after})
            monkeypatch.setattr(readiness, "FORGET_S", 0.2)
            await until(lambda: SharedMemory(two[0]).load() == frozenset({after}))
            assert not awaits(one, "uid-2")
            assert not awaits(lagging, "uid-2")
            # Somebody deletes it: those that know it write it again.
            two[1].change(lambda documents: documents.write(readiness.FILE, ""), of_node("n1"))
            await until(lambda: SharedMemory(two[0]).load() == frozenset({after}))

    asyncio.run(check())


def test_wireguard_keys_that_one_replica_was_told_are_known_to_the_other(two: tuple[ClusterStore, ClusterStore]) -> None:
    async def check() -> None:
        one, other = (NodeKeys(store, dict, dict) for store in two)
        loop = asyncio.get_running_loop()
        two[1].listen(lambda: loop.call_soon_threadsafe(other.look))
        for found in (one, other):
            await asyncio.to_thread(found.start)
        model = {"workload/shop/cart": pb.Entity(workload=pb.Workload(namespace="shop", name="cart", node="n1"))}
        key = pb.WireGuard(public_key=b"k" * 32, port=51871, endpoints=["192.0.2.1"])
        await one.announce("n1", key)
        await asyncio.wait_for(other.changed(), 5)
        assert other.entities(model)["node/n1"].node.wireguard.public_key == b"k" * 32
        await one.announce("n1", None)
        await asyncio.wait_for(other.changed(), 5)
        assert not other.entities(model)["node/n1"].node.wireguard.public_key

    asyncio.run(check())


def test_a_writer_that_the_api_server_leaves_alone_says_what_is_known(plane: ControlPlane, two: tuple[ClusterStore, ClusterStore]) -> None:
    two[0].change(lambda documents: documents.write("x", "1"))
    plane.stop()
    try:
        with pytest.raises(ControllerError, match=r"the API server has not answered .*: nothing was written; do it again when it does"):
            two[0].change(lambda documents: documents.write("x", "2"))
        with pytest.raises(ControllerError, match=r"it is not known whether it was written there"):
            two[0].change(lambda documents: documents.write("x", "2"), known=True)
        assert two[1].read("x") == b"1"
    finally:
        plane.start()
    two[0].change(lambda documents: documents.write("x", "3"))
    assert two[0].read("x") == b"3"
