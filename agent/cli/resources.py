"""`meshagent apply`, `delete` and `get`: resources through the controller's Admin service. Wired into the command by `agent.cli.main`.

Status 0: done. 1: something was refused or not found, or the controller is not reachable. 2: misuse.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
import grpc

from agent.cli import connection
from meshapi import admin_pb2 as pb
from meshapi import admin_pb2_grpc

DEFAULT_CONTROLLER: Final = "unix:///run/meshagent/controller.sock"
TIMEOUT_S: Final = 60.0
_SUFFIXES: Final = frozenset({".yaml", ".yml"})

_controller = click.option(
    "--controller", envvar="MESHAGENT_CONTROLLER", default=DEFAULT_CONTROLLER, show_default=True, help="Target: unix:///PATH or HOST:PORT."
)
_files = click.option(
    "-f",
    "--filename",
    "sources",
    multiple=True,
    required=True,
    metavar="FILE|DIR|-",
    help="YAML file, directory of them, or - for standard input.",
)


@click.command()
@_files
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="How results are shown.")
@_controller
@connection.with_tls
def apply(sources: tuple[str, ...], output: str, controller: str, **tls: Path | None) -> None:
    """Validate resources and bring them into force."""
    request = pb.ApplyRequest(documents=documents(sources))
    with connection.channel(controller, tls) as channel:
        results = call(controller, lambda: admin_pb2_grpc.AdminStub(channel).Apply(request, timeout=TIMEOUT_S)).results
    _show_results(results, output)


@click.command()
@_files
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="How results are shown.")
@_controller
@connection.with_tls
def delete(sources: tuple[str, ...], output: str, controller: str, **tls: Path | None) -> None:
    """Delete the resources that the files name."""
    request = pb.DeleteRequest(documents=documents(sources))
    with connection.channel(controller, tls) as channel:
        results = call(controller, lambda: admin_pb2_grpc.AdminStub(channel).Delete(request, timeout=TIMEOUT_S)).results
    _show_results(results, output)


@click.command(short_help="Show resources and their status.")
@click.argument("kind")
@click.argument("name", default="")
@click.option("-n", "--namespace", default="", help="Only this namespace; without it, every namespace.")
@click.option("-o", "--output", type=click.Choice(["table", "wide", "json", "yaml"]), default="table", help="How resources are shown.")
@_controller
@connection.with_tls
def get(kind: str, name: str, namespace: str, output: str, controller: str, **tls: Path | None) -> None:
    """Show resources and their status; KIND may be plural or short, or "all". NAME may be NAMESPACE/NAME."""
    if "/" in name:
        before, _, name = name.partition("/")
        if namespace and namespace != before:
            raise click.UsageError(f"-n {namespace} and {before}/{name} name two namespaces")
        namespace = before
    elif name and not namespace:
        namespace = "default"
    request = pb.GetRequest(kind=kind, namespace=namespace, name=name)
    with connection.channel(controller, tls) as channel:
        response = call(controller, lambda: admin_pb2_grpc.AdminStub(channel).Get(request, timeout=TIMEOUT_S))
    if response.error:
        connection.fail(response.error)
    objects = [json.loads(item) for item in response.objects]
    if name and not objects:
        connection.fail(f"there is no {kind} {namespace}/{name}")
    if output == "json":
        click.echo(json.dumps(objects[0] if name else {"kind": "List", "apiVersion": "v1", "items": objects}, indent=2))
    elif output == "yaml":
        click.echo(yaml(objects), nl=False)
    else:
        _show_table(objects, wide=output == "wide")


commands: list[click.Command] = [apply, delete, get]


def call(controller: str, ask: Any) -> Any:
    """Ask a controller; what fails ends the command with one line."""
    try:
        return ask()
    except grpc.RpcError as error:
        connection.fail(connection.unanswered(controller, error, TIMEOUT_S))


def documents(sources: Iterable[str]) -> list[pb.Document]:
    """The contents of files, directories or standard input; ends the command if one cannot be read."""
    found = []
    for source in sources:
        for origin, content in _texts(source):
            try:
                found.append(pb.Document(origin=origin, yaml=content.decode("utf-8-sig")))
            except UnicodeDecodeError as error:
                line = content.count(b"\n", 0, error.start) + 1
                connection.fail(f"{origin}:{line}: not UTF-8: save the file as UTF-8")
    return found


def _texts(source: str) -> Iterator[tuple[str, bytes]]:
    if source == "-":
        yield "stdin", sys.stdin.buffer.read()
        return
    path = Path(source)
    try:
        if not path.is_dir():
            yield source, path.read_bytes()
            return
        files = sorted(item for item in path.rglob("*") if item.suffix in _SUFFIXES and not item.name.startswith(".") and item.is_file())
        for file in files:
            yield str(file), file.read_bytes()
    except OSError as error:
        raise click.BadParameter(f"cannot read {error.filename or source}: {error.strerror}", param_hint="-f") from error
    if not files:
        raise click.BadParameter(f"no *.yaml or *.yml in {source}", param_hint="-f")


def _show_results(results: Iterable[pb.ObjectResult], output: str) -> None:
    results = list(results)
    if output == "json":
        fields = ("kind", "namespace", "name", "action", "message")
        click.echo(json.dumps([{field: getattr(result, field) for field in fields} for result in results], indent=2))
    for result in results if output == "text" else ():
        if result.action == "refused":
            click.echo(result.message, err=True)
            continue
        namespace = f" in {result.namespace}" if result.namespace not in {"", "default"} else ""
        click.echo(f"{result.kind.lower()}/{result.name}{namespace} {result.action}", err=result.action == "not found")
    if not results:
        connection.fail("the files hold no resource")
    sys.exit(1 if any(result.action in {"refused", "not found"} for result in results) else 0)


def yaml(objects: list[dict[str, Any]]) -> str:
    """As documents of one file."""
    from ruamel.yaml import YAML  # noqa: PLC0415 - the daemon imports this module and must not pay for it

    out = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    for index, item in enumerate(objects):
        if index:
            out.write("---\n")
        writer.dump(item, out)
    return out.getvalue()


def _status(item: Mapping[str, Any]) -> tuple[str, str]:
    """Return one word for an object's condition, and the messages of what is not as it should be."""
    bad = [condition for condition in item["status"]["conditions"] if condition["status"] != "True"]
    return (bad[0]["reason"] if bad else "Accepted"), "; ".join(condition["message"] for condition in bad)


