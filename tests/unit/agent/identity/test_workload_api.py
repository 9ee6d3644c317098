"""The Workload API over a real unix socket, called from the test's own process: who gets what, when, and what nobody gets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_private_key
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import features, netns
from agent.errors import EnvironmentUnfit
from agent.identity import door, service, workload_api
from agent.identity.callers import Callers
from agent.identity.door import Door
from agent.identity.service import Identity
from agent.identity.workload_api import WorkloadApi
from agent.model import LocalWorkload
from meshapi import workload_pb2 as pb
from meshapi import workload_pb2_grpc
from tests.tasks import until
from tests.unit.agent.identity.signer import TRUST_DOMAIN, Signer, local, spiffe_id

HEADER = (("workload.spiffe.io", "true"),)
OWN = Path("/proc/self/ns/net")
CGROUP = features.cgroup2_mount() or Path("/sys/fs/cgroup")


def own(name: str = "cart", account: str = "") -> LocalWorkload:
    """A workload whose network namespace is the test's."""
    return local(name, netns.cookie(OWN), str(OWN), account)


class Node:
    """A node with its Workload API, and a client of it."""

    def __init__(self, signer: Signer, identity: Identity, api: WorkloadApi, stub: Any, path: Path) -> None:
        self.signer, self.identity, self.api, self.stub, self.path = signer, identity, api, stub, path


@contextlib.asynccontextmanager
async def node(run_dir: Path, *here: LocalWorkload) -> AsyncIterator[Node]:
    async with Signer().serving() as signer:
        config = signer.joining(run_dir, cgroup=CGROUP)
        identity = Identity(config)
        identity.load()
        identity.update(here)
        api = WorkloadApi(config, identity)
        tasks = [asyncio.create_task(identity.run()), asyncio.create_task(api.run())]
        try:
            await until(config.workload_socket.is_socket)
            await until(lambda: all(identity.svid(one.workload.name) for one in here))
            async with grpc.aio.insecure_channel(f"unix:{config.workload_socket}") as channel:
                yield Node(signer, identity, api, workload_pb2_grpc.SpiffeWorkloadAPIStub(channel), config.workload_socket)  # type: ignore[no-untyped-call,unused-ignore]
        finally:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome


def run(run_dir: Path, scenario: Callable[[Node], Awaitable[None]], *here: LocalWorkload) -> None:
    async def body() -> None:
        async with node(run_dir, *here) as running:
            await asyncio.wait_for(scenario(running), 30)

    asyncio.run(body())


async def first(call: Any) -> Any:
    message = await call.read()
    call.cancel()
    return message


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    try:
        await (call.read() if hasattr(call, "read") else call)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("it was answered")


def test_a_workload_gets_its_certificate_its_key_and_whom_to_believe(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        answer = await first(n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER))
        (svid,) = answer.svids
        assert svid.spiffe_id == spiffe_id("cart")
        certificate = x509.load_der_x509_certificate(svid.x509_svid)
        key: Any = load_der_private_key(svid.x509_svid_key, None)
        assert key.public_key() == certificate.public_key()
        certificate.verify_directly_issued_by(x509.load_der_x509_certificate(svid.bundle))
        bundles = await first(n.stub.FetchX509Bundles(pb.X509BundlesRequest(), metadata=HEADER))
        assert dict(bundles.bundles) == {f"spiffe://{TRUST_DOMAIN}": n.signer.root.der}
        assert list(bundles.crl) == []

    run(run_dir, scenario, own())


def test_the_socket_is_for_everybody_and_what_is_behind_it_for_root(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        assert stat.S_IMODE(n.path.stat().st_mode) == 0o666
        assert stat.S_IMODE(n.path.parent.stat().st_mode) == 0o755
        inner = run_dir / "identity" / "door"
        assert stat.S_IMODE(inner.stat().st_mode) == 0o700
        await first(n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER))
        assert [path.name for path in inner.iterdir()] == ["api.sock"]
        assert [path.name for path in n.path.parent.iterdir()] == ["workload.sock"]

    run(run_dir, scenario, own())
    assert list(run_dir.with_name("run-workload").iterdir()) == []


