from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from controller.identity.certificates import check_chain
from controller.identity.ledger import read
from meshapi import discovery_pb2, discovery_pb2_grpc
from meshapi import identity_pb2 as pb
from meshapi import join as tokens
from tests.tasks import until
from tests.unit.controller.identity.harness import OPTIONS, World, ask_to_join, decoded, join, new_key, presented, request, uris, world


def test_a_node_joins_with_a_token_and_its_certificate_opens_everything_else(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            node = await join(served, "n1")
            assert uris(node.chain[0]) == ["spiffe://mesh.local/meshagent/node/n1"]
            check_chain(node.chain, decoded(node.trust.roots), served.clock())
            async with grpc.aio.secure_channel(served.address, node.credentials, OPTIONS) as channel:
                stub = discovery_pb2_grpc.DiscoveryStub(channel)  # type: ignore[arg-type,no-untyped-call,unused-ignore]
                call: Any = stub.Stream()
                await call.write(discovery_pb2.DiscoveryRequest(node="n1"))
                assert [item.name for item in (await call.read()).resources] == [
                    f"workload/shop/{name}" for name in ("cart", "outside", "redis")
                ]
                call.cancel()

    asyncio.run(check())


def test_the_join_port_shows_the_root_that_the_token_names(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            chain = await presented(served.join_address)
            assert tokens.root_hash(chain[-1]) == tokens.parse(served.token("n1")).root_hash

    asyncio.run(check())


TOKEN = "x"  # noqa: S105 - nobody's


async def refusal(served: World, message: pb.JoinRequest) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask_to_join(served, message)
    return caught.value.code().name, str(caught.value.details())


def test_a_token_serves_once(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            token = served.token("n1")
            message = pb.JoinRequest(node="n1", csr=request(new_key()), token=token)
            await ask_to_join(served, message)
            code, said = await refusal(served, message)
            assert code == "PERMISSION_DENIED"
            assert "was used 0 s ago by node n1" in said
            assert token.split(".")[1] not in said

    asyncio.run(check())


def test_of_many_concurrent_joins_with_one_token_one_gets_through(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            token = served.token()
            attempts = [ask_to_join(served, pb.JoinRequest(node=f"n{number}", csr=request(new_key()), token=token)) for number in range(23)]
            results = await asyncio.gather(*attempts, return_exceptions=True)
            assert sum(isinstance(result, pb.JoinResponse) for result in results) == 1
            codes = {result.code() for result in results if isinstance(result, grpc.aio.AioRpcError)}
            assert codes == {grpc.StatusCode.PERMISSION_DENIED}

    asyncio.run(check())


def test_expired_foreign_revoked_and_damaged_tokens_are_refused_by_name(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            csr = request(new_key())
            expired = served.token("n1", 60)
            bound = served.token("n1")
            revoked = served.token("n1")
            served.tokens.revoke(served.tokens.all()[-1].id)
            served.clock.now += 61
            unknown = str(tokens.Token(b"x" * 32, "0" * 64))
            for node, token, expected in (
                ("n1", expired, "expired 1 s ago: make a new one"),
                ("n2", bound, "is for node n1, not for n2: check --node"),
                ("n1", revoked, "does not know the join token: it was revoked"),
                ("n1", unknown, "does not know the join token"),
                ("n1", bound[:-1], "not a join token"),
                ("n1", "x" * 2000, "more than 1024 characters"),
            ):
                code, said = await refusal(served, pb.JoinRequest(node=node, csr=csr, token=token))
                assert (code, expected in said) == ("PERMISSION_DENIED", True), said
            await ask_to_join(served, pb.JoinRequest(node="n1", csr=csr, token=bound))

    asyncio.run(check())


def test_an_expired_token_stays_expired_when_the_clock_is_set_back(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            token = served.token("n1", 60)
            message = pb.JoinRequest(node="n1", csr=request(new_key()), token=token)
            served.clock.now += 61
            await refusal(served, message)
            served.clock.now -= 61
            assert "expired" in (await refusal(served, message))[1]

    asyncio.run(check())


def test_a_token_for_any_node_does_not_give_the_name_of_a_node_that_has_joined(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            await join(served, "n1")
            token = served.token()
            code, said = await refusal(served, pb.JoinRequest(node="n1", csr=request(new_key()), token=token))
            assert code == "PERMISSION_DENIED"
            assert "node n1 has a valid certificate" in said
            assert "token create --node n1" in said
            await join(served, "n2", token)  # it was given back
            await join(served, "n1", served.token("n1"))

    asyncio.run(check())


def test_bad_requests_cost_no_token(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            token = served.token("n1")
            p384 = request(ec.generate_private_key(ec.SECP384R1()))
            for message, expected in (
                (pb.JoinRequest(node="n1", csr=b"garbage", token=token), "the CSR cannot be read"),
                (pb.JoinRequest(node="n1", csr=p384, token=token), "P-256"),
                (pb.JoinRequest(node="../n1", csr=request(new_key()), token=token), "'../n1' is no node name"),
                (pb.JoinRequest(node="", csr=request(new_key()), token=token), "'' is no node name"),
                (pb.JoinRequest(node="n1", csr=request(new_key())), "a join token or a service-account token is needed"),
                (pb.JoinRequest(node="n1", csr=request(new_key()), service_account_token=TOKEN), "does not check service-account tokens"),
            ):
                code, said = await refusal(served, message)
                assert (code, expected in said) == ("INVALID_ARGUMENT", True), said
            await join(served, "n1", token)

    asyncio.run(check())


def test_nothing_but_join_is_served_where_nodes_join_and_nothing_without_tls(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            async with grpc.aio.secure_channel(served.join_address, grpc.ssl_channel_credentials(served.roots), OPTIONS) as channel:
                stub = discovery_pb2_grpc.DiscoveryStub(channel)  # type: ignore[arg-type,no-untyped-call,unused-ignore]
                with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
                    await stub.Stream().read()
            for address in (served.join_address, served.address):
                async with grpc.aio.insecure_channel(address, OPTIONS) as channel:
                    call = channel.unary_unary("/meshagent.v1.Join/Join", pb.JoinRequest.SerializeToString, pb.JoinResponse.FromString)
                    with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                        await call(pb.JoinRequest(), timeout=5)

    asyncio.run(check())


def test_without_a_certificate_the_other_port_refuses_the_handshake(tmp_path: Path) -> None:
    async def check() -> None:
        async with (
            world(tmp_path) as served,
            grpc.aio.secure_channel(served.address, grpc.ssl_channel_credentials(served.roots), OPTIONS) as channel,
        ):
            call = channel.unary_unary("/meshagent.v1.Identity/Renew", pb.RenewRequest.SerializeToString, pb.JoinResponse.FromString)
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await call(pb.RenewRequest(), timeout=5)

    asyncio.run(check())


def test_who_opens_calls_and_sends_nothing_keeps_nobody_from_joining(tmp_path: Path) -> None:
    async def check() -> None:
        async def nothing() -> Any:
            await asyncio.sleep(3600)
            yield pb.JoinRequest()

        async with (
            world(tmp_path) as served,
            grpc.aio.secure_channel(served.join_address, grpc.ssl_channel_credentials(served.roots), OPTIONS) as channel,
        ):
            call = channel.stream_unary("/meshagent.v1.Join/Join", pb.JoinRequest.SerializeToString, pb.JoinResponse.FromString)
            held = [call(nothing()) for _ in range(300)]
            await asyncio.sleep(1)
            await join(served, "n1")
            for item in held:
                item.cancel()

    asyncio.run(check())


def test_who_has_no_token_cannot_occupy_a_nodes_name_and_who_has_one_does(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            ca, going_on = served.plane.ca, asyncio.Event()
            in_thread = ca.in_thread
            reached: list[Any] = []
            unknown, any_node = str(tokens.Token(b"x" * 32, "0" * 64)), served.token()

            async def slowly(work: Any, *arguments: Any) -> Any:
                if arguments[0] == unknown:
                    reached.append(arguments[0])
                    await going_on.wait()
                return await in_thread(work, *arguments)

            ca.in_thread = slowly  # type: ignore[method-assign,assignment]
            issue_now, signed = ca.issue_now, threading.Event()

            def sign_slowly(orders: Any) -> Any:
                reached.append(orders)
                assert signed.wait(20)
                return issue_now(orders)

            ca.issue_now = sign_slowly  # type: ignore[method-assign]
            stranger = asyncio.ensure_future(refusal(served, pb.JoinRequest(node="n1", csr=request(new_key()), token=unknown)))
            await until(lambda: len(reached) == 1)
            first = asyncio.ensure_future(join(served, "n1"))
            await until(lambda: len(reached) == 2)
            message = pb.JoinRequest(node="n1", csr=request(new_key()), token=any_node)
            assert "n1 is joining at this moment" in (await refusal(served, message))[1]
            signed.set()
            going_on.set()
            assert (await first).name == "n1"
            assert "does not know the join token" in (await stranger)[1]
            await join(served, "n2", any_node)  # it was given back

    asyncio.run(check())


def test_a_certificate_that_nobody_waited_for_keeps_no_node_from_joining(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as served:
            ca, token = served.plane.ca, served.token()
            issue_now, signed = ca.issue_now, threading.Event()

            def sign_slowly(orders: Any) -> Any:
                assert signed.wait(20)
                return issue_now(orders)

            ca.issue_now = sign_slowly  # type: ignore[method-assign]
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(join(served, "n1", token), 1)
            await until(lambda: served.tokens.all()[-1].used == 0)  # given back
            signed.set()
            await until(lambda: any(record.node == "n1" for record in read(ca.directory)[0]))
            assert (await join(served, "n1", token)).name == "n1"
            assert ca.holds("n1")

    asyncio.run(check())
