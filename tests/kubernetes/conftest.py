"""The control plane of a module of tests: `make test-kubernetes` says where its programs are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes import controlplane
from tests.kubernetes.controlplane import ControlPlane

ASSETS = "MESH_KUBERNETES_ASSETS"


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
