"""The CustomResourceDefinition of policies, as it is, gone, or older."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kubernetes.controlplane import CRDS, ControlPlane, Failed

CRD = "authorizationpolicies.meshagent.io"
FILE = CRDS / "meshagent.io_authorizationpolicies.yaml"


def install(plane: ControlPlane, path: Path = FILE) -> None:
    plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(path))
    plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(path))


async def soon(work: Callable[..., object], *arguments: Any) -> None:
    """Do it as soon as the API server takes it: a definition that is new is not served at once."""
    said = ""
    for _ in range(100):
        try:
            await asyncio.to_thread(work, *arguments)
        except Failed as error:
            said = str(error)
            await asyncio.sleep(0.2)
        else:
            return
    raise AssertionError(said)


def older(plane: ControlPlane, path: Path) -> None:
    """A definition that does not know `when` yet."""
    definition = json.loads(plane.kubectl("create", "--dry-run=client", "-o", "json", "-f", str(FILE)))
    (version,) = definition["spec"]["versions"]
    rules = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["rules"]
    del rules["items"]["properties"]["when"]
    rules["items"].pop("x-kubernetes-validations", None)
    path.write_text(json.dumps(definition))
    install(plane, path)
