"""What a Gateway becomes, that a real Envoy takes it, and what it makes of strangers: hosts, certificates by SNI, forged headers, slow and large requests."""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from envoy.extensions.filters.network.set_filter_state.v3 import set_filter_state_pb2

from agent.l7 import gateways, names
from agent.l7.access_log import RequestRecord
from agent.l7.clusters import socket_address
from agent.l7.resources import Resources, pack
from agent.l7.snapshot import Builder, build, tracing
from agent.model import (
    Action,
    AtGateway,
    Authentication,
    Backend,
    Delta,
    Gateway,
    GatewayListener,
    MatchKind,
    Operation,
    Policy,
    PolicyRule,
    Route,
    RouteMatch,
    RouteRule,
    Snapshot,
    Source,
    StringMatch,
    TokenIssuer,
    Workload,
    decode,
)
from agent.routing import Mirror, Redirect
from meshapi import discovery_pb2 as pb
from tests.certificates import pair
from tests.ports import free_ports
from tests.tokens import Issuer
from tests.unit.agent.l7 import harness

EDGE = replace(harness.workload("edge", "10.0.0.1", account="edge"), labels={gateways.LABEL: "web"})
WEB = "default/web"


def at(*hostnames: str, listener: str = "http") -> AtGateway:
    return AtGateway(WEB, listener, hostnames)


def routed(name: str, *where: AtGateway, rules: Sequence[RouteRule] = (), **more: Any) -> Route:
    rules = tuple(rules) or (harness.rule(Backend(f"default/{name}", 80, 1)),)
    return Route(f"default/{name}", (), (), rules, 0, gateways=where, **more)


def scene(listeners: Sequence[GatewayListener], *routes: Route, port: int = 8080, waypoint: bool = False) -> Snapshot:
    """A gateway in the place of EDGE, and services s, t and u with one pod each on 127.0.0.1."""
    pods = [harness.workload(f"p-{one}", "127.0.0.1", backing={f"default/{one}": {80: port + n}}) for n, one in enumerate("stu")]
    services = [harness.service(one, f"10.96.0.{n}", 80, waypoint=waypoint) for n, one in enumerate("stu", 1)]
    return replace(harness.snapshot([EDGE, *pods], services, routes), gateways={WEB: Gateway(WEB, tuple(listeners))})


def built(snapshot: Snapshot, one: Workload = EDGE) -> Resources:
    return build(snapshot, [harness.local(one)], trust_domain=harness.TRUST_DOMAIN)


def hosts(snapshot: Snapshot, config: str) -> dict[str, list[str]]:
    configuration = harness.decoded(built(snapshot), names.ROUTES, config)
    return {host.domains[0]: [route.name for route in host.routes] for host in configuration.virtual_hosts}


def plain(resources: Resources) -> Resources:
    """Only the gateway's listeners, on 127.0.0.1 without namespaces, which need root."""
    found = {}
    for name in resources[names.LISTENER]:
        if not name.startswith(names.GATEWAY):
            continue
        listener = harness.decoded(resources, names.LISTENER, name)
        listener.ClearField("additional_addresses")
        listener.address.CopyFrom(socket_address("127.0.0.1", listener.address.socket_address.port_value))
        for chain in listener.filter_chains:
            state = set_filter_state_pb2.Config()
            assert chain.filters[0].typed_config.Unpack(state)
            del state.on_new_connection[0]
            chain.filters[0].typed_config.Pack(state)
        found[name] = pack(listener)
    kept = {name: one for name, one in resources[names.ROUTES].items() if name.startswith(names.GATEWAY)}
    return {**resources, names.LISTENER: found, names.ROUTES: kept, names.SCOPE: {}}


def connected(port: int, sni: str) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), 10), server_hostname=sni)


def shown(port: int, sni: str) -> str:
    with connected(port, sni) as stream:
        der = stream.getpeercert(binary_form=True)
    assert der
    (name,) = x509.load_der_x509_certificate(der).subject
    return str(name.value)


