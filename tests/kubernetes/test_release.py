"""The release of Helm on a real node: installed, upgraded under load to a version with other programs and tables, taken back, and uninstalled."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.test_upgrade import LARGER, NEWER, version
from tests.kubernetes import shop
from tests.kubernetes.controlplane import CRDS
from tests.kubernetes.install import CHART, HELM, Cluster, cluster, envoy, left, pinned, takes
from tests.kubernetes.manifest import OWN
from tests.kubernetes.shop import PYTHON, SHOP, ask

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(HELM is None, reason="no Helm: HELM names it, or it is in PATH")]
NOW, NEXT = "0.1.0", "0.2.0"
WAIT = ("--wait", "--timeout", "180s")
CALLERS = {
    "caller": ("http://cart/", "200"),
    "denied": ("http://cart/", "403"),
    "plain": ("http://frontend/healthz", "200"),
    "refused": ("http://redis:6379/", "PermissionError"),
}
"""Who calls what, and what comes: through Envoy and past it, of those who may and those who may not."""


@pytest.fixture(scope="module")
def release() -> Iterator[Cluster]:
    """A node with the images of two versions, and no mesh."""
    with cluster() as found:
        shop.load_redis(found)
        found.machine.change(f"localhost/meshagent/agent:{NEXT}", f"localhost/meshagent/agent:{NOW}", _edited(found.directory))
        found.machine.change(
            f"localhost/meshagent/controller:{NEXT}", f"localhost/meshagent/controller:{NOW}", {"/etc/version": NEXT.encode()}
        )
        yield found


def _edited(top: Path) -> dict[str, bytes]:
    """Files of an agent's image whose programs and tables are others, and that says so with a format of its own."""
    (top / "next").mkdir()
    version(top / "next", LARGER, NEWER)
    paths = {*(f"bpf_src/{name}" for name, _, _ in LARGER), *(f"agent/bpf/{name}" for name, _, _ in NEWER)}
    return {f"/opt/meshagent/{path}": (top / "next" / path).read_bytes() for path in paths}


@contextmanager
def undisturbed(found: Cluster) -> Iterator[None]:
    """All who call get what they got before, over connections that they have kept and over new ones, and Envoy is the same."""
    waypoint, begun, since = envoy(), {name: len(shop.tail(found, name)) for name in CALLERS}, time.monotonic()
    yield
    time.sleep(2)
    took = time.monotonic() - since
    assert envoy() == waypoint != 0
    for name, (_, outcome) in CALLERS.items():
        lines = shop.tail(found, name)[begun[name] :]
        assert shop.outcomes(lines) == {f"kept {outcome}", f"new {outcome}"}, name
        assert len(lines) > 20 * took, f"the load of {name} did not go on"
        if outcome == "200":
            assert len({line.split()[2] for line in lines if line.startswith("kept")}) == 1, "one connection, all the time"
    print(f"{took:.0f} s under load")


def ready(found: Cluster) -> bool:
    return found.settled("deployment", "meshagent-controller") and found.settled("daemonset", "meshagent-agent")


def image_of(found: Cluster, component: str) -> set[str]:
    return {pod["spec"]["containers"][0]["image"].rpartition(":")[2] for pod in found.pods(OWN, component)}


def test_helm_installs_and_waits_until_the_mesh_is_ready(release: Cluster) -> None:
    plane = release.plane
    plane.kubectl("create", "namespace", OWN)
    plane.kubectl("label", "namespace", OWN, "pod-security.kubernetes.io/enforce=privileged")
    release.sign()
    began = time.monotonic()
    release.helm("install", "meshagent", str(CHART), *WAIT)
    print(f"helm install --wait: {time.monotonic() - began:.0f} s")
    assert ready(release)
    shop.open_shop(release)
    shop.route(release, "cart")
    shop.admit(release, "cart", "frontend", "caller")
    shop.admit(release, "redis", "frontend")
    for name, (url, _) in CALLERS.items():
        shop.deploy(release, SHOP, name, PYTHON, *shop.CALLER, url)
    takes(lambda: all(shop.answered(release, name, status=outcome) for name, (_, outcome) in CALLERS.items()), release)
    status = json.loads(release.agent("meshagent", "status", "-o", "json"))
    assert status["problems"] == []
    assert {one["redirected"] for one in status["workloads"] if one["namespace"] == SHOP} == {True}


