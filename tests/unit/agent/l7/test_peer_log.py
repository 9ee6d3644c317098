"""What two real Envoys say of the far ends of their tunnels when they are asked, and what a revoked certificate still gets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509

from agent.config import HBONE_PORT
from agent.l7 import names, peer_log
from agent.l7.peer_log import Distrusted, Shown
from agent.l7.resources import Resources
from agent.l7.snapshot import tracing
from agent.l7.xds import XdsServer
from tests import hbone as peer
from tests.ports import free_ports
from tests.tasks import until
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7.test_hbone import FAR, ROOT, credentials, resources, scene, secret, spiffe_id


def uri(pem: bytes) -> str:
    return peer.spiffe_ids(x509.load_pem_x509_certificate(pem))[0]


@contextlib.asynccontextmanager
async def envoy(directory: Path, account: str, built: Resources, seen: list[Shown]) -> AsyncIterator[XdsServer]:
    await asyncio.to_thread(directory.mkdir)
    async with harness.waypoint(harness.config(directory, envoy_concurrency=1)) as (xds, _):
        xds.on_shown = seen.append
        xds.set_secrets(secret(account))
        await harness.applied(xds, {**built, **tracing(frozenset())})
        yield xds


def test_both_ends_name_the_tunnels_with_streams_and_what_was_shown(tmp_path: Path) -> None:
    async def scenario() -> None:
        port = free_ports(1)[0]
        with harness.http_server("far", FAR) as server:
            snapshot = scene(port, server.server_address[1])
            at_far: list[Shown] = []
            at_near: list[Shown] = []
            far, near = resources(snapshot, "node-2"), resources(snapshot, "node-1", port)
            async with envoy(tmp_path / "far", "far", far, at_far) as one, envoy(tmp_path / "near", "near", near, at_near) as other:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                assert b"200" in await reader.readline()
                await asyncio.sleep(peer_log.EVERY_S + 0.3)
                assert (at_far, at_near) == ([], []), "nobody asks"
                for xds, built in ((one, far), (other, near)):
                    xds.set({**built, **tracing(frozenset(), peers=True)})
                await until(lambda: at_far and at_near)
                writer.close()
            print(at_far[0], at_near[0])
            assert at_far[0].local == f"{FAR}:{HBONE_PORT}" == at_near[0].remote
            assert at_far[0].remote == at_near[0].local

    asyncio.run(scenario())


@pytest.mark.parametrize("serial", [0xABC, 0x80ABCD, 0x0FEDCBA987654321, (1 << 158) + 7])
def test_a_revoked_serial_opens_no_stream_on_a_tunnel_that_is_open(tmp_path: Path, serial: int) -> None:
    """However Envoy spells numbers; and another one does as before."""

    def holder(number: int) -> peer.Identity:
        chain, key = credentials(spiffe_id("near"), serial=number)
        return peer.Identity(chain, key, ROOT.pem)

    async def scenario() -> None:
        with harness.http_server("far", FAR) as server:
            port = server.server_address[1]
            snapshot = scene(free_ports(1)[0], port)
            before = resources(snapshot, "node-2")
            after = resources(snapshot, "node-2", distrusted=Distrusted.of({serial, 0x77}, [b"root"]))
            async with (
                envoy(tmp_path / "far", "far", before, []) as xds,
                peer.Tunnel.connect((FAR, HBONE_PORT), holder(serial)) as revoked,
                peer.Tunnel.connect((FAR, HBONE_PORT), holder(serial + 1)) as other,
            ):
                statuses = [(await tunnel.open(f"{FAR}:{port}")).status for tunnel in (revoked, other)]
                await harness.applied(xds, {**after, **tracing(frozenset())})
                statuses += [(await tunnel.open(f"{FAR}:{port}")).status for tunnel in (revoked, other)]
                assert statuses == [200, 200, 403, 200]

    asyncio.run(scenario())


def test_a_change_of_trust_makes_other_clusters_and_listeners_stay() -> None:
    snapshot = scene(80, 8080)
    plain, again, revoked, roots = [
        resources(snapshot, "node-1", 1, distrusted=one)
        for one in (Distrusted.of((), [b"a"]), Distrusted.of((), [b"a"]), Distrusted.of((5,), [b"a"]), Distrusted.of((), [b"b"]))
    ]
    tunnels = [name for name in plain[names.CLUSTER] if name.startswith(names.TUNNEL)]
    assert tunnels
    for name in tunnels:
        assert plain[names.CLUSTER][name] == again[names.CLUSTER][name]
        assert len({one[names.CLUSTER][name].version for one in (plain, revoked, roots)}) == 3
    assert plain[names.LISTENER] == revoked[names.LISTENER] == roots[names.LISTENER]
