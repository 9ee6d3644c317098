"""Requests from one node to another through two real Envoys with generated configuration: mTLS, CONNECT, and who may reach what."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from envoy.extensions.filters.network.set_filter_state.v3 import set_filter_state_pb2

from agent.config import HBONE_PORT, UNREAD_MARK
from agent.l7 import hbone, names, secrets
from agent.l7.clusters import socket_address
from agent.l7.peer_log import Distrusted
from agent.l7.resources import Resources, pack
from agent.l7.snapshot import Builder
from agent.l7.xds import XdsServer
from agent.model import Action, Mtls, Operation, Policy, PolicyRule, Snapshot, Source, Workload
from tests import hbone as peer
from tests.ports import free_ports
from tests.unit.agent.identity.signer import Root
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7.harness import TRUST_DOMAIN, Answer

# Of this process alone: the Envoys of two would share a port.
HERE = {name: str(ipaddress.ip_address(f"127.{block}.0.0") + os.getpid()) for name, block in (("node-1", 64), ("node-2", 128))}
FAR = HERE["node-2"]
ROOT = Root()


def spiffe_id(account: str) -> str:
    return f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{account}"


def credentials(identity: str, root: Root = ROOT, **more: Any) -> tuple[bytes, bytes]:
    """Certificate and key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = root.sign(key.public_key(), [x509.UniformResourceIdentifier(identity)], **more)
    return leaf.public_bytes(Encoding.PEM), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def secret(*accounts: str, root: Root = ROOT) -> dict[str, Any]:
    trusted, resource = secrets.trust(TRUST_DOMAIN, ROOT.pem, b"")
    found = {trusted: resource}
    for one in accounts:
        found |= secrets.certificate(spiffe_id(one), *credentials(spiffe_id(one), root))
    return found


def pod(name: str, node: str, *addresses: str, **more: Any) -> Workload:
    return dataclasses.replace(harness.workload(name, *addresses, **more), node=node, mtls=Mtls.PERMISSIVE)


def loopback(identity: str) -> str:
    return {spiffe_id("far"): "127.0.1.1", spiffe_id("near"): "127.0.1.2"}[identity]


def resources(snapshot: Snapshot, node: str, *ports: int, distrusted: Distrusted = Distrusted()) -> Resources:  # noqa: B008  immutable
    """What the agent of a node serves, without namespaces: outbound listeners on 127.0.0.1 at `ports`, ends of tunnels at `HERE`."""
    local = [harness.local(one) for one in snapshot.workloads.values() if one.node == node]
    built = Builder(node, TRUST_DOMAIN).build(snapshot, local, "", loopback, distrusted)
    listeners = {}
    for name in built[names.LISTENER]:
        listener = harness.decoded(built, names.LISTENER, name)
        if name.startswith(f"{names.TUNNEL}/"):
            continue
        if not listener.HasField("internal_listener"):
            listener.ClearField("additional_addresses")
            place = (HERE[node], HBONE_PORT) if name.startswith(names.HBONE) else ("127.0.0.1", ports[0] if ports else free_ports(1)[0])
            listener.address.CopyFrom(socket_address(*place))
        state = set_filter_state_pb2.Config()
        if listener.filter_chains[0].filters[0].typed_config.Unpack(state):
            kept = [one for one in state.on_new_connection if one.object_key != names.NETNS_KEY]
            del state.on_new_connection[:]
            state.on_new_connection.extend(kept)
            listener.filter_chains[0].filters[0].typed_config.Pack(state)
        listeners[name] = pack(listener)
    return {**built, names.LISTENER: listeners}


@contextlib.asynccontextmanager
async def node(directory: Path, built: Resources, *accounts: str) -> AsyncIterator[None]:
    await asyncio.to_thread(directory.mkdir)
    async with harness.waypoint(harness.config(directory)) as (server, _):
        server.set_secrets(secret(*accounts))
        await harness.applied(server, built)
        yield


def scene(port: int, target: int, *policies: Policy) -> Snapshot:
    near = pod("near", "node-1", "127.0.0.1")
    far = pod("far", "node-2", FAR, backing={"default/cart": {port: target}}, policies=tuple(p.name for p in policies))
    return harness.snapshot([near, far], [harness.service("cart", "127.0.0.1", port)], policies=policies)


