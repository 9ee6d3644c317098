"""Two controllers and what they remember together in a real API server: what was revoked stays so, whoever ends, and whatever is away."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent.discovery import Discovery
from agent.model import Snapshot
from agent.relay import Relay
from agent.replicas import Replicas as Replicated
from controller.errors import ControllerError
from controller.identity import revocations
from controller.identity.ca import CaSettings
from controller.identity.ledger import Issued
from controller.identity.operator import Intermediate
from controller.identity.plane import IdentitySettings
from controller.kubernetes.api import Api
from controller.kubernetes.part import opened
from controller.kubernetes.store import ClusterStore
from controller.server import Controller, Kubernetes, Settings
from meshapi import agent_pb2, discovery_pb2, relay_pb2_grpc
from meshapi import identity_pb2 as pb
from meshapi.relay_pb2 import AskRequest
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.manifest import ACCOUNT, OWN, grant
from tests.kubernetes.replicas import Joined, Replica, Replicas, replicas, workload
from tests.kubernetes.samples import namespace
from tests.tasks import beside
from tests.unit.test_relay import Place

pytestmark = pytest.mark.anyio
DOMAIN = "spiffe://mesh.local"
WRITERS = 100


@pytest.fixture
def two(plane: ControlPlane, tmp_path: Path) -> Iterator[Replicas]:
    """Two controllers that are ready, and a model with three workloads."""
    plane.apply(namespace(OWN, "none"), namespace("shop"))
    plane.apply(workload("shop", "cart", "n1", "10.9.0.1"), workload("shop", "redis", "n2", "10.9.0.2"))
    with replicas(plane, tmp_path) as found:
        found.start()
        yield found
    plane.kubectl(
        "delete", "workloads.meshagent.io", "--all", "-n", "shop"
    )  # the namespace would never be gone: that takes a controller manager


async def soon(condition: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    """Wait until an asynchronous condition holds."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)


async def equal(found: Callable[[Replica], Awaitable[Any]], at: Replica, wanted: Any) -> bool:
    return bool(await found(at) == wanted)


async def holds(condition: Callable[[], bool]) -> bool:
    """The same of one that blocks."""
    return await asyncio.to_thread(condition)


async def test_what_is_revoked_is_in_force_at_every_replica_within_a_second_and_after_the_end_of_all(two: Replicas) -> None:
    bad, good = await two.join("n1", two.a), await two.join("n2", two.b)
    cart = await bad.sign(two.b, "shop/cart")
    assert cart.chain, cart.error
    assert (await bad.refused(two.a), await bad.refused(two.b)) == ("", "")
    async with good.identity(two.a) as at_a, good.identity(two.b) as at_b:
        calls = [stub.Trust(pb.TrustRequest()) for stub in (at_a, at_b)]
        for call in calls:
            await call.read()
        said = await asyncio.to_thread(two.said, "ca", "revoke", "--with-workloads", f"{DOMAIN}/meshagent/node/n1")
        began = time.monotonic()
        assert said.count("  revoked\n") == 2, "what one replica issued to the node, and what the other did"
        for call in calls:
            while len((await call.read()).revoked) < 2:
                pass
        took = time.monotonic() - began
    assert took < 1.0, f"{took:.2f} s"
    for one in (two.a, two.b):
        assert "was revoked" in await bad.refused(one)
    revoked = await good.revoked(two.a)
    assert bad.chain[0].serial_number in revoked
    two.kill()
    two.start()
    for one in (two.a, two.b):
        assert await good.revoked(one) == revoked, "from the first moment on"
        assert "was revoked" in await bad.refused(one)
    assert two.shown()["barred"] == ["n1"]


async def test_while_the_api_server_is_away_nothing_is_revoked_silently_and_nobody_begins_as_if_nothing_had_been(two: Replicas) -> None:
    bad, good = await two.join("n1", two.a), await two.join("n2", two.b)
    await asyncio.to_thread(two.said, "ca", "revoke", f"{DOMAIN}/meshagent/node/n1")
    await soon(lambda: equal(good.revoked, two.b, {bad.chain[0].serial_number}))
    two.a.kill()
    await asyncio.to_thread(two.plane.stop)
    code, said = await asyncio.to_thread(two.command, "ca", "revoke", f"{DOMAIN}/meshagent/node/n2")
    assert code == 1
    assert "nothing was read, and nothing was changed: no news of it: https://127.0.0.1" in said
    assert await good.revoked(two.b) == {bad.chain[0].serial_number}, "what it knew holds"
    answer = await good.sign(two.b, "shop/redis")
    assert not answer.chain, "what cannot be recorded could not be revoked"
    two.a.start()
    await soon(lambda: holds(lambda: two.a.ready().startswith("what the certificate authority must remember is not known: no news of it")))
    await soon(lambda: holds(lambda: two.b.ready().startswith("what the certificate authority must remember is not known")), 60)
    with pytest.raises(OSError, match="Connect call failed"):
        await asyncio.open_connection("127.0.0.1", two.a.port)
    await asyncio.to_thread(two.plane.start)
    await asyncio.to_thread(two.a.wait, 60)
    await asyncio.to_thread(two.b.wait, 60)
    assert await good.revoked(two.a) == {bad.chain[0].serial_number}
    assert "was revoked" in await bad.refused(two.a)
    assert (await good.sign(two.b, "shop/redis")).chain


