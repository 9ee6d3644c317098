"""What is in force of what an API server says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from controller import externals
from controller.compile import Compiled, compile_model
from controller.kubernetes import reflector, secrets
from controller.kubernetes.shapes import followed
from controller.kubernetes.source import KubernetesSource
from controller.mesh import Mesh
from controller.objects import Key, Object
from meshapi import discovery_pb2 as pb
from tests.tasks import beside, until
from tests.tokens import Issuer
from tests.unit.controller.kubernetes.apiserver import Scripted, Watch, listed, scripted

pytestmark = pytest.mark.anyio
UID = "0fe7fc41-8d9c-4d6c-8c9f-d9f0a5b8e0a{}"
PATHS = {kind.kind: kind.path for kind in followed()}
KINDS = {kind.kind: kind for kind in followed()}


def meta(name: str, version: str = "1", namespace: str = "shop", **more: Any) -> dict[str, Any]:
    return {"name": name, "namespace": namespace, "uid": UID.format(len(name) % 10), "resourceVersion": version, **more}


def pod(name: str, *addresses: str, labels: dict[str, str] | None = None, ready: bool = True, **more: Any) -> dict[str, Any]:
    found = meta(name, **{key: more.pop(key) for key in ("creationTimestamp", "deletionTimestamp", "uid") if key in more})
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "metadata": {**found, "labels": labels or {}},
        "spec": {"nodeName": "node-1", "serviceAccountName": name, **more},
        "status": {"podIPs": [{"ip": address} for address in addresses], "conditions": conditions},
    }


def service(name: str, address: str, selector: dict[str, str] | None, *ports: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": meta(name), "spec": {"clusterIP": address, "selector": selector, "ports": list(ports) or [{"port": 80}]}}


def policy(name: str, version: str, action: str) -> dict[str, Any]:
    api_version, kind = "meshagent.io/v1alpha1", "AuthorizationPolicy"
    return {"apiVersion": api_version, "kind": kind, "metadata": meta(name, version), "spec": {"action": action, "rules": [{}]}}


def compiled(**items: Any) -> Compiled:
    """The model of these objects, by kind."""
    found: dict[Key, Object] = {}
    for kind, several in items.items():
        for item in several:
            seen = KINDS[kind].read(json.dumps(item).encode())
            assert seen is not None
            assert not seen.problems
            if seen.object is not None:
                found[seen.key] = seen.object
    return compile_model(found, authority=True)


MESH = {"metadata": {"name": "shop", "labels": {"meshagent.io/mode": "mesh"}}}


def workload(model: Compiled, name: str) -> pb.Workload:
    return model.entities[f"workload/{name}"].workload


@pytest.mark.parametrize(
    ("namespace", "labels", "enrolled"),
    [
        ({}, {}, False),
        ({"meshagent.io/mode": "mesh"}, {}, True),
        ({"meshagent.io/mode": "mesh"}, {"meshagent.io/mode": "none"}, False),
        ({}, {"meshagent.io/mode": "mesh"}, True),
        ({"meshagent.io/mode": "none"}, {"meshagent.io/mode": "mesh"}, True),
    ],
)
def test_a_pod_is_enrolled_where_a_label_of_it_or_its_namespace_says_so(
    namespace: dict[str, str], labels: dict[str, str], enrolled: bool
) -> None:
    model = compiled(Namespace=[{"metadata": {"name": "shop", "labels": namespace}}], Pod=[pod("cart", "10.1.0.5", labels=labels)])
    found = workload(model, "shop/cart")
    assert (found.enrolled, bool(found.pod_uid), found.network_namespace) == (enrolled, True, "")


def test_only_of_a_pod_in_the_mesh_it_is_said_what_its_kubelet_calls() -> None:
    containers = [{"readinessProbe": {"httpGet": {"port": "web"}}, "ports": [{"name": "web", "containerPort": 8080}]}]
    modes = (("mesh", "mesh"), ("no", "none"))
    pods = [pod(name, f"10.1.0.{len(name)}", labels={"meshagent.io/mode": mode}, containers=containers) for name, mode in modes]
    model = compiled(Namespace=[{"metadata": {"name": "shop"}}], Pod=pods)
    assert [list(workload(model, f"shop/{name}").probe_ports) for name in ("mesh", "no")] == [[8080], []]


def test_a_pod_in_the_hosts_network_is_no_workload_and_stands_behind_its_services_as_its_node() -> None:
    pods = [pod(name, "192.0.2.1", labels={"app": "proxy"}, hostNetwork=True) for name in ("a", "bb")]
    pods.append(pod("ccc", "192.0.2.1", labels={"app": "proxy"}, hostNetwork=True, ready=False))
    model = compiled(Namespace=[MESH], Pod=pods, Service=[service("proxy", "10.96.0.9", {"app": "proxy"})])
    assert [name for name in model.entities if name.startswith("workload/")] == ["workload/(node)/node-1"]
    node = workload(model, "(node)/node-1")
    assert (node.enrolled, list(node.addresses), [one.service for one in node.backing]) == (False, ["192.0.2.1"], ["shop/proxy"])


def test_a_named_port_leads_where_each_pod_has_it() -> None:
    def ports(number: int) -> list[dict[str, Any]]:
        return [{"ports": [{"name": "web", "containerPort": number}]}]

    pods = [
        pod("a", "10.1.0.1", labels={"app": "x"}, containers=ports(8080)),
        pod("bb", "10.1.0.2", labels={"app": "x"}, containers=ports(9090)),
        pod("ccc", "10.1.0.3", labels={"app": "x"}),
    ]
    model = compiled(Namespace=[MESH], Pod=pods, Service=[service("x", "10.96.0.9", {"app": "x"}, {"port": 80, "targetPort": "web"})])
    targets = {
        name: [port.target_port for one in workload(model, f"shop/{name}").backing for port in one.ports] for name in ("a", "bb", "ccc")
    }
    assert targets == {"a": [8080], "bb": [9090], "ccc": []}


def test_a_service_without_a_selector_leads_where_its_endpoint_slices_say() -> None:
    item = {
        "metadata": meta("db-1", labels={"kubernetes.io/service-name": "db"}),
        "ports": [{"name": "", "port": 5432}],
        "endpoints": [{"addresses": ["203.0.113.7"], "zone": "z1"}, {"addresses": ["10.1.0.1"]}],
    }
    model = compiled(Namespace=[MESH], Pod=[pod("a", "10.1.0.1")], Service=[service("db", "10.96.0.9", None)], EndpointSlice=[item])
    outside = workload(model, "(address)/203.0.113.7")
    assert (outside.enrolled, outside.zone, outside.node) == (False, "z1", "")
    assert [(one.service, one.ports[0].target_port) for one in outside.backing] == [("shop/db", 5432)]
    assert [one.service for one in workload(model, "shop/a").backing] == ["shop/db"]


def test_ports_that_several_slices_have_at_one_address_are_put_together_and_nobody_stands_at_a_virtual_address() -> None:
    def part(name: str, port: str, number: int) -> dict[str, Any]:
        return {
            "metadata": meta(name, labels={"kubernetes.io/service-name": "db"}),
            "ports": [{"name": port, "port": number}],
            "endpoints": [{"addresses": ["203.0.113.7"]}, {"addresses": ["10.96.0.9"]}],
        }

    ports = ({"name": "a", "port": 80}, {"name": "b", "port": 443})
    model = compiled(Service=[service("db", "10.96.0.9", None, *ports)], EndpointSlice=[part("x", "a", 8080), part("y", "b", 8443)])
    (backing,) = workload(model, "(address)/203.0.113.7").backing
    assert [(one.service_port, one.target_port) for one in backing.ports] == [(80, 8080), (443, 8443)]
    assert "workload/(address)/10.96.0.9" not in model.entities


def test_a_slice_with_a_nodes_address_leads_to_the_nodes_stand_in() -> None:
    proxy = pod("proxy", "192.0.2.1", "fd00::1", labels={"app": "proxy"}, hostNetwork=True)
    item = {
        "metadata": meta("db-1", labels={"kubernetes.io/service-name": "db"}),
        "ports": [{"name": "", "port": 5432}],
        "endpoints": [{"addresses": ["fd00::1"]}],
    }
    services = [service("db", "10.96.0.9", None), service("proxy", "10.96.0.8", {"app": "proxy"})]
    model = compiled(Pod=[proxy], Service=services, EndpointSlice=[item])
    node = workload(model, "(node)/node-1")
    assert (list(node.addresses), [one.service for one in node.backing]) == (["192.0.2.1", "fd00::1"], ["shop/db", "shop/proxy"])


def test_a_pod_is_in_the_zone_of_its_node() -> None:
    node = {"metadata": {"name": "node-1", "labels": {"topology.kubernetes.io/zone": "z1"}}}
    assert workload(compiled(Node=[node], Pod=[pod("a", "10.1.0.1")]), "shop/a").zone == "z1"


def test_a_workload_with_the_name_of_a_pod_or_its_address_does_not_take_its_place() -> None:
    def vm(name: str, address: str) -> dict[str, Any]:
        spec = {"node": "vm-1", "addresses": [address], "networkNamespace": "x"}
        return {"apiVersion": "meshagent.io/v1alpha1", "kind": "Workload", "metadata": meta(name), "spec": spec}

    model = compiled(Pod=[pod("a", "10.1.0.1")], Workload=[vm("a", "10.9.9.9")])
    assert workload(model, "shop/a").node == "node-1"
    assert [one.reason for one in model.conditions[Key("Workload", "shop", "a")]] == ["NameTaken"]


def everything(server: Scripted, **items: list[Any]) -> None:
    for kind, path in PATHS.items():
        server.pages[path] = [listed("100", *items.get(kind, []), kind=kind)]


async def watched(server: Scripted, kind: str) -> Watch:
    """The watch of one kind, once all are open."""
    watches = [await server.watches.get() for _ in PATHS]
    return watches[[path for path, params in server.asked if "watch" in params].index(PATHS[kind])]


async def test_nothing_is_in_force_before_every_kind_has_been_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", 0.02)
    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[MESH], Pod=[pod("a", "10.1.0.1")])
        server.pages[PATHS["AuthorizationPolicy"]] = [403]
        source = KubernetesSource(api)
        mesh = Mesh(source, authority=False)
        await mesh.start()
        async with beside(mesh.watch()):
            await until(lambda: mesh.state.problems)
            assert "see the ClusterRole" in str(mesh.state.problems[0])
            assert not mesh.publication.current.serial
            server.pages[PATHS["AuthorizationPolicy"]] = [listed("100", policy("p", "5", "DENY"), kind="AuthorizationPolicy")]
            await until(lambda: mesh.publication.current.serial)
            assert {"workload/shop/a", "policy/shop/p"} <= mesh.compiled.entities.keys()
            assert mesh.state.problems == ()


async def test_a_refused_version_keeps_the_last_good_one_and_what_is_deleted_goes(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (server, api):
        everything(server, AuthorizationPolicy=[policy("p", "5", "DENY")])
        source = KubernetesSource(api)
        mesh = Mesh(source, authority=False)
        async with beside(mesh.watch()):
            await until(lambda: "policy/shop/p" in mesh.compiled.entities)
            watch = await watched(server, "AuthorizationPolicy")
            await watch.send("MODIFIED", policy("p", "6", "DENI"))
            await until(lambda: mesh.state.refused)
            assert mesh.compiled.entities["policy/shop/p"].policy.action == pb.Policy.DENY
            await watch.send("DELETED", policy("p", "7", "DENI"))
            await until(lambda: "policy/shop/p" not in mesh.compiled.entities)
            assert mesh.state.problems == ()


async def test_who_ends_it_while_it_loads_has_ended_what_follows_the_api_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted(tmp_path) as (server, api):
        everything(server)
        mesh = Mesh(KubernetesSource(api), authority=False)
        loading = asyncio.Event()

        async def reload() -> None:
            loading.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(mesh, "reload", reload)
        async with beside(mesh.watch()):
            await loading.wait()
            assert any(task.get_name().startswith("follow ") for task in asyncio.all_tasks())
        assert not [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("follow ")]


async def owners(tmp_path: Path, *pods: dict[str, Any]) -> tuple[Mesh, dict[str, list[str]]]:
    async with scripted(tmp_path) as (server, api):
        everything(server, Pod=list(pods))
        mesh = Mesh(KubernetesSource(api), authority=False)
        async with beside(mesh.watch()):
            await until(lambda: mesh.publication.current.serial)
    return mesh, {one["metadata"]["name"]: list(workload(mesh.compiled, f"shop/{one['metadata']['name']}").addresses) for one in pods}


@pytest.mark.parametrize("later", [False, True])
async def test_a_pod_that_terminates_leaves_its_address_to_the_one_that_lives(tmp_path: Path, later: bool) -> None:
    old = pod("old", "10.1.0.1", "fd00::1", deletionTimestamp="x")
    pods = (old, pod("new-1", "10.1.0.1"))
    mesh, found = await owners(tmp_path, *(pods if later else reversed(pods)))
    assert found == {"old": ["fd00::1"], "new-1": ["10.1.0.1"]}
    assert mesh.state.problems == ()


async def test_an_address_that_two_living_pods_have_is_nobodys_until_one_of_them_ends(tmp_path: Path) -> None:
    mesh, found = await owners(tmp_path, pod("a", "10.1.0.1"), pod("bb", "10.1.0.1", "fd00::2"))
    assert found == {"a": [], "bb": ["fd00::2"]}
    assert "10.1.0.1 is said to be the address of shop/a, shop/bb: none of them has it" in str(mesh.state.problems[0])


@pytest.mark.parametrize("first", ["a", "z"])
async def test_of_two_workloads_with_one_address_the_older_one_has_it_in_every_controller(tmp_path: Path, first: str) -> None:
    def vm(name: str, made: int) -> dict[str, Any]:
        metadata = meta(name, creationTimestamp=f"2026-01-01T00:00:0{made}Z")
        return {
            "apiVersion": "meshagent.io/v1alpha1",
            "kind": "Workload",
            "metadata": metadata,
            "spec": {"node": "n", "addresses": ["10.1.0.1"]},
        }

    async def winner(came: dict[str, Any], comes: dict[str, Any]) -> list[str]:
        async with scripted(tmp_path) as (server, api):
            everything(server, Workload=[came])
            mesh = Mesh(KubernetesSource(api), authority=False)
            async with beside(mesh.watch()):
                await until(lambda: mesh.publication.current.serial)
                watch = await watched(server, "Workload")
                await watch.send("ADDED", comes)
                await until(lambda: mesh.state.refused)
            return [key.name for key in mesh.state.objects if key.kind == "Workload"]

    a, z = (vm(name, 1 if name == first else 2) for name in ("a", "z"))
    assert await winner(a, z) == await winner(z, a) == [first]


@pytest.mark.parametrize(
    "answer", [404, {"kind": "Status", "metadata": {}, "status": "Failure"}, {"kind": "AuthorizationPolicyList", "metadata": {}}]
)
async def test_no_answer_of_a_server_that_is_not_well_takes_a_policy_out_of_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", 0.02)
    monkeypatch.setattr(reflector, "ABSENT_S", 0.02)
    async with scripted(tmp_path) as (server, api):
        everything(server, AuthorizationPolicy=[policy("p", "5", "DENY")])
        mesh = Mesh(KubernetesSource(api), authority=False)
        async with beside(mesh.watch()):
            await until(lambda: mesh.publication.current.serial)
            watch = await watched(server, "AuthorizationPolicy")
            server.pages[PATHS["AuthorizationPolicy"]] = [answer]
            await watch.send("ERROR", {"code": 410})
            await until(lambda: mesh.state.problems)
            assert "what was known stays in force" in str(mesh.state.problems[0])
            assert "policy/shop/p" in mesh.compiled.entities


async def test_without_the_definitions_of_our_own_kinds_nothing_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "ABSENT_S", 0.02)
    async with scripted(tmp_path) as (server, api):
        everything(server)
        server.pages[PATHS["AuthorizationPolicy"]] = [404]
        server.pages[PATHS["HTTPRoute"]] = [404]
        mesh = Mesh(KubernetesSource(api), authority=False)
        async with beside(mesh.watch()):
            await until(lambda: mesh.state.problems)
            await asyncio.sleep(0.1)
            assert [problem.kind for problem in mesh.state.problems] == ["AuthorizationPolicy"]
            assert not mesh.publication.current.serial
            server.pages[PATHS["AuthorizationPolicy"]] = [listed("100", kind="AuthorizationPolicy")]
            await until(lambda: mesh.publication.current.serial)


def space(version: str, labels: dict[str, str], annotations: dict[str, str]) -> dict[str, Any]:
    return {"metadata": {"name": "shop", "uid": UID.format("9"), "resourceVersion": version, "labels": labels, "annotations": annotations}}


async def test_of_a_namespace_only_what_is_nonsense_goes_on_to_say_what_it_said_before(tmp_path: Path) -> None:
    mode, default, egress = "meshagent.io/mode", "meshagent.io/default-policy", "meshagent.io/egress"
    async with scripted(tmp_path) as (server, api):
        everything(server, Namespace=[space("5", {mode: "mesh", "team": "a"}, {})])
        mesh = Mesh(KubernetesSource(api), authority=False)

        def said() -> tuple[dict[str, str], dict[str, str]]:
            found = mesh.state.objects.get(Key("Namespace", "", "shop"))
            return (dict(found.labels), dict(found.annotations)) if found is not None else ({}, {})

        async with beside(mesh.watch()):
            await until(lambda: said() == ({mode: "mesh", "team": "a"}, {}))
            watch = await watched(server, "Namespace")
            await watch.send("MODIFIED", space("6", {mode: "Mesh", default: "deny"}, {egress: "deny", mode: "mesh"}))
            await until(lambda: said() == ({mode: "mesh", default: "deny"}, {egress: "deny"}))
            assert len(mesh.state.problems) == 2, "the label, and the annotation that has no effect"
            await watch.send("MODIFIED", space("7", {mode: "Mesh", default: "Deny"}, {}))
            await until(lambda: said() == ({mode: "mesh", default: "deny"}, {}))
            await watch.send("MODIFIED", space("8", {default: "Deny"}, {}))
            await until(lambda: said() == ({default: "deny"}, {}))
            await watch.send("MODIFIED", space("9", {}, {}))
            await until(lambda: said() == ({}, {}) and not mesh.state.problems)


async def test_one_that_is_made_again_does_not_inherit_the_last_good_version(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (server, api):
        everything(server, AuthorizationPolicy=[policy("p", "5", "ALLOW")])
        mesh = Mesh(KubernetesSource(api), authority=False)
        async with beside(mesh.watch()):
            await until(lambda: "policy/shop/p" in mesh.compiled.entities)
            watch = await watched(server, "AuthorizationPolicy")
            again = policy("p", "7", "ALLO")
            again["metadata"]["uid"] = UID.format("f")
            await watch.send("DELETED", policy("p", "6", "ALLOW"))
            await watch.send("ADDED", again)
            await until(lambda: mesh.state.refused)
            await until(lambda: "policy/shop/p" not in mesh.compiled.entities)


async def test_a_workload_that_claims_the_address_of_a_pod_is_refused_even_if_it_came_first(tmp_path: Path) -> None:
    spec = {"node": "vm-1", "addresses": ["10.1.0.1"]}
    vm = {"apiVersion": "meshagent.io/v1alpha1", "kind": "Workload", "metadata": meta("vm"), "spec": spec}
    async with scripted(tmp_path) as (server, api):
        everything(server, Workload=[vm])
        source = KubernetesSource(api)
        mesh = Mesh(source, authority=False)
        async with beside(mesh.watch()):
            await until(lambda: "workload/shop/vm" in mesh.compiled.entities)
            watch = await watched(server, "Pod")
            await watch.send("ADDED", pod("a", "10.1.0.1"))
            await until(lambda: "workload/shop/a" in mesh.compiled.entities)
        assert "workload/shop/vm" not in mesh.compiled.entities
        assert "10.1.0.1 already belongs to Pod shop/a" in str(mesh.state.problems[0])


async def test_a_burst_of_changes_is_few_reloads(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (server, api):
        everything(server)
        source = KubernetesSource(api)
        mesh = Mesh(source, authority=False)
        async with beside(mesh.watch()):
            await until(lambda: mesh.publication.current.serial)
            watch = await watched(server, "Pod")
            before = mesh.publication.current.serial
            for number in range(200):
                await watch.send("ADDED", pod(f"p{number}", f"10.1.1.{number}", uid=UID.format(1)))
            await until(lambda: "workload/shop/p199" in mesh.compiled.entities)
            await asyncio.sleep(0.1)
            assert mesh.publication.current.serial - before < 40


async def test_more_secrets_than_can_be_followed_are_refused_by_name_and_push_none_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "MOST", 1)

    def gateway(name: str) -> dict[str, Any]:
        listener = {"name": "l", "port": 8443, "protocol": "HTTPS", "tls": {"certificateRefs": [{"name": name}]}}
        spec = {"gatewayClassName": "meshagent", "listeners": [listener]}
        return {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": meta(name), "spec": spec}

    async with scripted(tmp_path) as (server, api):
        everything(server, Gateway=[gateway("z")])
        held = {"metadata": meta("z"), "type": "kubernetes.io/tls", "data": {"tls.crt": "eA=="}}
        server.pages["/api/v1/namespaces/shop/secrets"] = [listed("100", held, kind="Secret")]
        mesh = Mesh(KubernetesSource(api), authority=False)
        async with beside(mesh.watch()):
            await until(lambda: mesh.publication.current.serial)
            watch = await watched(server, "Gateway")
            await watch.send("ADDED", {**gateway("a"), "metadata": meta("a", "7")})
            await until(lambda: mesh.state.problems)
            assert str(mesh.state.problems[0]) == "api-server Secret/shop/a: is not read: Gateways name more than 1 Secrets"
            assert Key("Secret", "shop", "z") in mesh.state.objects
            assert Key("Gateway", "shop", "a") in mesh.state.objects


def lure(*addresses: str, port: int = 8080) -> dict[str, list[dict[str, Any]]]:
    """A Service of the namespace `stranger`, and an EndpointSlice with addresses that are not the stranger's."""
    made = service("lure", "10.96.0.10", None, {"port": 80, "appProtocol": "http"})
    made["metadata"]["namespace"] = "stranger"
    labels = {"kubernetes.io/service-name": "lure"}
    endpoints = [{"addresses": [address]} for address in addresses]
    item = {"metadata": meta("s", namespace="stranger", labels=labels), "ports": [{"name": "", "port": port}], "endpoints": endpoints}
    return {"Service": [made], "EndpointSlice": [item]}