def between(directory: Path, work: Callable[[int], list[Answer]], *policies: Policy, shown: str = "far") -> list[Answer]:
    """Run `work` with the port of a service whose one endpoint is on the other node; `shown` is the account whose certificate is there."""
    port = free_ports(1)[0]
    with harness.http_server("far", FAR) as server:
        snapshot = scene(port, server.server_address[1], *policies)

        async def scenario() -> list[Answer]:
            far = resources(snapshot, "node-2")
            if shown != "far":
                listener = harness.decoded(far, names.LISTENER, "hbone/default/far")
                chain = listener.filter_chains[0].transport_socket.typed_config
                chain.value = chain.value.replace(spiffe_id("far").encode(), spiffe_id(shown).encode())
                far = {**far, names.LISTENER: {**far[names.LISTENER], "hbone/default/far": pack(listener)}}
            async with (
                node(directory / "far", far, shown),
                node(directory / "near", resources(snapshot, "node-1", port), "near"),
            ):
                return await asyncio.to_thread(work, port)

        return asyncio.run(scenario())


def policy(action: Action, source: Source, *operations: Operation) -> Policy:
    return Policy("default/rule", action, (PolicyRule((source,), operations),))


def test_what_goes_on_unread_has_sockets_that_can_be_told_from_others() -> None:
    """Where no policy of a workload needs the request; where one does, another cluster is used for what was read."""
    for operation, unread in ((Operation(ports=(80,)), True), (Operation(methods=("GET",)), False)):
        found = resources(scene(80, 80, policy(Action.ALLOW, Source(), operation)), "node-2")
        [own, _] = harness.decoded(found, names.ROUTES, "hbone/default/far").virtual_hosts
        used = {route.route.cluster for route in own.routes if route.HasField("route")}
        assert (names.UNREAD_CLUSTER in used) is unread
    [option] = harness.decoded(found, names.CLUSTER, names.UNREAD_CLUSTER).upstream_bind_config.socket_options
    assert (option.level, option.name, option.int_value) == (socket.SOL_SOCKET, socket.SO_MARK, UNREAD_MARK)
    assert not harness.decoded(found, names.CLUSTER, names.ORIGINAL_DESTINATION_CLUSTER).upstream_bind_config.socket_options


def test_a_request_reaches_a_workload_of_another_node_through_a_tunnel(tmp_path: Path) -> None:
    answers = between(
        tmp_path, lambda port: [harness.request(port, "/x", headers={"x-meshagent-destination": "1.2.3.4:5"}) for _ in range(3)]
    )
    assert [(one.status, one.name, one.seen["path"]) for one in answers] == [(200, "far", "/x")] * 3
    assert "x-meshagent-destination" not in answers[0].seen["headers"]


def test_a_certificate_of_another_workload_at_the_far_end_is_refused(tmp_path: Path) -> None:
    (answer,) = between(tmp_path, lambda port: [harness.request(port)], shown="fox")
    assert (answer.status, answer.headers[names.REASON_HEADER]) == (503, "backend-connection-ended")


NEAR, STRANGER = Source(principals=(f"{TRUST_DOMAIN}/ns/default/sa/near",)), Source(principals=(f"{TRUST_DOMAIN}/ns/default/sa/other",))