async def test_of_a_hundred_writers_at_once_nothing_is_lost(plane: ControlPlane) -> None:
    plane.apply(namespace(OWN, "none"))
    connect = functools.partial(Api.connect, plane.kubeconfig(), "")
    with ExitStack() as stack:
        stores = [stack.enter_context(opened(plane.kubeconfig(), "", OWN)) for _ in range(10)]
        stack.callback(lambda: plane.kubectl("delete", "controllerstates", "--all", "-n", OWN))
        revocations.prepare(stores[0])
        barrier = threading.Barrier(WRITERS)

        def write(number: int) -> None:
            barrier.wait()
            issued = Issued(f"{number + 1:x}", f"{DOMAIN}/ns/shop/sa/cart", "n1", "", 2_000_000_000)
            revocations.add(stores[number % len(stores)], [issued], 1_700_000_000, bar=[f"n{number}"])

        with ThreadPoolExecutor(WRITERS) as threads:
            began = time.monotonic()
            await asyncio.gather(*(asyncio.get_running_loop().run_in_executor(threads, write, number) for number in range(WRITERS)))
            print(f"{WRITERS} writers: {time.monotonic() - began:.2f} s")
        fresh = ClusterStore(connect, OWN)
        news = threading.Event()
        fresh.listen(news.set)
        fresh.start()
        stack.callback(fresh.close)
        while not fresh.synced:
            assert news.wait(20)
            news.clear()
        assert {int(record.serial, 16) for record in revocations.read(fresh)} == set(range(1, WRITERS + 1))
        assert revocations.known(fresh)[1] == {f"n{number}" for number in range(WRITERS)}


async def test_who_has_tunnels_is_known_to_every_replica_and_outlives_all_of_them(two: Replicas) -> None:
    one, other = await two.join("n1", two.a), await two.join("n2", two.b)
    assert await other.awaiting(two.b) == {"shop/cart", "shop/redis"}
    async with one.discovery(two.a) as stub:
        await stub.ReportTunnels(discovery_pb2.TunnelReport(node="n1", workloads=["shop/cart"]))
    for replica in (two.a, two.b):
        await soon(functools.partial(equal, other.awaiting, replica, {"shop/redis"}))
    two.kill()
    two.start()
    for replica in (two.a, two.b):
        assert await other.awaiting(replica) == {"shop/redis"}
    two.kill()
    damaged = json.dumps({"documents": {"tunnels.json": '{"ready": {'}})
    two.plane.kubectl("patch", "controllerstate", "node.n1", "-n", OWN, "--type=merge", "-p", damaged)
    two.start()
    assert await other.awaiting(two.a) == set(), "what cannot be read takes nobody's tunnels away"


async def test_a_token_is_good_at_any_replica_and_once(two: Replicas) -> None:
    node = await two.join("n1", two.a)
    listed = json.loads(await asyncio.to_thread(two.said, "token", "list", "-o", "json"))
    assert [(token["state"], token["usedBy"]) for token in listed] == [("used", "n1")]
    assert await node.refused(two.b) == "", "a certificate of one is believed by the other"


async def test_a_token_for_any_node_gives_no_name_that_a_node_has_got_at_another_replica(two: Replicas) -> None:
    token = await two.token()
    await two.join("n1", two.a)
    with pytest.raises(grpc.aio.AioRpcError, match="node n1 has a valid certificate"):
        await two.join("n1", two.b, token)
    await asyncio.to_thread(two.said, "ca", "revoke", f"{DOMAIN}/meshagent/node/n1")
    again = await two.join("n1", two.b, token)
    await asyncio.sleep(1.5)
    assert [await again.refused(one) for one in (two.a, two.b)] == ["", ""], "what was given after the revocation is not meant by it"


async def test_a_jwt_of_one_replica_can_be_checked_with_what_the_other_tells(two: Replicas) -> None:
    node = await two.join("n1", two.a)

    async def kids(at: Replica) -> set[str]:
        async with node.identity(at) as stub:
            bundle = await stub.Trust(pb.TrustRequest()).read()
            return {key["kid"] for key in json.loads(bundle.jwt_keys)["keys"]}

    async def shared() -> bool:
        return len(await kids(two.a)) == 4 and await kids(two.a) == await kids(two.b)  # two of each: the one that signs, and the next

    await soon(shared)
    before = await kids(two.a)
    assert "JWT keys are replaced" in await asyncio.to_thread(two.said, "ca", "rotate", "--now")

    async def replaced() -> bool:
        now = await kids(two.a)
        return len(now) == 4 and not now & before and await kids(two.b) == now

    await soon(replaced)
    before = await kids(two.a)
    two.b.kill()
    await asyncio.to_thread(two.said, "ca", "rotate", "--now")
    await soon(lambda: apart(kids, two.a, before))
    two.b.start(again=True)
    await asyncio.to_thread(two.b.wait)
    assert not before & await kids(two.b), "one that was away does not bring its own back"
    await soon(shared)
    assert not before & await kids(two.a)


