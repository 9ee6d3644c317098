"""The rendered manifest on a real API server: it is accepted, and a controller that has its rights, and no others, reads and writes all that it has to."""

from __future__ import annotations

import subprocess

import pytest

from controller.documents import parse
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import conditions, writing
from tests.kubernetes.install import CHART, HELM
from tests.kubernetes.manifest import ACCOUNT, FULL, HOLDING, MANIFEST, OWN, grant, objects
from tests.kubernetes.samples import namespace, policy
from tests.tasks import until


def test_the_manifest_is_accepted(plane: ControlPlane) -> None:
    plane.apply(*objects("Namespace"))
    said = plane.kubectl(
        "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", str(MANIFEST), check=False
    )
    errors = [line for line in said.splitlines() if "rror" in line or "ensure CRDs" in line]
    unknown = objects("MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding") if plane.minor < HOLDING else []
    assert said.count("serverside-applied") == len(objects()) - len(unknown), said
    assert all("MutatingAdmissionPolicy" in line or "ensure CRDs" in line for line in errors), errors
    assert bool(errors) == bool(unknown)


@pytest.mark.anyio
async def test_its_rights_are_enough_for_the_controller_and_no_more(plane: ControlPlane) -> None:
    plane.apply(namespace(OWN), namespace("rights"), policy("rights", "p"))
    grant(plane)
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: one.part.source.ready)
        await until(lambda: conditions(plane, "authorizationpolicy", "rights", "p").get("Accepted") == ("True", "Accepted"))
        await until(lambda: one.mesh.state.problems == ())  # 429 for a moment: the definitions are new
        assert one.part._writer.failed == 0
    for verb, what in (
        ("list", "secrets"),
        ("get", "secrets"),
        ("update", "pods"),
        ("delete", "nodes"),
        ("patch", "authorizationpolicies.meshagent.io"),
    ):
        assert plane.kubectl("auth", "can-i", verb, what, "-A", f"--as={ACCOUNT}", check=False).startswith("no"), (verb, what)


def test_with_every_value_turned_on_it_is_accepted_too(plane: ControlPlane) -> None:
    monitoring = plane.assets / "prometheus-operator"
    if not monitoring.exists():
        pytest.skip(f"no {monitoring}, which scripts/kubernetes fetches")
    plane.kubectl("apply", "--server-side", "-f", str(monitoring))
    plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(monitoring))
    plane.apply(*objects("Namespace"), namespace("shop"), namespace("blog"))
    kinds = [one.value["kind"] for one in parse(FULL.read_bytes(), str(FULL))]
    assert {"ServiceMonitor", "PrometheusRule", "ConfigMap"} <= set(kinds)
    said = plane.kubectl(
        "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", str(FULL), check=False
    )
    known = [kind for kind in kinds if plane.minor >= HOLDING or not kind.startswith("MutatingAdmissionPolicy")]
    assert said.count("serverside-applied") == len(known), said


@pytest.mark.skipif(not HELM, reason="no Helm: scripts/render builds one")
@pytest.mark.parametrize("size", ["100Mi", "5", "1Ti"])
def test_helm_names_a_size_that_the_agent_would_refuse(size: str) -> None:
    argv = [str(HELM), "template", "meshagent", str(CHART), "--set-string", f"agent.envoyMemory={size}"]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert f"at '/agent/envoyMemory': '{size}' does not match pattern" in run.stderr
    assert not run.stdout
