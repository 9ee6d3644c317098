from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from controller.server import ServerTls
from meshapi import discovery_pb2 as pb
from meshapi import discovery_pb2_grpc
from tests.tasks import until
from tests.unit.controller.harness import SHOP, Authority, Pair, serve, service


class Stream:
    """An agent's side of the stream, one message at a time."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def hello(self, node: str, known: Mapping[str, str] | None = None) -> pb.DiscoveryResponse:
        with contextlib.suppress(grpc.aio.AioRpcError):  # `receive` says why
            await self._call.write(pb.DiscoveryRequest(node=node, known=known))
        return await self.receive()

    async def receive(self) -> pb.DiscoveryResponse:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(f"{error.code().name}: {error.details()}") from error
        assert isinstance(response, pb.DiscoveryResponse)
        return response

    async def answer(self, response: pb.DiscoveryResponse, error: str = "") -> None:
        await self._call.write(pb.DiscoveryRequest(nonce=response.nonce, error=error))


@asynccontextmanager
async def stream(target: str, credentials: grpc.ChannelCredentials | None = None) -> AsyncIterator[Stream]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.aio.secure_channel(target, credentials, options) if credentials else grpc.aio.insecure_channel(target, options)
    async with channel:
        call = discovery_pb2_grpc.DiscoveryStub(channel).Stream()  # type: ignore[arg-type,no-untyped-call,unused-ignore]
        yield Stream(call)
        call.cancel()


def names(response: pb.DiscoveryResponse) -> list[str]:
    return [resource.name for resource in response.resources]


def versions(response: pb.DiscoveryResponse) -> dict[str, str]:
    return {resource.name: resource.version for resource in response.resources}


def test_a_stream_carries_everything_first_and_then_differences(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        (directory / "a.yaml").write_text(SHOP)
        async with serve(directory, tmp_path / "c.sock"), stream(f"unix:{tmp_path}/c.sock") as agent:
            first = await agent.hello("n1")
            assert names(first) == ["service/default/cart", "workload/default/cart-1"]
            await agent.answer(first)
            (directory / "b.yaml").write_text(service("extra", "10.96.0.2"))
            second = await agent.receive()
            assert (names(second), list(second.removed)) == (["service/default/extra"], [])
            assert second.changed_at_ns > first.changed_at_ns
            await agent.answer(second)
            (directory / "b.yaml").unlink()
            third = await agent.receive()
            assert (names(third), list(third.removed), third.version) == ([], ["service/default/extra"], first.version)

    asyncio.run(check())


def test_a_reconnect_transfers_only_what_differs(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        (directory / "a.yaml").write_text(SHOP)
        async with serve(directory, tmp_path / "c.sock"):
            async with stream(f"unix:{tmp_path}/c.sock") as agent:
                known = versions(await agent.hello("n1"))
            async with stream(f"unix:{tmp_path}/c.sock") as agent:
                again = await agent.hello("n1", {**known, "service/default/gone": "0", "workload/default/cart-1": "old"})
            assert (names(again), list(again.removed)) == (["workload/default/cart-1"], ["service/default/gone"])
            async with stream(f"unix:{tmp_path}/c.sock") as agent:
                current = await agent.hello("n1", known)
            assert (names(current), list(current.removed), current.version) == ([], [], again.version)

    asyncio.run(check())


def test_changes_while_an_answer_is_outstanding_come_as_one(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        (directory / "a.yaml").write_text(SHOP)
        async with serve(directory, tmp_path / "c.sock") as controller, stream(f"unix:{tmp_path}/c.sock") as agent:
            first = await agent.hello("n1")
            for number in range(3, 10):
                (directory / "b.yaml").write_text(service(f"extra-{number}", f"10.96.0.{number}"))
                await controller.mesh.reload()
            await agent.answer(first)
            second = await agent.receive()
            assert (names(second), list(second.removed)) == (["service/default/extra-9"], [])

    asyncio.run(check())


def test_a_refused_response_is_not_sent_again_before_something_changes(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        (directory / "a.yaml").write_text(SHOP)
        async with serve(directory, tmp_path / "c.sock") as controller, stream(f"unix:{tmp_path}/c.sock") as agent:
            first = await agent.hello("n1")
            await agent.answer(first, "no room")
            waiting = asyncio.create_task(agent.receive())
            await until(lambda: controller.discovery.nacks)
            assert not waiting.done()
            (directory / "b.yaml").write_text(service("extra", "10.96.0.2"))
            second = await waiting
            assert names(second) == ["service/default/cart", "service/default/extra", "workload/default/cart-1"]
            assert controller.discovery.nacks == 1

    asyncio.run(check())


def test_agents_at_one_version_share_one_encoding(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        (directory / "a.yaml").write_text(SHOP)
        async with serve(directory, tmp_path / "c.sock") as controller:
            target = f"unix:{tmp_path}/c.sock"
            async with stream(target) as one, stream(target) as two, stream(target) as three:
                agents = (one, two, three)
                for number, agent in enumerate(agents):
                    await agent.answer(await agent.hello(f"n{number}"))
                assert controller.mesh.publication.encodings == 1
                (directory / "b.yaml").write_text(service("extra", "10.96.0.2"))
                assert [names(await agent.receive()) for agent in agents] == [["service/default/extra"]] * 3
                assert controller.mesh.publication.encodings == 2

    asyncio.run(check())


def test_a_wrong_nonce_ends_the_stream(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), stream(f"unix:{tmp_path}/c.sock") as agent:
            response = await agent.hello("n1")
            response.nonce = "other"
            await agent.answer(response)
            with pytest.raises(ConnectionError, match=r"INVALID_ARGUMENT: nonce 'other' answers nothing that is outstanding"):
                await agent.receive()

    asyncio.run(check())


def test_the_socket_is_for_its_owner_only(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"):
            assert (tmp_path / "c.sock").stat().st_mode & 0o777 == 0o600

    asyncio.run(check())


def test_on_tcp_the_certificate_must_name_the_node(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        (directory / "a.yaml").write_text(SHOP)
        ours, foreign = Authority(tmp_path, "ours"), Authority(tmp_path, "foreign")
        server = ours.issue("controller")

        def credentials(pair: Pair | None) -> grpc.ChannelCredentials:
            if pair is None:
                return grpc.ssl_channel_credentials(ours.ca.read_bytes())
            return grpc.ssl_channel_credentials(ours.ca.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes())

        async with serve(directory, tmp_path / "c.sock", ServerTls(server.certificate, server.key, ours.ca)) as controller:
            target = f"127.0.0.1:{controller.port}"
            node = ours.issue("n1", "spiffe://mesh.local/meshagent/node/n1")
            async with stream(target, credentials(node)) as agent:
                assert len(names(await agent.hello("n1"))) == 2
            async with stream(target, credentials(node)) as agent:
                with pytest.raises(
                    ConnectionError, match=r"PERMISSION_DENIED: node n2 is not yours: .* must name .*/node/n2; it names .*/node/n1"
                ):
                    await agent.hello("n2")
            for stranger in (
                ours.issue("nameless"),
                ours.issue("other", "spiffe://other.domain/meshagent/node/n1"),
                ours.issue("admin", "spiffe://mesh.local/meshagent/admin"),
            ):
                async with stream(target, credentials(stranger)) as agent:
                    with pytest.raises(ConnectionError, match="PERMISSION_DENIED"):
                        await agent.hello("n1")
            for outsider in (None, foreign.issue("n1-foreign", "spiffe://mesh.local/meshagent/node/n1")):
                async with stream(target, credentials(outsider)) as agent:
                    with pytest.raises(ConnectionError, match="UNAVAILABLE"):
                        await agent.hello("n1")
            async with stream(target) as agent:
                with pytest.raises(ConnectionError, match="UNAVAILABLE"):
                    await agent.hello("n1")

    asyncio.run(check())


def test_a_file_that_is_emptied_and_filled_again_never_leaves_the_model(tmp_path: Path, directory: Path) -> None:
    async def scenario() -> None:
        file = directory / "a.yaml"
        file.write_text(service("one", "10.0.0.1"))
        async with serve(directory, tmp_path / "c.sock") as controller:
            mesh = controller.mesh
            await asyncio.sleep(0.3)  # the watch is there
            with file.open("w") as writer:  # as `cat new > a.yaml` does
                await until(lambda: mesh.source.unsettled)
                assert [key.name for key in mesh.state.objects] == ["one"]
                writer.write(service("one", "10.0.0.2"))
            await until(lambda: [item.spec["clusterIP"] for item in mesh.state.objects.values()] == ["10.0.0.2"])
            file.write_text("")
            emptied = asyncio.get_running_loop().time()
            await until(lambda: not mesh.state.objects)
            # Sooner than the rescan that happens anyway.
            assert 0.7 < asyncio.get_running_loop().time() - emptied < 3

    asyncio.run(scenario())
