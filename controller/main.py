"""The `mesh-controller` command. Turns options into Settings, signals into a clean end, and failures into one line and status 1."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import click

from controller import logs
from controller.conflicts import resolve
from controller.errors import ControllerError, Problem
from controller.identity.cli import ca, token
from controller.identity.options import Given, identity_options, identity_settings
from controller.identity.refusals import Refused
from controller.jwks import REFRESH_S
from controller.objects import ROOT_NAMESPACE
from controller.page.settings import PageSettings, page_options
from controller.schema import read_or_problems
from controller.server import Controller, Kubernetes, ServerTls, Settings
from controller.source import Source
from controller.store import SharedStore
from meshapi.text import counted

_PATH: Final = click.Path(path_type=Path)


def _shared(kubeconfig: Path | None, context: str, namespace: str) -> AbstractContextManager[SharedStore]:
    from controller.kubernetes.part import opened  # noqa: PLC0415  the module says why

    logging.getLogger("controller").addHandler(logging.NullHandler())  # a command says what went wrong in one line of its own
    return opened(kubeconfig, context, namespace)


class Group(click.Group):
    """Shows failures that an operator can act on as one line of click's, "Error: …", which misuse has too, and exit code 1."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ControllerError, Refused) as error:
            raise click.ClickException(str(error)) from error


@click.group(
    cls=Group,
    context_settings={"auto_envvar_prefix": "MESH_CONTROLLER", "show_default": True, "help_option_names": ["-h", "--help"], "obj": _shared},
)
def main() -> None:
    """Turn Kubernetes-style resources into what the agents of a mesh need."""


main.add_command(ca)
main.add_command(token)


@main.command(short_help="Serve the resources of a directory or of a Kubernetes API server.")
@click.option("--directory", type=_PATH, help="Directory of YAML files; watched.")
@click.option("--kubernetes", is_flag=True, help="Read the API server instead: by default the one of the pod that this runs in.")
@click.option("--kubeconfig", type=_PATH, help="For --kubernetes: the file that says where it is and who we are.")
@click.option("--context", metavar="NAME", default="", help="For --kubeconfig: the context; empty = the file's current one.")
@click.option(
    "--namespace",
    metavar="NAME",
    default=ROOT_NAMESPACE,
    help="For --kubernetes: the controller's own, with the Lease of the one that writes status.",
)
@click.option("--socket", type=_PATH, default=Path("/run/meshagent/controller.sock"), help="Unix socket for local agents and commands.")
@click.option("--listen", metavar="HOST:PORT", default="", help="TCP address for agents on other nodes; mutual TLS only.")
@click.option("--tls-cert", type=_PATH, help="Server certificate, PEM.")
@click.option("--tls-key", type=_PATH, help="Its key, PEM.")
@click.option("--tls-client-ca", type=_PATH, help="Who signs the certificates of agents and administrators, PEM.")
@identity_options
@click.option("--trust-domain", default="mesh.local", help="SPIFFE trust domain of the mesh.")
@click.option(
    "--encryption",
    type=click.Choice(["hbone", "wireguard"]),
    default="hbone",
    help="Between nodes: HBONE, or WireGuard where both have it and the port is not STRICT.",
)
@click.option(
    "--egress",
    type=click.Choice(["allow", "deny"]),
    default="allow",
    help="May workloads go where nobody declared anything? The annotation meshagent.io/egress of a Namespace goes first.",
)
@click.option("--metrics-address", default="127.0.0.1", help="Address of /metrics, /healthz and /readyz.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=0, help="Their port; 0 = off.")
@page_options
@click.option("--jwks-ca", type=_PATH, help="Authorities besides the system's that may vouch for the servers in jwksUri, PEM.")
@click.option("--jwks-refresh", type=click.FloatRange(1, 86400), default=REFRESH_S, help="Seconds after which jwksUri is asked again.")
@click.option(
    "--quota-redis",
    metavar="URL",
    default="",
    show_default=False,
    help="redis[s]://[USER:PASSWORD@]HOST:PORT/DB for counts of global limits, where several controllers run; better as MESH_CONTROLLER_RUN_QUOTA_REDIS.",
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False), default="info", help="What is logged."
)
def run(  # noqa: PLR0913, PLR0917 - one parameter per option
    directory: Path | None,
    kubernetes: bool,
    kubeconfig: Path | None,
    context: str,
    namespace: str,
    socket: Path,
    listen: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    trust_domain: str,
    encryption: str,
    egress: str,
    metrics_address: str,
    metrics_port: int,
    jwks_ca: Path | None,
    jwks_refresh: float,
    quota_redis: str,
    log_level: str,
    identity: Given,
    page: PageSettings | None,
) -> None:
    """Serve the resources of a directory, or of a Kubernetes API server, to agents until SIGTERM."""
    if (directory is None) != kubernetes:
        raise click.UsageError("give --directory DIR or --kubernetes: one source and no other")
    if (kubeconfig and not kubernetes) or (context and not kubeconfig):
        raise click.UsageError("--kubeconfig belongs to --kubernetes, and --context to --kubeconfig")
    authority = identity_settings(identity)
    if authority is None and len({option is None for option in (tls_cert, tls_key, tls_client_ca)}) > 1:
        raise click.UsageError("--tls-cert, --tls-key and --tls-client-ca belong together: give all three or none")
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together: give both or neither")
    if listen and not listen.rpartition(":")[2].isdigit():
        raise click.UsageError(f"--listen {listen!r} is not HOST:PORT")
    tls = ServerTls(tls_cert, tls_key, tls_client_ca) if tls_cert or tls_client_ca else None
    logs.set_up(log_level)
    wireguard = encryption == "wireguard"
    if wireguard and authority is None:
        raise click.UsageError("--encryption wireguard needs --ca-directory: where WireGuard is missing HBONE encrypts, with certificates")
    settings = Settings(
        directory,
        socket,
        listen,
        tls,
        trust_domain,
        metrics_address,
        metrics_port,
        authority,
        jwks_ca,
        jwks_refresh,
        wireguard,
        egress,
        quota_redis,
        Kubernetes(kubeconfig, context, namespace) if kubernetes else None,
        page,
    )
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    controller = Controller(settings)
    try:
        starting = asyncio.create_task(controller.start())
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait({starting, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not starting.done():  # what it waits for may take as long as an API server is away
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return
        starting.result()
        await controller.run(stopping)
    finally:
        await controller.stop()


@main.command(short_help="Check files or directories without a controller.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def validate(paths: tuple[Path, ...]) -> None:
    """Check files or directories without a controller: every problem on a line, status 1 if there is one."""
    problems: list[Problem] = []
    count = 0
    for path in paths:
        if path.is_dir():
            state = Source(path).load()
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
    click.echo(f"{count} good, {counted(len(problems), 'problem')}", err=True)
    sys.exit(1 if problems else 0)


def _lines(problems: list[Problem]) -> Iterator[str]:
    return (str(problem) for problem in sorted(problems))
