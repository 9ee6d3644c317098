"""Certificates that run out while the controller is away: tunnels are refused, nothing falls back to plaintext, and a trace says why."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import mesh
from lab.lab import Lab
from tests.kernel import shop, short_lived

pytestmark = pytest.mark.kernel

LIFE_S = 25
"""Of a certificate: the mesh must be up, and have called, before the first are over."""


@pytest.fixture(scope="module", autouse=True)
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Controllers have their certificates signed by one whose certificates do not last. Before `lab`, which starts the first."""
    directory = tmp_path_factory.mktemp("authority")
    root = short_lived.root(directory)
    command = f"{sys.executable} {Path(short_lived.__file__)} {directory} {LIFE_S}"
    with pytest.MonkeyPatch.context() as patched:
        options = ("--ca-command", command, "--ca-root", str(root))
        patched.setattr(mesh, "start_controller", functools.partial(mesh.start_controller, options=options))
        yield


def test_expired_certificates_are_named_by_a_trace_and_replaced_when_the_controller_is_back(lab: Lab) -> None:
    shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items?[1-10]") == {"200": 10}, 20)
    lab.controller_stop()
    time.sleep(LIFE_S + 1)
    with shop.tracing("node-1", "frontend", "cart", "--errors-only", "--count", "1", "--duration", "30") as running:
        codes = shop.codes(lab, "frontend", "http://cart/items?[1-20]")
        (seen,) = shop.connections(running)
    print(codes, json.dumps(seen, indent=1))
    assert codes["503"] > 0
    assert "certificate has run out" in seen["nextStep"]
    lab.controller_start()
    shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items?[1-20]") == {"200": 20}, 60)
