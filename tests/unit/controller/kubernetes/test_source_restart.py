"""What a controller that starts makes of last good versions: it is ready with them, whatever is missing, and writes none of them away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from controller.kubernetes import definition, lastgood, reflector
from controller.kubernetes.source import KubernetesSource
from controller.mesh import Mesh
from controller.objects import Key
from meshapi import discovery_pb2 as pb
from tests.tasks import beside, until
from tests.unit.controller.kubernetes.apiserver import Scripted, Watch, listed, scripted
from tests.unit.controller.kubernetes.test_source import PATHS, everything, meta, policy

pytestmark = pytest.mark.anyio
STATES = "/apis/meshagent.io/v1alpha1/namespaces/own/controllerstates"
SECRETS = "/api/v1/namespaces/shop/secrets"
SPACE = {"metadata": {"name": "shop", "uid": "u", "resourceVersion": "1"}}
PORT = 8443


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for back-off here."""
    monkeypatch.setattr(reflector, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", 0.02)
    monkeypatch.setattr(reflector, "ABSENT_S", 0.02)
    monkeypatch.setattr(lastgood, "AGAIN_S", 0.02)


def gateway(generation: int = 1, port: Any = PORT) -> dict[str, Any]:
    listener = {"name": "l", "port": port, "protocol": "HTTPS", "tls": {"certificateRefs": [{"name": "c"}]}}
    spec = {"gatewayClassName": "meshagent", "listeners": [listener]}
    return {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": meta("g", generation=generation), "spec": spec}


def route() -> dict[str, Any]:
    spec = {"parentRefs": [{"group": "", "kind": "Service", "name": "web"}]}
    return {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": meta("r"), "spec": spec}


def state(version: str, *objects: dict[str, Any], orphan: bool = False, generation: int = 0) -> dict[str, Any]:
    """The ControllerState with last good versions of objects of one kind."""
    rows = [{"uid": one["metadata"]["uid"], "object": one, "orphan": orphan, "generation": generation} for one in objects]
    metadata = {"name": lastgood.NAME, "namespace": "own", "uid": "l", "resourceVersion": version}
    return {"metadata": metadata, "documents": {f"{objects[0]['kind']}.json": json.dumps(rows)} if objects else {}}


def states(*items: dict[str, Any]) -> dict[str, Any]:
    return listed("100", *items, kind="ControllerState")


@asynccontextmanager
async def starting(api: Any) -> AsyncIterator[tuple[Mesh, KubernetesSource]]:
    """A controller that starts with what the server has."""
    source = KubernetesSource(api, "own")
    mesh = Mesh(source, authority=False)
    async with beside(mesh.watch()):
        yield mesh, source


async def watch_of(server: Scripted, path: str) -> Watch:
    """The watch of this path, once it is open."""
    seen = 0
    while True:
        watch = await asyncio.wait_for(server.watches.get(), 10)
        paths = [asked for asked, params in server.asked if "watch" in params]
        if paths[seen] == path:
            return watch
        seen += 1


@pytest.mark.parametrize("orphan", [False, True])
async def test_a_gateway_that_is_in_force_as_it_was_waits_for_its_secret_and_the_controller_starts(tmp_path: Path, orphan: bool) -> None:
    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[SPACE], Gateway=[] if orphan else [gateway(2, "x")])
        server.pages[STATES] = [states(state("5", gateway(), orphan=orphan))]
        server.pages[SECRETS] = [listed("100", kind="Secret")]
        async with starting(api) as (mesh, _):
            await until(lambda: mesh.publication.current.serial)
            held = mesh.state.objects[Key("Gateway", "shop", "g")]
            assert held.spec["listeners"][0]["port"] == PORT
            assert ("is not there any more" if orphan else "must be a whole number") in str(mesh.state.problems)


async def test_a_route_of_a_definition_that_is_gone_is_in_force_and_the_controller_starts(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[SPACE])
        server.pages[PATHS["HTTPRoute"]] = [404]
        server.pages[STATES] = [states(state("5", route(), orphan=True))]
        async with starting(api) as (mesh, source):
            await until(lambda: mesh.publication.current.serial)
            await asyncio.sleep(0.1)
            assert Key("HTTPRoute", "shop", "r") in mesh.state.objects
            assert [problem.name for problem in mesh.state.problems] == ["shop/r"], "the kind is absent, and nothing is wrong with that"
            assert source.reflectors["HTTPRoute"].absent


async def test_a_refusal_to_look_at_a_definition_is_forgotten_when_there_turns_out_to_be_none(tmp_path: Path) -> None:
    """An API server that has just started knows no roles yet, and refuses everything."""
    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[SPACE])
        server.pages[PATHS["HTTPRoute"]] = [404]
        server.pages[f"{definition.PATH}/httproutes.gateway.networking.k8s.io"] = [403, 404]
        server.pages[STATES] = [states()]
        async with starting(api) as (mesh, source):
            await until(lambda: mesh.publication.current.serial)
            await until(lambda: source.reflectors["HTTPRoute"].absent)
            await until(lambda: mesh.state.problems == ())


async def test_a_definition_of_gateway_api_that_does_not_go_keeps_no_controller_from_starting(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[SPACE], HTTPRoute=[route()])
        server.pages[f"{definition.PATH}/httproutes.gateway.networking.k8s.io"] = [{"metadata": {"uid": "d", "deletionTimestamp": "x"}}]
        server.pages[STATES] = [states()]
        async with starting(api) as (mesh, _):
            await until(lambda: mesh.publication.current.serial)
            watch = await watch_of(server, PATHS["HTTPRoute"])
            await watch.send("DELETED", {**route(), "metadata": meta("r", "7")})
            await until(lambda: mesh.state.problems)
            assert Key("HTTPRoute", "shop", "r") in mesh.state.objects


async def test_nothing_is_published_before_last_good_versions_are_understood(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[SPACE], AuthorizationPolicy=[policy("p", "6", "DENI")])
        server.pages[STATES] = [states(state("5", policy("p", "5", "DENY")))]
        source = KubernetesSource(api, "own")
        assert source.last_good is not None
        last_good, looks = source.last_good, []
        told = last_good.reflector._changed

        def between() -> None:
            """What a load in a thread sees that runs just now."""
            if last_good.reflector.synced and not last_good.kept:
                source.load()
                looks.append(source.ready)
            told()

        last_good.reflector._changed = between
        last_good.reflector.synced = False
        source.reflectors = {name: one for name, one in source.reflectors.items() if name in {"Namespace", "AuthorizationPolicy"}}
        async with beside(source.reflectors["Namespace"].run()), beside(source.reflectors["AuthorizationPolicy"].run()):
            await until(lambda: all(one.synced for one in source.reflectors.values()))
            async with beside(last_good.reflector.run()):
                await until(lambda: last_good.kept)
        assert looks == [False]
        assert Key("AuthorizationPolicy", "shop", "p") in source.load().objects
        assert source.ready


async def test_what_another_controller_wrote_is_not_written_away_before_it_was_looked_at(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (server, api):
        server.pages[STATES] = [states(state("5", policy("p", "5", "DENY")))]
        source = KubernetesSource(api, "own")
        assert source.last_good is not None
        last_good = source.last_good
        async with beside(last_good.reflector.run()), beside(last_good.write(lambda: True)):
            await until(lambda: last_good.kept)
            last_good.want({}, {})
            await asyncio.sleep(0.1)
            assert len(asked(server)) == 1, "it was written from a look at what was there before"
            server.pages[STATES] = [state("6")]
            server.pages[f"{STATES}/{lastgood.NAME}"] = [state("6")]
            last_good.want({}, last_good.kept)
            await until(lambda: not last_good.kept)


def asked(server: Scripted) -> list[str]:
    """Requests for last good versions, but for watches."""
    return [path for path, params in server.asked if path.startswith(STATES) and "watch" not in params]


@pytest.mark.parametrize("code", [500, 401])
async def test_a_secret_that_nobody_can_read_keeps_no_controller_from_starting_and_closes_its_listener_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("controller.kubernetes.secrets.PATIENCE_S", 0.2)
    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[SPACE], Gateway=[gateway()], AuthorizationPolicy=[policy("p", "5", "DENY")])
        server.pages[STATES] = [states()]
        server.pages[SECRETS] = [code]
        async with starting(api) as (mesh, source):
            await until(lambda: SECRETS in [path for path, _ in server.asked])
            assert not mesh.publication.current.serial
            await until(lambda: mesh.publication.current.serial)
            assert "policy/shop/p" in mesh.compiled.entities
            secret = Key("Secret", "shop", "c")
            assert f"message {code}" in str(mesh.state.refused[secret])
            held = {"metadata": meta("c"), "type": "kubernetes.io/tls", "data": {"tls.crt": "eA=="}}
            server.pages[SECRETS] = [listed("100", held, kind="Secret")]
            await until(lambda: secret in mesh.state.objects)
            assert source.secrets.problem(secret) is None


async def test_a_secret_that_was_read_is_not_refused_because_the_api_server_is_away_for_a_while(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[SPACE], Gateway=[gateway()])
        server.pages[STATES] = [states()]
        held = {"metadata": meta("c"), "type": "kubernetes.io/tls", "data": {"tls.crt": "eA=="}}
        server.pages[SECRETS] = [listed("100", held, kind="Secret")]
        async with starting(api) as (mesh, _):
            await until(lambda: mesh.publication.current.serial)
            watch = await watch_of(server, SECRETS)
            before = dict(mesh.state.refused)
            server.pages[SECRETS] = [500]
            await watch.send("ERROR", {"code": 410})
            await until(lambda: any(problem.kind == "Secret" and "no news of it" in problem.message for problem in mesh.state.problems))
            assert mesh.state.refused == before
            server.pages[SECRETS] = [403]
            await until(lambda: Key("Secret", "shop", "c") in mesh.state.refused)


async def test_orphans_that_another_controller_writes_while_this_one_starts_are_in_force_in_it(tmp_path: Path) -> None:
    def policies(*names: str) -> list[dict[str, Any]]:
        return [policy(name, "5", "DENY") for name in names]

    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[SPACE])
        server.pages[PATHS["AuthorizationPolicy"]] = [404]
        server.pages[STATES] = [states(state("5", *policies("p"), orphan=True))]
        async with starting(api) as (mesh, source):
            watch = await watch_of(server, STATES)
            assert not source.ready
            await watch.send("MODIFIED", state("6", *policies("p", "qq"), orphan=True))
            await until(lambda: source.seen(Key("AuthorizationPolicy", "shop", "qq")))
            server.pages[PATHS["AuthorizationPolicy"]] = [listed("100", kind="AuthorizationPolicy")]
            await until(lambda: mesh.publication.current.serial)
            assert {"policy/shop/p", "policy/shop/qq"} <= mesh.compiled.entities.keys()
            await watch.send("MODIFIED", state("7", *policies("p", "qq", "sss"), orphan=True))
            await until(lambda: source.last_good is not None and len(source.last_good.kept) == 3)
            assert source.seen(Key("AuthorizationPolicy", "shop", "sss")) is None, "what comes later is others'"


