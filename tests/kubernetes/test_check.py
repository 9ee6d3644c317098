"""`meshagent check --kubernetes` on a real API server, with what controllers and kubelets would write there written by the test."""

from __future__ import annotations

import datetime as dt
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent.check.definitions import own
from controller.documents import parse
from tests.certificates import pair
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.installed import AGENT_LABELS, READY, check, node, pod, ready
from tests.kubernetes.manifest import OWN, objects

CRDS = Path(__file__).parents[2] / "deploy" / "crds"
REMOVAL = Path(__file__).parents[2] / "deploy" / "kubernetes" / "uninstall.yaml"


def severities(found: dict[str, list[dict[str, str]]], name: str) -> list[str]:
    return [finding["severity"] for finding in found[name]]


def remake(plane: ControlPlane, number: int, args: Sequence[str] = ()) -> None:
    """A pod of an agent that is made anew, and not ready yet."""
    plane.kubectl("delete", "pod", "-n", OWN, "--force", "--grace-period=0", f"agent-{number}")
    plane.apply(pod(f"agent-{number}", f"check-{number}", args=args, **AGENT_LABELS))


def test_before_it_is_installed_nothing_is_an_error(plane: ControlPlane) -> None:
    code, found = check(plane, "--namespace", "nowhere")
    assert code == 0
    assert severities(found, "installed") == severities(found, "namespace") == severities(found, "rights") == ["ok"]
    assert severities(found, "root") == severities(found, "signer") == ["warning"]
    assert "is not installed" in found["installed"][0]["what"]


def test_a_mesh_that_is_installed_and_well_has_no_finding_but_good_ones(installed: ControlPlane) -> None:
    code, found = check(installed)
    assert (code, {one["severity"] for findings in found.values() for one in findings}) == (0, {"ok"}), found
    assert set(found) == {
        "api", "installed", "versions", "definitions", "gateway api", "namespace", "root", "signer", "nodes", "rights", "other meshes", "webhooks",
    }  # fmt: skip
    assert "each of 2 nodes" in found["nodes"][0]["what"]


def test_what_is_secret_stays_where_it_is(installed: ControlPlane) -> None:
    argv = [sys.executable, "-m", "agent.cli.main", "check", "--kubernetes", "--kubeconfig", str(installed.kubeconfig())]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "aGlkZGVu" not in said
    assert "the Secret that controllers sign with is there" in said


def test_a_definition_that_is_older_newer_or_gone_is_said_with_its_fields(installed: ControlPlane) -> None:
    name = "workloads.meshagent.io"
    path = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties"
    patches = {
        "older": ([{"op": "remove", "path": f"{path}/weight"}], "older than this version: it lacks spec.weight"),
        "newer": ([{"op": "add", "path": f"{path}/later", "value": {"type": "string"}}], "newer than this version: it has spec.later"),
        "other": ([{"op": "add", "path": f"{path}/addresses/maxItems", "value": 7}], "its fields are the same, its rules are not"),
    }
    try:
        for patch, said in patches.values():
            installed.kubectl("patch", "crd", name, "--type=json", "-p", json.dumps(patch))
            code, found = check(installed)
            (one,) = found["definitions"]
            assert (code, one["severity"], said in one["what"]) == (0, "warning", True), one
            installed.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRDS / f"meshagent.io_{name.split('.', 1)[0]}.yaml"))
            undo = json.dumps([{"op": "remove", "path": f"{path}/later"}])
            installed.kubectl("patch", "crd", name, "--type=json", "-p", undo, check=False)
        installed.kubectl("delete", "crd", name)
        code, found = check(installed)
        assert (code, severities(found, "definitions")) == (1, ["error"])
        assert name in found["definitions"][0]["what"]
        assert len(own()) == 9
    finally:
        installed.install_crds()
    assert check(installed)[0] == 0


def test_a_namespace_that_refuses_agents_is_an_error(installed: ControlPlane) -> None:
    label = "pod-security.kubernetes.io/enforce"
    try:
        installed.kubectl("label", "namespace", OWN, "--overwrite", f"{label}=baseline")
        code, found = check(installed)
        assert (code, severities(found, "namespace")) == (1, ["error"])
        installed.kubectl("label", "namespace", OWN, f"{label}-")
        assert severities(check(installed)[1], "namespace") == ["warning"]
    finally:
        installed.kubectl("label", "namespace", OWN, "--overwrite", f"{label}=privileged")