@pytest.mark.parametrize(
    ("rule", "path", "status"),
    [
        (policy(Action.ALLOW, NEAR), "/", 200),
        (policy(Action.ALLOW, STRANGER), "/", 503),
        (policy(Action.DENY, NEAR), "/", 503),
        (policy(Action.ALLOW, NEAR, Operation(paths=("/open",))), "/open", 200),
        (policy(Action.ALLOW, NEAR, Operation(paths=("/open",))), "/shut", 403),
        (policy(Action.ALLOW, Source(namespaces=("default",)), Operation(methods=("GET",))), "/", 200),
        (policy(Action.ALLOW, Source(namespaces=("def",)), Operation(methods=("GET",))), "/", 403),
        (policy(Action.ALLOW, Source(service_accounts=("default/ne*",)), Operation(methods=("GET",))), "/", 200),
        (policy(Action.DENY, Source(ip_blocks=("127.0.0.0/8",)), Operation(methods=("GET",))), "/", 403),
        (policy(Action.DENY, Source(ip_blocks=("10.0.0.0/8",)), Operation(methods=("GET",))), "/", 200),
        (policy(Action.ALLOW, NEAR, Operation(ports=(1,), methods=("GET",))), "/", 503),
    ],
)
def test_the_receiver_decides_by_what_the_callers_certificate_says(tmp_path: Path, rule: Policy, path: str, status: int) -> None:
    """The caller's node is told of no policy: it must be the receiver."""
    port = free_ports(1)[0]
    with harness.http_server("far", FAR) as server:
        guarded = scene(port, server.server_address[1], rule)
        open_ = scene(port, server.server_address[1])

        async def scenario() -> Answer:
            async with (
                node(tmp_path / "far", resources(guarded, "node-2"), "far"),
                node(tmp_path / "near", resources(open_, "node-1", port), "near"),
            ):
                return await asyncio.to_thread(harness.request, port, path)

        answer = asyncio.run(scenario())
    assert answer.status == status


def asked(directory: Path, identity: str, *rules: Policy, targets: Callable[[int], list[str]]) -> list[int]:
    """Statuses of CONNECTs of a ztunnel to the workload `far`, by its program's port."""
    with harness.http_server("far", FAR) as server:
        target = server.server_address[1]
        built = resources(scene(free_ports(1)[0], target, *rules), "node-2")

        async def scenario() -> list[int]:
            async with (
                node(directory / "far", built, "far"),
                peer.Tunnel.connect((FAR, HBONE_PORT), peer.Identity(*credentials(identity), ROOT.pem)) as tunnel,
            ):
                return [(await tunnel.open(f"{FAR}:{port}")).status for port in targets(target)]

        return asyncio.run(scenario())


def test_a_port_that_is_spelled_otherwise_evades_no_policy(tmp_path: Path) -> None:
    def targets(port: int) -> list[str]:
        return [str(port), f"0{port}", f"+{port}", f"{port}:{port}", "0", "1", str(HBONE_PORT), f"0{HBONE_PORT}"]

    forbidden = Policy("default/rule", Action.DENY, (PolicyRule((), (Operation(not_ports=(1,)),)),))
    assert asked(tmp_path, spiffe_id("near"), forbidden, targets=targets) == [403, 400, 400, 400, 400, 503, 400, 400]


@pytest.mark.parametrize("path", ["", "/ns/default", "/ns/default/near", "/ns/default/sa/near/x", "/ns//sa/", "/ns/default/sa/a,b"])
def test_whose_spiffe_id_is_no_workloads_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(peer.Lost, match=r"CERTIFICATE_UNKNOWN|closed"):
        asked(tmp_path, f"spiffe://{TRUST_DOMAIN}{path}", targets=lambda port: [str(port)])


def test_a_certificate_with_two_names_opens_nothing_although_one_fits(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    uris = [x509.UniformResourceIdentifier(spiffe_id(account)) for account in ("near", "other")]
    leaf = ROOT.sign(key.public_key(), uris).public_bytes(Encoding.PEM)
    double = peer.Identity(leaf, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), ROOT.pem)

    async def scenario() -> list[int]:
        with harness.http_server("far", FAR) as server:
            built = resources(scene(free_ports(1)[0], server.server_address[1]), "node-2")
            async with node(tmp_path / "far", built, "far"):
                found = []
                for identity in (double, holder("near")):
                    async with peer.Tunnel.connect((FAR, HBONE_PORT), identity) as tunnel:
                        found.append((await tunnel.open(f"{FAR}:{server.server_address[1]}")).status)
                return found

    assert asyncio.run(scenario()) == [403, 200]


@contextlib.asynccontextmanager
async def receiving(directory: Path, rule: Policy) -> AsyncIterator[tuple[XdsServer, int]]:
    """The end of `far`'s tunnels with one policy and one worker, and the port of an application behind it."""
    with harness.http_server("far", FAR) as server:
        port = server.server_address[1]
        async with harness.waypoint(harness.config(directory, envoy_concurrency=1)) as (xds, _):
            xds.set_secrets(secret("far"))
            await harness.applied(xds, resources(scene(1, port, rule), "node-2"))
            yield xds, port


