"""What the tests of the waypoint share: a model to build from, real Envoys, real HTTP servers and a static bootstrap for validation."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socketserver
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import config_source_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_pb2, scoped_route_pb2
from envoy.extensions.bootstrap.internal_listener.v3 import internal_listener_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from envoy.extensions.filters.network.set_filter_state.v3 import set_filter_state_pb2
from google.protobuf import json_format

from agent.config import Config
from agent.l7 import names
from agent.l7.access_log import RequestRecord
from agent.l7.bootstrap import bootstrap as make_bootstrap
from agent.l7.clusters import socket_address
from agent.l7.envoy import Envoy, find, stop
from agent.l7.resources import Resources, pack, packed
from agent.l7.snapshot import build
from agent.l7.xds import XdsServer
from agent.model import (
    Backend,
    Backing,
    HeaderEdit,
    LocalWorkload,
    Policy,
    Retry,
    Route,
    RouteMatch,
    RouteRule,
    Service,
    ServicePort,
    Snapshot,
    Workload,
)
from tests.tasks import beside

TRUST_DOMAIN = "mesh.test"
OWN_NETNS = "/proc/self/ns/net"
OWN_NETNS_TOO = "/proc/thread-self/ns/net"
"""The same namespace by another path: a second listener on the same port of what Envoy takes for another namespace."""


def workload(
    name: str,
    *addresses: str,
    backing: Mapping[str, Mapping[int, int]] | None = None,
    policies: tuple[str, ...] = (),
    account: str = "",
    ready: bool = True,
) -> Workload:
    """A workload of namespace `default` unless the name says otherwise; its service account is its name unless given."""
    name = name if "/" in name else f"default/{name}"
    return Workload(
        name=name,
        service_account=account or name.partition("/")[2],
        node="node-1",
        labels={},
        addresses=addresses,
        network_namespace="",
        enrolled=True,
        ready=ready,
        backing=tuple(Backing(service, ports) for service, ports in (backing or {}).items()),
        policies=policies,
    )


def service(name: str, address: str, *ports: int, protocol: str = "http", waypoint: bool = True) -> Service:
    """A service of namespace `default` with L7 ports."""
    return Service(f"default/{name}", (address,), tuple(ServicePort(p, "", "TCP", protocol, waypoint, "test") for p in ports))


def rule(
    *backends: Backend,
    matches: tuple[RouteMatch, ...] = (),
    retry: Retry | None = None,
    timeout_ms: int = 0,
    try_ms: int = 0,
    name: str = "",
    request: HeaderEdit | None = None,
    response: HeaderEdit | None = None,
) -> RouteRule:
    """A rule of an HTTPRoute."""
    return RouteRule(name, matches, backends, retry, timeout_ms, try_ms, request or HeaderEdit(), response or HeaderEdit())


def route(name: str, *rules: RouteRule, parent: str, port: int = 0, hostnames: tuple[str, ...] = (), created: int = 0) -> Route:
    """An HTTPRoute of namespace `default` attached to one service of it."""
    return Route(f"default/{name}", ((f"default/{parent}", port),), hostnames, rules, created)


def snapshot(
    workloads: Sequence[Workload] = (), services: Sequence[Service] = (), routes: Sequence[Route] = (), policies: Sequence[Policy] = ()
) -> Snapshot:
    """A snapshot of these objects by name."""
    return Snapshot(
        "1", {w.name: w for w in workloads}, {s.name: s for s in services}, {r.name: r for r in routes}, {p.name: p for p in policies}
    )


def build_nothing() -> Resources:
    """What an agent without workloads serves."""
    return build(Snapshot(), [], trust_domain=TRUST_DOMAIN)


def local(one: Workload, netns_path: str = OWN_NETNS) -> LocalWorkload:
    """The workload bound to a namespace, by default the tests' own."""
    return LocalWorkload(one, 1, netns_path)