async def apart(kids: Callable[[Replica], Awaitable[set[str]]], at: Replica, before: set[str]) -> bool:
    return not await kids(at) & before


async def test_a_trace_and_a_status_reach_an_agent_through_the_replica_that_it_is_not_connected_to(two: Replicas, tmp_path: Path) -> None:
    node = await two.join("n1", two.a)
    files = node.files(tmp_path)
    place = Place("n1", tmp_path, two.a.address)
    config = replace(place.config, tls=files, replicas="mesh-controller:15010", state_dir=tmp_path / "state")
    agent = Relay(config)

    async def resolve(_host: str, _port: int) -> list[str]:
        return [two.a.address, two.b.address]

    async def apply(_: Snapshot) -> None:
        pass

    discovery = Discovery(config, apply, beside=(agent.run,))
    async with beside(place.api.run()), beside(discovery.run()), beside(Replicated(config, agent.offer, resolve).run()):
        for replica in (two.b, two.a):
            async with grpc.aio.insecure_channel(f"unix:{replica.top}/c.sock") as channel:
                stub: Any = relay_pb2_grpc.RelayStub(channel)  # type: ignore[no-untyped-call,unused-ignore]

                async def answers(stub: Any = stub) -> bool:
                    return [one.node async for one in stub.Ask(AskRequest(status=agent_pb2.StatusRequest())) if one.document] == ["n1"]

                await soon(answers)
                asked = agent_pb2.TraceRequest(source="frontend", destination="redis", duration_s=20, count=1)
                call = stub.Ask(AskRequest(node="n1", trace=asked))
                assert json.loads((await call.read()).document)["source"] == "default/frontend"
                call.cancel()


async def test_the_rights_of_the_manifest_are_enough(two: Replicas) -> None:
    two.kill()
    grant(two.plane)
    for one in (two.a, two.b):
        one.user = ACCOUNT
    two.start()
    node = await two.join("n1", two.a)
    await asyncio.to_thread(two.said, "ca", "revoke", f"{DOMAIN}/meshagent/node/n1")
    await soon(lambda: refused_everywhere(two, node))
    for verb, what, space in (("delete", "controllerstates.meshagent.io", "shop"), ("get", "configmaps", OWN), ("create", "secrets", OWN)):
        said = two.plane.kubectl("auth", "can-i", verb, what, "-n", space, f"--as={ACCOUNT}", check=False)
        assert said.startswith("no"), (verb, what)


async def test_a_controller_that_cannot_read_any_more_what_others_change_ends(
    plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane.apply(namespace(OWN, "none"))
    with replicas(plane, tmp_path):
        files = CaSettings(tmp_path / "ca", Intermediate(tmp_path / "middle.pem", tmp_path / "middle.key"), roots=tmp_path / "root.pem")
        own = Kubernetes(plane.kubeconfig(), "", OWN)
        controller = Controller(Settings(None, tmp_path / "c.sock", identity=IdentitySettings(files), kubernetes=own))
        try:
            await controller.start()
            running = asyncio.create_task(controller.run(asyncio.Event()))
            assert controller._shared is not None

            def broken(*_: object, **__: object) -> None:
                raise RuntimeError("boom")

            monkeypatch.setattr(controller._shared._reflector, "_take", broken)
            with opened(plane.kubeconfig(), "", OWN) as other:
                await asyncio.to_thread(other.change, lambda documents: documents.write("x", "1"))
            with pytest.raises(ControllerError, match=r"what other controllers change is not read any more \(RuntimeError\('boom'\)\)"):
                await asyncio.wait_for(running, 20)
        finally:
            await controller.stop()


async def refused_everywhere(two: Replicas, node: Joined) -> bool:
    return all([await node.refused(one) for one in (two.a, two.b)])


async def test_a_list_of_what_was_revoked_that_somebody_has_deleted_is_not_taken_for_an_empty_one(two: Replicas) -> None:
    bad, good = await two.join("n1", two.a), await two.join("n2", two.b)
    await asyncio.to_thread(two.said, "ca", "revoke", f"{DOMAIN}/meshagent/node/n1")
    await soon(lambda: equal(good.revoked, two.b, {bad.chain[0].serial_number}))
    two.plane.kubectl("delete", "controllerstate", "authority", "-n", OWN)
    await asyncio.sleep(1.5)
    assert "was revoked" in await bad.refused(two.a)
    assert await good.revoked(two.b) == {bad.chain[0].serial_number}
    two.a.kill()
    two.a.start()
    await soon(lambda: holds(lambda: two.a.process is not None and two.a.process.poll() == 1))
    assert "revoked.json is gone, and certificates have been issued: revoked ones would be good again" in two.a.log()
