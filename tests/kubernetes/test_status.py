"""What is written back to a real API server: conditions, events, and by whom."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from controller.kubernetes import lease, status
from controller.kubernetes.part import LEASE, KubernetesPart
from controller.mesh import Mesh
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.test_source import namespace, pod, policy, service, until

pytestmark = pytest.mark.anyio
OWN = "meshagent-system"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases turn in seconds."""
    monkeypatch.setattr(lease, "DURATION_S", 3)
    monkeypatch.setattr(lease, "RENEW_S", 0.5)
    monkeypatch.setattr(lease, "GRACE_S", 2.0)
    monkeypatch.setattr(status, "LOOK_S", 1.0)


class Writing:
    """One controller's mesh with what writes back."""

    def __init__(self, plane: ControlPlane, user: str = "admin") -> None:
        self.part = KubernetesPart(plane.kubeconfig(user), "", OWN)
        self.mesh = Mesh(self.part.source, authority=False)
        self.mesh.looked = self.part.looked
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.mesh.start()
        self.tasks = [asyncio.create_task(self.mesh.watch()), asyncio.create_task(self.part.run())]

    async def stop(self) -> None:
        """As the server does it."""
        await self._end()
        await self.part.stop()
        await self.part.source.close()

    async def kill(self) -> None:
        """As a process that ends without a word."""
        await self._end()
        await self.part.source.close()

    async def _end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    @property
    def holds(self) -> bool:
        return self.part._lease.held

    @property
    def written(self) -> int:
        return self.part._writer.written


@asynccontextmanager
async def writing(plane: ControlPlane, user: str = "admin") -> AsyncIterator[Writing]:
    one = Writing(plane, user)
    await one.start()
    try:
        yield one
    finally:
        await one.stop()


def got(plane: ControlPlane, kind: str, space: str, name: str) -> Any:
    return json.loads(plane.kubectl("get", kind, name, "-n", space, "-o", "json"))


def conditions(plane: ControlPlane, kind: str, space: str, name: str) -> dict[str, tuple[str, str]]:
    found = got(plane, kind, space, name).get("status", {}).get("conditions", [])
    return {one["type"]: (one["status"], one["reason"]) for one in found}


async def test_conditions_are_written_once_and_follow_changes(plane: ControlPlane) -> None:
    plane.apply(namespace(OWN, "none"), namespace("said"), policy("said", "p"))
    async with writing(plane) as one:
        await until(
            lambda: (
                conditions(plane, "authorizationpolicy", "said", "p")
                == {
                    "Accepted": ("True", "Accepted"),
                    "Enforced": ("False", "NothingSelected"),
                }
            )
        )
        first = got(plane, "authorizationpolicy", "said", "p")
        assert {one["observedGeneration"] for one in first["status"]["conditions"]} == {1}
        await asyncio.sleep(3)
        again = got(plane, "authorizationpolicy", "said", "p")
        assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"], "it goes on writing what is there"
        plane.apply(pod("said", "app"))
        await until(lambda: conditions(plane, "authorizationpolicy", "said", "p") == {"Accepted": ("True", "Accepted")})
        last = got(plane, "authorizationpolicy", "said", "p")
        since = {found["status"]["conditions"][0]["lastTransitionTime"] for found in (first, last)}
        assert len(since) == 1, "Accepted was True all the time"
        assert one.part._writer.failed == 0


async def test_a_refused_object_says_why_and_has_an_event(plane: ControlPlane) -> None:
    bad = policy("said", "bad")
    bad["metadata"]["annotations"] = {"meshagent.io/dry-run": "perhaps"}  # of metadata a definition can say nothing
    plane.apply(namespace(OWN, "none"), namespace("said"), bad)
    async with writing(plane):
        await until(lambda: conditions(plane, "authorizationpolicy", "said", "bad").get("Accepted") == ("False", "Invalid"))
        message = got(plane, "authorizationpolicy", "said", "bad")["status"]["conditions"][0]["message"]
        assert "dry-run" in message
        await until(lambda: "Refused" in plane.kubectl("get", "events.events.k8s.io", "-n", "said", "-o", "json"))
        events = json.loads(plane.kubectl("get", "events.events.k8s.io", "-n", "said", "-o", "json"))["items"]
        assert [(one["regarding"]["name"], one["reportingController"]) for one in events] == [("bad", "meshagent.io/controller")]
    plane.kubectl("delete", "authorizationpolicy", "bad", "-n", "said")


async def test_one_of_two_controllers_writes_and_the_other_takes_over(plane: ControlPlane) -> None:
    plane.apply(namespace(OWN, "none"), namespace("taken"), policy("taken", "p"))
    async with AsyncExitStack() as stack:
        first = Writing(plane)
        await first.start()
        await until(lambda: first.holds)
        second = await stack.enter_async_context(writing(plane))
        await until(lambda: second.mesh.publication.current.serial)
        assert second.mesh.publication.current.version == first.mesh.publication.current.version, "both serve"
        await asyncio.sleep(2)
        assert (first.holds, second.holds, second.written) == (True, False, 0)
        turns = got(plane, "lease", OWN, LEASE)["spec"]["leaseTransitions"]
        await first.kill()
        await until(lambda: second.holds, 15)
        plane.apply(pod("taken", "app"))
        await until(lambda: second.written)
        spec = got(plane, "lease", OWN, LEASE)["spec"]
        assert spec["holderIdentity"] == second.part._lease.identity
        assert spec["leaseTransitions"] == turns + 1
    released = got(plane, "lease", OWN, LEASE)["spec"]
    assert not released.get("holderIdentity")


async def test_a_route_says_of_each_parent_what_became_of_it_and_leaves_what_others_say(plane: ControlPlane) -> None:
    plane.install_gateway_api()
    parents = [{"kind": "Service", "group": "", "name": name} for name in ("cart", "missing")]
    backends = [{"name": "cart", "port": 80}]
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "r", "namespace": "routed"},
        "spec": {"parentRefs": parents, "rules": [{"backendRefs": backends}]},
    }
    plane.apply(namespace(OWN, "none"), namespace("routed"), service("routed", "cart"), route)
    foreign = {
        "parentRef": {"name": "other"},
        "controllerName": "example.com/other",
        "conditions": [
            {"type": "Accepted", "status": "True", "reason": "Accepted", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        ],
    }
    plane.set_status("httproute", "routed", "r", {"parents": [foreign]})
    async with writing(plane):
        await until(lambda: len(got(plane, "httproute", "routed", "r")["status"]["parents"]) == 3)
        said = {
            (one["controllerName"], one["parentRef"]["name"]): {(c["type"], c["status"], c["reason"]) for c in one["conditions"]}
            for one in got(plane, "httproute", "routed", "r")["status"]["parents"]
        }
        assert said["example.com/other", "other"] == {("Accepted", "True", "Accepted")}
        assert ("Accepted", "True", "Accepted") in said["meshagent.io/controller", "cart"]
        assert ("Accepted", "False", "NoMatchingParent") in said["meshagent.io/controller", "missing"]
