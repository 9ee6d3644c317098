"""An API server whose certificate is of another authority from now on: controllers believe it as soon as their files say so, without a restart."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from controller.kubernetes import access
from controller.kubernetes.api import Api, Unreachable
from meshapi import discovery_pb2 as pb
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.following import action, found, reading, told
from tests.kubernetes.manifest import OWN, grant
from tests.kubernetes.samples import namespace, pod, policy
from tests.tasks import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quick")]


class Files(Protocol):
    """Where a controller reads whom to believe."""

    def connect(self) -> Api: ...

    def believe(self, authority: bytes) -> None: ...


class Kubeconfig:
    """A kubeconfig file of the administrator, with the authority in it or in a file of its own."""

    def __init__(self, plane: ControlPlane, directory: Path, *, inside: bool) -> None:
        self.file, self.authority, self.inside = directory / "kubeconfig", directory / "ca.crt", inside
        self.config: dict[str, Any] = json.loads(plane.kubeconfig().read_text())
        self.believe((plane.directory / "ca.crt").read_bytes())

    def connect(self) -> Api:
        return Api.connect(self.file)

    def believe(self, authority: bytes) -> None:
        one = {"certificate-authority-data": base64.b64encode(authority).decode()}
        self.authority.write_bytes(authority)
        of_cluster = one if self.inside else {"certificate-authority": self.authority.name}
        server = self.config["clusters"][0]["cluster"]["server"]
        self.config["clusters"][0]["cluster"] = {"server": server, **of_cluster}
        self.file.write_text(json.dumps(self.config))


class Account:
    """The directory of a pod's service account, as the kubelet writes it: all files anew, behind a link (kubernetes pkg/volume/util/atomic_writer.go)."""

    def __init__(self, plane: ControlPlane, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self.times = directory, 0
        grant(plane)
        self.token = plane.kubectl("create", "token", "meshagent-controller", "-n", OWN).strip()
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", plane.address)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(plane.port))
        monkeypatch.setattr(access, "ACCOUNT", str(directory))
        for name in ("ca.crt", "token", "namespace"):
            (directory / name).symlink_to(f"..data/{name}")
        self.believe((plane.directory / "ca.crt").read_bytes())

    def connect(self) -> Api:
        return Api.connect()

    def believe(self, authority: bytes) -> None:
        self.times += 1
        made = self.directory / f"..{self.times}"
        made.mkdir()
        for name, content in (("ca.crt", authority), ("token", self.token.encode()), ("namespace", OWN.encode())):
            (made / name).write_bytes(content)
        link = self.directory / "..new"
        link.symlink_to(made.name)
        link.replace(self.directory / "..data")


@pytest.fixture(autouse=True)
def own(plane: ControlPlane) -> Iterator[None]:
    """Afterwards there are no pods and policies."""
    plane.apply(namespace(OWN, "none"), namespace("defined"))
    yield
    plane.kubectl("delete", "authorizationpolicies,pods", "--all", "-n", "defined", "--force", "--grace-period=0")


@pytest.fixture(params=["file", "inside", "account"])
def files(request: pytest.FixtureRequest, plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Each way to say whom to believe."""
    if request.param == "account":
        return Account(plane, tmp_path, monkeypatch)
    return Kubeconfig(plane, tmp_path, inside=request.param == "inside")


async def test_an_authority_that_was_replaced_is_believed_without_a_restart_and_the_one_before_no_more(
    plane: ControlPlane, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "controller")
    before = (plane.directory / "ca.crt").read_bytes()
    await asyncio.to_thread(plane.apply, policy("defined", "p"), pod("defined", "before"))
    api = files.connect()
    async with reading(api, OWN) as mesh:
        await until(lambda: action(mesh, "p") == pb.Policy.DENY and found(mesh, "defined/before"))
        await mesh.reload()  # the publication is behind the model
        version = mesh.publication.current.version
        await asyncio.to_thread(plane.stop)
        authority = plane.rotate()
        await asyncio.to_thread(plane.start)
        await until(lambda: "certificate verify failed" in told(mesh), 60)
        assert (mesh.publication.current.version, action(mesh, "p")) == (version, pb.Policy.DENY)
        files.believe(authority[:99])  # half written
        await until(lambda: "cannot be used: those before go on being used" in caplog.text)
        assert (mesh.publication.current.version, action(mesh, "p")) == (version, pb.Policy.DENY)
        files.believe(authority)
        await asyncio.to_thread(plane.apply, pod("defined", "after"))
        await until(lambda: found(mesh, "defined/after") and mesh.state.problems == (), 60)
        assert caplog.text.count("credentials for the API server were read again") == 1
        assert caplog.text.count("those before go on being used") == 1
        files.believe(before)
        with pytest.raises(Unreachable, match="certificate verify failed"):
            await api.get("/version", {})
        await asyncio.to_thread(plane.apply, pod("defined", "last"))
        await until(lambda: found(mesh, "defined/last"))  # a watch that was begun before goes on