@pytest.mark.parametrize("metadata", [(), (("workload.spiffe.io", "True"),), (("workload.spiffe.io", ""),)], ids=["none", "case", "empty"])
def test_a_call_without_the_standards_metadata_is_invalid(run_dir: Path, metadata: tuple[tuple[str, str], ...]) -> None:
    async def scenario(n: Node) -> None:
        for call in calls(n, metadata):
            code, _ = await refusal(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT

    run(run_dir, scenario, own())


def calls(n: Node, metadata: tuple[tuple[str, str], ...] = HEADER) -> list[Any]:
    return [
        n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=metadata),
        n.stub.FetchX509Bundles(pb.X509BundlesRequest(), metadata=metadata),
        n.stub.FetchJWTBundles(pb.JWTBundlesRequest(), metadata=metadata),
        n.stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["a"]), metadata=metadata),
        n.stub.ValidateJWTSVID(pb.ValidateJWTSVIDRequest(audience="a", svid="b"), metadata=metadata),
    ]


def test_a_process_in_no_workloads_namespace_gets_nothing(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        for call in calls(n):
            code, details = await refusal(call)
            assert code is grpc.StatusCode.PERMISSION_DENIED
            assert "in no network namespace of an enrolled workload" in details
        assert n.identity.status().callers_refused == 5

    run(run_dir, scenario, local("elsewhere", 1))


def test_who_connected_before_its_workload_was_enrolled_gets_its_identity_over_the_same_connection(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        code, _ = await refusal(calls(n)[0])
        assert code is grpc.StatusCode.PERMISSION_DENIED
        n.identity.update([own()])
        answer = await first(n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER))
        assert answer.svids[0].spiffe_id == spiffe_id("cart")
        assert len(n.api._door._present) == 1

    run(run_dir, scenario, local("elsewhere", 1))


def test_a_process_outside_of_the_agents_cgroup_gets_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.cgroups.Tree.of", lambda _self, _pid: Path("/elsewhere"))

    async def scenario(n: Node) -> None:
        code, details = await refusal(calls(n)[0])
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "runs outside of cgroup" in details

    run(run_dir, scenario, own())


def test_a_socket_of_a_workload_in_the_hands_of_a_process_elsewhere_is_nobodys(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        code, details = await refusal(calls(n)[0])
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "from another network namespace" in details

    run(run_dir, scenario, local("cart", netns.cookie(OWN), "/proc/self/ns/uts"))


def test_a_workload_that_is_no_longer_enrolled_loses_its_stream(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        call = n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER)
        await call.read()
        n.identity.update([])
        code, _ = await refusal(call)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        code, _ = await refusal(calls(n)[0])  # over the same connection
        assert code is grpc.StatusCode.PERMISSION_DENIED

    run(run_dir, scenario, own())


def test_a_stream_tells_of_another_identity_another_root_and_a_revocation(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        call = n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER)
        before = await call.read()
        n.signer.accounts["default/cart"] = "other"
        n.identity.update([own(account="other")])
        code, details = await refusal(call)  # for a moment there is none: the standard's way to take one back
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "has no certificate" in details
        call = n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER)
        after = await call.read()
        assert after.svids[0].spiffe_id == spiffe_id("other")
        assert after.svids[0].x509_svid_key != before.svids[0].x509_svid_key
        n.signer.revoked.append(23)
        await n.signer.announce()
        revoked = await call.read()
        assert revoked.svids == after.svids
        (crl,) = revoked.crl
        assert [one.serial_number for one in x509.load_der_x509_crl(crl)] == [23]
        call.cancel()

    run(run_dir, scenario, own())


def test_who_comes_before_the_certificate_waits_for_it_a_little(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload_api, "PATIENCE_S", 0.3)

    async def scenario(n: Node) -> None:
        n.signer.refuse["default/cart"] = "not now"
        n.identity.update([own()])
        code, details = await refusal(calls(n)[0])
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "not now" in details
        monkeypatch.setattr(workload_api, "PATIENCE_S", 10)
        call = n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER)
        reading = asyncio.create_task(call.read())
        del n.signer.refuse["default/cart"]
        assert (await reading).svids[0].spiffe_id == spiffe_id("cart")
        call.cancel()

    run(run_dir, scenario)


