"""What the kernel tests share: a machine that is fit for them, and a running shop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lab import cgroup, paths, topology
from lab.cli import SHOP
from lab.errors import LabError, StartFailed
from lab.lab import Lab
from tests.kernel import datanode
from tests.kernel.datanode import DataNode


def _unfit() -> str:
    """Return what this machine lacks, or ""."""
    if os.geteuid() != 0:
        return "kernel tests need root"
    try:
        cgroup.mount_point()
    except LabError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    """Skip on a machine that cannot run kernel tests; with MESH_REQUIRE_KERNEL=1 that is a failure."""
    reason = _unfit()
    if reason and os.environ.get("MESH_REQUIRE_KERNEL") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def node() -> Iterator[DataNode]:
    """The data path of a node, without a mesh."""
    with datanode.running() as running:
        yield running


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The shop with its mesh and its resources applied. One a module, because there is one lab a machine and other modules make theirs.

    A module that says `IDENTITY = False` has it without a certificate authority: in plaintext between nodes; one that says `WIREGUARD = True`
    with a controller that wants WireGuard between nodes. `controller_options(directory)` of a module says more options of the controller.
    """
    others = paths.AGENT_RUN.exists()  # of an agent or controller that is not the lab's
    identity, wireguard = getattr(request.module, "IDENTITY", True), getattr(request.module, "WIREGUARD", False)
    running = Lab(replace(topology.load(SHOP / "lab.yaml"), identity=identity, wireguard=wireguard))
    if options := getattr(request.module, "controller_options", None):
        running.controller_options = options(tmp_path_factory.mktemp("controller"))
    try:
        running.up()
    except StartFailed as error:
        pytest.fail(f"{error}\n{error.log}")
    try:
        running.apply(SHOP / "mesh")
        running.settle()
        yield running
    finally:
        left = running.down()
    assert left == []
    assert others or not paths.AGENT_RUN.exists(), sorted(paths.AGENT_RUN.iterdir())
