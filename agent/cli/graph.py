"""`meshagent graph`: who talks to whom, as a table, JSON, DOT or SVG."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import grpc

from agent.cli import connection, observe
from agent.errors import NotFound
from meshapi import agent_pb2 as pb
from meshapi import relay_pb2
from meshapi.graph import drawing, export
from meshapi.graph.answer import Answer, Edge, Unreadable, decode
from meshapi.graph.merge import Graph, merge
from meshapi.text import counted

PATIENCE_S = 10.0
"""What an agent may take beyond the window."""
_PIPE_WIDTH = 200


@click.command(short_help="Show who talks to whom now: rates, errors, denials.")
@click.option("-n", "--namespace", default="", help="Only calls from and to this namespace.")
@click.option(
    "--window",
    type=click.FloatRange(1, 30),
    default=5.0,
    show_default=True,
    metavar="S",
    help="Rates are taken over S seconds, or somewhat more.",
)
@click.option(
    "-o", "--output", type=click.Choice(["table", "json", "dot", "svg"]), default="table", show_default=True, help="dot: for Graphviz."
)
@observe.RUN_DIR
@observe.THROUGH
@connection.with_tls
def graph(namespace: str, window: float, output: str, run_dir: Path, controller: str, **tls: Path | None) -> None:
    """Show who talks to whom now: rates, errors, denials, latency and mTLS, from this machine's agents or all that a controller knows.

    It takes as long as the window. Exit code 1 if a node does not answer; what the others said is shown all the same.
    """
    problems: list[str] = []
    documents = _through(controller, tls, window, problems) if controller else _here(run_dir, window, problems)
    answers: dict[str, Answer] = {}
    for node, document in documents:
        try:
            answers[node] = decode(document, node)
        except Unreadable as error:
            problems.append(f"{node}: {error}")
    found = merge(answers.values(), problems=problems)
    if namespace:
        found = found.only(namespace)
    if output == "json":
        click.echo(json.dumps(found.document()))
    elif output == "table":
        _show(found)
    else:
        drawn = drawing.draw(found)
        click.echo(export.dot(drawn) if output == "dot" else export.svg(drawn), nl=False)
    for problem in found.problems:
        click.ClickException(problem).show()
    sys.exit(1 if problems else 0)


def _through(controller: str, tls: Mapping[str, Path | None], window: float, problems: list[str]) -> Iterator[tuple[str, bytes]]:
    request = relay_pb2.AskRequest(graph=pb.GraphRequest(window_s=window))
    try:
        yield from observe.told(controller, tls, request)
    except NotFound as error:
        problems.append(str(error))


def _here(run_dir: Path, window: float, problems: list[str]) -> list[tuple[str, bytes]]:
    """What the agents of this machine say, all asked at the same time."""

    def ask(path: Path) -> tuple[str, bytes]:
        agent = observe.stub(path)
        document = agent.Graph(pb.GraphRequest(window_s=window), timeout=window + PATIENCE_S).document
        return str(json.loads(document)["node"]), document

    paths = observe.sockets(run_dir)
    found = []
    with ThreadPoolExecutor(len(paths)) as pool:
        for path, answer in [(path, pool.submit(ask, path)) for path in paths]:
            try:
                found.append(answer.result())
            except grpc.RpcError as error:
                problems.append(f"the agent at {path} does not answer: {error.details() or error.code().name.lower()}")
    return found


def _show(found: Graph) -> None:
    from rich.console import Console  # noqa: PLC0415 - the daemon imports this package and must not pay for it
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    table = Table(box=None, pad_edge=False)
    for name in ("from", "to", "port"):
        table.add_column(name, overflow="fold")
    for name in ("rate/s", "errors/s", "denied/s", "p50", "p99", "bytes/s", "live"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("mTLS", no_wrap=True)
    for edge in found.edges:
        table.add_row(*map(escape, _row(edge)), style="red" if edge.denied else "yellow" if edge.errors else "")
    console.print(table)
    for edge in found.edges:
        for rule in edge.rules:
            console.print(f"[red]denied[/red]  {escape(_row(edge)[0])} -> {escape(_row(edge)[1])}: {escape(rule)}", soft_wrap=True)
    left = f", {found.folded} quieter ones are not shown" if found.folded else ""
    kinds = counted(len(found.edges), "kind of calls", "kinds of calls")
    console.print(f"{kinds}, told by {', '.join(map(escape, found.nodes)) or 'no node'}, over {found.seconds:.1f} s{left}")


def _row(edge: Edge) -> tuple[str, ...]:
    return (
        edge.source or "(outside)",
        edge.destination or "(outside)",
        f"{edge.port or ''} {edge.protocol}".strip(),
        drawing.amount(edge.rate),
        drawing.amount(edge.errors) if edge.errors else "",
        drawing.amount(edge.denied) if edge.denied else "",
        "" if edge.p50 is None else drawing.duration(edge.p50),
        "" if edge.p99 is None else drawing.duration(edge.p99),
        drawing.amount(edge.bytes),
        str(edge.active) if edge.active else "",
        {"all": "yes", "some": "in part", "none": "no", "": ""}[edge.mtls],
    )
