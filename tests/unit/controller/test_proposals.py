"""What the model would be with other policies: said to those who may ask, and nothing is brought into force."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from controller import proposals
from controller.server import Controller, ServerTls
from meshapi import admin_pb2, discovery_pb2, proposal_pb2_grpc
from meshapi import proposal_pb2 as pb
from tests.unit.controller.harness import SHOP, Authority, serve

HELD = """
---
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: held}
spec: {action: ALLOW}
"""
DENY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: deny}
spec:
  selector: {matchLabels: {app: cart}}
  action: DENY
  rules: [{to: [{operation: {methods: [GET]}}]}]
"""


@asynccontextmanager
async def stub(target: str, credentials: grpc.ChannelCredentials | None = None) -> AsyncIterator[Any]:
    channel = grpc.aio.secure_channel(target, credentials) if credentials else grpc.aio.insecure_channel(target)
    async with channel:
        yield proposal_pb2_grpc.ProposalsStub(channel)  # type: ignore[no-untyped-call,unused-ignore]


@asynccontextmanager
async def controlled(tmp_path: Path, directory: Path, tls: ServerTls | None = None) -> AsyncIterator[tuple[Controller, Any]]:
    (directory / "mesh.yaml").write_text(SHOP + HELD)
    async with serve(directory, tmp_path / "c.sock", tls) as controller, stub(f"unix:{tmp_path}/c.sock") as local:
        yield controller, local


def request(*texts: str, deleted: tuple[str, ...] = ()) -> pb.CompileRequest:
    return pb.CompileRequest(documents=[admin_pb2.Document(origin="new.yaml", yaml=text) for text in texts], deleted=deleted)


def test_a_proposal_says_what_differs_and_changes_nothing(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with controlled(tmp_path, directory) as (controller, local):
            before = controller.mesh.publication.current.version
            found = await local.Compile(request(DENY, deleted=("held",)))
            assert list(found.problems) == []
            (policy,) = found.proposal.policies
            assert (policy.namespace, policy.name, policy.action) == ("default", "deny", discovery_pb2.Policy.DENY)
            assert list(found.proposal.removed) == ["default/held"]
            assert [(one.name, list(one.policies)) for one in found.proposal.workloads] == [("default/cart-1", ["default/deny"])]
            nothing = await local.Compile(request(HELD))
            assert nothing == pb.CompileResponse(proposal=pb.Proposal())
            assert controller.mesh.publication.current.version == before
            assert not (directory / "applied").exists()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        pytest.param(
            request(DENY.replace("[GET]", "GET")),
            "new.yaml:8 AuthorizationPolicy/deny spec.rules[0].to[0].operation.methods: must be a list",
            id="a-field-of-the-wrong-type",
        ),
        pytest.param(request("{"), "new.yaml:1: not YAML", id="no-yaml"),
        pytest.param(request(SHOP), "only AuthorizationPolicy can be tried", id="another-kind"),
        pytest.param(request(DENY, DENY), "is there twice, first at new.yaml:2", id="twice"),
        pytest.param(request(deleted=("shop/none",)), "there is no AuthorizationPolicy shop/none to delete", id="nothing-to-delete"),
        pytest.param(request(HELD, deleted=("held",)), "is to be deleted, and is in a file", id="both"),
        pytest.param(request("#" * (proposals.MAX_BYTES + 1)), "larger than 4 MiB", id="too-large"),
    ],
)
def test_what_is_wrong_is_said_and_then_there_is_no_proposal(
    tmp_path: Path, directory: Path, asked: pb.CompileRequest, problem: str
) -> None:
    async def check() -> None:
        async with controlled(tmp_path, directory) as (_, local):
            found = await local.Compile(asked)
            assert problem in "\n".join(found.problems)
            assert not found.HasField("proposal")

    asyncio.run(check())


def test_administrators_and_nodes_may_ask_and_nobody_else(tmp_path: Path, directory: Path) -> None:
    servers, clients = Authority(tmp_path, "servers"), Authority(tmp_path, "clients")
    own = servers.issue("controller")
    tls = ServerTls(own.certificate, own.key, clients.ca)

    async def asked(port: int, name: str, uri: str) -> grpc.StatusCode:
        pair = clients.issue(name, uri)
        credentials = grpc.ssl_channel_credentials(servers.ca.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes())
        async with stub(f"127.0.0.1:{port}", credentials) as remote:
            call = remote.Compile(request(DENY))
            code: grpc.StatusCode = await call.code()
            return code

    async def check() -> None:
        async with controlled(tmp_path, directory, tls) as (controller, _):
            port = controller.port
            assert await asked(port, "admin", "spiffe://mesh.local/meshagent/admin") is grpc.StatusCode.OK
            assert await asked(port, "node", "spiffe://mesh.local/meshagent/node/n1") is grpc.StatusCode.OK
            for name, uri in (("pod", "spiffe://mesh.local/ns/shop/sa/web"), ("far", "spiffe://other.local/meshagent/admin")):
                assert await asked(port, name, uri) is grpc.StatusCode.PERMISSION_DENIED

    asyncio.run(check())


def test_whoever_asks_and_goes_away_keeps_one_thread_busy_at_most(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0

    def compiled(_self: proposals.Proposals, _request: pb.CompileRequest) -> pb.CompileResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.2)
        running -= 1
        return pb.CompileResponse()

    monkeypatch.setattr(proposals.Proposals, "_compiled", compiled)

    async def check() -> None:
        async with controlled(tmp_path, directory) as (_, local):
            codes = []
            for _ in range(proposals.MAX_WAITING + 1):
                call = local.Compile(request(DENY))
                await asyncio.wait({asyncio.ensure_future(call.code())}, timeout=0.02)
                codes.append(await call.code() if call.done() else None)
                call.cancel()
            assert codes == [*[None] * proposals.MAX_WAITING, grpc.StatusCode.RESOURCE_EXHAUSTED]
            await asyncio.sleep(0.25 * proposals.MAX_WAITING)
            assert await local.Compile(request(DENY)) == pb.CompileResponse()
        assert most == 1

    asyncio.run(check())
