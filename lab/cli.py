"""`meshagent lab up|down|status|exec`: the lab on the command line. Hung into `meshagent` by an entry point (pyproject.toml).

Exit codes: 0 good, 1 negative (a lab that did not come up, one that is not whole), 2 misuse; `exec` hands on the command's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lab import paths, teardown, topology
from lab.errors import LabError, StartFailed
from lab.lab import Lab

SHOP = Path(__file__).parent / "shop"


@click.group(short_help="A whole mesh on this machine, to try things.")
def lab() -> None:
    """A whole mesh on this machine: nodes and pods as network namespaces."""


@lab.command()
@click.option(
    "-f", "--file", type=click.Path(dir_okay=False, path_type=Path), default=SHOP / "lab.yaml", show_default="the shop", help="Topology."
)
@click.option("--mesh/--no-mesh", default=True, help="Start controller and agents, or only network and pods.")
def up(file: Path, mesh: bool) -> None:
    """Bring a lab up and wait until it is ready."""
    with _failures():
        wanted = topology.load(file)
        started = time.monotonic()
        with progress() as show:
            Lab(wanted, mesh=mesh, progress=show).up()
    seconds = time.monotonic() - started
    click.echo(f"the lab is up after {seconds:.1f} s: {len(wanted.nodes)} nodes, {len(wanted.pods)} pods", err=True)
    if mesh and file == SHOP / "lab.yaml":
        click.echo(
            f"next: meshagent apply -f {os.path.relpath(SHOP / 'mesh')}; meshagent lab exec frontend -- curl -s http://cart/items", err=True
        )


@lab.command(short_help="Take the lab down and remove everything it made.")
def down() -> None:
    """Take the lab down and remove everything it made, also after a crash."""
    with _failures():
        present = bool(teardown.leftovers())
        with progress() as show:
            problems = take_down(show)
        left = teardown.leftovers()
    for line in [*problems, *(f"still there: {thing}" for thing in left)]:
        click.ClickException(line).show()
    if problems or left:
        sys.exit(1)
    click.echo("the lab is down" if present else "no lab was up", err=True)


@lab.command(short_help="Show nodes and pods, and whether their programs run.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def status(output: str) -> None:
    """Show nodes and pods, and whether their programs run; exit code 1 if not all do."""
    with _failures():
        report = describe(Lab.attach())
    if output == "json":
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    sys.exit(0 if report["ready"] else 1)


@lab.command(
    "exec",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="Run a command in a pod, on a host outside, or on a node.",
)
@click.argument("pod")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(pod: str, command: tuple[str, ...]) -> None:
    """Run a command in a pod ([NAMESPACE/]NAME), on a host outside the mesh, or on a node."""
    with _failures():
        running = Lab.attach()
        argv = command[1:] if command[0] == "--" else command  # click keeps it where options may not be interspersed
        if not argv:
            raise click.UsageError("no command: meshagent lab exec POD -- CMD...")
        line = running.command(pod, argv)
        environment = running.environment(running.topology.place(pod))
    os.execve(line[0], line, environment)  # noqa: S606 - its streams, signals and exit code are the command's own


def take_down(show: Callable[[str], None]) -> list[str]:
    """Take down whatever lab there is, even one of which only names are left; return the problems."""
    try:
        running = Lab.attach(show)
    except LabError:
        if os.geteuid() != 0:
            raise
        return teardown.run(None, show)
    return running.down()


def describe(running: Lab) -> dict[str, Any]:
    """Return the status of a lab as `-o json` prints it."""
    state = running.state

    def alive(name: str) -> dict[str, Any]:
        found = state.processes.get(name)
        return {"pid": found.pid if found else None, "alive": bool(found and found.alive())}

    nodes: list[dict[str, Any]] = [
        {
            "name": node.name,
            "addresses": list(node.wire),
            "podNetworks": list(node.networks),
            "networkNamespace": paths.place_netns(node),
            **({"agent": {**alive(f"agent-{node.name}"), "ready": running.agent_ready(node.name)}} if state.mesh else {}),
        }
        for node in state.topology.nodes
    ]
    pods = [
        {
            "namespace": pod.namespace,
            "name": pod.name,
            "node": pod.node,
            "addresses": list(pod.addresses),
            "networkNamespace": paths.place_netns(pod),
            "command": list(pod.command),
            **(alive(f"{pod.namespace}_{pod.name}") if pod.command else {}),
        }
        for pod in state.topology.pods
    ]
    outside = [
        {"name": host.name, "addresses": list(host.addresses), "networkNamespace": paths.place_netns(host)}
        for host in state.topology.outside
    ]
    controller = alive("controller") if state.mesh else None
    good = state.complete and all(pod.get("alive", True) for pod in pods)
    if controller:
        good = good and controller["alive"] and all(node["agent"]["ready"] for node in nodes)
    return {"ready": good, "mesh": state.mesh, "controller": controller, "nodes": nodes, "pods": pods, "outside": outside}


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show the step that is under way: a spinner on a terminal, lines elsewhere; both on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: click.echo(f"- {text}", err=True)
        return
    started = time.monotonic()
    with console.status("") as spinner:
        yield lambda text: spinner.update(f"{text} [dim]({time.monotonic() - started:.0f} s)[/dim]")


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Turn failures that are for people into one line (and the end of a log) and exit code 1."""
    try:
        yield
    except StartFailed as error:
        if error.log:
            click.echo(error.log, err=True)
        raise click.ClickException(str(error)) from error
    except LabError as error:
        raise click.ClickException(str(error)) from error


def _print(report: dict[str, Any]) -> None:
    console = Console()
    nodes = Table("node", "address", "pod networks", "agent")
    for node in report["nodes"]:
        agent = node.get("agent")
        text = f"pid {agent['pid']}, {'ready' if agent['ready'] else 'not ready' if agent['alive'] else 'dead'}" if agent else "no mesh"
        nodes.add_row(node["name"], node["addresses"][0], "\n".join(node["podNetworks"]), text)
    console.print(nodes)
    pods = Table("pod", "node", "addresses", "program")
    for pod in report["pods"]:
        text = f"pid {pod['pid']}, {'runs' if pod['alive'] else 'dead'}" if pod["command"] else "none"
        pods.add_row(f"{pod['namespace']}/{pod['name']}", pod["node"], "\n".join(pod["addresses"]), text)
    for host in report["outside"]:
        pods.add_row(host["name"], "outside", "\n".join(host["addresses"]), "none")
    console.print(pods)
    if report["controller"]:
        console.print(f"controller: pid {report['controller']['pid']}, {'runs' if report['controller']['alive'] else 'dead'}")
