from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from controller.server import ServerTls
from meshapi import admin_pb2 as pb
from meshapi import admin_pb2_grpc
from tests.unit.controller.harness import SHOP, Authority, serve, service


@asynccontextmanager
async def admin(target: str, credentials: grpc.ChannelCredentials | None = None) -> AsyncIterator[Any]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.aio.secure_channel(target, credentials, options) if credentials else grpc.aio.insecure_channel(target, options)
    async with channel:
        yield admin_pb2_grpc.AdminStub(channel)  # type: ignore[arg-type,no-untyped-call,unused-ignore]


POLICY = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: NAME, namespace: ns}
spec: {action: DENY, rules: [{from: [{source: {namespaces: [ns]}}]}]}
"""


async def apply(stub: Any, *texts: str) -> list[tuple[str, str, str]]:
    response = await stub.Apply(pb.ApplyRequest(documents=[pb.Document(origin="given.yaml", yaml=text) for text in texts]))
    return [(result.kind, result.name, result.action) for result in response.results]


async def get(stub: Any, kind: str, namespace: str = "", name: str = "") -> list[dict[str, Any]]:
    response = await stub.Get(pb.GetRequest(kind=kind, namespace=namespace, name=name))
    assert not response.error
    return [json.loads(item) for item in response.objects]


def test_what_was_applied_is_in_force_when_the_answer_comes(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock") as controller, admin(f"unix:{tmp_path}/c.sock") as stub:
            assert await apply(stub, SHOP) == [("Service", "cart", "created"), ("Workload", "cart-1", "created")]
            assert sorted(controller.mesh.publication.current.versions) == ["service/default/cart", "workload/default/cart-1"]
            assert await apply(stub, SHOP) == [("Service", "cart", "unchanged"), ("Workload", "cart-1", "unchanged")]
            changed = SHOP.replace("10.96.0.1", "10.96.0.9")
            assert await apply(stub, changed) == [("Service", "cart", "configured"), ("Workload", "cart-1", "unchanged")]
            files = sorted(path.name for path in (directory / "applied").iterdir())
            assert files == ["default_service_cart.yaml", "default_workload_cart-1.yaml"]
            (cart,) = await get(stub, "svc", name="cart")
            assert cart["spec"]["clusterIP"] == "10.96.0.9"
            assert cart["metadata"]["creationTimestamp"].endswith("Z")
            assert cart["status"]["conditions"] == [{"type": "Accepted", "status": "True", "reason": "Accepted", "message": "in force"}]

    asyncio.run(check())


@pytest.mark.parametrize("length", [200, 227, 228, 253])
def test_objects_with_names_as_long_as_there_may_be_are_stored_apart_and_deleted(tmp_path: Path, directory: Path, length: int) -> None:
    """227: what the name of a file just takes."""

    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock") as controller, admin(f"unix:{tmp_path}/c.sock") as stub:
            names = [f"{'x' * (length - 1)}{number}" for number in range(3)]
            text = "\n---\n".join(POLICY.replace("NAME", name) for name in names)
            assert [action for _, _, action in await apply(stub, text)] == ["created"] * 3
            assert [action for _, _, action in await apply(stub, text)] == ["unchanged"] * 3
            assert len(controller.mesh.publication.current.versions) == 3
            assert len(list((directory / "applied").iterdir())) == 3
            documents = [pb.Document(origin="given.yaml", yaml=POLICY.replace("NAME", names[1]))]
            assert [result.action for result in (await stub.Delete(pb.DeleteRequest(documents=documents))).results] == ["deleted"]
            assert set(controller.mesh.publication.current.versions) == {f"policy/ns/{names[0]}", f"policy/ns/{names[2]}"}

    asyncio.run(check())


def test_bad_documents_are_refused_and_the_good_ones_stored(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), admin(f"unix:{tmp_path}/c.sock") as stub:
            bad = "---\n" + service("bad", "10.96.0.300")
            response = await stub.Apply(
                pb.ApplyRequest(documents=[pb.Document(origin="x.yaml", yaml=SHOP + bad), pb.Document(origin="y", yaml="{")])
            )
            assert [result.action for result in response.results] == ["created", "created", "refused", "refused"]
            assert response.results[2].message == 'x.yaml:15 Service/bad spec.clusterIP: "10.96.0.300" is not an IPv4 or IPv6 address'
            assert response.results[3].message.startswith("y:1: not YAML")

    asyncio.run(check())


def test_a_change_that_would_push_something_out_is_refused_and_not_written(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), admin(f"unix:{tmp_path}/c.sock") as stub:
            await apply(stub, service("one", "10.96.0.1"))
            response = await stub.Apply(pb.ApplyRequest(documents=[pb.Document(origin="x", yaml=service("a-thief", "10.96.0.1"))]))
            (result,) = response.results
            assert result.action == "refused"
            assert result.message == "x:4 Service/a-thief spec.clusterIP: 10.96.0.1 port 80 already belongs to Service default/one"
            assert [path.name for path in (directory / "applied").iterdir()] == ["default_service_one.yaml"]

    asyncio.run(check())


def test_of_two_objects_in_one_batch_that_exclude_each_other_the_first_is_stored(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), admin(f"unix:{tmp_path}/c.sock") as stub:
            texts = (service("one", "10.96.0.1"), service("two", "10.96.0.1"), service("three", "10.96.0.3"))
            assert await apply(stub, *texts) == [
                ("Service", "one", "created"),
                ("Service", "two", "refused"),
                ("Service", "three", "created"),
            ]

    asyncio.run(check())


def test_of_one_object_twice_in_a_batch_the_last_counts(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), admin(f"unix:{tmp_path}/c.sock") as stub:
            texts = (service("one", "10.96.0.1"), service("one", "10.96.0.2"))
            assert await apply(stub, *texts) == [("Service", "one", "created"), ("Service", "one", "configured")]
            assert [item["spec"]["clusterIP"] for item in await get(stub, "svc")] == ["10.96.0.2"]

    asyncio.run(check())


def test_an_object_in_a_users_file_is_changed_there(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        (directory / "mine.yaml").write_text(service("one", "10.96.0.1"))
        async with serve(directory, tmp_path / "c.sock"), admin(f"unix:{tmp_path}/c.sock") as stub:
            document = pb.Document(origin="x", yaml=service("one", "10.96.0.2"))
            applied = await stub.Apply(pb.ApplyRequest(documents=[document]))
            deleted = await stub.Delete(pb.DeleteRequest(documents=[document]))
            for result in (applied.results[0], deleted.results[0]):
                assert result.action == "refused"
                assert str(directory / "mine.yaml") in result.message

    asyncio.run(check())


def test_delete_takes_objects_out_of_force(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock") as controller, admin(f"unix:{tmp_path}/c.sock") as stub:
            await apply(stub, SHOP)
            request = pb.DeleteRequest(documents=[pb.Document(origin="x", yaml="apiVersion: v1\nkind: Service\nmetadata: {name: cart}\n")])
            assert [result.action for result in (await stub.Delete(request)).results] == ["deleted"]
            assert sorted(controller.mesh.publication.current.versions) == ["workload/default/cart-1"]
            assert [result.action for result in (await stub.Delete(request)).results] == ["not found"]

    asyncio.run(check())


def test_get_shows_why_an_object_is_refused_and_what_stays_in_force(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        file = directory / "a.yaml"
        file.write_text(service("one", "10.96.0.1"))
        async with serve(directory, tmp_path / "c.sock") as controller, admin(f"unix:{tmp_path}/c.sock") as stub:
            file.write_text(service("one", "nonsense") + "---\n" + service("never", "nonsense"))
            await controller.mesh.reload()
            never, one = await get(stub, "services")
            assert one["spec"]["clusterIP"] == "10.96.0.1"
            condition = one["status"]["conditions"][0]
            assert (condition["type"], condition["status"], condition["reason"]) == ("Accepted", "False", "Invalid")
            assert condition["message"].startswith(f"the last good version stays in force: {file}:4 Service/one spec.clusterIP: ")
            assert never["status"]["conditions"][0]["message"].startswith(f"{file}:9 Service/never spec.clusterIP: ")
            assert "spec" not in never

    asyncio.run(check())


@pytest.mark.parametrize("word", ["Service", "service", "services", "svc", "SVC", "all"])
def test_kinds_have_many_spellings(tmp_path: Path, directory: Path, word: str) -> None:
    async def check() -> None:
        (directory / "a.yaml").write_text(service("one", "10.96.0.1"))
        async with serve(directory, tmp_path / "c.sock"), admin(f"unix:{tmp_path}/c.sock") as stub:
            assert [item["metadata"]["name"] for item in await get(stub, word)] == ["one"]
            assert await get(stub, word, "elsewhere") == []

    asyncio.run(check())


def test_an_unknown_kind_comes_back_with_a_suggestion(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        async with serve(directory, tmp_path / "c.sock"), admin(f"unix:{tmp_path}/c.sock") as stub:
            response = await stub.Get(pb.GetRequest(kind="servcies"))
            assert response.error == 'unknown kind "servcies"; did you mean "services"?'

    asyncio.run(check())


def test_on_tcp_only_an_administrators_certificate_may_apply(tmp_path: Path, directory: Path) -> None:
    async def check() -> None:
        authority = Authority(tmp_path, "ours")
        server = authority.issue("controller")
        tls = ServerTls(server.certificate, server.key, authority.ca)
        async with serve(directory, tmp_path / "c.sock", tls) as controller:
            for name, uri, allowed in (
                ("admin", "spiffe://mesh.local/meshagent/admin", True),
                ("node", "spiffe://mesh.local/meshagent/node/admin", False),
            ):
                pair = authority.issue(name, uri)
                credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes())
                async with admin(f"127.0.0.1:{controller.port}", credentials) as stub:
                    if allowed:
                        assert await apply(stub, service("one", "10.96.0.1")) == [("Service", "one", "created")]
                        continue
                    with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
                        await apply(stub, service("two", "10.96.0.2"))
                    with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
                        await stub.Get(pb.GetRequest(kind="all"))

    asyncio.run(check())
