"""Certificates that run out while the controller is away: new tunnels are refused, nothing falls back to plaintext, and a trace says where to look."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lab.lab import Lab
from tests.kernel import shop, short_lived

pytestmark = pytest.mark.kernel

LIFE_S = 25
"""Of a certificate: the mesh must be up, and have called, before the first are over."""


def controller_options(directory: Path) -> list[str]:
    """For the fixture `lab`: a controller that has its certificates signed by an authority whose certificates do not last."""
    root = short_lived.root(directory)
    return ["--ca-command", f"{sys.executable} {Path(short_lived.__file__)} {directory} {LIFE_S}", "--ca-root", str(root)]


def test_no_tunnel_is_opened_with_certificates_that_have_run_out_and_new_ones_come_with_the_controller(lab: Lab) -> None:
    shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items?[1-10]") == {"200": 10}, 20)
    lab.controller_stop()
    time.sleep(LIFE_S + 1)
    envoy = shop.status("node-2")["waypoint"]["pid"]
    os.kill(envoy, signal.SIGKILL)
    shop.takes(lambda: (found := shop.status("node-2")["waypoint"])["ready"] and found["pid"] != envoy, 20)
    with shop.tracing("node-1", "frontend", "cart", "--errors-only", "--count", "1", "--duration", "30") as running:
        codes = shop.codes(lab, "frontend", "http://cart/items?[1-20]")
        (seen,) = shop.connections(running)
    assert codes["503"] > 0
    assert codes.keys() <= {"200", "503"}
    assert "certificate" in seen["nextStep"], seen
    lab.controller_start()
    shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/items?[1-20]") == {"200": 20}, 60)
