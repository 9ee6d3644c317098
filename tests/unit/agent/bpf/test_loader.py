"""The loader child up to where it needs a kernel: how long it lives, and what it says when something is wrong."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import select
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from agent.bpf import loader, source
from agent.bpf.datapath import run_loader
from agent.bpf.source import Job
from agent.errors import KernelRefused, MeshError

CHILD = """
import os, subprocess, sys, time
from agent.bpf import loader
if sys.argv[1] == "agent":
    subprocess.run([sys.executable, "-c", sys.argv[2], str(os.getpid()), ""])
else:
    loader._end_with(int(sys.argv[1]))
    print("bound", flush=True)
    time.sleep(30)
"""


def job(root: Path, **more: str) -> Job:
    places = {name: str(root / name) for name in ("maps", "programs", "bridge", "manifest")}
    return Job(**places, flags=[], capacities={}, **more)


def test_a_loader_ends_with_the_agent_that_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD, "agent", CHILD], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "bound\n"
        agent.send_signal(signal.SIGKILL)
        assert select.select([agent.stdout], [], [], 10)[0], "the loader has the other end of this pipe"
        assert agent.stdout.read() == ""


def test_a_loader_whose_agent_is_gone_already_does_nothing(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "agent.bpf.loader", json.dumps(asdict(job(tmp_path))), "1"]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (1, "loader: the agent that started this, pid 1, has ended\n")
    assert not list(tmp_path.iterdir())


def test_a_failure_that_has_nothing_to_do_with_rights_does_not_ask_for_them(tmp_path: Path) -> None:
    with pytest.raises(KernelRefused, match=r"No such file.*bpf_src.*all that it said is in") as refused:
        asyncio.run(run_loader(job(tmp_path, source=str(tmp_path / "bpf_src")), tmp_path / "loader.log"))
    assert "allow" not in str(refused.value)


@pytest.mark.parametrize(("code", "asks"), [(errno.EPERM, True), (errno.EINVAL, False), (errno.ENOMEM, False)])
def test_only_a_missing_right_is_asked_for(code: int, asks: bool) -> None:
    class Module:
        def load_func(self, *_: object, **__: object) -> None:
            ctypes.set_errno(code)
            raise Exception("no")  # noqa: TRY002  as bcc does

    with pytest.raises(MeshError, match="the kernel refuses mesh_connect4: no") as refused:
        loader._load(Module())
    assert ("lockdown" in str(refused.value)) == asks


@pytest.mark.parametrize("text", ["{", "{}", '{"maps": {"mesh_flow": {}}}'])
def test_a_manifest_that_says_too_little_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(loader, "_layouts", lambda _: {"mesh_flow": {"kind": 1, "capacity": 1, "flags": 0, "key": [], "key_size": 4}})
    monkeypatch.setattr(loader, "_made", lambda _: {})
    (tmp_path / "old.json").write_text(text)
    work = loader._Work(job(tmp_path, before_maps=str(tmp_path), before_manifest=str(tmp_path / "old.json")), source.read())
    with pytest.raises(MeshError, match=r"old\.json does not say what maps .*meshagent uninstall"):
        work.maps()
