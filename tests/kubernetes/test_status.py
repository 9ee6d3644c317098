"""What is written back to a real API server: conditions, events, and by whom."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import pytest

from controller.kubernetes.part import LEASE
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import Writing, conditions, got, writing
from tests.kubernetes.manifest import OWN
from tests.kubernetes.samples import namespace, pod, policy, service
from tests.tasks import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quick")]


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