def test_a_node_without_an_agent_and_one_that_is_not_ready_are_named(installed: ControlPlane) -> None:
    installed.apply(node("check-3"))
    installed.set_status("pod", OWN, "agent-2", {"conditions": [{"type": "Ready", "status": "False"}], "phase": "Running"})
    ready(installed, agents=1)
    try:
        code, found = check(installed)
    finally:
        installed.kubectl("delete", "node", "check-3")
        installed.set_status("pod", OWN, "agent-2", READY)
        ready(installed)
    assert code == 1
    without, waiting = found["nodes"]
    assert "1 of 3 nodes have no agent: check-3" in without["what"]
    assert "check-2" in waiting["what"]
    assert any("1 of 2 pods of meshagent-agent are ready" in one["what"] for one in found["installed"])


def test_a_controller_of_another_version_is_said(installed: ControlPlane) -> None:
    installed.kubectl("label", "deployment", "-n", OWN, "meshagent-controller", "--overwrite", "app.kubernetes.io/version=0.0.9")
    try:
        _, found = check(installed)
    finally:
        installed.kubectl("label", "deployment", "-n", OWN, "meshagent-controller", "--overwrite", "app.kubernetes.io/version=0.1.0")
    assert [(one["severity"], "controllers 0.0.9" in one["what"]) for one in found["versions"]] == [("warning", True)]


def test_a_root_that_has_ended_or_is_none_is_an_error_and_one_that_ends_soon_a_warning(installed: ControlPlane) -> None:
    before = json.loads(installed.kubectl("get", "configmap", "-n", OWN, "meshagent-root", "-o", "json"))["data"]["ca.crt"]
    document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "meshagent-root", "namespace": OWN}}

    def with_root(life: dt.timedelta) -> tuple[int, dict[str, str]]:
        installed.apply(document | {"data": {"ca.crt": pair("root", life=life)[0].decode()}})
        code, found = check(installed)
        return code, found["root"][0]

    try:
        code, one = with_root(dt.timedelta(minutes=-1))
        assert (code, one["severity"], "no certificate in it is in force" in one["what"]) == (1, "error", True)
        code, one = with_root(dt.timedelta(days=7))
        assert (code, one["severity"], "it ends 20" in one["what"]) == (0, "warning", True)
        installed.apply(document | {"data": {"ca.crt": "hello"}})
        code, found = check(installed)
        assert (code, "holds no certificate" in found["root"][0]["what"]) == (1, True)
        installed.kubectl("delete", "configmap", "-n", OWN, "meshagent-root")
        code, found = check(installed)
        assert (code, "is not there" in found["root"][0]["what"]) == (1, True)
    finally:
        installed.apply(document | {"data": {"ca.crt": before}})


def test_a_right_that_the_controller_lost_is_named(installed: ControlPlane) -> None:
    installed.kubectl("patch", "clusterrole", "meshagent-controller", "--type=json", "-p", '[{"op": "remove", "path": "/rules/1"}]')
    try:
        code, found = check(installed)
    finally:
        installed.apply(*objects("ClusterRole"))
    assert code == 1
    (one,) = [one for one in found["rights"] if one["severity"] == "error"]
    assert "the controller may not list endpointslices, watch endpointslices" in one["what"]


@pytest.mark.parametrize(
    ("rule", "lost"),
    [
        pytest.param(
            1, f"get leases meshagent-controller of {OWN}, update leases meshagent-controller of {OWN}", id="the-lease-that-it-holds"
        ),
        pytest.param(
            2, f"create controllerstates of {OWN}, delete controllerstates of {OWN}, get controllerstates of {OWN}", id="its-memory"
        ),
    ],
)
def test_a_right_that_the_controller_lost_in_its_own_namespace_is_named(installed: ControlPlane, rule: int, lost: str) -> None:
    remove = f'[{{"op": "remove", "path": "/rules/{rule}"}}]'
    installed.kubectl("patch", "role", "-n", OWN, "meshagent-controller", "--type=json", "-p", remove)
    try:
        code, found = check(installed)
    finally:
        installed.apply(*objects("Role"))
    (one,) = [one for one in found["rights"] if one["severity"] == "error"]
    assert (code, one["what"].startswith(f"the controller may not {lost}")) == (1, True), one


def test_the_taint_of_a_new_node_goes_as_the_page_says_when_its_agent_is_ready(installed: ControlPlane) -> None:
    page = (Path(__file__).parents[2] / "docs/kubernetes.md").read_text()
    wait, untaint = (
        line.replace("NODE", "check-1").split()[1:] for line in page.splitlines() if re.match(r"kubectl (-n \S+ wait|taint) .*NODE", line)
    )
    installed.kubectl("taint", "node", "check-1", "meshagent.io/not-ready:NoSchedule")
    assert "condition met" in installed.kubectl(*wait)
    assert "untainted" in installed.kubectl(*untaint)
    (daemons,) = objects("DaemonSet")
    assert {"operator": "Exists"} in daemons["spec"]["template"]["spec"]["tolerations"]