def _summary(item: Mapping[str, Any]) -> str:  # noqa: PLR0911 - one for each kind
    """The few words that say most about an object of this kind."""
    spec = item.get("spec") or {}
    kind = item["kind"]
    if kind == "Service":
        ports = ", ".join(f"{port['port']}/{port.get('protocol', 'TCP')}" for port in spec.get("ports", []))
        return f"{', '.join(spec.get('clusterIPs') or [spec.get('clusterIP', '?')])} {ports}"
    if kind == "Workload":
        return f"{', '.join(spec.get('addresses', []))} on {spec.get('node', '?')}"
    if kind in {"HTTPRoute", "GRPCRoute"}:
        return "for " + ", ".join(parent["name"] for parent in spec.get("parentRefs", []))
    if kind == "AuthorizationPolicy":
        rules = len(spec.get("rules", []))
        return f"{spec.get('action', 'ALLOW')}, {rules} {'rule' if rules == 1 else 'rules'}"
    if kind == "PeerAuthentication":
        own = [f"{port} {entry.get('mode', 'UNSET')}" for port, entry in spec.get("portLevelMtls", {}).items()]
        return ", ".join([spec.get("mtls", {}).get("mode", "UNSET"), *own])
    if kind == "Gateway":
        listeners = ", ".join(
            f"{one['name']} {one['protocol']} {one['port']} {one.get('hostname', '*')}" for one in spec.get("listeners", [])
        )
        return f"{spec.get('gatewayClassName', '?')}: {listeners}"
    if kind == "RequestAuthentication":
        return "tokens of " + ", ".join(rule["issuer"] for rule in spec.get("jwtRules", []))
    return ", ".join(f"{name}={value}" for name, value in (item["metadata"].get("labels") or {}).items())


def _show_table(objects: list[dict[str, Any]], *, wide: bool) -> None:
    if not objects:
        click.echo("no resources found", err=True)
        return
    rows = []
    for item in objects:
        word, details = _status(item)
        metadata = item["metadata"]
        row = [
            item["kind"],
            metadata.get("namespace", ""),
            metadata["name"],
            _summary(item) if "spec" in item or "labels" in metadata else "",
            word,
        ]
        rows.append([*row, details, item["status"].get("source", "")] if wide else row)
    header = ["KIND", "NAMESPACE", "NAME", "SUMMARY", "STATUS", *(["DETAILS", "SOURCE"] if wide else [])]
    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 - the daemon imports this module and must not pay for it
        from rich.table import Table  # noqa: PLC0415

        table = Table(*header, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
