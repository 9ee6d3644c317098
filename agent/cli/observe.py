"""`meshagent status` and `meshagent trace`: ask the agents of this machine and lay out what they say."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import grpc

from agent.errors import NotFound
from agent.plan import qualified
from meshapi import agent_pb2 as pb
from meshapi import agent_pb2_grpc

_RUN_DIR = click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/run/meshagent"),
    show_default=True,
    help="Where the agent keeps its socket; a directory of such directories serves several agents.",
)
_OUTPUT = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="json: one object a line."
)
_CONNECT_TIMEOUT_S = 5
NEGATIVE = {"denied", "refused", "failed", "timed out", "given up", "401", "403"}
"""Outcomes of a connection that make the command end with exit code 1."""


def sockets(run_dir: Path) -> list[Path]:
    """The sockets of the agents below `run_dir`. NotFound if there is none."""
    own = run_dir / "agent.sock"
    found = [own] if own.exists() else sorted(run_dir.glob("*/agent.sock"))
    if not found:
        raise NotFound(f"no agent has its socket in {run_dir}: is 'meshagent run' running, and are you root?")
    return found


def _stub(path: Path) -> agent_pb2_grpc.AgentStub:
    return agent_pb2_grpc.AgentStub(grpc.insecure_channel(f"unix:{path}"))


def _statuses(run_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sockets(run_dir):
        try:
            yield path, json.loads(_stub(path).Status(pb.StatusRequest(), timeout=_CONNECT_TIMEOUT_S).document)
        except grpc.RpcError as error:
            raise NotFound(
                f"the agent at {path} does not answer: {error.details()}; is 'meshagent run' running, and are you root?"
            ) from error


@click.command()
@_RUN_DIR
@_OUTPUT
def status(run_dir: Path, output: str) -> None:
    """Show whether this machine's agents are in force. Exit code 1 if one is not ready."""
    ready = True
    for _, document in _statuses(run_dir):
        ready &= document["ready"]
        if output == "json":
            click.echo(json.dumps(document))
        else:
            _show_status(document)
    sys.exit(0 if ready else 1)


def _show_status(s: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415 - the daemon imports this module and must not pay for it
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    console = Console(highlight=False)
    waypoint, controller = s["waypoint"], s["controller"]
    console.print(f"[bold]{s['node']}[/bold]  {'ready' if s['ready'] else '[red]not ready[/red]'}")
    console.print(
        f"  waypoint    {_yes(waypoint['ready'])}  Envoy {waypoint['version']}  pid {waypoint['pid']}  refused configurations {waypoint['nacks']}"
    )
    lag = "" if controller["lagSeconds"] is None else f"  last change in force after {controller['lagSeconds']:.3f} s"
    console.print(f"  controller  {_yes(controller['connected'])}  version {controller['version'] or '-'}{lag}")
    console.print(
        f"  programs    {', '.join(h['name'] + ('' if h['effective'] else ' [red](not running)[/red]') for h in s['hooks'])}",
        soft_wrap=True,
    )
    probe = s.get("probe", {})
    if probe.get("ageSeconds") is not None:
        known = "-" if probe["works"] is None else _yes(probe["works"])
        console.print(f"  live probe  {known}  {probe['ageSeconds']:.0f} s ago")
    for f in s.get("foreignPrograms", ()):
        console.print(
            f"  not ours    {escape(f['name'] or 'a program')} (id {f['id']}) at {f['attachType']} of {escape(f['place'])}", soft_wrap=True
        )
    table = Table("workload", "redirected", "identity", box=None, pad_edge=False)
    for w in s["workloads"]:
        table.add_row(f"{w['namespace']}/{w['name']}", _yes(w["redirected"]), w["identity"])
    console.print(table)
    for problem in s["problems"]:
        console.print(f"  [yellow]![/yellow] {escape(problem)}", soft_wrap=True)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("--probe", is_flag=True, help="Open one connection from the source's namespace (L7: GET /).")
@click.option(
    "--duration", type=click.FloatRange(0), default=10.0, show_default=True, metavar="S", help="Watch for S seconds; 0 shows only the plan."
)
@click.option("--count", type=click.IntRange(0), default=0, help="Stop after N connections or requests.", metavar="N")
@_RUN_DIR
@_OUTPUT
def trace(source: str, destination: str, *, probe: bool, duration: float, count: int, run_dir: Path, output: str) -> None:
    """Explain what happens to calls from SOURCE to DESTINATION, then watch them.

    SOURCE is a workload, DESTINATION a service or a workload, each NAMESPACE/NAME, or NAME in the namespace default; DESTINATION may end in :PORT.
    Exit code 1 if the call is denied.
    """
    request = pb.TraceRequest(source=source, destination=destination, duration_s=duration, count=count, probe=probe)
    negative = False
    call = _stub(_agent_of(source, run_dir)).Trace(request)
    # Not KeyboardInterrupt: raised inside a callback of gRPC it would be lost, and the command would go on.
    before = signal.signal(signal.SIGINT, lambda *_: call.cancel())
    try:
        for answer in call:
            document = json.loads(answer.document)
            negative |= document.get("verdict") == "DENY" or document.get("outcome") in NEGATIVE
            if output == "json":
                click.echo(json.dumps(document))
            elif document["kind"] == "plan":
                _show_plan(document)
            else:
                _show_connection(document)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.CANCELLED:
            raise NotFound(error.details() or str(error.code())) from error
    finally:
        signal.signal(signal.SIGINT, before)
    sys.exit(1 if negative else 0)


def _agent_of(workload: str, run_dir: Path) -> Path:
    """The agent on whose node a workload runs; the first one if none says so, whose answer then says why."""
    found = sockets(run_dir)
    if len(found) == 1:
        return found[0]
    name = qualified(workload)
    for path, document in _statuses(run_dir):
        if any(f"{w['namespace']}/{w['name']}" == name for w in document["workloads"]):
            return path
    return found[0]


def _show_plan(p: dict[str, Any]) -> None:
    rule = f"  rule {p['rule']}" if p["rule"] else ""
    click.echo(f"{p['source']}  ->  {p['destination']}")
    click.echo(f"  verdict     {p['verdict']}{rule}")
    if p.get("audit"):
        click.echo(f"  audit       enforcing {p['audit']} would deny")
    click.echo(f"  level       {p['level']}: {p['reason']}")
    for n, b in enumerate(p["backends"]):
        click.echo(f"  {'backends' if not n else '':11} {b['share']:7.1%}  {b['workload']}  {b['address']}  on {b['node']}")
    click.echo(f"  encryption  {p['encryption']}")
    click.echo(f"  fail mode   {p['failMode']}")
    for problem in p["problems"]:
        click.echo(f"  problem     {problem}")


def _show_connection(c: dict[str, Any]) -> None:
    click.echo(f"\n{c['source']}  ->  {c['destination']}   {c['outcome']}")
    for hop in c["hops"]:
        facts = "  ".join(f"{k} {_fact(v)}" for k, v in hop.items() if k not in {"at", "node", "durationNs"})
        click.echo(f"  {hop['at']:10} {hop['node']:8} {_duration(hop['durationNs']):>9}  {facts}")
    if c["nextStep"]:
        click.echo(f"  next step   {c['nextStep']}")


def _fact(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _duration(ns: int) -> str:
    for limit, unit, scale in ((1_000, "ns", 1), (1_000_000, "µs", 1_000), (1_000_000_000, "ms", 1_000_000)):
        if ns < limit:
            return f"{ns / scale:.4g} {unit}"
    return f"{ns / 1_000_000_000:.4g} s"
