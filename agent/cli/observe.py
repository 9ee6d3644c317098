"""`meshagent status` and `meshagent trace`: ask the agents of this machine and lay out what they say."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import grpc

from agent.cli import connection, live
from agent.errors import NotFound
from agent.plan import qualified
from meshapi import agent_pb2 as pb
from meshapi import agent_pb2_grpc, relay_pb2, relay_pb2_grpc
from meshapi.text import counted, shown

_LONGEST_ERROR = 500
"""Characters of what a node says went wrong."""
RUN_DIR = click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False, readable=False),
    default=Path("/run/meshagent"),
    show_default=True,
    help="Where the agent keeps its socket; a directory of such directories serves several agents.",
)
OUTPUT = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="json: one object a line."
)
THROUGH = click.option("--controller", default="", metavar="TARGET", help="Ask through this controller: unix:///PATH or HOST:PORT.")
NAMESPACE = click.option(
    "-n", "--namespace", default="default", show_default=True, help="Of workloads and services that are named without one."
)
CONNECT_TIMEOUT_S = 5
NEGATIVE = {"denied", "refused", "failed", "timed out", "given up", "401", "403"}
"""Outcomes of a connection that make the command end with exit code 1, as does one that the mesh has a next step for."""
_AUDITED = "would be denied"


def sockets(run_dir: Path) -> list[Path]:
    """The sockets of the agents below `run_dir`. NotFound if there is none."""
    own = run_dir / "agent.sock"
    try:
        found = [own] if own.exists() else sorted(run_dir.glob("*/agent.sock"))
    except PermissionError as error:
        raise NotFound(f"{run_dir} is not yours to look into: run this as root, or ask a controller with --controller") from error
    if not found:
        raise NotFound(f"no agent has its socket in {run_dir}: is 'meshagent run' running, and are you root?")
    return found


def stub(path: Path) -> agent_pb2_grpc.AgentStub:
    """What talks to the agent whose socket is at `path`."""
    return agent_pb2_grpc.AgentStub(grpc.insecure_channel(f"unix:{path}"))


def _statuses(run_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sockets(run_dir):
        try:
            yield path, json.loads(stub(path).Status(pb.StatusRequest(), timeout=CONNECT_TIMEOUT_S).document)
        except grpc.RpcError as error:
            raise NotFound(
                f"the agent at {path} does not answer: {error.details()}; is 'meshagent run' running, and are you root?"
            ) from error


def documents(target: str, tls: Mapping[str, Path | None], request: relay_pb2.AskRequest) -> Iterator[dict[str, Any]]:
    """What nodes say, asked through a controller, which knows which node says it. Raises NotFound once all have answered, if one could not."""
    for node, document in told(target, tls, request):
        found = json.loads(document)
        yield {**found, "node": node} if "node" in found else found


def told(target: str, tls: Mapping[str, Path | None], request: relay_pb2.AskRequest) -> Iterator[tuple[str, bytes]]:
    """The documents that nodes say, each with its node, as `documents`."""
    failed = []
    with connection.channel(target, tls) as channel:
        call = relay_pb2_grpc.RelayStub(channel).Ask(request)
        with _ended_by_interrupt(call):
            try:
                for one in call:
                    if one.error:
                        error = shown(one.error, _LONGEST_ERROR)
                        failed.append(error if one.node in error else f"{one.node}: {error}")
                    else:
                        yield one.node, one.document
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.CANCELLED:
                    raise NotFound(connection.unanswered(target, error)) from error
    if failed:
        raise NotFound("; ".join(failed))


@contextlib.contextmanager
def _ended_by_interrupt(call: Any) -> Iterator[None]:
    """Let Ctrl-C cancel a call. Not KeyboardInterrupt: raised inside a callback of gRPC it would be lost, and the command would go on."""
    before = signal.signal(signal.SIGINT, lambda *_: call.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        call.cancel()


@click.command(short_help="Show whether agents and what they need are in force.")
@RUN_DIR
@THROUGH
@connection.with_tls
@OUTPUT
def status(run_dir: Path, controller: str, output: str, **tls: Path | None) -> None:
    """Show whether this machine's agents are in force, or all that a controller knows. Exit code 1 if one is not ready."""
    ready = True
    asked = relay_pb2.AskRequest(status=pb.StatusRequest())
    for document in documents(controller, tls, asked) if controller else (found for _, found in _statuses(run_dir)):
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
    if waypoint.get("residentBytes"):
        push = f"  last change taken after {waypoint['lastPushSeconds']:.3f} s" if waypoint["pushes"] else ""
        behind = f"  [red]{waypoint['rejected']} resources as before the last refusal[/red]" if waypoint["rejected"] else ""
        console.print(f"              memory {waypoint['residentBytes'] / 1e6:.0f} MB{push}{behind}")
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
    if (held := s.get("identity", {})).get("mode", "off") != "off":
        console.print(f"  identity    {_identity(held)}", soft_wrap=True)
    if (wireguard := s.get("wireguard", {})).get("mode", "off") != "off":
        console.print(f"  wireguard   {_wireguard(wireguard)}", soft_wrap=True)
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


def _wireguard(held: dict[str, Any]) -> str:
    """One line: with how many of the other nodes, and how old the oldest handshake is."""
    if held["mode"] == "unavailable":
        return "[red]not available[/red]: HBONE is used instead"
    ages = [p["handshakeAgeSeconds"] for p in held["peers"] if p["state"] == "encrypted"]
    oldest = f"  oldest handshake {max(ages):.0f} s ago" if ages else ""
    return f"{len(ages)} of {len(held['peers'])} other nodes{oldest}  UDP port {held['port']}  MTU {held['mtu']}"