def test_controllers_are_replaced_under_load_and_policies_of_later_hold(release: Cluster) -> None:
    before = {pod["metadata"]["uid"] for pod in release.pods(OWN, "controller")}
    with undisturbed(release):
        release.plane.kubectl("rollout", "restart", "deployment/meshagent-controller", "-n", OWN)
        takes(lambda: release.settled("deployment", "meshagent-controller"), release)
        assert not before & {pod["metadata"]["uid"] for pod in release.pods(OWN, "controller")}
        assert ask(release, "stranger", "http://frontend/") == "200"
        shop.admit(release, "frontend", "plain")
        takes(lambda: ask(release, "stranger", "http://frontend/") == "URLError", release)
    release.plane.kubectl("delete", "authorizationpolicy", "frontend", "-n", SHOP)


def test_an_upgrade_to_other_programs_and_tables_fails_no_request_and_lets_nobody_in(release: Cluster) -> None:
    before = pinned()
    with undisturbed(release):
        release.helm("upgrade", "meshagent", str(CHART), "--reset-then-reuse-values", "--set", f"image.tag={NEXT}", *WAIT)
        assert ready(release)
        assert image_of(release, "agent") == image_of(release, "controller") == {NEXT}
    now = pinned()
    assert not before["prog"] & now["prog"], "all programs are others"
    assert before["map"] - now["map"], "tables of another layout"
    status = json.loads(release.agent("meshagent", "status", "-o", "json"))
    assert status["problems"] == []
    assert {one["redirected"] for one in status["workloads"] if one["namespace"] == SHOP} == {True}


def test_an_earlier_agent_refuses_to_take_over_what_a_later_one_left_which_goes_on(release: Cluster) -> None:
    before = pinned()

    def said() -> str:
        (pod,) = release.pods(OWN, "agent") or [{"metadata": {"name": "none"}}]
        name = pod["metadata"]["name"]
        return "".join(release.plane.kubectl("logs", "-n", OWN, name, *which, check=False) for which in ((), ("--previous",)))

    with undisturbed(release):
        release.helm("rollback", "meshagent", "1")
        takes(lambda: image_of(release, "agent") == {NOW} and "start that version again" in said(), release)
        takes(lambda: release.settled("deployment", "meshagent-controller"), release)
        assert not release.settled("daemonset", "meshagent-agent")
        assert pinned() == before
        assert ask(release, "stranger", "http://cart/") == "403"
        release.helm("upgrade", "meshagent", str(CHART), "--reset-then-reuse-values", "--set", f"image.tag={NEXT}", *WAIT)
    assert pinned()["prog"] == before["prog"]
    assert json.loads(release.agent("meshagent", "status", "-o", "json"))["problems"] == []


def test_uninstalled_it_leaves_definitions_and_its_namespace_which_go_by_hand_and_pods_talk_without_it(release: Cluster) -> None:
    before, begun, plane = pinned(), len(shop.tail(release, "plain")), release.plane
    pods = shop.instances(release)
    release.helm("upgrade", "meshagent", str(CHART), "--reuse-values", "--set", "agent.remove=true", *WAIT)
    assert "removed programs, maps" in plane.kubectl("logs", "-n", OWN, "daemonset/meshagent-agent")
    release.helm("uninstall", "meshagent")
    takes(lambda: left(release, before) == [], seconds=20)  # the last reference goes with the last program run
    takes(lambda: shop.answered(release) and shop.answered(release, "denied"), release)
    lines = shop.tail(release, "plain")[begun:]
    assert shop.outcomes(lines) == {"kept 200", "new 200"}
    assert len({line.split()[2] for line in lines if line.startswith("kept")}) == 1, "what did not go through Envoy has noticed nothing"
    definitions = {f"CustomResourceDefinition <none>/{file.stem.partition('_')[2]}.meshagent.io" for file in CRDS.glob("*.yaml")}
    assert len(definitions) > 5
    takes(lambda: not release.pods(OWN), release)
    spaces = {f"Namespace <none>/{OWN}", f"Namespace <none>/{SHOP}"}
    of_cluster = {one for one in release.added() if "<none>" in one}
    assert of_cluster == {*definitions, *spaces, "APIService <none>/v1alpha1.meshagent.io"}
    plane.kubectl("delete", "namespace", OWN)
    plane.kubectl("delete", "-f", str(CRDS))
    takes(lambda: release.added() == {f"Namespace <none>/{SHOP}"}, release)
    assert shop.instances(release) == pods