def decoded(resources: Resources, kind: str, name: str) -> Any:
    """One resource as its message."""
    types = {
        names.CLUSTER: cluster_pb2.Cluster,
        names.ENDPOINTS: endpoint_pb2.ClusterLoadAssignment,
        names.LISTENER: listener_pb2.Listener,
        names.ROUTES: route_pb2.RouteConfiguration,
        names.SCOPE: scoped_route_pb2.ScopedRouteConfiguration,
    }
    return types[kind].FromString(resources[kind][name].body)


def manager(listener: listener_pb2.Listener) -> hcm_pb2.HttpConnectionManager:
    """The HTTP connection manager of a built listener."""
    result = hcm_pb2.HttpConnectionManager()
    assert listener.filter_chains[0].filters[-1].typed_config.Unpack(result)
    return result


def validate(resources: Resources, directory: Path) -> None:
    """Turn the resources into one static bootstrap and let the real Envoy check it; AssertionError says what it refuses."""
    bootstrap = bootstrap_pb2.Bootstrap()
    bootstrap.node.id = bootstrap.node.cluster = "validate"
    internal = bootstrap.bootstrap_extensions.add(name="envoy.bootstrap.internal_listener")
    internal.typed_config.CopyFrom(packed(internal_listener_pb2.InternalListener()))
    layers = make_bootstrap("validate", directory, directory)["layered_runtime"]["layers"][:1]  # its limits
    json_format.ParseDict({"layers": layers}, bootstrap.layered_runtime)
    static = bootstrap.static_resources
    agent = cluster_pb2.Cluster(name=names.XDS_CLUSTER)
    agent.load_assignment.cluster_name = names.XDS_CLUSTER
    static.clusters.append(agent)
    # Nobody is asked; but what bounds access logs is of no other source (agent.l7.call_log).
    bootstrap.dynamic_resources.ads_config.CopyFrom(
        config_source_pb2.ApiConfigSource(api_type=config_source_pb2.ApiConfigSource.DELTA_GRPC, transport_api_version="V3")
    )
    bootstrap.dynamic_resources.ads_config.grpc_services.add().envoy_grpc.cluster_name = names.XDS_CLUSTER
    for name in resources[names.CLUSTER]:
        cluster = decoded(resources, names.CLUSTER, name)
        if cluster.type == cluster_pb2.Cluster.EDS:
            cluster.type = cluster_pb2.Cluster.STATIC
            cluster.ClearField("eds_cluster_config")
            cluster.load_assignment.CopyFrom(decoded(resources, names.ENDPOINTS, name))
        static.clusters.append(cluster)
    configurations = {name: decoded(resources, names.ROUTES, name) for name in resources[names.ROUTES]}
    for configuration in configurations.values():
        configuration.validate_clusters.value = False  # as over RDS: the cluster of invalid backends never exists
    scopes = [decoded(resources, names.SCOPE, name) for name in resources[names.SCOPE]]
    for name in resources[names.LISTENER]:
        listener = decoded(resources, names.LISTENER, name)
        connections = manager(listener)
        if connections.HasField("rds"):
            connections.route_config.CopyFrom(configurations[connections.rds.route_config_name])
        else:
            scoped = connections.scoped_routes
            scoped.ClearField("rds_config_source")
            scoped.scoped_rds.Clear()
            inline = scoped.scoped_route_configurations_list.scoped_route_configurations
            for scope in scopes:
                inlined = inline.add()
                inlined.CopyFrom(scope)
                inlined.ClearField("route_configuration_name")
                inlined.route_configuration.CopyFrom(configurations[scope.route_configuration_name])
        listener.filter_chains[0].filters[-1].typed_config.Pack(connections)
        static.listeners.append(listener)
    path = directory / "validate.pb"  # not JSON, which leaves out what xds-protos does not know (agent.l7.metrics)
    path.write_bytes(bootstrap.SerializeToString())
    done = subprocess.run([find(), "--mode", "validate", "-c", path, "--log-level", "error"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def on_loopback(resources: Resources, *ports: int) -> Resources:
    """The resources without namespaces, which need root: each outbound listener on 127.0.0.1 at these ports.

    No connection is redirected then, so its local address is its original destination: a service under test is 127.0.0.1 at one of `ports`.
    """
    listeners = {}
    for name in resources[names.LISTENER]:
        listener = decoded(resources, names.LISTENER, name)
        listener.ClearField("additional_addresses")
        listener.address.CopyFrom(socket_address("127.0.0.1", ports[0]))
        for port in ports[1:]:
            listener.additional_addresses.add().address.CopyFrom(socket_address("127.0.0.1", port))
        state = set_filter_state_pb2.Config()
        assert listener.filter_chains[0].filters[0].typed_config.Unpack(state)
        del state.on_new_connection[0]
        listener.filter_chains[0].filters[0].typed_config.Pack(state)
        listeners[name] = pack(listener)
    return {**resources, names.LISTENER: listeners}


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; `seen` is what `http_server` reports, empty for an answer of Envoy's own."""

    status: int
    headers: dict[str, str]
    seen: dict[str, Any]

    @property
    def name(self) -> str:
        """Which server answered."""
        return str(self.seen.get("name", ""))


def request(port: int, path: str = "/", method: str = "GET", headers: Mapping[str, str] | None = None) -> Answer:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        response = connection.getresponse()
        body = response.read()
        seen = json.loads(body) if body.startswith(b"{") else {}
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, seen)
    finally:
        connection.close()


def config(directory: Path, **changes: Any) -> Config:
    """An agent's configuration below a directory; the cgroup is a plain directory."""
    (directory / "cgroup").mkdir(exist_ok=True)
    return Config(node="node-1", controller="unix:///nowhere", cgroup=directory / "cgroup", run_dir=directory, **changes)


@contextlib.asynccontextmanager
async def waypoint(
    settings: Config,
    on_record: Callable[[RequestRecord], None] | None = None,
    on_audited: Callable[[RequestRecord], None] | None = None,
    quotas: Callable[[grpc.aio.Server], None] | None = None,
) -> AsyncIterator[tuple[XdsServer, Envoy]]:
    """An xDS server and a supervised Envoy; the Envoy is ended at the end."""
    server = XdsServer(settings.xds_socket, on_record, on_audited)
    server.services += [] if quotas is None else [quotas]
    await server.start()
    envoy = Envoy(settings)
    try:
        async with beside(envoy.run()):
            yield server, envoy
    finally:
        await server.stop()
        await asyncio.to_thread(stop, settings.run_dir)


@contextlib.asynccontextmanager
async def agent(settings: Config, resources: Resources) -> AsyncIterator[tuple[XdsServer, Envoy]]:
    """One life of an agent, which has these resources at first; it ends without ending Envoy."""
    server, envoy = XdsServer(settings.xds_socket), Envoy(settings)
    server.set(resources)
    await server.start()
    task = asyncio.create_task(envoy.run())
    try:
        yield server, envoy
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop()


async def applied(server: XdsServer, resources: Resources) -> None:
    """Give Envoy the resources and wait until it has them all."""
    server.set(resources)
    assert await server.wait_acked(20), f"{server.state} {server._pending()}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer would look its own name up: ten seconds in a namespace without DNS


Behaviour = Callable[[BaseHTTPRequestHandler], int]


@contextlib.contextmanager
def http_server(name: str, address: str, port: int = 0, behaviour: Behaviour = lambda _: 200) -> Iterator[ThreadingHTTPServer]:
    """An HTTP/1.1 server that answers with JSON: its name, the peer's address, the path and the headers that it saw."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65536  # one segment: headers and body apart would meet Nagle and a delayed ACK, 40 ms each

        def do_GET(self) -> None:
            status = behaviour(self)
            seen = {"name": name, "peer": self.client_address[0], "port": self.client_address[1], "path": self.path}
            body = json.dumps(seen | {"headers": {k.lower(): v for k, v in self.headers.items()}}).encode() + b"\n"
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_DELETE = do_GET  # noqa: N815  # the names are http.server's

        def log_message(self, *_: Any) -> None:
            pass

    server = _Server((address, port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
