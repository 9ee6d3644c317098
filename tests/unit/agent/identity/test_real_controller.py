"""A node against the project's own controller: joining, signing, renewal, revocation, rotation of the root, and both ends of the Workload API's tokens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from click.testing import CliRunner

from agent import features, netns
from agent.check import running
from agent.check.finding import Severity
from agent.config import Config, Join
from agent.discovery import Discovery
from agent.identity import node, workloads
from agent.identity.service import Identity
from agent.identity.workload_api import HEADER, WorkloadApi
from agent.model import LocalWorkload, Snapshot, Workload
from agent.report import as_json
from controller.identity.ca import CaSettings
from controller.identity.operator import Intermediate
from controller.main import main
from meshapi import workload_pb2 as pb
from meshapi import workload_pb2_grpc
from tests.tasks import until
from tests.unit.controller.identity.authorities import make
from tests.unit.controller.identity.harness import DOMAIN, World, world

CART = f"spiffe://{DOMAIN}/ns/shop/sa/cart"
OWN = Path("/proc/self/ns/net")


def cart() -> LocalWorkload:
    one = Workload("shop/cart", "cart", "n1", {}, ("10.0.1.2",), "cart", enrolled=True, ready=True)
    return LocalWorkload(one, netns.cookie(OWN), str(OWN))


def config(served: World, run_dir: Path) -> Config:
    token = run_dir.parent / "token"
    token.write_text(served.token("n1"))
    return Config(
        "n1", served.address, trust_domain=DOMAIN, run_dir=run_dir, state_dir=run_dir.parent / "state",
        cgroup=features.cgroup2_mount() or Path("/sys/fs/cgroup"), join=Join(served.join_address, token_file=token),
    )  # fmt: skip


@contextlib.asynccontextmanager
async def agent(settings: Config) -> AsyncIterator[Identity]:
    identity = Identity(settings)
    identity.load()
    task = asyncio.create_task(identity.run())
    identity.update([cart()])
    try:
        await until(lambda: identity.svid("shop/cart"))
        yield identity
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def ca(served: World, *arguments: str) -> str:
    done = CliRunner().invoke(main, ["ca", *arguments, "--ca-directory", str(served.ca_directory)])
    assert done.exit_code == 0, done.output
    return done.output


def test_join_sign_and_renew(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (node, workloads):
        monkeypatch.setattr(module, "LOOK_S", 0.1)

    async def check() -> None:
        settings = CaSettings(tmp_path / "ca", hold_s=0.0, lifetime_s=6)
        async with world(tmp_path, ca=settings) as served, agent(config(served, run_dir)) as identity:
            first, of_node = identity.svid("shop/cart"), identity.status().node
            assert first is not None
            assert first.chain.spiffe_id == CART
            assert of_node is not None
            await until(lambda: identity.svid("shop/cart") not in {None, first}, 20)
            await until(lambda: (identity.status().node or of_node).serial != of_node.serial, 20)
            await until(lambda: identity.status().connected)
            assert identity.problems() == []

    asyncio.run(check())


@pytest.mark.parametrize(("left_s", "found"), [(600, []), (60, ["CN=intermediate"])], ids=["in time", "late"])
def test_an_authority_that_ends_is_named_once_and_only_when_it_should_have_been_replaced(
    run_dir: Path, tmp_path: Path, left_s: int, found: list[str]
) -> None:
    root = make("root")
    root_file, _ = root.write(tmp_path, "root")
    own = Intermediate(*make("intermediate", root, lifetime_s=left_s).write(tmp_path, "intermediate"))  # it began an hour ago

    async def check() -> None:
        settings = CaSettings(tmp_path / "ca", own, roots=root_file, hold_s=0.0)
        async with world(tmp_path, ca=settings) as served, agent(config(served, run_dir)) as identity:
            said = running.certificates(as_json(identity.status()), time.time())
            assert [one.where for one in said if one.severity is not Severity.OK] == found

    asyncio.run(check())


def test_a_node_that_joined_gets_its_model_over_the_same_credentials(run_dir: Path, tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            settings = config(served, run_dir)
            async with agent(settings):
                found: asyncio.Queue[Snapshot] = asyncio.Queue()
                task = asyncio.create_task(Discovery(settings, found.put).run())
                try:
                    snapshot = await asyncio.wait_for(found.get(), 10)
                finally:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                assert "shop/cart" in snapshot.workloads

    asyncio.run(check())


def test_a_workload_of_another_node_is_refused(run_dir: Path, tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served, agent(config(served, run_dir)) as identity:
            redis = Workload("shop/redis", "redis", "n1", {}, ("10.0.2.2",), "redis", enrolled=True, ready=True)
            identity.update([cart()], [redis])
            await until(identity.problems)
            assert "not on node n1" in identity.problems()[0]
            assert identity.svid("shop/redis") is None
            assert identity.svid("shop/cart") is not None

    asyncio.run(check())


def test_a_revoked_certificate_is_replaced_and_listed_for_envoy(run_dir: Path, tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served, agent(config(served, run_dir)) as identity:
            first = identity.svid("shop/cart")
            assert first is not None
            await asyncio.to_thread(ca, served, "revoke", f"{first.chain.serial:x}")
            await until(lambda: identity.svid("shop/cart") not in {None, first}, 20)
            assert identity.trust is not None
            assert identity.trust.revoked == {first.chain.serial}
            assert len(identity.trust.crls_der) == 1

    asyncio.run(check())


def test_the_root_is_rotated_and_the_node_goes_on(run_dir: Path, tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served, agent(config(served, run_dir)) as identity:
            first = identity.svid("shop/cart")
            await asyncio.to_thread(ca, served, "rotate", "--now")
            await until(lambda: identity.trust is not None and len(identity.trust.roots) == 2, 20)
            assert identity.svid("shop/cart") is first
            trust = identity.trust
            assert trust is not None
            await until(lambda: (run_dir / "identity" / "roots.pem").read_bytes() == trust.pem)
            identity._authority.reconnect()  # to a controller that shows a certificate of the new root
            await until(lambda: identity.status().connected)

    asyncio.run(check())


def test_tokens_of_the_controller_hold_at_the_workload_socket(run_dir: Path, tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            settings = config(served, run_dir)
            async with agent(settings) as identity:
                task = asyncio.create_task(WorkloadApi(settings, identity).run())
                try:
                    await until(settings.workload_socket.is_socket)
                    async with grpc.aio.insecure_channel(f"unix:{settings.workload_socket}") as channel:
                        stub: Any = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
                        answer = await stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["bank"]), metadata=(HEADER,))
                        request = pb.ValidateJWTSVIDRequest(audience="bank", svid=answer.svids[0].svid)
                        assert (await stub.ValidateJWTSVID(request, metadata=(HEADER,))).spiffe_id == CART
                finally:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

    asyncio.run(check())