def over_tls(stream: ssl.SSLSocket, host: str) -> tuple[int, dict[str, str], bytes]:
    stream.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    response = http.client.HTTPResponse(stream)
    response.begin()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def test_a_workload_without_the_label_or_of_another_namespace_runs_no_gateway() -> None:
    snapshot = scene([GatewayListener("http", 8000)], routed("s", at()))
    for other in (replace(EDGE, labels={}), replace(EDGE, name="other/edge")):
        assert not [name for name in built(snapshot, other)[names.LISTENER] if name.startswith(names.GATEWAY)]


def test_a_host_belongs_to_the_listener_that_names_it_best() -> None:
    listeners = [GatewayListener("any", 8000), GatewayListener("wild", 8000, "*.a.b"), GatewayListener("exact", 8000, "x.a.b")]
    snapshot = scene(
        listeners,
        routed("s", at(listener="any"), at("*.a.b", listener="wild")),
        routed("t", at("y.a.b", listener="wild"), at("c.d", "z.a.b", listener="any")),
    )
    assert hosts(snapshot, "gateway/default/edge/8000") == {
        "*": ["default/s rule 0"],
        "c.d": ["default/t rule 0", "default/s rule 0"],
        "*.a.b": ["default/s rule 0"],
        "y.a.b": ["default/t rule 0", "default/s rule 0"],
        "x.a.b": [],  # no route of its own, and none of the others
    }


def test_with_tls_a_host_of_another_listener_is_misdirected() -> None:
    listeners = [GatewayListener("wild", 8443, "*.a.b", ("default/w",)), GatewayListener("exact", 8443, "x.a.b", ("default/x",))]
    snapshot = scene(listeners, routed("s", at("*.a.b", listener="wild"), at("x.a.b", listener="exact")))
    assert hosts(snapshot, "gateway/default/edge/8443/wild") == {"*.a.b": ["default/s rule 0"], "x.a.b": ["misdirected"]}
    assert hosts(snapshot, "gateway/default/edge/8443/exact") == {"x.a.b": ["default/s rule 0"]}


def test_strangers_match_no_rule_for_some_callers_and_get_no_connect() -> None:
    some = replace(harness.rule(Backend("default/s", 80, 1)), callers=((Source(service_accounts=("default/edge",)),),))
    snapshot = scene([GatewayListener("http", 8000)], routed("s", at(), rules=[some, harness.rule(Backend("default/t", 80, 1))]))
    configuration = harness.decoded(built(snapshot), names.ROUTES, "gateway/default/edge/8000")
    (host,) = configuration.virtual_hosts
    assert [route.name for route in host.routes] == ["default/s rule 1"]
    assert not any(route.match.HasField("connect_matcher") for route in host.routes)


def test_what_no_grant_lets_gateways_reach_answers_500_and_is_not_mirrored() -> None:
    rule = replace(harness.rule(Backend("default/s", 80, 1), Backend("default/t", 80, 1)), mirrors=(Mirror("default/t", 80, 1, 100),))
    snapshot = scene([GatewayListener("http", 8000)], routed("s", at(), rules=[rule], not_from_gateways=("default/t",)))
    configuration = harness.decoded(built(snapshot), names.ROUTES, "gateway/default/edge/8000")
    (route,) = configuration.virtual_hosts[0].routes
    assert [one.name for one in route.route.weighted_clusters.clusters] == ["service/default/s/80", names.INVALID_CLUSTER]
    assert not route.route.request_mirror_policies