def test_tokens_are_signed_for_an_audience_remembered_and_validated(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        answer = await n.stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["shop", "bank"]), metadata=HEADER)
        (token,) = answer.svids
        assert token.spiffe_id == spiffe_id("cart")
        again = await n.stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["bank", "shop"], spiffe_id=spiffe_id("cart")), metadata=HEADER)
        assert again == answer
        assert n.signer.jwts == 1
        bundles = await first(n.stub.FetchJWTBundles(pb.JWTBundlesRequest(), metadata=HEADER))
        assert b'"kid": "one"' in bundles.bundles[f"spiffe://{TRUST_DOMAIN}"]
        good = await n.stub.ValidateJWTSVID(pb.ValidateJWTSVIDRequest(audience="shop", svid=token.svid), metadata=HEADER)
        assert good.spiffe_id == spiffe_id("cart")
        assert json_format.MessageToDict(good.claims)["aud"] == ["bank", "shop"]
        for bad in (("nobody", token.svid), ("shop", token.svid[:-3] + "AAA"), ("shop", "x.y.z")):
            code, details = await refusal(n.stub.ValidateJWTSVID(pb.ValidateJWTSVIDRequest(audience=bad[0], svid=bad[1]), metadata=HEADER))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert token.svid[:30] not in details

    run(run_dir, scenario, own())


def test_one_workload_does_not_use_up_the_nodes_tokens(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "TOKENS_AT_ONCE", 3.0)
    monkeypatch.setattr(service, "TOKENS_PER_S", 0.001)

    async def scenario(n: Node) -> None:
        for audience in "abc":
            await n.stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=[audience]), metadata=HEADER)
        code, details = await refusal(n.stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["d"]), metadata=HEADER))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "keep those that have not expired" in details
        await n.stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["a"]), metadata=HEADER)  # it is remembered
        assert n.signer.jwts == 3

    run(run_dir, scenario, own())


def test_nobody_gets_a_token_for_somebody_else_or_for_no_audience(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        code, _ = await refusal(n.stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["a"], spiffe_id=spiffe_id("admin")), metadata=HEADER))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        for audience in ([], [""], ["a" * 1025], ["a"] * 17):
            code, _ = await refusal(n.stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=audience), metadata=HEADER))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert n.signer.jwts == 0

    run(run_dir, scenario, own())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"sub": spiffe_id("admin")}, "another identity", id="another-subject"),
        pytest.param({"aud": ["nobody"]}, "somebody else", id="another-audience"),
        pytest.param({"exp": 1}, "expired", id="expired"),
        pytest.param({"sub": "spiffe://elsewhere/ns/default/sa/cart"}, "trust domain", id="another-trust-domain"),
    ],
)
def test_a_controllers_token_that_does_not_hold_is_not_handed_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    async def scenario(n: Node) -> None:
        real = n.signer.jwt.sign
        monkeypatch.setattr(n.signer.jwt, "sign", lambda claims, header=None: real({**claims, **change}, header))
        code, details = await refusal(n.stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["shop"]), metadata=HEADER))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert said in details

    run(run_dir, scenario, own())


def test_while_the_controller_fails_there_is_no_token_and_the_caller_may_come_back(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        n.signer.fail = grpc.StatusCode.UNAVAILABLE
        code, _ = await refusal(n.stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["shop"]), metadata=HEADER))
        assert code is grpc.StatusCode.UNAVAILABLE

    run(run_dir, scenario, own())


def test_one_callers_connections_are_bounded_and_close_with_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MAX_OF_ONE", 3)

    async def scenario(n: Node) -> None:
        held = []
        for _ in range(7):
            one = socket.socket(socket.AF_UNIX)
            one.connect(str(n.path))
            held.append(one)
        await until(lambda: n.api._door.turned_away == 4)
        assert len(n.api._door._present) == 3
        for one in held:
            one.close()
        await until(lambda: not n.api._door._present)
        assert +n.api._door._count == {}
        await first(n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER))

    run(run_dir, scenario, own())


def test_the_inner_socket_gives_nothing_to_who_did_not_come_through_the_door(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        async with grpc.aio.insecure_channel(f"unix:{n.api._door.inner_socket}") as channel:
            stub: Any = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
            code, details = await refusal(stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER))
            assert code is grpc.StatusCode.PERMISSION_DENIED
            assert "did not come through" in details

    run(run_dir, scenario, own())


