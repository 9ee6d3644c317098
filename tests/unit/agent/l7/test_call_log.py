"""Requests that are remembered, through a real Envoy: what is told of them, and that no more are told than the bound allows."""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Callable
from pathlib import Path

from agent.l7 import call_log, names
from agent.l7.call_log import Asked
from agent.l7.snapshot import build, tracing
from agent.model import Action, Operation, Policy, PolicyRule
from tests.ports import free_ports
from tests.unit.agent.l7 import harness

CALLS = 7
CALLER = harness.workload("caller", "10.0.0.1")
NO_ADMIN = Policy("default/no-admin", Action.DENY, (PolicyRule(operations=(Operation(paths=("/admin*",)),)),))


def told(directory: Path, work: Callable[[int], None], *, on: bool = True, settle_s: float = 0.5) -> list[Asked]:
    """What Envoy tells of the requests that `work` sends to a port."""
    [entry] = free_ports(1)
    found: list[Asked] = []
    with harness.http_server("cart", "127.0.0.1") as cart:
        pod = harness.workload("cart-1", "127.0.0.1", backing={"default/cart": {entry: cart.server_address[1]}}, policies=(NO_ADMIN.name,))
        snapshot = harness.snapshot([CALLER, pod], [harness.service("cart", "127.0.0.1", entry)], policies=[NO_ADMIN])
        resources = {**build(snapshot, [harness.local(CALLER)], trust_domain=harness.TRUST_DOMAIN), **tracing(frozenset(), calls=on)}

        async def scenario() -> None:
            async with harness.waypoint(harness.config(directory)) as (server, _):
                server.on_asked = found.append
                await harness.applied(server, harness.on_loopback(resources, entry))
                await asyncio.to_thread(work, entry)
                await asyncio.sleep(settle_s)

        asyncio.run(scenario())
    return found


def test_a_request_is_told_with_its_ends_and_without_its_query(tmp_path: Path) -> None:
    def work(port: int) -> None:
        assert harness.request(port, "/items/7?token=secret").status == 200
        assert harness.request(port, "/admin", "POST").status == 403

    served, denied = sorted(told(tmp_path, work), key=lambda one: one.code)  # each of Envoy's threads tells its own
    assert (served.side, served.owner, served.target) == (names.OUTBOUND, "default/caller", "default/cart-1")
    assert (served.method, served.path, served.code, served.details) == ("GET", "/items/7", 200, "via_upstream")
    assert served.cluster.startswith("service/default/cart/")
    assert served.dialled == f"127.0.0.1:{served.cluster.rpartition('/')[2]}"
    assert (denied.method, denied.path, denied.code) == ("POST", "/admin", 403)
    assert (denied.cluster, denied.target, denied.dialled) == ("", "", served.dialled)
    assert denied.details.startswith("rbac_access_denied")


def test_when_it_is_off_nothing_is_told(tmp_path: Path) -> None:
    def work(port: int) -> None:
        for _ in range(CALLS):
            assert harness.request(port).status == 200

    assert told(tmp_path, work, on=False) == []


def test_of_a_flood_a_bounded_number_is_told(tmp_path: Path) -> None:
    sent = 3 * call_log.BURST
    took = 0.0

    def work(port: int) -> None:
        nonlocal took
        started = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        for _ in range(sent):
            connection.request("GET", "/items")
            connection.getresponse().read()
        connection.close()
        took = time.monotonic() - started

    found = told(tmp_path, work)
    assert call_log.BURST <= len(found) <= call_log.BURST + call_log.RATE * (took + 2)
    assert len(found) < sent