def holder(account: str) -> peer.Identity:
    chain, key = credentials(spiffe_id(account))
    return peer.Identity(chain, key, ROOT.pem)


async def asks(tunnel: peer.Tunnel, port: int) -> bytes:
    """The status line of a GET inside a tunnel."""
    stream = await tunnel.open(f"{FAR}:{port}")
    if stream.status != 200:
        return str(stream.status).encode()
    await stream.write(b"GET / HTTP/1.1\r\nhost: far\r\n\r\n")
    return (await stream.read()).partition(b"\r\n")[0]


def test_a_connection_that_one_peer_has_left_behind_is_no_other_peers(tmp_path: Path) -> None:
    async def scenario() -> tuple[bytes, list[bytes]]:
        rule = policy(Action.ALLOW, NEAR, Operation(methods=("GET",)))
        async with (
            receiving(tmp_path, rule) as (_, port),
            peer.Tunnel.connect((FAR, HBONE_PORT), holder("near")) as near,
            peer.Tunnel.connect((FAR, HBONE_PORT), holder("other")) as other,
        ):
            first, found = await asks(near, port), []
            for _ in range(5):
                http = near._link.http
                stream = http.get_next_available_stream_id()
                http.send_headers(stream, [(":method", "CONNECT"), (":authority", f"{FAR}:{port}")])
                http.reset_stream(stream, 8)  # in one piece with the request: Envoy has begun to connect and has nobody to give it to
                near._link.send()
                await near.ping()
                found.append(await asks(other, port))
            return first, found

    first, found = asyncio.run(scenario())
    assert first == b"HTTP/1.1 200 OK"
    assert found == [b"HTTP/1.1 403 Forbidden"] * 5


@pytest.mark.parametrize("kind", ["principals", "namespaces", "service_accounts"])
def test_a_policy_of_many_callers_is_taken(tmp_path: Path, kind: str) -> None:
    text = {"principals": "mesh.test/ns/team-{0}/sa/account-{0}", "namespaces": "team-{0}*", "service_accounts": "team-{0}/account-*"}[kind]
    callers: Any = tuple(text.format(n * 7919) for n in range(53))
    source = Source(**{kind: callers})
    rule = policy(Action.ALLOW, source, Operation(methods=("GET",)))

    async def scenario() -> int:
        async with receiving(tmp_path, rule) as (xds, _):
            return xds.state.nacks

    assert asyncio.run(scenario()) == 0


def test_a_flood_of_connections_ends_at_the_limit_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond it is closed at once, before a byte of TLS; the others' tunnels go on, and there is room again when the flood is over."""
    monkeypatch.setattr(hbone, "MOST_TUNNELS", 23)
    rule = policy(Action.ALLOW, NEAR, Operation(methods=("GET",)))

    async def closed(reader: asyncio.StreamReader) -> bool:
        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            return await asyncio.wait_for(reader.read(1), 1) == b""
        return False

    async def scenario() -> None:
        async with receiving(tmp_path, rule) as (_, port), peer.Tunnel.connect((FAR, HBONE_PORT), holder("near")) as tunnel:
            assert await asks(tunnel, port) == b"HTTP/1.1 200 OK"
            flood = [await asyncio.open_connection(FAR, HBONE_PORT) for _ in range(40)]
            assert sum(await asyncio.gather(*[closed(reader) for reader, _ in flood])) == 40 - 22
            assert await asks(tunnel, port) == b"HTTP/1.1 200 OK"
            with pytest.raises((peer.Lost, OSError)):
                async with peer.Tunnel.connect((FAR, HBONE_PORT), holder("near")):
                    pass
            for _, writer in flood:
                writer.close()
            await asyncio.sleep(0.2)
            async with peer.Tunnel.connect((FAR, HBONE_PORT), holder("near")) as other:
                assert await asks(other, port) == b"HTTP/1.1 200 OK"

    asyncio.run(scenario())
