"""docs/quickstart.md: its commands on a real API server, as far as no pod has to run for them, and what its policies mean to a controller."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.documents import parse
from meshapi import discovery_pb2 as pb
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import following
from tests.kubernetes.install import HELM
from tests.kubernetes.manifest import HOLDING, MANIFEST, OWN
from tests.tasks import until

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quickstart.md"
FILES = ROOT / "docs" / "quickstart"
ELSEWHERE = re.compile(r"(kind|docker|minikube|make|helm upgrade|helm uninstall) |.* (exec|rollout|trace|--node) ")
"""What needs nodes, or has no meaning without them."""


def commands() -> list[str]:
    """All of the page, in order."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture
def shell(plane: ControlPlane, tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with kubectl and its plugin, in a directory that looks like the repository's top; what is applied is gone afterwards."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "kubectl").symlink_to(plane.assets / "kubectl")
    (programs / "kubectl-meshagent").write_text(f"#!{sys.executable}\nfrom agent.cli.kubectl import main\nmain()\n")
    (programs / "kubectl-meshagent").chmod(0o755)
    for name in ("docs", "deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    plane.kubectl("delete", "namespace", OWN, "--ignore-not-found", "--wait=false")
    finalize = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": OWN},
        "spec": {"finalizers": []},
    }  # which no controller-manager does here
    plane.kubectl("replace", "--raw", f"/api/v1/namespaces/{OWN}/finalize", "-f", "-", stdin=json.dumps(finalize), check=False)
    yield {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "KUBECONFIG": str(plane.kubeconfig()),
        "PYTHONPATH": str(ROOT),
    }
    made = "deployments,pods,services,serviceaccounts,authorizationpolicies"
    plane.kubectl("delete", made, "--all", "-n", "shop", "--force", "--grace-period=0")


def test_every_file_of_the_page_is_there_and_named_on_it() -> None:
    assert {f"docs/quickstart/{file.name}" for file in FILES.iterdir()} == set(
        re.findall(r"docs/quickstart/[a-z]+\.yaml", PAGE.read_text())
    )


def test_each_command_that_needs_no_running_pod_does_what_it_says(plane: ControlPlane, shell: dict[str, str], tmp_path: Path) -> None:
    ran = []
    for command in commands():
        if ELSEWHERE.match(f"{command} ") or command.startswith("kubectl delete -f"):
            continue
        line = shlex.split(command)
        if line[:2] == ["helm", "install"]:
            line = ["kubectl", "apply", "--server-side", "--force-conflicts", "-f", rendered(plane, tmp_path, line)]
        done = subprocess.run(line, cwd=tmp_path, env=shell, capture_output=True, text=True, timeout=120, check=False)
        if line[1:3] == ["meshagent", "check"]:
            wrong = [text for text in done.stdout.splitlines() if text.startswith("error")]
            assert [text for text in wrong if " pods of meshagent-" not in text] == [], done.stdout
            assert re.search(r"^ok +signer", done.stdout, re.MULTILINE)
            assert re.search(r"^ok +root", done.stdout, re.MULTILINE)
        else:
            assert done.returncode == 0, (command, done.stderr)
        ran.append(line[:3])
    assert len(ran) == 11, ran
    assert "web-callers" in plane.kubectl("get", "authorizationpolicies", "-n", "shop")
    secret = plane.kubectl("get", "secret", "meshagent-ca", "-n", OWN, "-o", "jsonpath={.data}")
    assert all(f'"{name}"' in secret for name in ("tls.crt", "tls.key", "ca.crt"))


def rendered(plane: ControlPlane, tmp_path: Path, install: list[str]) -> str:
    """What Helm would apply; without Helm the manifest, which is the chart with its default values for Kubernetes 1.36."""
    if not HELM:
        if plane.minor < HOLDING:
            pytest.skip(f"no Helm, which leaves out what Kubernetes 1.{plane.minor} does not know")
        return str(MANIFEST)
    text = subprocess.run(
        [HELM, "template", "--kube-version", f"1.{plane.minor}", *install[2:]], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    path = tmp_path / "rendered.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.anyio
@pytest.mark.usefixtures("shell")
async def test_its_policies_mean_what_the_page_says(plane: ControlPlane) -> None:
    documents = [one.value for one in parse((FILES / "app.yaml").read_bytes(), "app.yaml")]
    plane.apply(*documents, *(pod(one) for one in documents if one["kind"] == "Deployment"))

    async with following(plane) as mesh:

        def web() -> tuple[list[str], bool]:
            workload, service = mesh.compiled.entities["workload/shop/web"].workload, mesh.compiled.entities["service/shop/web"].service
            return list(workload.policies), service.ports[0].waypoint

        await until(lambda: "workload/shop/web" in mesh.compiled.entities and "service/shop/web" in mesh.compiled.entities)
        assert mesh.compiled.entities["workload/shop/web"].workload.enrolled
        assert web() == ([], False), "it is no L7 port before there is a policy about requests"
        plane.kubectl("apply", "-f", str(FILES / "who.yaml"))
        await until(lambda: web() == (["shop/web-callers"], False))
        who = mesh.compiled.entities["policy/shop/web-callers"].policy
        assert (who.action, list(who.rules[0].sources[0].service_accounts)) == (pb.Policy.ALLOW, ["shop/frontend"])
        plane.kubectl("apply", "-f", str(FILES / "what.yaml"))
        await until(lambda: web() == (["shop/web-callers", "shop/web-no-licenses"], True))


def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    """What a controller-manager and a scheduler make of it."""
    template = deployment["spec"]["template"]
    metadata = {"name": deployment["metadata"]["name"], "namespace": "shop", "labels": template["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {**template["spec"], "nodeName": "node-1"}}