def test_a_mesh_that_is_being_removed_is_said_to_be(installed: ControlPlane) -> None:
    """agent.remove=true: each agent's pod is ready when its node is clean."""
    document = json.loads(installed.kubectl("get", "daemonset", "-n", OWN, "meshagent-agent", "-o", "json"))
    before = document["spec"]["template"]["spec"]["containers"][0]["args"]
    argument = '[{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": %s}]'
    (daemons,) = (one.value for one in parse(REMOVAL.read_bytes(), str(REMOVAL)) if one.value["kind"] == "DaemonSet")
    removing = daemons["spec"]["template"]["spec"]["containers"][0]["args"]
    installed.kubectl("patch", "daemonset", "-n", OWN, "meshagent-agent", "--type=json", "-p", argument % json.dumps(removing))
    try:
        ready(installed, agents=2, updated=0)
        code, found = check(installed)
        assert (code, severities(found, "installed"), "nodes" in found) == (0, ["warning"], False)
        assert "the mesh is being taken off the nodes: 2 of 2 are not clean yet" in found["installed"][0]["what"]
        remake(installed, 1, removing)
        ready(installed, agents=1, updated=1)  # the agent that runs the mesh yet, and not the one that is to clean its node
        assert "2 of 2 are not clean yet" in check(installed)[1]["installed"][0]["what"]
        installed.set_status("pod", OWN, "agent-1", READY)
        ready(installed, agents=2, updated=1)
        assert "1 of 2 are not clean yet" in check(installed)[1]["installed"][0]["what"]
        remake(installed, 2, removing)
        installed.set_status("pod", OWN, "agent-2", READY)
        ready(installed)
        code, found = check(installed)
        assert (code, found["installed"][0]["what"]) == (
            0,
            "the mesh was taken off all 2 nodes: no pod is in it, and no policy is in force",
        )
        assert "agent.remove=false" in found["installed"][0]["nextStep"]
        ready(installed, agents=0, wanted=0, updated=0)
        (one,) = check(installed)[1]["installed"]
        assert (one["severity"], "no node is to have an agent that does it" in one["what"]) == ("warning", True), one
    finally:
        installed.kubectl("patch", "daemonset", "-n", OWN, "meshagent-agent", "--type=json", "-p", argument % json.dumps(before))
        for number in (1, 2):
            remake(installed, number)
            installed.set_status("pod", OWN, f"agent-{number}", READY)
        ready(installed)


def test_a_namespace_of_two_meshes_is_an_error(installed: ControlPlane) -> None:
    marks = {"istio-injection": "enabled", "meshagent.io/mode": "mesh"}
    installed.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "check-both", "labels": marks}})
    linkerd = {"name": "check-linkerd", "labels": {"meshagent.io/mode": "mesh"}, "annotations": {"linkerd.io/inject": "enabled"}}
    installed.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": linkerd})
    installed.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "check-istio", "labels": {"istio-injection": "enabled"}}}
    )
    try:
        code, found = check(installed)
    finally:
        for name in ("check-both", "check-linkerd"):
            installed.kubectl("label", "namespace", name, "meshagent.io/mode-")
    assert code == 1
    assert {(one["where"], one["nextStep"].rpartition("kubectl ")[2]) for one in found["other meshes"]} == {
        ("namespace check-both", "label namespace check-both istio-injection-"),
        ("namespace check-linkerd", "annotate namespace check-linkerd linkerd.io/inject-"),
    }


def test_a_webhook_that_another_mesh_left_is_named(installed: ControlPlane) -> None:
    hook = {
        "name": "sidecar.istio.io",
        "clientConfig": {"service": {"namespace": "istio-system", "name": "istiod", "path": "/inject"}},
        "rules": [{"apiGroups": ["example.com"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["nothings"]}],
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Fail",
    }
    kind = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration"}
    try:
        installed.apply({**kind, "metadata": {"name": "istio-sidecar-injector"}, "webhooks": [hook]})
        code, found = check(installed)
    finally:
        installed.kubectl("delete", "mutatingwebhookconfiguration", "istio-sidecar-injector")
    (one,) = found["webhooks"]
    assert (code, one["severity"]) == (1, "error")
    assert "istio-system/istiod" in one["what"]
    assert one["nextStep"] == "kubectl delete mutatingwebhookconfiguration istio-sidecar-injector"


def test_who_may_see_little_is_told_which_rights_are_missing(installed: ControlPlane) -> None:
    code, found = check(installed, user="nobody-special", groups=("nobodies",))
    assert severities(found, "api") == ["ok"]
    causes = " ".join(one["cause"] for findings in found.values() for one in findings)
    assert all(f'cannot get resource "{what}"' in causes for what in ("daemonsets", "customresourcedefinitions", "configmaps")), causes
    assert "rights" not in found  # whether it is installed is not known, so neither is what is needed
    assert "whether its Secret is there is not known" in found["signer"][0]["what"]
    assert code == 0  # nothing is known to be wrong