def test_a_path_that_no_unix_socket_can_have_is_said_at_once(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    with pytest.raises(EnvironmentUnfit, match="at most 107 bytes"):
        Door(long / "w.sock", tmp_path, Callers(CGROUP, lambda _: None)).prepare()


def test_a_socket_that_cannot_be_made_is_a_problem_and_ends_nothing_else(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload_api, "RETRY_S", 0.05)
    run_dir.with_name("run-workload").write_text("in the way")

    async def check() -> None:
        async with Signer().serving() as signer:
            config = signer.joining(run_dir, cgroup=CGROUP)
            identity = Identity(config)
            identity.load()
            tasks = [asyncio.create_task(identity.run()), asyncio.create_task(WorkloadApi(config, identity).run())]
            await until(identity.problems)
            assert "workloads cannot ask for their identities: cannot prepare" in identity.problems()[0]
            assert not any(task.done() for task in tasks)
            run_dir.with_name("run-workload").unlink()
            await until(config.workload_socket.is_socket)
            await until(lambda: not identity.problems())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(check())


def test_what_is_not_grpc_ends_its_own_connection_only(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        call = n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER)
        await call.read()
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64, b"\0" * 100_000):
            reader, writer = await asyncio.open_unix_connection(str(n.path))
            with contextlib.suppress(OSError):
                writer.write(garbage)
                if garbage:
                    writer.write_eof()
                await asyncio.wait_for(reader.read(), 10) if garbage else None
            writer.close()
        assert (await first(n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER))).svids
        call.cancel()

    run(run_dir, scenario, own())


METHODS = ("FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles", "FetchJWTSVID", "ValidateJWTSVID")


def test_any_bytes_as_a_request_get_an_answer_or_an_error_and_harm_nobody(run_dir: Path) -> None:
    """Fuzzing inside of one node, because a node for each example would take minutes."""

    async def scenario(n: Node) -> None:
        loop = asyncio.get_running_loop()
        channel = grpc.insecure_channel(f"unix:{n.path}")

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(METHODS), st.one_of(st.binary(max_size=300), messages()))
        def attempt(method: str, content: bytes) -> None:
            path = f"/SpiffeWorkloadAPI/{method}"
            streams = method in METHODS[:3]
            call: Any = (channel.unary_stream if streams else channel.unary_unary)(path)
            try:
                if streams:
                    answers = call(content, metadata=HEADER, timeout=10)
                    next(iter(answers))
                    answers.cancel()
                else:
                    call(content, metadata=HEADER, timeout=10)
            except grpc.RpcError as error:
                failed: Any = error
                assert failed.code() in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INTERNAL}

        try:
            await loop.run_in_executor(None, attempt)
        finally:
            channel.close()
        assert (await first(n.stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER))).svids[0].spiffe_id == spiffe_id("cart")

    run(run_dir, scenario, own())


def messages() -> st.SearchStrategy[bytes]:
    """Requests that decode."""
    text = st.text(max_size=40)
    token = st.builds("{}.{}.{}".format, text, text, text) | text
    return st.one_of(
        st.builds(lambda a, s: pb.JWTSVIDRequest(audience=a, spiffe_id=s).SerializeToString(), st.lists(text, max_size=3), text),
        st.builds(lambda a, s: pb.ValidateJWTSVIDRequest(audience=a, svid=s).SerializeToString(), text, token),
    )


def test_a_process_that_ended_or_cannot_be_seen_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    here = own()
    callers = Callers(CGROUP, lambda cookie: here if cookie == here.netns_cookie else None)
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert callers.identify(ours).refused == ""
        monkeypatch.setattr("agent.identity.callers._ended", lambda _: True)
        assert "has ended" in callers.identify(ours).refused
        monkeypatch.setattr("agent.identity.callers._CREDENTIALS", type("S", (), {"size": 12, "unpack": lambda _, __: (0, 0, 0)})())
        assert "process namespace" in callers.identify(ours).refused
    assert "cannot be identified" in callers.identify(ours).refused


def test_without_so_peerpidfd_the_process_is_found_by_its_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.identity.callers._SO_PEERPIDFD", 9999)
    here = own()
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        caller = Callers(CGROUP, lambda _: here).identify(ours)
    assert (caller.refused, caller.netns_cookie) == ("", here.netns_cookie)


def test_an_answer_takes_milliseconds(run_dir: Path) -> None:
    async def scenario(n: Node) -> None:
        times = []
        for _ in range(23):
            async with grpc.aio.insecure_channel(f"unix:{n.path}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                stub: Any = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
                started = time.monotonic()
                await first(stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER))
                times.append(time.monotonic() - started)
        print(f"a new connection and its first SVID: median {sorted(times)[11] * 1000:.1f} ms")
        assert sorted(times)[11] < 0.2

    run(run_dir, scenario, own())