def attached(kind: str, namespace: str, name: str, **spec: Any) -> dict[str, Any]:
    """A policy for the workloads behind a Service of its namespace."""
    whole = {"targetRefs": [{"kind": "Service", "name": name}], **spec}
    return {"apiVersion": "meshagent.io/v1alpha1", "kind": kind, "metadata": meta("mine", namespace=namespace), "spec": whole}


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("AuthorizationPolicy", {"action": "ALLOW", "rules": [{}]}),
        ("PeerAuthentication", {"mtls": {"mode": "DISABLE"}}),
        ("RequestAuthentication", {"jwtRules": [{"issuer": "https://stranger.test", "jwks": Issuer("https://stranger.test").jwks}]}),
    ],
)
def test_a_slice_with_the_address_of_another_namespaces_pod_lets_no_policy_decide_about_it(kind: str, spec: dict[str, Any]) -> None:
    base = {"Namespace": [MESH], "Pod": [pod("a", "10.1.0.1")]}
    alone = workload(compiled(**base), "shop/a")
    model = compiled(**base, **lure("10.1.0.1", "203.0.113.7"), **{kind: [attached(kind, "stranger", "lure", **spec)]})
    found = workload(model, "shop/a")
    assert [one.service for one in found.backing] == ["stranger/lure"]
    assert (list(found.policies), list(found.authentications), found.mtls) == ([], [], alone.mtls)
    said = {one.type: one.message for one in model.conditions[Key(kind, "stranger", "mine")]}
    assert said["SelectedInItsNamespace"].endswith("about which only their own namespaces' objects decide: shop/a")
    assert "nothing enforces it for (address)/203.0.113.7" in said["Enforced"]


