"""What the Debian packages do when they are removed; tests/package installs them on a Debian of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.deploy.test_manifests import DEPLOY


@pytest.mark.parametrize(
    ("settings", "cgroup"),
    [
        pytest.param(None, "", id="no-file"),
        pytest.param("MESHAGENT_RUN_NODE=vm-1\n", "", id="the-default"),
        pytest.param(
            "#MESHAGENT_RUN_CGROUP=/commented\nMESHAGENT_RUN_CGROUP=/cgroup/mesh \nMESHAGENT_RUN_NODE=vm-1\n", "/cgroup/mesh", id="one"
        ),
        pytest.param('MESHAGENT_RUN_CGROUP=/cgroup/first\n  MESHAGENT_RUN_CGROUP="/cgroup/the last"\n', "/cgroup/the last", id="quoted"),
        pytest.param("MESHAGENT_RUN_CGROUP='/cgroup/mesh'", "/cgroup/mesh", id="half-quoted"),
    ],
)
def test_what_is_removed_is_what_the_agent_served(tmp_path: Path, settings: str | None, cgroup: str) -> None:
    file = tmp_path / "agent.env"
    if settings is not None:
        file.write_text(settings)
    for name, body in (("meshagent", 'echo "$MESHAGENT_RUN_CGROUP|$1"'), ("py3clean", ":"), ("deb-systemd-invoke", ":")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    script = (DEPLOY / "debian/meshagent/prerm").read_text().replace("/etc/meshagent/agent.env", str(file))
    done = subprocess.run(
        ["sh", "-c", script, "prerm", "remove"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (f"{cgroup}|uninstall\n", "")
