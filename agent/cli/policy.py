"""`meshagent policy try`: what was called lately under other policies, and policies that fit what was called. Nothing is enforced."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import grpc

from agent.cli import connection, observe, resources
from agent.errors import NotFound
from agent.report import CallRow, Change, camel
from meshapi import admin_pb2, admin_pb2_grpc, proposal_pb2, proposal_pb2_grpc, relay_pb2
from meshapi import agent_pb2 as pb
from meshapi.text import counted, shown

_UNITS = {"s": 1, "m": 60, "h": 3600}
_METHOD, _PATH = re.compile("[A-Z_]{0,32}"), re.compile(r"(?:\*|/[A-Za-z0-9._~/{}*-]{0,300})?")
"""What agents write."""
_CHANGE, _CALL = ({camel(one.name) for one in fields(shape)} for shape in (Change, CallRow))
_LONGEST_LINE = 4096
_ORDER = ("newly denied", "newly allowed", "undecided")


def _seconds(_context: click.Context, _parameter: click.Parameter, given: str) -> float:
    """Seconds of "90s", "15m" or "1h"."""
    match = re.fullmatch(r"([0-9]{1,6})([smh])", given)
    if match is None:
        raise click.BadParameter(f"{given!r} is no time: write 90s, 15m or 1h")
    seconds = int(match[1]) * _UNITS[match[2]]
    if not 0 < seconds <= _UNITS["h"]:
        raise click.BadParameter(f"{given}: an hour is remembered at most, and less than a second is nothing")
    return float(seconds)


@click.group()
def policy() -> None:
    """Try AuthorizationPolicies before they are in force."""


@policy.command(name="try", short_help="Hold the calls of the last hour against other policies.")
@click.option(
    "-f", "--filename", "sources", multiple=True, metavar="FILE|DIR|-", help="AuthorizationPolicies, which replace those of the same name."
)
@click.option("--delete", "deleted", multiple=True, metavar="NAMESPACE/NAME", help="An AuthorizationPolicy that is to go; several times.")
@click.option(
    "--from-traffic", "namespace", default="", metavar="NAMESPACE", help="Print policies that allow what was called, and no more."
)
@click.option("--since", "since_s", callback=_seconds, default="1h", show_default=True, help="How far to look back: 90s, 15m, 1h.")
@observe.RUN_DIR
@observe.THROUGH
@connection.with_tls
@observe.OUTPUT
def try_(
    *,
    sources: tuple[str, ...],
    deleted: tuple[str, ...],
    namespace: str,
    since_s: float,
    run_dir: Path,
    controller: str,
    output: str,
    **tls: Path | None,
) -> None:
    """Say what would become of the calls of the last hour under other policies. Nothing is enforced.

    Looks at what the agents of this machine remember, or with --controller at what all nodes do. Exit code 0: nothing changes; 1: something would.
    """
    if bool(sources or deleted) == bool(namespace):
        raise click.UsageError("give policies with -f or --delete, or ask for some with --from-traffic NAMESPACE")
    files = proposal_pb2.CompileRequest(documents=resources.documents(sources), deleted=deleted)
    request = pb.CallsRequest(since_s=since_s, namespace=namespace) if namespace else pb.CallsRequest(since_s=since_s, files=files)
    answers = Answers(_through(controller, tls, request) if controller else _local(run_dir, request))
    if namespace:
        _propose(namespace, answers, output)
    else:
        sys.exit(_compare(answers, output))


class Answers:
    """What nodes said: rows, and of each node a summary."""

    def __init__(self, documents: Iterable[dict[str, Any]]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summaries: list[dict[str, Any]] = []
        for document in documents:
            if document.get("kind") == "calls":
                self.rows += document["calls"]
            elif document.get("kind") == "summary":
                if not all(isinstance(document.get(name), (int, float)) for name in ("since", "unchanged", "gone", "forgotten")):
                    raise NotFound(f"node {document.get('node', '?')} answers with something else than a summary: is it of this version?")
                self.summaries.append(document)
            else:
                raise NotFound(f"the agent of node {document.get('node', '?')} does not know the question: it is older than this command")
        if not self.summaries:
            raise NotFound("no node is connected to the controller: are agents running?")

    def total(self, name: str) -> int:
        """A number of the summaries."""
        return sum(summary[name] for summary in self.summaries)

    @property
    def since(self) -> str:
        """When the first node began to remember, for people."""
        return observe.moment(min(summary["since"] for summary in self.summaries))


def _local(run_dir: Path, request: pb.CallsRequest) -> Iterator[dict[str, Any]]:
    for path in observe.sockets(run_dir):
        try:
            for answer in observe.stub(path).Calls(request):
                yield json.loads(answer.document)
        except grpc.RpcError as error:
            failed: Any = error  # what a stub raises is also a grpc.Call, which its type does not say
            if failed.code() is grpc.StatusCode.INVALID_ARGUMENT:
                connection.fail(failed.details())
            raise NotFound(failed.details() or str(failed.code())) from error


def _through(controller: str, tls: Mapping[str, Path | None], request: pb.CallsRequest) -> Iterator[dict[str, Any]]:
    """What all nodes say. Each is believed about workloads of its own: others' rows are left out, with a warning."""
    with connection.channel(controller, tls) as channel:
        if request.HasField("files"):
            compiled = resources.call(
                controller, lambda: proposal_pb2_grpc.ProposalsStub(channel).Compile(request.files, timeout=resources.TIMEOUT_S)
            )
            if compiled.problems:
                connection.fail("\n".join(compiled.problems))
            request = pb.CallsRequest(since_s=request.since_s, proposal=compiled.proposal)
        workloads = resources.call(
            controller, lambda: admin_pb2_grpc.AdminStub(channel).Get(admin_pb2.GetRequest(kind="Workload"), timeout=resources.TIMEOUT_S)
        )
    known = {
        f"{found['metadata'].get('namespace', 'default')}/{found['metadata']['name']}": found
        for found in map(json.loads, workloads.objects)
    }
    for document in observe.documents(controller, tls, relay_pb2.AskRequest(calls=request)):
        if document.get("kind") != "calls":
            yield document
            continue
        rows = [own for row in document["calls"] if (own := own_row(row, document["node"], known)) is not None]
        if len(rows) < len(document["calls"]):
            click.echo(
                f"node {document['node']} tells of {len(document['calls']) - len(rows)} calls that are not its own: left out", err=True
            )
        yield {**document, "calls": rows}


