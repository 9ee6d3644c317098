"""Removes every trace of an agent: process, Envoy, name servers, programs, links, maps, namespace mounts, cgroup, files. Works after a crash, and twice."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

from agent import lock, netns, probe
from agent.config import Config
from agent.l7 import envoy
from agent.names import dnsmasq as names
from agent.wireguard.device import Device

_PATIENCE_S = 10.0


def uninstall(config: Config) -> list[str]:
    """Undo everything an agent with this configuration ever did; returns what was found and removed."""
    done = []
    if pid := _stop_agent(config.run_dir / "agent.lock"):
        done.append(f"stopped the agent (pid {pid})")
    # Links first: with them the programs stop deciding, and nothing is redirected to a waypoint that is gone.
    if config.pin_dir.is_dir():
        links = list(config.pin_dir.glob("links/*"))
        for link in links:
            link.unlink()
        shutil.rmtree(config.pin_dir)
        done.append(f"removed programs, maps and {len(links)} links below {config.pin_dir}")
    done += _stop_helpers(config)
    mounts = netns.held(config.netns_dir)
    for mount in mounts:
        netns.release(mount)
    if mounts:
        done.append(f"unmounted {len(mounts)} network namespaces")
    probe.remove(config)
    if config.waypoint_cgroup.is_dir():
        _remove_cgroup(config.waypoint_cgroup)
        done.append(f"removed cgroup {config.waypoint_cgroup}")
    for directory in (config.run_dir, config.state_dir):
        if directory.is_dir():
            _remove_files(directory)
            done.append(f"removed {directory}")
    if config.workload_socket.parent.is_dir():
        config.workload_socket.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else keeps something there
            config.workload_socket.parent.rmdir()
            done.append(f"removed {config.workload_socket.parent}")
    return done


def _stop_helpers(config: Config) -> list[str]:
    done = ["removed the WireGuard device with its routes and rules"] if Device(str(config.run_dir)).remove() else []
    done += ["stopped Envoy"] if envoy.stop(config.run_dir) else []
    if servers := names.stop(config):
        done.append(f"stopped {servers} name servers")
    return done


def _stop_agent(path: Path) -> int | None:
    pid = lock.holder(path)
    if not pid:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + _PATIENCE_S
    while lock.holder(path):
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            end += _PATIENCE_S
        time.sleep(0.05)
    return pid


def _remove_cgroup(path: Path) -> None:
    end = time.monotonic() + _PATIENCE_S
    while True:
        for pid in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


# Only what agents put there: the directories may hold other nodes' directories (one machine can run several agents).
_OWN = (
    "agent.lock",
    "agent.sock",
    "cgroup",
    "xds.sock",
    "envoy*",
    "ids",
    "tunnels",
    "tunnels-ready",
    "tunnels-distrusted",
    "ids.*",
    "acceleration.json",
    "manifest-*",
    "loader.log",
    "netns",
    "identity",
    "snapshot.*",
    "wireguard",
    "logs",
)


def _remove_files(directory: Path) -> None:
    for pattern in (*_OWN, *(f".{own}" for own in _OWN)):  # with a dot: what a killed agent was writing (agent.files)
        for path in directory.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()
