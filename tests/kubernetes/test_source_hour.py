"""What is due while the API server is away for an hour, or refuses: the controller's own token is another one afterwards, and so is who has the Lease."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.identity.kubernetes import ApiServer, KubernetesAttestor
from controller.identity.refusals import Unavailable
from controller.kubernetes import lease
from controller.kubernetes.api import Api
from meshapi import discovery_pb2 as pb
from meshapi.join import AUDIENCE
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import action, conditions, found, reading, told, writing
from tests.kubernetes.manifest import ACCOUNT, OWN, grant, objects
from tests.kubernetes.samples import namespace, pod, policy
from tests.tasks import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quick")]
AGENT, CONTROLLER = "meshagent-agent", "meshagent-controller"


@pytest.fixture(autouse=True)
def own(plane: ControlPlane) -> Iterator[None]:
    """The controller's rights, as the manifest gives them."""
    plane.apply(namespace(OWN, "none"), namespace("defined"))
    grant(plane)
    yield
    plane.kubectl("delete", "authorizationpolicies,pods", "--all", "-n", "defined", "--force", "--grace-period=0")


class Token:
    """A token of the controller's service account in a file, as the kubelet projects it: it is good as long as the Secret is there that it is bound to."""

    def __init__(self, plane: ControlPlane, directory: Path) -> None:
        self.plane, self.file, self.bound = plane, directory / "token", ""
        self.kubeconfig = directory / "kubeconfig"
        config = json.loads(plane.kubeconfig().read_text())
        config["users"][0]["user"] = {"tokenFile": str(self.file)}
        self.kubeconfig.write_text(json.dumps(config))

    def make(self, name: str) -> None:
        """Have another one in the file."""
        self.bound = name
        self.plane.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": OWN}})
        bound = ["--bound-object-kind=Secret", f"--bound-object-name={name}", "--duration=3600s"]
        text = self.plane.kubectl("create", "token", CONTROLLER, "-n", OWN, *bound)
        beside_it = self.file.with_suffix(".new")
        beside_it.write_text(text.strip())
        beside_it.replace(self.file)

    def end(self) -> None:
        """Have the last one run out."""
        self.plane.kubectl("delete", "secret", self.bound, "-n", OWN)


async def test_without_the_right_to_the_lease_nobody_writes_and_everything_is_served(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: one.holds)
        role = next(item for item in objects("Role") if any("leases" in rule["resources"] for rule in item["rules"]))
        less = {**role, "rules": [rule for rule in role["rules"] if "leases" not in rule["resources"]]}
        await asyncio.to_thread(plane.apply, less)
        await until(lambda: not one.holds, 20)
        await asyncio.to_thread(plane.apply, policy("defined", "p"))
        await until(lambda: action(one.mesh, "p") == pb.Policy.DENY)
        lines = [vars(record) for record in caplog.records if record.name == lease.__name__ and record.levelno >= logging.WARNING]
        assert any("403 Forbidden" in str(line.get("error", "")) for line in lines), lines
        assert len(lines) < 5
        assert not conditions(plane, "authorizationpolicy", "defined", "p")
        await asyncio.to_thread(plane.apply, role)
        await until(lambda: one.holds, 60)
        await until(lambda: "Accepted" in conditions(plane, "authorizationpolicy", "defined", "p"))


async def test_events_that_may_not_be_written_leave_conditions_and_last_good_versions_alone(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    whole = objects("ClusterRole", "Role")
    less: list[dict[str, Any]] = [
        {**role, "rules": [rule for rule in role["rules"] if "events" not in rule["resources"]]} for role in whole
    ]
    assert less != whole
    bad = policy("defined", "p")
    await asyncio.to_thread(plane.apply, bad)
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: action(one.mesh, "p") == pb.Policy.DENY)
        await asyncio.to_thread(plane.apply, *less)
        bad["metadata"]["annotations"] = {"meshagent.io/dry-run": "perhaps"}
        await asyncio.to_thread(plane.apply, bad)
        await until(lambda: conditions(plane, "authorizationpolicy", "defined", "p").get("Accepted") == ("False", "Invalid"))
        await until(lambda: [record for record in caplog.records if record.message == "an event cannot be written"])
        assert action(one.mesh, "p") == pb.Policy.DENY
        failed = one.part._writer.failed
        await until(lambda: one.part._writer.failed > failed + 1)
        lines = [record for record in caplog.records if record.message == "an event cannot be written"]
        assert len(lines) == 1
        await asyncio.to_thread(plane.apply, *whole)
        await until(lambda: "Refused" in plane.kubectl("get", "events.events.k8s.io", "-n", "defined", "-o", "json"))


async def test_a_token_that_was_replaced_while_the_api_server_was_away_is_used_without_a_restart(
    plane: ControlPlane, tmp_path: Path
) -> None:
    token = Token(plane, tmp_path)
    await asyncio.to_thread(token.make, "first")
    await asyncio.to_thread(plane.apply, policy("defined", "p"), pod("defined", "before"))
    async with reading(Api.connect(token.kubeconfig), OWN) as mesh:
        await until(lambda: action(mesh, "p") == pb.Policy.DENY and found(mesh, "defined/before"))
        await mesh.reload()  # the publication is behind the model
        version = mesh.publication.current.version
        await asyncio.to_thread(token.end)
        await asyncio.to_thread(plane.stop)
        await until(lambda: mesh.state.problems)
        await asyncio.to_thread(plane.start)
        await until(lambda: "does not let the controller read it (401 Unauthorized" in told(mesh), 60)
        assert (mesh.publication.current.version, action(mesh, "p")) == (version, pb.Policy.DENY)
        await asyncio.to_thread(token.make, "second")
        await asyncio.to_thread(plane.apply, pod("defined", "after"))
        await until(lambda: found(mesh, "defined/after") and mesh.state.problems == (), 60)


async def test_a_node_cannot_join_meanwhile_and_joins_afterwards_with_another_token_of_the_controller(
    plane: ControlPlane, tmp_path: Path
) -> None:
    token = Token(plane, tmp_path)
    await asyncio.to_thread(token.make, "third")
    runs = pod(OWN, "agent")
    runs["spec"]["serviceAccountName"] = AGENT
    await asyncio.to_thread(plane.apply, runs)
    bound = ["--bound-object-kind=Pod", "--bound-object-name=agent", f"--audience={AUDIENCE}"]
    proof = (await asyncio.to_thread(plane.kubectl, "create", "token", AGENT, "-n", OWN, *bound)).strip()
    server = ApiServer(plane.url, plane.directory / "ca.crt", token.file, f"{OWN}/{AGENT}")
    server.check()
    attestor = KubernetesAttestor(server, tuple)

    async def said() -> str:
        try:
            async with attestor.proven("node-1", proof) as proven:
                return str(proven)
        except Unavailable as error:
            return str(error)

    try:
        joined = await said()
        assert f"{OWN}/agent" in joined
        await asyncio.to_thread(token.end)
        await asyncio.to_thread(plane.stop)
        assert f"the API server {plane.url} does not answer" in await said()
        await asyncio.to_thread(plane.start)
        assert "does not let the controller review tokens (status 401)" in await said()
        await asyncio.to_thread(token.make, "fourth")
        assert await said() == joined
    finally:
        attestor.close()
