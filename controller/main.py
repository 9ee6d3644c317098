"""The `mesh-controller` command. Turns options into Settings, signals into a clean end, and failures into one line and status 1."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from controller import logs
from controller.conflicts import resolve
from controller.errors import ControllerError, Problem
from controller.schema import read_or_problems
from controller.server import Controller, ServerTls, Settings
from controller.source import Source

_PATH: Final = click.Path(path_type=Path)


@click.group(context_settings={"auto_envvar_prefix": "MESH_CONTROLLER", "show_default": True, "help_option_names": ["-h", "--help"]})
def main() -> None:
    """Turn Kubernetes-style resources into what the agents of a mesh need."""


@main.command()
@click.option("--directory", type=_PATH, required=True, help="Directory of YAML files; watched.")
@click.option("--socket", type=_PATH, default=Path("/run/meshagent/controller.sock"), help="Unix socket for local agents and commands.")
@click.option("--listen", metavar="HOST:PORT", default="", help="TCP address for agents on other nodes; mutual TLS only.")
@click.option("--tls-cert", type=_PATH, help="Server certificate, PEM.")
@click.option("--tls-key", type=_PATH, help="Its key, PEM.")
@click.option("--tls-client-ca", type=_PATH, help="Who signs the certificates of agents and administrators, PEM.")
@click.option("--trust-domain", default="mesh.local", help="SPIFFE trust domain of the mesh.")
@click.option("--metrics-address", default="127.0.0.1", help="Address of /metrics.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=0, help="Port of /metrics; 0 = off.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False), default="info", help="What is logged."
)
def run(  # noqa: PLR0913, PLR0917 - one parameter per option
    directory: Path,
    socket: Path,
    listen: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    trust_domain: str,
    metrics_address: str,
    metrics_port: int,
    log_level: str,
) -> None:
    """Serve the resources of a directory to agents until SIGTERM."""
    given = [option for option in (tls_cert, tls_key, tls_client_ca) if option is not None]
    if len(given) not in {0, 3}:
        raise click.UsageError("--tls-cert, --tls-key and --tls-client-ca belong together: give all three or none")
    if listen and not listen.rpartition(":")[2].isdigit():
        raise click.UsageError(f"--listen {listen!r} is not HOST:PORT")
    tls = ServerTls(given[0], given[1], given[2]) if given else None
    logs.set_up(log_level)
    settings = Settings(directory, socket, listen, tls, trust_domain, metrics_address, metrics_port)
    try:
        asyncio.run(_serve(settings))
    except ControllerError as error:
        click.echo(f"mesh-controller: {error}", err=True)
        sys.exit(1)


async def _serve(settings: Settings) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    controller = Controller(settings)
    try:
        await controller.start()
        await controller.run(stopping)
    finally:
        await controller.stop()


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def validate(paths: tuple[Path, ...]) -> None:
    """Check files or directories without a controller: every problem on a line, status 1 if there is one."""
    problems: list[Problem] = []
    count = 0
    for path in paths:
        if path.is_dir():
            try:
                state = Source(path).load()
            except ControllerError as error:
                click.echo(f"mesh-controller: {error}", err=True)
                sys.exit(1)
            problems += state.problems
            count += len(state.objects)
        else:
            checked, unreadable = read_or_problems(path.read_bytes(), str(path))
            objects = [item.object for item in checked if item.object is not None]
            problems += [problem for item in checked for problem in item.problems] + ([unreadable] if unreadable else [])
            problems += resolve(objects, {})[1].values()
            count += len(objects)
    for line in _lines(problems):
        click.echo(line)
    click.echo(f"{count} good, {len(problems)} {'problem' if len(problems) == 1 else 'problems'}", err=True)
    sys.exit(1 if problems else 0)


def _lines(problems: list[Problem]) -> Iterator[str]:
    return (str(problem) for problem in sorted(problems))