def _identity(held: dict[str, Any]) -> str:
    """One line: how many certificates there are, and when the first one ends."""
    if held["mode"] == "waiting":
        return "waiting for the controller"
    ends = [w["expiresAt"] for w in held["workloads"] if w["expiresAt"] is not None]
    failing = sum(bool(w["problem"]) for w in held["workloads"])
    parts = [f"{len(ends)} of {len(held['workloads'])} certificates", counted(held["roots"], "trusted root")]
    if ends:
        parts.insert(1, f"first ends {moment(min(ends))}")
    if held["node"] is not None and held["node"]["expiresAt"] is not None:
        parts.append(f"node's ends {moment(held['node']['expiresAt'])}")
    if failing:
        parts.append(f"[red]{failing} not renewed[/red]")
    if not held["kept"]:
        parts.append("kept in memory only")
    return "  ".join(parts)


def moment(unix: float) -> str:
    """A time as people read it: UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _codes(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    for code in given:
        if not re.fullmatch(r"[1-5]([0-9][0-9]|xx)", code):
            raise click.BadParameter(f"{code!r} is no status: write 503, or 5xx for all that begin so")
    return given


@click.command(short_help="Explain what happens to calls, and watch them.")
@click.argument("source")
@click.argument("destination")
@click.option("--probe", is_flag=True, help="Open one connection from the source's namespace (L7: GET /).")
@click.option(
    "--duration", type=click.FloatRange(0), default=10.0, show_default=True, metavar="S", help="Watch for S seconds; 0 shows only the plan."
)
@click.option("--count", type=click.IntRange(0), default=0, help="Stop after N connections or requests.", metavar="N")
@click.option("--method", default="", help="Requests with this method only.")
@click.option("--path", default="", help="Requests with this path only, without the query; PATH* is the beginning of one.")
@click.option(
    "--status", "statuses", multiple=True, callback=_codes, metavar="CODE", help="Requests with this code only: 503, 5xx. Repeatable."
)
@click.option("--errors-only", is_flag=True, help="What failed only: connections that did, codes of 400 and more.")
@click.option("--slow", type=click.FloatRange(0), default=0.0, metavar="MS", help="What took at least MS milliseconds only.")
@NAMESPACE
@RUN_DIR
@THROUGH
@connection.with_tls
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "text", "json"]),
    help="table: the newest, live; text: every hop on a line; json: one object a line.  [default: table on a terminal, or else json]",
)
def trace(  # noqa: PLR0913  each is an option
    source: str,
    destination: str,
    *,
    probe: bool,
    duration: float,
    count: int,
    method: str,
    path: str,
    statuses: tuple[str, ...],
    errors_only: bool,
    slow: float,
    namespace: str,
    run_dir: Path,
    controller: str,
    output: str | None,
    **tls: Path | None,
) -> None:
    """Explain what happens to calls from SOURCE to DESTINATION, then watch them.

    SOURCE is a workload, DESTINATION a service or a workload, each NAMESPACE/NAME, or NAME in the namespace of -n; DESTINATION may end in :PORT.
    `kubelet` as SOURCE is that of the DESTINATION's node: its probes of that workload.
    Exit code 1 if a call is denied, or fails for a reason that has a next step.
    """
    source, destination = within(namespace, source), within(namespace, destination)
    request = pb.TraceRequest(
        source=source,
        destination=destination,
        duration_s=duration,
        count=count,
        probe=probe,
        method=method,
        path=path,
        status=statuses,
        errors_only=errors_only,
        slow_ms=slow,
    )
    negative = False
    awaited = probe and not (method or path or statuses or errors_only or slow)
    found = documents(controller, tls, relay_pb2.AskRequest(trace=request)) if controller else _traced(agent_of(source, run_dir), request)
    with _shown_as(output or ("table" if live.is_terminal() else "json")) as show:
        for document in found:
            negative |= _is_negative(document)
            awaited &= document["kind"] != "connection"
            show(document)
    if awaited:
        connection.fail(
            "nothing answered the probe, or what did was not seen: see the problems of the plan, and 'meshagent status' on the source's node"
        )
    sys.exit(1 if negative else 0)


def _is_negative(document: Mapping[str, Any]) -> bool:
    outcome = document.get("outcome")
    return document.get("verdict") == "DENY" or outcome in NEGATIVE or bool(document.get("nextStep") and outcome != _AUDITED)


def within(namespace: str, name: str) -> str:
    """A name with its namespace; one that has it already, or is a DNS name, stays."""
    return name if "/" in name or "." in name or namespace == "default" else f"{namespace}/{name}"


@contextlib.contextmanager
def _shown_as(output: str) -> Iterator[live.Show]:
    if output == "table":
        with live.table() as show:
            yield show
    else:
        yield live.as_text if output == "text" else lambda document: click.echo(json.dumps(document))


def _traced(socket: Path, request: pb.TraceRequest) -> Iterator[dict[str, Any]]:
    """What an agent of this machine says."""
    call = stub(socket).Trace(request)
    with _ended_by_interrupt(call):
        try:
            for answer in call:
                yield json.loads(answer.document)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                raise NotFound(error.details() or str(error.code())) from error


def agent_of(workload: str, run_dir: Path) -> Path:
    """The agent on whose node a workload runs; the first one if none says so, whose answer then says why."""
    found = sockets(run_dir)
    if len(found) == 1:
        return found[0]
    name = qualified(workload)
    for path, document in _statuses(run_dir):
        if any(f"{w['namespace']}/{w['name']}" == name for w in document["workloads"]):
            return path
    return found[0]