@pytest.mark.parametrize(
    ("port", "tls", "wanted", "expected"),
    [
        (443, True, Redirect(full_path="/x"), 0),
        (8443, True, Redirect(full_path="/x"), 8443),
        (80, False, Redirect("https"), 443),
        (8080, False, Redirect(full_path="/x"), 8080),
    ],
)
def test_a_redirect_names_the_listeners_port_unless_it_is_the_schemes(port: int, tls: bool, wanted: Redirect, expected: int) -> None:
    rule = replace(harness.rule(), redirect=wanted)
    listener = GatewayListener("http", port, "", ("default/c",) if tls else ())
    config = f"gateway/default/edge/{port}" + ("/http" if tls else "")
    configuration = harness.decoded(built(scene([listener], routed("s", at(), rules=[rule]))), names.ROUTES, config)
    found = configuration.virtual_hosts[0].routes[0].redirect.port_redirect
    assert found == expected or (not expected and not found) or (wanted.scheme == "https" and found in {0, 443})


def test_backends_have_clusters_on_every_node_and_a_change_of_gateways_is_built() -> None:
    builder = Builder("node-1", harness.TRUST_DOMAIN)
    first = scene([GatewayListener("http", 8000)], routed("s", at()))
    before = builder.build(first, [harness.local(EDGE)], "")
    assert "service/default/s/80" in before[names.CLUSTER]
    second = replace(first, gateways={WEB: Gateway(WEB, (GatewayListener("http", 8001),))})
    after = builder.build(second, [harness.local(EDGE)], "")
    assert {name for name in after[names.LISTENER] if name.startswith(names.GATEWAY)} == {"gateway/default/edge/8001"}
    assert after == Builder("node-1", harness.TRUST_DOMAIN).build(second, [harness.local(EDGE)], "")


@pytest.mark.parametrize("change", ["endpoint", "policy", "ready", "label"])
def test_what_is_built_from_a_difference_is_what_is_built_from_everything(change: str) -> None:
    policy = Policy(
        "default/only", Action.ALLOW, (PolicyRule((Source(service_accounts=("default/edge",)),), (Operation(paths=("/ok",)),)),)
    )
    first = scene([GatewayListener("http", 8000)], routed("s", at()), routed("t", at("t.example")))
    first = replace(first, policies={policy.name: policy})
    pod = first.workloads["default/p-s"]
    other = {
        "endpoint": replace(pod, addresses=("10.9.9.9",)),
        "policy": replace(pod, policies=(policy.name,)),
        "ready": replace(pod, ready=False),
        "label": replace(EDGE, labels={}),
    }[change]
    delta = Delta("1", workloads=frozenset({other.name}))
    second = replace(first, version="2", workloads={**first.workloads, other.name: other}, delta=delta)
    builder = Builder("node-1", harness.TRUST_DOMAIN)
    before = dict(builder.build(first, [harness.local(EDGE)], ""))
    local = [harness.local(second.workloads[EDGE.name])]
    after = builder.build(second, local, "")
    assert after == Builder("node-1", harness.TRUST_DOMAIN).build(replace(second, delta=None), local, "")
    assert after != before


def test_an_entity_comes_back_as_it_was_and_mixed_ports_are_refused() -> None:
    message = pb.Gateway(namespace="a", name="g", listeners=[pb.GatewayListener(name="x", port=80, hostname="*.a.b", certificates=["a/s"])])
    assert decode(pb.Entity(gateway=message).SerializeToString()) == Gateway("a/g", (GatewayListener("x", 80, "*.a.b", ("a/s",)),))
    message.listeners.add(name="y", port=80)
    with pytest.raises(ValueError, match="cannot be served on port 80"):
        decode(pb.Entity(gateway=message).SerializeToString())


def run(check: Callable[[], Any]) -> None:
    asyncio.run(check())


