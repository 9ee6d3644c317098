"""`meshagent identity`: the certificates of this machine's nodes and workloads. Keys are not among what an agent says."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import grpc

from agent.cli.observe import CONNECT_TIMEOUT_S, NAMESPACE, OUTPUT, RUN_DIR, agent_of, moment, sockets, stub, within
from agent.errors import NotFound
from agent.plan import qualified
from meshapi import agent_pb2 as pb


@click.group()
def identity() -> None:
    """Certificates of nodes and workloads."""


@identity.command("list")
@RUN_DIR
@OUTPUT
def show_all(run_dir: Path, output: str) -> None:
    """List the certificates of this machine's workloads. Exit code 1 if one is missing or cannot be renewed."""
    good = True
    for path in sockets(run_dir):
        document = _ask(path, "")
        good &= not any(one["problem"] or one["expiresAt"] is None for one in _certificates(document))
        if output == "json":
            click.echo(json.dumps(document))
        else:
            _show_list(document)
    sys.exit(0 if good else 1)


@identity.command("show", short_help="Show a workload's certificate, with its chain.")
@click.argument("workload")
@NAMESPACE
@RUN_DIR
@OUTPUT
def show_one(workload: str, namespace: str, run_dir: Path, output: str) -> None:
    """Show the certificate of WORKLOAD, NAMESPACE/NAME or NAME in the namespace of -n, with its chain. Exit code 1 if it has none."""
    workload = within(namespace, workload)
    document = _ask(agent_of(workload, run_dir), qualified(workload))
    if output == "json":
        click.echo(json.dumps(document))
    else:
        _show_one(document)
    sys.exit(0 if document["expiresAt"] is not None else 1)


def _ask(path: Path, workload: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(stub(path).Identity(pb.IdentityRequest(workload=workload), timeout=CONNECT_TIMEOUT_S).document)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            raise NotFound(error.details() or f"no workload {workload}") from error
        raise NotFound(f"the agent at {path} does not answer: {error.details()}; is 'meshagent run' running, and are you root?") from error
    return found


def _certificates(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [*([document["node"]] if document["node"] else []), *document["workloads"]]


def _show_list(document: dict[str, Any]) -> None:
    if document["mode"] == "off":
        click.echo("there are no identities here: the controller has no identity service, or it is reached over a unix socket")
        return
    state = "connected" if document["connected"] else "not connected"
    trust = f"{document['roots']} roots, {document['revoked']} revoked" if document["trustSequence"] is not None else "nobody yet"
    click.echo(f"trust domain {document['trustDomain']}  controller {state}  trusted: {trust}")
    click.echo(f"keys are kept {'for a restart in ' + document['kept'] if document['kept'] else 'in memory only'}")
    rows = [["WORKLOAD", "SPIFFE ID", "SERIAL", "ENDS", "IN", "PROBLEM"]]
    for one in _certificates(document):
        ends = one["expiresAt"]
        when = [moment(ends), _span(ends - time.time())] if ends is not None else ["-", "-"]
        rows.append([one["workload"] or "(this node)", one["spiffeId"], one["serial"][:16] or "-", *when, one["problem"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show_one(one: dict[str, Any]) -> None:
    click.echo(f"{one['workload']}")
    click.echo(f"  SPIFFE ID  {one['spiffeId']}")
    if one["expiresAt"] is None:
        click.echo("  state      no certificate")
    else:
        click.echo(f"  serial     {one['serial']}")
        click.echo(f"  begins     {moment(one['notBefore'])}")
        click.echo(f"  ends       {moment(one['expiresAt'])}, in {_span(one['expiresAt'] - time.time())}")
        click.echo(f"  renews     {moment(one['renewsAt'])}")
    if one["problem"]:
        click.echo(f"  problem    {one['problem']}")
    from cryptography import x509  # noqa: PLC0415  the daemon's other commands start faster without it

    for number, pem in enumerate(one["chain"]):
        certificate = x509.load_pem_x509_certificate(pem.encode())
        names = certificate.subject.rfc4514_string() or one["spiffeId"]
        click.echo(
            f"  chain {number}    {names}, signed by {certificate.issuer.rfc4514_string()}, until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S UTC}"
        )
        click.echo(pem.rstrip())


def _span(seconds: float) -> str:
    for limit, unit, scale in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{max(0.0, seconds) / scale:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
