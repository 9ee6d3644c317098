"""A large model at the real Envoy: what one change sends, and what one bad resource among thousands does to the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from agent.l7 import names, xds
from agent.l7.envoy import Envoy
from agent.l7.resources import Resource, Resources
from agent.l7.snapshot import Builder
from agent.l7.xds import XdsServer
from agent.model import LocalWorkload
from bench.l7_model import NODE, History, L7Model, L7Size
from meshapi import discovery_pb2 as pb
from tests.ports import free_ports
from tests.unit.agent.l7 import harness

MODEL = L7Model(L7Size(local=3))
"""Few workloads here, because without root all listeners are in one network namespace; all else is as many as there are to be."""
CLUSTER, ENDPOINTS, LISTENER, SCOPE, ROUTES = (kind.rpartition(".")[2] for kind in xds.ORDER)


class Plant:
    """A builder, an xDS server and an Envoy that has everything, and what has been sent to it."""

    def __init__(self, server: XdsServer, envoy: Envoy) -> None:
        self.server, self.envoy = server, envoy
        self.history = History(MODEL)
        self.sent: list[tuple[str, str]] = []
        self._builder = Builder(NODE, harness.TRUST_DOMAIN)
        self._entries = free_ports(MODEL.size.local)
        self._listeners: dict[str, tuple[str, int]] = {}

    async def change(self, *resources: pb.Resource, removed: Iterable[str] = ()) -> list[tuple[str, str]]:
        """Bring resources into force; returns what Envoy was sent for it: (type, name), and ("-" + type, name) for what was taken back."""
        self.sent.clear()
        snapshot = self.history.take(resources, removed)
        local = [LocalWorkload(one, 1, "") for _, one in sorted(snapshot.workloads.items()) if one.node == NODE]
        self._builder.needs_inbound(snapshot)
        self.server.set(self._reachable(self._builder.build(snapshot, local, "")))
        assert await self.server.wait_acked(60), self.server._pending()[:5]
        return sorted(self.sent)

    def _reachable(self, built: Resources) -> Resources:
        """Outbound listeners on ports of their own; no inbound ones, which need a namespace too."""
        wanted = [name for name in built[names.LISTENER] if name.startswith(names.OUTBOUND)]
        found: dict[str, Resource] = {}
        for name, entry in zip(sorted(wanted), self._entries, strict=False):
            one = harness.on_loopback({names.LISTENER: {name: built[names.LISTENER][name]}}, entry)
            found |= one[names.LISTENER]
        routes = {name: one for name, one in built[names.ROUTES].items() if not name.startswith(names.INBOUND)}
        return {**built, names.LISTENER: found, names.ROUTES: routes}


@contextlib.asynccontextmanager
async def plant(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plant]:
    async with harness.waypoint(harness.config(directory)) as (server, envoy):
        result = Plant(server, envoy)
        respond = xds._Stream._respond

        def watched(stream: xds._Stream, kind: str, state: xds._Type, changed: dict[str, Resource], removed: tuple[str, ...]) -> object:
            short = kind.rpartition(".")[2]
            result.sent.extend([*((short, name) for name in changed), *((f"-{short}", name) for name in removed)])
            return respond(stream, kind, state, changed, removed)

        monkeypatch.setattr(xds._Stream, "_respond", watched)
        monkeypatch.setattr(xds, "LINGER_S", 0.0)  # what goes belongs to its change
        await result.change(*MODEL.resources())
        yield result


def service(number: int) -> str:
    return names.service(MODEL.service_name(number), 80)


def endpoint_name(number: int) -> str:
    return f"{MODEL.namespace(number)}/service-{number}-00001"


async def one_change_at_a_time(mesh: Plant) -> None:
    # An endpoint of a service with a route, of one with a TrafficPolicy, of one with neither: its own resource each time.
    assert await mesh.change(MODEL.endpoint(55, 1, ready=False)) == [(ENDPOINTS, service(55))]
    assert await mesh.change(MODEL.endpoint(85, 1, ready=False)) == [(ENDPOINTS, service(85))]
    assert await mesh.change(MODEL.endpoint(1700, 1, ready=False)) == [(ENDPOINTS, service(1700))]
    assert await mesh.change(MODEL.endpoint(55, 1)) == [(ENDPOINTS, service(55))]
    assert await mesh.change(MODEL.route(77, weight=20)) == [(ROUTES, service(77))]
    assert await mesh.change(MODEL.traffic(40, requests=77)) == [(CLUSTER, service(40)), (ENDPOINTS, service(40))]
    assert await mesh.change(removed=[f"route/{MODEL.service_name(77)}"]) == [(ROUTES, service(77))]
    # One with a policy that needs the request has an address of its own that is served.
    own, address = names.workload(endpoint_name(700), 8080), MODEL.endpoint_address(700, 1)
    gone = await mesh.change(removed=[f"workload/{endpoint_name(700)}"])
    taken = {(f"-{CLUSTER}", own), (f"-{SCOPE}", names.destination(address, 8080)), (ENDPOINTS, service(700))}
    assert set(gone) - {(f"-{ROUTES}", own)} == taken, "Envoy lets go of the routes itself, sooner or later"
    assert await mesh.change(MODEL.service(1999)) == []


async def one_bad_route_among_500(mesh: Plant) -> None:
    before = await mesh.envoy.stats("http.outbound.rds")
    # Everything at once: all routes differ, and the regular expression of one of them is none.
    changed = [MODEL.route(number, weight=30) for number in range(500)]
    changed[123] = MODEL.route(123, bad="(")
    sent = await mesh.change(*changed)
    assert {name for _, name in sent} == {service(number) for number in range(500)}
    assert (mesh.server.state.nacks, mesh.server.state.rejected) == (1, 1)
    assert service(123) in mesh.server.state.last_nack
    assert "missing )" in mesh.server.state.last_nack
    assert len(sent) < 500 * 3, "halves of halves, not one by one, and not everything again each time"
    after = await mesh.envoy.stats("http.outbound.rds")
    assert len([name for name in after if name.endswith("config_reload") and after[name] != before.get(name, 0)]) == 499
    # It is not sent again with what comes later, also not with another resource of its service; a good one is taken at once.
    assert await mesh.change(MODEL.endpoint(123, 1, ready=False)) == [(ENDPOINTS, service(123))]
    assert await mesh.change(MODEL.route(124, weight=40)) == [(ROUTES, service(124))]
    assert await mesh.change(MODEL.route(123, weight=40)) == [(ROUTES, service(123))]
    assert (mesh.server.state.nacks, mesh.server.state.rejected) == (1, 0)


def test_among_2000_services_a_change_sends_itself_alone_and_a_bad_route_keeps_none_of_500_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with plant(tmp_path, monkeypatch) as mesh:
            assert (len(mesh.history.snapshot.services), len(mesh.history.snapshot.routes)) == (2000, 500)
            clusters = await mesh.envoy.stats("cluster_manager.active_clusters")
            assert clusters["cluster_manager.active_clusters"] > 3000
            await one_change_at_a_time(mesh)
            await one_bad_route_among_500(mesh)

    asyncio.run(scenario())