def test_a_service_of_another_namespace_does_not_say_what_is_spoken_at_a_port_that_has_its_own() -> None:
    own = service("a", "10.96.0.9", {"app": "a"}, {"port": 6379, "targetPort": 8080, "appProtocol": "redis"})
    rules = {"jwtRules": [{"issuer": "https://one.test", "jwks": Issuer("https://one.test").jwks}]}
    tokens = {"apiVersion": "meshagent.io/v1alpha1", "kind": "RequestAuthentication", "metadata": meta("tokens"), "spec": rules}
    more = lure("10.1.0.1")
    objects = {"Namespace": [MESH], "Pod": [pod("a", "10.1.0.1", labels={"app": "a"})], "RequestAuthentication": [tokens]}
    alone = compiled(**objects, Service=[own])
    lured = compiled(**objects, Service=[own, *more["Service"]], EndpointSlice=more["EndpointSlice"])
    assert list(workload(alone, "shop/a").policies) == list(workload(lured, "shop/a").policies) == []
    elsewhere = lure("10.1.0.1", port=9090)
    beside = compiled(**objects, Service=[own, *elsewhere["Service"]], EndpointSlice=elsewhere["EndpointSlice"])
    assert len(workload(beside, "shop/a").policies) == 1, "a port that none of its own services leads to is looked at"


def test_nobody_stands_at_an_address_that_an_external_service_has() -> None:
    spec = {"hosts": ["db.example.com"], "addresses": ["203.0.113.5"], "ports": [{"port": 5432, "protocol": "TCP"}]}
    external = {"apiVersion": "meshagent.io/v1alpha1", "kind": "ExternalService", "metadata": meta("db"), "spec": spec}
    given = str(externals.VIRTUAL4[7])
    model = compiled(ExternalService=[external], **lure("203.0.113.5", given, "203.0.113.6"))
    assert [name for name in model.entities if name.startswith("workload/")] == ["workload/(address)/203.0.113.6"]