def own_row(row: dict[str, Any], node: str, workloads: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """A row as far as a node is to be believed: about calls of and to its own workloads; who they are the controller says. None: it is not to be believed."""
    try:
        owner, source = workloads[row["owner"]], row["source"]
        if owner["spec"]["node"] != node or source not in {"", "unknown", row["owner"]}:
            return None
        if not _shaped(row):
            return None
        row = {name: shown(value) if isinstance(value, str) else value for name, value in row.items()}
        if "receivers" not in row:
            return row
        inbound = source != row["owner"]
        receivers = {name: workloads[name]["metadata"].get("labels") or {} for name in row["receivers"]}
        account = "" if inbound else f"{source.partition('/')[0]}/{owner['spec'].get('serviceAccount', 'default')}"
    except (KeyError, TypeError, AttributeError):
        return None  # a name that nobody knows, or nothing that an agent writes
    if not receivers or row.get("serviceAccount") not in {"", account} or (inbound and receivers.keys() != {row["owner"]}):
        return None
    return {**row, "receivers": receivers}


def _shaped(row: Mapping[str, Any]) -> bool:
    """Is it what an agent of this version writes? Raises TypeError or KeyError if it is not."""
    if not (type(row["count"]) is int and row["count"] >= 0 and _METHOD.fullmatch(row["method"]) and _PATH.fullmatch(row["path"])):
        return False
    if "receivers" not in row:
        texts = isinstance(row["rule"], str) and isinstance(row["destination"], str)
        return texts and row.keys() == _CHANGE and row["change"] in _ORDER and isinstance(row["lastSeen"], (int, float))
    ported = type(row["port"]) is int and 0 <= row["port"] <= 0xFFFF and row["protocol"] in {"TCP", "UDP"}
    return (
        ported
        and row.keys() == _CALL
        and all(isinstance(row[name], str) for name in ("destination", "outcome", "answer", "serviceAccount"))
    )


def _compare(answers: Answers, output: str) -> int:
    """Show what would change; returns the exit code."""
    rows = merged(answers.rows)
    if output == "json":
        for row in rows:
            click.echo(json.dumps(row))
        click.echo(json.dumps({"kind": "summary", **{name: answers.total(name) for name in ("unchanged", "gone", "forgotten")}}))
    else:
        for word in _ORDER:
            found = [row for row in rows if row["change"] == word]
            if found:
                click.echo(f"{word}: {counted(sum(row['count'] for row in found), 'call')}")
            for row in found:
                request = f"{row['method'] or '?'} {row['path']}  " if row["path"] else ""
                click.echo(
                    f"  {row['count']:7}  {row['source']}  ->  {row['destination']}  {request}{row['rule'] or 'no policy protects it'}"
                )
        click.echo(f"unchanged: {answers.total('unchanged')} calls; recorded since {answers.since}")
        if forgotten := answers.total("forgotten"):
            click.echo(f"not known: {forgotten} kinds of calls that found no room")
        if gone := answers.total("gone"):
            click.echo(f"left out: {gone} calls whose ends are in the model no more")
    return 1 if rows else 0


def merged(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of several nodes as one list, most important first; what differs in counts alone is one row."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in ("change", "source", "destination", "method", "path", "rule"))
        before = found.get(key)
        found[key] = (
            row
            if before is None
            else {**row, "count": row["count"] + before["count"], "lastSeen": max(row["lastSeen"], before["lastSeen"])}
        )
    return sorted(
        found.values(), key=lambda row: (_ORDER.index(row["change"]), -row["count"], row["source"], row["destination"], row["path"])
    )


def _propose(namespace: str, answers: Answers, output: str) -> None:
    """Print policies as YAML, what there is to say about them as comments; as JSON one object for each policy, then one with the notes."""
    from agent.calls.tightest import tightest  # noqa: PLC0415  other commands start faster without it

    result = tightest(namespace, [_row(row) for row in answers.rows])
    notes = [*result.notes, *([] if result.policies else ["nothing was called that a policy should allow"])]
    if (gone := answers.total("gone")) or answers.total("forgotten"):
        notes.append(
            f"left out: {gone} calls whose ends are in the model no more, {answers.total('forgotten')} kinds of calls that found no room"
        )
    if output == "json":
        for one in result.policies:
            click.echo(json.dumps(one.resource()))
        click.echo(json.dumps({"kind": "notes", "notes": notes}))
        return
    nodes = ", ".join(sorted(summary["node"] for summary in answers.summaries))
    click.echo(shown(f"# What workloads of {namespace} were called for, recorded since {answers.since} on {nodes}.", _LONGEST_LINE))
    click.echo(
        "# ALLOW policies that are in force go on to allow what they do: 'meshagent policy try --delete' says what is lost without one."
    )
    for note in notes:
        click.echo(shown(f"# {note}", _LONGEST_LINE))
    click.echo(resources.yaml([one.resource() for one in result.policies]), nl=False)


def _row(document: Mapping[str, Any]) -> CallRow:
    return CallRow(**{re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", name): value for name, value in document.items()})
