"""What is written back of Gateways and of routes for gRPC: listeners in their own list, each parent by itself, and nothing that others say is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from controller.gateways import CONTROLLER, LABEL
from controller.kubernetes import status
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import got, writing
from tests.kubernetes.manifest import OWN
from tests.kubernetes.samples import API, listener, namespace, pod, running, service
from tests.tasks import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quick")]
BEFORE = "2026-01-01T00:00:00Z"
FOREIGN = {"type": "example.com/Dns", "status": "True", "reason": "Known", "message": "theirs", "lastTransitionTime": BEFORE}


@pytest.fixture(scope="module", autouse=True)
def gateway_api(plane: ControlPlane) -> None:
    plane.install_gateway_api()


@pytest.fixture(autouse=True)
def edge(plane: ControlPlane) -> Iterator[None]:
    """A pod in whose place the gateway `web` runs; what is made there is gone afterwards."""
    plane.apply(namespace(OWN, "none"), namespace("edge"), service("edge", "cart"), pod("edge", "edge", **{LABEL: "web"}))
    running(plane, "edge", "edge", "10.1.0.9", "fd00::9")
    yield
    plane.kubectl("delete", "gateways,httproutes,grpcroutes,services,pods", "--all", "-n", "edge", "--force", "--grace-period=0")


def gateway(*listeners: dict[str, Any], name: str = "web", of: str = "meshagent") -> dict[str, Any]:
    meta = {"name": name, "namespace": "edge"}
    return {"apiVersion": f"{API}/v1", "kind": "Gateway", "metadata": meta, "spec": {"gatewayClassName": of, "listeners": list(listeners)}}


def route(kind: str, name: str, *parents: dict[str, Any]) -> dict[str, Any]:
    spec = {"parentRefs": list(parents), "rules": [{"backendRefs": [{"name": "cart", "port": 80}]}]}
    return {"apiVersion": f"{API}/v1", "kind": kind, "metadata": {"name": name, "namespace": "edge"}, "spec": spec}


def told(conditions: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {one["type"]: (one["status"], one["reason"]) for one in conditions}


def listeners(plane: ControlPlane, name: str = "web") -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in got(plane, "gateway", "edge", name).get("status", {}).get("listeners", ())}


async def test_each_listener_of_a_gateway_says_what_became_of_it_and_what_others_say_stays(plane: ControlPlane) -> None:
    grpc_only = {"kinds": [{"kind": "GRPCRoute"}]}
    tls = {"certificateRefs": [{"name": "missing"}]}
    plane.apply(
        gateway(
            listener("open", 8080),
            listener("calls", 8081, allowedRoutes=grpc_only),
            listener("bad", 8443, protocol="HTTPS", tls=tls),
            listener("raw", 9000, protocol="TCP"),
        ),
        route("HTTPRoute", "pages", {"name": "web"}),
        route("GRPCRoute", "calls", {"name": "web", "sectionName": "calls"}),
    )
    held = [{"name": name, "supportedKinds": [], "attachedRoutes": 0, "conditions": [FOREIGN]} for name in ("open", "gone")]
    plane.set_status("gateway", "edge", "web", {"conditions": [FOREIGN], "listeners": held})
    async with writing(plane) as one:
        await until(lambda: len(listeners(plane)) == 4)
        first = got(plane, "gateway", "edge", "web")
        said = told(first["status"]["conditions"])
        assert said == {
            "Accepted": ("True", "ListenersNotValid"),
            "ListenersValid": ("False", "InvalidCertificateRef"),
            "Programmed": ("True", "Programmed"),
            FOREIGN["type"]: ("True", "Known"),
        }
        assert FOREIGN in first["status"]["conditions"], "it was changed"
        assert [one["value"] for one in first["status"]["addresses"]] == ["10.1.0.9", "fd00::9"]
        now = listeners(plane)
        assert {name: found["attachedRoutes"] for name, found in now.items()} == {"open": 1, "calls": 1, "bad": 1, "raw": 0}
        kinds = {name: [kind["kind"] for kind in found["supportedKinds"]] for name, found in now.items()}
        both = ["HTTPRoute", "GRPCRoute"]
        assert kinds == {"open": both, "calls": ["GRPCRoute"], "bad": both, "raw": []}
        good = {"Accepted": ("True", "Accepted"), "Conflicted": ("False", "NoConflicts"), "ResolvedRefs": ("True", "ResolvedRefs")}
        programmed, invalid = ("True", "Programmed"), ("False", "Invalid")
        assert told(now["open"]["conditions"]) == {**good, "Programmed": programmed, FOREIGN["type"]: ("True", "Known")}
        assert told(now["calls"]["conditions"]) == {**good, "Programmed": programmed}
        assert told(now["bad"]["conditions"]) == {**good, "ResolvedRefs": ("False", "InvalidCertificateRef"), "Programmed": invalid}
        assert told(now["raw"]["conditions"]) == {**good, "Accepted": ("False", "UnsupportedProtocol"), "Programmed": invalid}

        await asyncio.to_thread(plane.apply, route("HTTPRoute", "more", {"name": "web", "sectionName": "open"}))
        await until(lambda: listeners(plane)["open"]["attachedRoutes"] == 2)
        after = listeners(plane)
        assert after["open"]["conditions"] == now["open"]["conditions"], "nothing of it has changed but the count"
        assert {name: found for name, found in after.items() if name != "open"} == {name: now[name] for name in ("calls", "bad", "raw")}

        changed = gateway(listener("open", 8080), listener("calls", 8081, allowedRoutes=grpc_only))
        await asyncio.to_thread(plane.apply, changed)
        await until(lambda: listeners(plane).keys() == {"open", "calls"})
        last = got(plane, "gateway", "edge", "web")
        assert told(last["status"]["conditions"]) == {
            "Accepted": ("True", "Accepted"),
            "Programmed": ("True", "Programmed"),
            FOREIGN["type"]: ("True", "Known"),
        }
        own = [found for found in last["status"]["conditions"] if found["type"] != FOREIGN["type"]]
        assert {found["observedGeneration"] for found in own} == {last["metadata"]["generation"]}
        await asyncio.sleep(3 * status.LOOK_S)
        assert got(plane, "gateway", "edge", "web")["metadata"]["resourceVersion"] == last["metadata"]["resourceVersion"], (
            "it goes on writing"
        )
        assert one.part._writer.failed == 0


async def test_a_gateway_of_another_class_is_left_alone(plane: ControlPlane) -> None:
    plane.apply(gateway(listener("open", 8080), name="theirs", of="other"), gateway(listener("open", 8080)))
    before = got(plane, "gateway", "edge", "theirs")
    async with writing(plane):
        await until(lambda: listeners(plane))
        assert got(plane, "gateway", "edge", "theirs") == before


async def test_a_route_for_grpc_is_in_force_and_says_so_of_each_parent(plane: ControlPlane) -> None:
    parents: list[dict[str, Any]] = [{"name": "web"}, *({"kind": "Service", "group": "", "name": name} for name in ("cart", "missing"))]
    plane.apply(gateway(listener("open", 8080)), route("GRPCRoute", "calls", *parents))
    theirs = {"parentRef": {"name": "other"}, "controllerName": "example.com/other", "conditions": [{**FOREIGN, "type": "Accepted"}]}
    ours = {"parentRef": {**parents[0], "group": API, "kind": "Gateway"}, "controllerName": CONTROLLER, "conditions": [FOREIGN]}
    plane.set_status("grpcroute", "edge", "calls", {"parents": [theirs, ours]})

    def said() -> dict[tuple[str, str], list[dict[str, Any]]]:
        found = got(plane, "grpcroute", "edge", "calls").get("status", {}).get("parents", ())
        return {(one["controllerName"], one["parentRef"]["name"]): one["conditions"] for one in found}

    async with writing(plane) as one:
        await until(lambda: len(said()) == 4)
        now = said()
        assert now["example.com/other", "other"] == theirs["conditions"]
        problem, resolved = ("False", "NoMatchingParent"), ("True", "ResolvedRefs")
        accepted = ("True", "Accepted")
        known = {name: told(conditions) for (controller, name), conditions in now.items() if controller == CONTROLLER}
        assert {name: (found["Accepted"], found["ResolvedRefs"]) for name, found in known.items()} == {
            "web": (accepted, resolved),
            "cart": (accepted, resolved),
            "missing": (problem, resolved),
        }
        assert FOREIGN in now[CONTROLLER, "web"], "a condition of others was taken away"
        assert "route/edge/calls:grpc" in one.mesh.compiled.entities
        await until(lambda: (found := listeners(plane)) and found["open"]["attachedRoutes"] == 1)
        await asyncio.to_thread(plane.apply, route("GRPCRoute", "calls", parents[1]))
        await until(lambda: {name for controller, name in said() if controller == CONTROLLER} == {"cart"})
        await until(lambda: listeners(plane)["open"]["attachedRoutes"] == 0)
        await asyncio.to_thread(plane.kubectl, "delete", "grpcroute", "calls", "-n", "edge")
        await until(lambda: "route/edge/calls:grpc" not in one.mesh.compiled.entities)