@pytest.mark.parametrize("first", ["the kind goes", "it is written"])
async def test_orphans_of_a_kind_that_is_not_there_any_more_are_in_force_in_every_controller_whenever_they_are_written(
    tmp_path: Path, first: str
) -> None:
    """Gateway API's definitions go, and its routes one by one, while this controller starts; the one that has known them writes them when this one is ready."""
    gone = Key("HTTPRoute", "shop", "r")
    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[SPACE])
        server.pages[PATHS["HTTPRoute"]] = [404] if first == "the kind goes" else [listed("100", kind="HTTPRoute")]
        server.pages[STATES] = [states()]
        async with starting(api) as (mesh, source):
            await until(lambda: mesh.publication.current.serial)
            assert source.last_good is not None
            last_good = source.last_good
            watches: dict[str, Watch] = {}
            while not ({STATES} if first == "the kind goes" else {STATES, PATHS["HTTPRoute"]}) <= watches.keys():
                watch = await asyncio.wait_for(server.watches.get(), 10)
                watches[watch.path] = watch
            await watches[STATES].send("ADDED", state("6", route(), orphan=True))
            await until(lambda: last_good.kept)
            if first == "it is written":
                await mesh.reload()
                assert gone not in mesh.state.objects, "it may have been deleted by somebody"
                server.pages[PATHS["HTTPRoute"]] = [404]
                await watches[PATHS["HTTPRoute"]].send("ERROR", {"code": 410})
            await until(lambda: gone in mesh.state.objects)
            await until(lambda: last_good._known is last_good.kept)
            assert gone in (last_good._wanted or {}), "if it were this one's turn to write it would be written away"


async def test_one_that_was_hidden_is_read_again_when_its_definition_was_mended(tmp_path: Path) -> None:
    whole = policy("p", "5", "ALLOW")
    whole["metadata"]["generation"] = 1
    whole["spec"]["rules"] = [{"when": [{"key": "source.namespace", "values": ["x"]}]}]
    hidden = {**whole, "spec": {"action": "ALLOW", "rules": [{}]}}
    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[SPACE], AuthorizationPolicy=[hidden])
        server.pages[STATES] = [states(state("5", whole, generation=1))]
        async with starting(api) as (mesh, _):
            watch = await watch_of(server, PATHS["AuthorizationPolicy"])
            await until(lambda: mesh.publication.current.serial)
            assert mesh.compiled.entities["policy/shop/p"].policy.action == pb.Policy.ALLOW
            assert "gives it without spec.rules[0].when" in str(mesh.state.problems)
            server.pages[PATHS["AuthorizationPolicy"]] = [listed("100", whole, kind="AuthorizationPolicy")]
            watch.end()
            await until(lambda: not mesh.state.problems)
            assert not mesh.state.refused
