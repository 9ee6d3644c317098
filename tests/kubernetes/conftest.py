"""The control plane of a module of tests: `make test-kubernetes` says where its programs are."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from controller.kubernetes import lastgood, lease, reflector, status
from lab import cgroup
from tests.kubernetes import controlplane, mesh, node
from tests.kubernetes.controlplane import ControlPlane, Failed
from tests.kubernetes.install import ASSETS, NEEDED, own_network
from tests.kubernetes.installed import installing

__all__ = ["ASSETS"]  # of tests that have no node


@pytest.fixture
def anyio_backend() -> str:
    """asyncio, as everywhere."""
    return "asyncio"


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server with the mesh's CRDs and nothing else: no other module's tests leave anything there."""
    assets = os.environ.get(ASSETS)
    if not assets:
        pytest.skip(f"no control plane: `make test-kubernetes` builds one and says so in {ASSETS}")
    with controlplane.running(Path(assets), tmp_path_factory.mktemp("control-plane")) as found:
        found.install_crds()
        yield found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases turn in seconds, and nobody waits long to ask or to write again."""
    monkeypatch.setattr(lease, "DURATION_S", 3)
    monkeypatch.setattr(lease, "RENEW_S", 0.5)
    monkeypatch.setattr(lease, "GRACE_S", 2.0)
    monkeypatch.setattr(reflector, "MAX_BACKOFF_S", 1.0)
    monkeypatch.setattr(reflector, "ABSENT_S", 0.5)
    monkeypatch.setattr(status, "AGAIN_S", 0.5)
    monkeypatch.setattr(status, "LOOK_S", 1.0)
    monkeypatch.setattr(lastgood, "AGAIN_S", 0.5)


@pytest.fixture(scope="module")
def installed(plane: ControlPlane) -> Iterator[ControlPlane]:
    """An API server with the mesh installed in it, on two nodes that are none."""
    with installing(plane) as found:
        yield found


@pytest.fixture(scope="module")
def whole() -> Iterator[mesh.Cluster]:
    """A whole control plane with a node, and the mesh on it, as processes beside its kubelet."""
    with whole_mesh() as found:
        yield found


@contextmanager
def whole_mesh(dns: str = node.DNS, *, systemd: bool = False) -> Iterator[mesh.Cluster]:
    """The same, whose pods ask `dns` for names, and have cgroups that systemd makes."""
    assets = Path(os.environ.get(ASSETS) or "/nonexistent")
    if lacking := [name for name in NEEDED if not (assets / name).exists()]:
        pytest.skip(f"no {', '.join(lacking)}: `make test-kubernetes` builds them and says so in {ASSETS}")
    top = Path(tempfile.mkdtemp(prefix="mesh-", dir="/dev/shm"))
    cgroup2 = cgroup.mount_point() / "mesh-systemd" if systemd else cgroup.mount_point()
    try:
        with (
            own_network(),
            controlplane.running(assets, top / "plane", whole=True) as plane,
            node.running(plane, top / "node", cgroup2, dns=dns, systemd=systemd) as machine,
        ):
            plane.install_crds()
            with mesh.running(plane, machine, top / "mesh") as found:
                yield found
    except Failed as error:
        pytest.fail(str(error))
    finally:
        shutil.rmtree(top, ignore_errors=True)
