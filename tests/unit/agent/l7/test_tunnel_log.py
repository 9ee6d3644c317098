"""What two real Envoys say of one CONNECT while it is traced: the same caller at both ends, who proved what, and why there was no tunnel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from agent import causes
from agent.config import HBONE_PORT
from agent.l7 import secrets
from agent.l7.resources import Resource, Resources
from agent.l7.snapshot import tracing
from agent.l7.tunnel_log import TunnelRecord
from agent.l7.xds import XdsServer
from tests.ports import free_ports
from tests.tasks import until
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7.harness import TRUST_DOMAIN
from tests.unit.agent.l7.test_hbone import FAR, ROOT, credentials, resources, scene, secret, spiffe_id

TRACED = frozenset({"default/near", "default/far"})


@contextlib.asynccontextmanager
async def envoy(
    directory: Path, own: dict[str, Resource], built: Resources, seen: list[TunnelRecord], traced: frozenset[str]
) -> AsyncIterator[XdsServer]:
    await asyncio.to_thread(directory.mkdir)
    async with harness.waypoint(harness.config(directory, envoy_concurrency=1)) as (xds, _):
        xds.on_tunnel = seen.append
        xds.set_secrets(own)
        await harness.applied(xds, {**built, **tracing(traced, received=traced)})
        yield xds


def records(
    directory: Path, own: dict[str, Resource], traced: frozenset[str], status: bytes, *, wait: bool = True
) -> tuple[list[TunnelRecord], list[TunnelRecord]]:
    """What the caller's and the receiver's Envoy say of one request from "near" to "far"."""

    async def scenario() -> tuple[list[TunnelRecord], list[TunnelRecord]]:
        port = free_ports(1)[0]
        with harness.http_server("far", FAR) as server:
            snapshot = scene(port, server.server_address[1])
            near: list[TunnelRecord] = []
            far: list[TunnelRecord] = []
            async with (
                envoy(directory / "far", secret("far"), resources(snapshot, "node-2"), far, traced),
                envoy(directory / "near", own, resources(snapshot, "node-1", port), near, traced),
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                assert status in await reader.readline()
                writer.close()
                if wait:
                    await until(lambda: far and (near or status == b"200"))
                else:
                    await asyncio.sleep(0.5)
        return near, far

    return asyncio.run(scenario())


def test_a_tunnel_of_requests_is_told_when_it_begins(tmp_path: Path) -> None:
    _, far = records(tmp_path, secret("near"), TRACED, b"200")
    assert (far[0].workload, far[0].receiver, far[0].caller, far[0].peer, far[0].tls) == (
        "default/far",
        True,
        "",
        spiffe_id("near"),
        "TLSv1.3",
    )
    assert far[0].target.startswith(f"{FAR}:")
    assert not far[0].remote.endswith(f":{HBONE_PORT}")


def test_nothing_is_told_when_nobody_traces(tmp_path: Path) -> None:
    assert records(tmp_path, secret("near"), frozenset(), b"200", wait=False) == ([], [])


def test_a_certificate_that_has_run_out_is_told_by_the_receivers_end_with_the_next_step(tmp_path: Path) -> None:
    trusted, resource = secrets.trust(TRUST_DOMAIN, ROOT.pem, b"")
    expired = secrets.certificate(spiffe_id("near"), *credentials(spiffe_id("near"), lifetime_s=-60))
    near, far = records(tmp_path, {trusted: resource, **expired}, TRACED, b"503")
    assert near[0].failure == "", "TLS 1.3: the alert comes when the caller believes the handshake done"
    assert near[0].flags
    assert "CERTIFICATE" in far[0].failure.upper()
    assert (far[0].workload, far[0].peer, far[0].code) == ("default/far", "", 0)
    assert "the caller's certificate has run out" in str(causes.of_failure(far[0].failure, at_receiver=True))