def test_requests_go_by_host_and_path_and_nothing_that_strangers_say_of_themselves_is_believed(tmp_path: Path) -> None:
    (port,) = free_ports(1)

    async def check() -> None:
        with harness.http_server("s", "127.0.0.1") as s, harness.http_server("t", "127.0.0.1") as t:
            match = RouteMatch(path=StringMatch(MatchKind.PREFIX, "/t"))
            rules = [
                harness.rule(Backend("default/t", 80, 1), matches=(match,)),
                harness.rule(Backend("default/s", 80, 1)),
            ]
            snapshot = scene([GatewayListener("http", port)], routed("s", at("shop.example"), rules=rules))
            pods = [
                harness.workload(f"p-{name}", "127.0.0.1", backing={f"default/{name}": {80: server.server_address[1]}})
                for name, server in (("s", s), ("t", t))
            ]
            snapshot = replace(snapshot, workloads={one.name: one for one in (EDGE, *pods)})
            async with harness.waypoint(harness.config(tmp_path)) as (xds, _):
                await harness.applied(xds, plain(built(snapshot)))
                await asyncio.to_thread(ask)

    def ask() -> None:
        shop = {"Host": "shop.example"}
        assert [harness.request(port, path, headers=shop).name for path in ("/", "/t", "/t/1", "/tx")] == ["s", "t", "t", "s"]
        assert harness.request(port, "/", headers={"Host": "SHOP.example:8080"}).name == "s"
        unknown = harness.request(port, "/", headers={"Host": "other.example"})
        assert (unknown.status, unknown.headers["x-meshagent-reason"]) == (404, "no-route")
        forged = {
            "X-Forwarded-For": "1.2.3.4",
            "X-Forwarded-Proto": "https",
            "X-Forwarded-Host": "evil",
            "Forwarded": "for=1.2.3.4",
            "X-Real-Ip": "1.2.3.4",
            "X-Forwarded-Client-Cert": "URI=spiffe://mesh.test/ns/default/sa/root",
            "X-Envoy-External-Address": "1.2.3.4",
            "X-Envoy-Original-Path": "/evil",
            "X-Meshagent-Destination": "10.0.0.1:80",
        }
        seen = harness.request(port, "/", headers={**shop, **forged}).seen["headers"]
        assert "1.2.3.4" not in seen["x-forwarded-for"]  # of a client on loopback Envoy writes the machine's own address
        assert seen["x-forwarded-proto"] == "http"
        left = {name for name in seen if name.startswith(("x-", "forwarded"))} - {"x-forwarded-for", "x-forwarded-proto"}
        assert left == set()
        assert harness.request(port, "/", headers={**shop, "x_forwarded_for": "1.2.3.4"}).status == 400
        assert harness.request(port, "/", headers={**shop, "big": "x" * (61 << 10)}).status == 431
        assert harness.request(port, "/", headers=shop | {f"h{i}": "x" for i in range(120)}).status == 431
        assert harness.request(port, "/a%2f..%2ft", headers=shop).status == 307
        with socket.create_connection(("127.0.0.1", port), 10) as stranger:
            stranger.sendall(b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: shop.example\r\n\r\n")
            assert stranger.recv(12) in {b"HTTP/1.1 404", b"HTTP/1.1 403"}

    run(check)


def test_a_host_that_nobody_knows_is_answered_with_404_and_has_an_entry_in_the_access_log(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    found: list[RequestRecord] = []

    async def check() -> None:
        came = asyncio.Event()

        def take(record: RequestRecord) -> None:
            found.append(record)
            came.set()

        async with harness.waypoint(harness.config(tmp_path), take) as (xds, _):
            resources = plain(built(scene([GatewayListener("http", port)], routed("s", at("a.example")))))
            await harness.applied(xds, {**resources, **tracing(frozenset({EDGE.name}))})
            answer = await asyncio.to_thread(harness.request, port, "/x", headers={"Host": "b.example"})
            assert (answer.status, answer.headers["x-meshagent-reason"]) == (404, "no-route")
            await asyncio.wait_for(came.wait(), 10)

    run(check)
    assert [(one.side, one.workload, one.authority, one.response_code, one.response_flags) for one in found] == [
        ("gateway", EDGE.name, "b.example", 404, ("no route found",))
    ]


def test_a_token_and_the_gateways_identity_are_asked_for_together(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    issuer, other = Issuer("https://one.test"), Issuer("https://one.test")
    source = Source(principals=("mesh.test/ns/default/sa/edge",), request_principals=("https://one.test/*",))
    policy = Policy("default/must", Action.ALLOW, (PolicyRule((source,)),))
    tokens = Authentication("default/tokens", (TokenIssuer(issuer.name, keys=issuer.jwks),))

    def ask() -> list[int]:
        headers = [{}, *({"Authorization": f"Bearer {one.token()}"} for one in (issuer, other))]
        return [harness.request(port, "/", headers=one).status for one in headers]

    async def check() -> None:
        with harness.http_server("s", "127.0.0.1") as server:
            snapshot = scene([GatewayListener("http", port)], routed("s", at()), port=server.server_address[1], waypoint=True)
            guarded = replace(snapshot.workloads["default/p-s"], policies=(policy.name,), authentications=(tokens.name,))
            workloads = {**snapshot.workloads, guarded.name: guarded}
            snapshot = replace(snapshot, workloads=workloads, policies={policy.name: policy}, authentications={tokens.name: tokens})
            async with harness.waypoint(harness.config(tmp_path)) as (xds, _):
                await harness.applied(xds, plain(built(snapshot)))
                assert await asyncio.to_thread(ask) == [403, 200, 401]

    run(check)


def test_a_slow_client_is_sent_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateways, "HEADERS_S", 1)
    (port,) = free_ports(1)

    def drip() -> bytes:
        with socket.create_connection(("127.0.0.1", port), 10) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n")
            started = time.monotonic()
            answer = slow.recv(12)
            assert time.monotonic() - started < 5
            return answer

    async def check() -> None:
        async with harness.waypoint(harness.config(tmp_path)) as (xds, _):
            await harness.applied(xds, plain(built(scene([GatewayListener("http", port)]))))
            assert await asyncio.to_thread(drip) == b"HTTP/1.1 408"

    run(check)


def test_certificates_are_chosen_by_sni_and_rotated_without_ending_connections(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    listeners = [
        GatewayListener("a", port, "a.example", ("default/a",)),
        GatewayListener("b", port, "*.b.example", ("default/b", "default/r")),
    ]
    rsa_pair = pair("rsa.b.example", key=rsa.generate_private_key(65537, 2048))
    held = {
        "default/a": pair("a.example"),
        "default/b": pair("x.b.example", key=ec.generate_private_key(ec.SECP384R1())),
        "default/r": rsa_pair,
    }

    async def check() -> None:
        with harness.http_server("s", "127.0.0.1") as server:
            snapshot = scene(listeners, routed("s", at("a.example", listener="a")), port=server.server_address[1])
            async with harness.waypoint(harness.config(tmp_path)) as (xds, _):
                xds.set_secrets(gateways.secrets(held))
                await harness.applied(xds, plain(built(snapshot)))
                await asyncio.to_thread(ask_both)
                stream = await asyncio.to_thread(connected, port, "a.example")
                with stream:
                    assert (await asyncio.to_thread(over_tls, stream, "a.example"))[0] == 200
                    xds.set_secrets(gateways.secrets({**held, "default/a": pair("new.a.example")}))
                    assert await xds.wait_acked(10)
                    assert await asyncio.to_thread(shown, port, "a.example") == "new.a.example"
                    status, headers, body = await asyncio.to_thread(over_tls, stream, "a.example")
                    assert (status, headers.get("connection")) == (200, None)
                    assert b'"x-forwarded-proto": "https"' in body

    def ask_both() -> None:
        assert shown(port, "a.example") == "a.example"
        assert shown(port, "deep.x.b.example") in {"x.b.example", "rsa.b.example"}
        with pytest.raises((ssl.SSLError, ConnectionError)):
            shown(port, "c.example")
        with connected(port, "a.example") as stream:
            assert over_tls(stream, "x.b.example")[0] == 404

    run(check)
    log = (tmp_path / "envoy.log").read_text()
    assert "PRIVATE KEY" not in log
