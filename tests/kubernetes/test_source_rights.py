"""Rights that the controller loses while it runs: what is in force stays, and what is wrong is said, once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest

from meshapi import discovery_pb2 as pb
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import action, conditions, following, writing
from tests.kubernetes.manifest import ACCOUNT, OWN, grant, objects
from tests.kubernetes.samples import namespace, policy
from tests.tasks import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quick")]


@pytest.fixture(autouse=True)
def own(plane: ControlPlane) -> Iterator[None]:
    """The controller's rights, as the manifest gives them, before and after."""
    plane.apply(namespace(OWN, "none"), namespace("defined"))
    grant(plane)
    yield
    plane.kubectl("delete", "authorizationpolicies", "--all", "-n", "defined")


def without(plane: ControlPlane, resource: str) -> None:
    """Take the rights to a resource out of the ClusterRole."""
    (role,) = objects("ClusterRole")
    rules = [{**rule, "resources": kept} for rule in role["rules"] if (kept := [one for one in rule["resources"] if resource not in one])]
    assert rules != role["rules"]
    plane.apply({**role, "rules": rules})


async def test_policies_that_may_not_be_read_any_more_stay_in_force_and_are_named(plane: ControlPlane) -> None:
    plane.apply(policy("defined", "p"))
    async with following(plane, ACCOUNT) as mesh:
        await until(lambda: action(mesh, "p") == pb.Policy.DENY)
        await mesh.reload()
        version = mesh.publication.current.version
        await asyncio.to_thread(without, plane, "authorizationpolicies")
        await asyncio.to_thread(plane.stop)  # which ends the watch: rights are looked at when one begins
        await asyncio.to_thread(plane.start)
        # Right after its start the API server knows no roles yet, and refuses everything.
        await until(lambda: [one.kind for one in mesh.state.problems if "403" in one.message] == ["AuthorizationPolicy"], 60)
        await asyncio.to_thread(plane.apply, policy("defined", "q"))
        await asyncio.sleep(2)
        (problem,) = [one for one in mesh.state.problems if "403" in one.message]
        assert "does not let the controller read it (403 Forbidden" in problem.message
        assert "see the ClusterRole of the controller's service account; what was known stays in force" in problem.message
        assert (action(mesh, "p"), action(mesh, "q")) == (pb.Policy.DENY, None)
        assert mesh.publication.current.version == version, "something was taken out of force"
        await asyncio.to_thread(plane.apply, *objects("ClusterRole"))
        await until(lambda: action(mesh, "q") == pb.Policy.DENY, 60)
        await until(lambda: mesh.state.problems == (), 60)


async def test_statuses_that_may_not_be_written_any_more_are_one_line_and_all_else_goes_on(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("p", "q", "r")
    plane.apply(policy("defined", "before"))
    async with writing(plane, ACCOUNT) as one:
        await until(lambda: "Accepted" in conditions(plane, "authorizationpolicy", "defined", "before"))
        await asyncio.to_thread(without, plane, "authorizationpolicies/status")
        await asyncio.to_thread(plane.apply, *(policy("defined", name) for name in names))
        await until(lambda: all(action(one.mesh, name) == pb.Policy.DENY for name in names))
        failed = one.part._writer.failed
        await until(lambda: one.part._writer.failed > failed + 3 * len(names))
        lines = [
            record for record in caplog.records if record.message == "a status cannot be written" and record.levelno == logging.WARNING
        ]
        assert len(lines) == 1, [vars(record)["error"] for record in lines]
        assert "403 Forbidden" in vars(lines[0])["error"]
        await asyncio.to_thread(plane.apply, *objects("ClusterRole"))
        await until(lambda: all("Accepted" in conditions(plane, "authorizationpolicy", "defined", name) for name in names))
