"""Certificates that are due within the hour: while the API server is away, and when the certificate that signs them is about to end.

Controllers and the agent's identities are the real ones; the agent's clock that never steps is moved on, by which half of a life is over at once.
"""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent import netns, telemetry
from agent.check import running
from agent.check.finding import Severity
from agent.config import Config, Join
from agent.identity import authority, node, service, workloads
from agent.identity.clock import Clock
from agent.identity.service import Identity
from agent.model import LocalWorkload, Workload
from agent.report import as_json
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.manifest import OWN
from tests.kubernetes.replicas import Replica, Replicas, replicas, workload
from tests.kubernetes.samples import namespace
from tests.tasks import beside, until
from tests.unit.controller.identity.authorities import make

pytestmark = pytest.mark.anyio
LIFE_S = 3600
CART = "shop/cart"


@pytest.fixture
def two(plane: ControlPlane, tmp_path: Path) -> Iterator[Replicas]:
    """Two controllers that are not started yet, with certificates of an hour, and a workload on node n1."""
    plane.apply(namespace(OWN, "none"), namespace("shop"), workload("shop", "cart", "n1", "10.9.0.1"))
    with replicas(plane, tmp_path) as found:
        for one in (found.a, found.b):
            one.options = ("--svid-lifetime", "1h")
        yield found
    plane.kubectl("delete", "workloads.meshagent.io", "--all", "-n", "shop")


class Moved:
    """The clock that never steps, moved on; no jitter."""

    def __init__(self) -> None:
        self.by = 0.0
        self.clock = Clock(time.time, lambda: time.monotonic() + self.by, lambda: 0.5)


@asynccontextmanager
async def agent(two: Replicas, top: Path, moved: Moved, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Identity]:
    """The identities of node n1, which joins with a token."""
    for module in (node, workloads, authority):
        monkeypatch.setattr(module, "MAX_BACKOFF_S", 0.5)
    for module in (node, workloads):
        monkeypatch.setattr(module, "LOOK_S", 0.1)
    monkeypatch.setattr(service, "protect_memory", lambda: None)
    token = top / "token"
    token.write_text(await two.token("--node", "n1"))
    join = Join(f"127.0.0.1:{two.a.join_port}", token_file=token)
    config = Config(
        "n1", two.a.address, trust_domain="mesh.local", run_dir=top / "run", state_dir=top / "state", join=join, keys_on_disk=True
    )
    identity = Identity(config, moved.clock)
    identity.load()
    own = Path("/proc/self/ns/net")
    cart = Workload(CART, "cart", "n1", {}, ("10.9.0.1",), "cart", enrolled=True, ready=True)
    identity.update([LocalWorkload(cart, netns.cookie(own), str(own))])
    async with beside(identity.run()):
        await until(lambda: identity.svid(CART))
        yield identity


def failing(identity: Identity) -> dict[str, float]:
    """What the agent's metrics say of renewal, of the workload and of the node."""
    return {
        sample.name: sample.value
        for family in telemetry._identity(identity.status())
        for sample in family.samples
        if sample.name.endswith("renewal_failing")
    }


def checked(identity: Identity) -> list[tuple[Severity, str]]:
    """What `meshagent check` says of certificates."""
    return [(one.severity, one.what) for one in running.certificates(as_json(identity.status()), time.time())]


def of_controller(one: Replica, name: str) -> float:
    """A metric of a controller."""
    with urllib.request.urlopen(f"http://127.0.0.1:{one.metrics_port}/metrics", timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    (value,) = (sample.value for family in families for sample in family.samples if sample.name == name)
    return float(value)


def ends(identity: Identity) -> float:
    svid = identity.svid(CART)
    assert svid is not None
    return svid.chain.not_after


async def test_what_is_due_while_the_api_server_is_away_stays_is_told_of_and_is_renewed_before_it_ends(
    two: Replicas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(two.start)
    moved = Moved()
    async with agent(two, tmp_path, moved, monkeypatch) as identity:
        first = identity.svid(CART)
        await until(lambda: [what for severity, what in checked(identity) if severity is Severity.OK and "2 are in time" in what])
        await asyncio.to_thread(two.plane.stop)
        moved.by = 0.6 * LIFE_S
        await until(lambda: failing(identity) == {"mesh_identity_renewal_failing": 1.0, "mesh_node_certificate_renewal_failing": 1.0})
        assert identity.svid(CART) is first, "it has an hour, and is given up for nothing"
        said = checked(identity)
        assert [severity for severity, _ in said] == [Severity.WARNING] * 2
        assert all("is not renewed; it ends in 1.0 h" in what for _, what in said), said
        await asyncio.to_thread(two.plane.start)
        await until(lambda: identity.svid(CART) is not first, 60)
        await until(lambda: set(failing(identity).values()) == {0.0}, 60)
        assert [severity for severity, _ in checked(identity)] == [Severity.OK]


async def test_a_signing_certificate_that_ends_within_the_hour_is_told_of_by_everybody_and_its_successor_is_taken_up(
    two: Replicas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("middle", two.root, lifetime_s=LIFE_S // 8).write(tmp_path, "middle")
    await asyncio.to_thread(two.start)
    moved = Moved()
    async with agent(two, tmp_path, moved, monkeypatch) as identity:
        last = ends(identity)
        assert last < time.time() + LIFE_S / 8
        for one in (two.a, two.b):
            assert of_controller(one, "mesh_controller_ca_expiry_timestamp_seconds") == last
            assert of_controller(one, "mesh_controller_ca_problem") == 1
            assert "and all that it signs no later: put the next one in place of --ca-cert and --ca-key" in one.log()
        assert [severity for severity, _ in checked(identity)] == [Severity.WARNING]
        assert re.search("what signs them ends on .* in 0.1 h, and they with it", checked(identity)[0][1])
        make("middle", two.root).write(tmp_path, "middle")
        for one in (two.a, two.b):
            await until(lambda one=one: of_controller(one, "mesh_controller_ca_problem") == 0)  # type: ignore[misc]
        moved.by = 0.6 * LIFE_S
        await until(lambda: ends(identity) > last + LIFE_S / 3)
        await until(lambda: [severity for severity, _ in checked(identity)] == [Severity.OK])
