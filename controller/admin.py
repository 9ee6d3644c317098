"""The Admin service behind `meshagent apply|delete|get`: objects into files below DIR/applied and back. Served by `controller.main`.

Who may: the unix socket's owner, or a client certificate that names spiffe://TRUST-DOMAIN/meshagent/admin. Every change is staged first; it is
written only if it would be accepted and would push nothing else out of force. The answer comes when the change is in force.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from ruamel.yaml import YAML

from controller import statuses
from controller.documents import path_text
from controller.errors import Problem
from controller.files import sync_directory, write_atomically
from controller.mesh import Mesh
from controller.objects import Key, Object
from controller.peers import NotAllowed, require
from controller.schema import Checked, Kind, kinds, read_or_problems, suggestion
from controller.source import Source, State
from meshapi import admin_pb2 as pb
from meshapi import admin_pb2_grpc

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
# Written by servers, not by people: not a difference between two versions of an object.
_SERVER_FIELDS = frozenset({"creationTimestamp", "resourceVersion", "generation", "uid", "managedFields", "selfLink"})


class AdminService(admin_pb2_grpc.AdminServicer):
    """Apply, Delete and Get."""

    def __init__(self, mesh: Mesh, trust_domain: str) -> None:
        self._mesh = mesh
        self._uri = f"spiffe://{trust_domain}/meshagent/admin"

    async def Apply(self, request: pb.ApplyRequest, context: Context) -> pb.ApplyResponse:  # noqa: N802
        """Store every valid document; one result per document, in order."""
        await self._authorize(context)
        results = await asyncio.shield(self._change("apply", _apply, request.documents))
        return pb.ApplyResponse(results=results)

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:  # noqa: N802
        """Delete the object that each document names; only kind, namespace and name of the document count."""
        await self._authorize(context)
        results = await asyncio.shield(self._change("delete", _delete, request.documents))
        return pb.DeleteResponse(results=results)

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:  # noqa: N802
        """Return what is in force, and what is refused, with its status."""
        await self._authorize(context)
        wanted, error = _kinds_named(request.kind)
        if error:
            return pb.GetResponse(error=error)
        state = self._mesh.state
        found = []
        for key in sorted({*state.objects, *state.refused}):
            if key.kind not in wanted or (request.name and key.name != request.name):
                continue
            if request.namespace and key.namespace and key.namespace != request.namespace:
                continue
            found.append(json.dumps(self._shown(state, key)).encode())
        return pb.GetResponse(objects=found)

    async def _change(
        self, verb: str, work: Callable[[Source, list[Checked]], list[pb.ObjectResult]], documents: Any
    ) -> list[pb.ObjectResult]:
        """Do `work` with every document, then wait until the model says so. Shielded by its callers: a client that leaves stops nothing."""
        parsed = await asyncio.to_thread(_read, documents)
        async with self._mesh.change() as source:
            if not isinstance(source, Source):
                return [pb.ObjectResult(action="refused", message=_ELSEWHERE) for _ in parsed]
            done = iter(await asyncio.to_thread(work, source, [checked for checked, problem in parsed if problem is None]))
        results = [next(done) if problem is None else pb.ObjectResult(action="refused", message=str(problem)) for _, problem in parsed]
        for result in results:
            _log.info(verb, extra={"kind": result.kind, "object": f"{result.namespace}/{result.name}", "action": result.action})
        return results

    async def _authorize(self, context: Context) -> None:
        try:
            require(context, self._uri)
        except NotAllowed as error:
            _log.warning("admin call refused", extra={"peer": context.peer(), "error": str(error)})
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))

    def _shown(self, state: State, key: Key) -> dict[str, Any]:
        item = state.objects.get(key)
        status = statuses.of(state, self._mesh.compiled, key)
        if item is not None:
            metadata = {"namespace": key.namespace, **item.metadata} if key.namespace else dict(item.metadata)
            return {**_public(item.data), "metadata": _public(metadata), "status": {**status, "source": item.file}}
        metadata = {"name": key.name, "namespace": key.namespace} if key.namespace else {"name": key.name}
        return {"apiVersion": kinds()[key.kind].api_version, "kind": key.kind, "metadata": metadata, "status": status}


def _public(data: Mapping[str, Any]) -> dict[str, Any]:
    """An object, or its metadata, without what a Secret holds; kubectl writes all of it into an annotation again."""
    shown = {name: value for name, value in data.items() if name not in {"data", "stringData"}}
    if annotations := shown.get("annotations"):
        shown["annotations"] = {name: value for name, value in annotations.items() if name != _LAST_APPLIED}
    return shown


_ELSEWHERE = "the objects of this mesh come from a Kubernetes API server: change them with kubectl"
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def _read(documents: Any) -> list[tuple[Checked, Problem | None]]:
    found: list[tuple[Checked, Problem | None]] = []
    for document in documents:
        checked, problem = read_or_problems(document.yaml, document.origin or "stdin")
        found += [(item, None) for item in checked]
        if problem is not None:
            found.append((Checked(None, None, ()), problem))
    return found


def _result(key: Key | None, action: str, message: str = "") -> pb.ObjectResult:
    if key is None:
        return pb.ObjectResult(action=action, message=message)
    return pb.ObjectResult(kind=key.kind, namespace=key.namespace, name=key.name, action=action, message=message)


@dataclass(frozen=True, slots=True)
class _Plan:
    """One object that is to be written."""

    item: Object
    target: Path
    text: str
    held: Object | None


def _apply(source: Source, batch: list[Checked]) -> list[pb.ObjectResult]:
    """Store what is valid; all together if nothing in the batch meets an objection, otherwise one after the other."""
    plans = [_plan(source, checked) for checked in batch]
    changes = {plan.target: plan.text for plan in plans if isinstance(plan, _Plan)}
    if 1 < len(changes) == sum(isinstance(plan, _Plan) for plan in plans):
        staged = source.stage(changes)
        if not any(isinstance(plan, _Plan) and _objection(source.state, staged, plan.item, plan.target) for plan in plans):
            results = [plan if isinstance(plan, pb.ObjectResult) else _write(plan) for plan in plans]
            source.load()
            return results
    results = []
    for checked in batch:
        plan = _plan(source, checked)  # again: what came before it in the batch may have changed what it means
        if isinstance(plan, _Plan):
            problem = _objection(source.state, source.stage({plan.target: plan.text}), plan.item, plan.target)
            results.append(_result(plan.item.key, "refused", problem) if problem else _write(plan))
            source.load()
        else:
            results.append(plan)
    return results


def _plan(source: Source, checked: Checked) -> _Plan | pb.ObjectResult:
    key, item = checked.key, checked.object
    if key is None or item is None:
        return _result(key, "refused", "\n".join(str(problem) for problem in checked.problems))
    target = source.applied_path(key)
    foreign = [path for path in source.files_of(key) if path != target]
    if foreign:
        return _result(key, "refused", str(item.problem((), f"lives in the file {foreign[0]}: change it there, or remove it there first")))
    held = source.state.objects.get(key)
    if held is not None and key not in source.state.refused and target in source.files_of(key) and _same(held.data, item.data):
        return _result(key, "unchanged")
    return _Plan(item, target, _text(item, held), held)


def _write(plan: _Plan) -> pb.ObjectResult:
    try:
        write_atomically(plan.target, plan.text)
    except OSError as error:
        return _result(
            plan.item.key, "refused", str(plan.item.problem((), f"cannot be stored in {plan.target}: {error.strerror or error}"))
        )
    return _result(plan.item.key, "configured" if plan.held else "created")


def _objection(before: State, staged: State, item: Object, target: Path) -> str:
    """Return why a staged change must not be written, or nothing."""
    if item.key in staged.refused:
        # The staged text has other line numbers than the text that the user gave.
        lines = {path_text(path): line for path, line in item.lines.items()}
        return "\n".join(
            str(replace(problem, file=item.file, line=lines.get(problem.field, item.line))) for problem in staged.refused[item.key]
        )
    pushed_out = sorted(set(staged.refused) - set(before.refused))
    if pushed_out:
        return str(item.problem((), f"would put {pushed_out[0]} out of force"))
    unreadable = [problem for problem in staged.problems if problem.file == str(target)]
    return str(item.problem((), unreadable[0].message)) if unreadable else ""


def _delete(source: Source, batch: list[Checked]) -> list[pb.ObjectResult]:
    return [_delete_one(source, checked) for checked in batch]


def _delete_one(source: Source, checked: Checked) -> pb.ObjectResult:
    key = checked.key
    if key is None:
        return _result(None, "refused", "\n".join(str(problem) for problem in checked.problems))
    target = source.applied_path(key)
    files = source.files_of(key)
    foreign = [path for path in files if path != target]
    if foreign:
        return _result(key, "refused", f"{key} lives in the file {foreign[0]}: remove it there")
    if target not in files:
        return _result(key, "not found")
    try:
        target.unlink()
        sync_directory(target.parent)
        source.load()
    except OSError as error:
        return _result(key, "refused", f"{target} cannot be removed: {error.strerror or error}")
    return _result(key, "deleted")


def _meaning(data: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {name: value for name, value in data["metadata"].items() if name not in _SERVER_FIELDS and value}
    metadata.setdefault("namespace", "default")
    return {**data, "metadata": metadata}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return _meaning(one) == _meaning(other)


def _text(item: Object, held: Object | None) -> str:
    """Spell an object as YAML, stamped with the time it was first applied: Gateway API lets the older of two routes win."""
    metadata = dict(item.metadata)
    if item.key.namespace:
        metadata["namespace"] = item.key.namespace
    stamp = held.metadata.get("creationTimestamp") if held else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if stamp:
        metadata["creationTimestamp"] = stamp
    out = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.dump({**item.data, "metadata": metadata}, out)
    return "# Written by `meshagent apply`; change it with `meshagent apply` or `meshagent delete`.\n" + out.getvalue()


def _kinds_named(word: str) -> tuple[set[str], str]:
    known: dict[str, Kind] = {spelling: kind for kind in kinds().values() for spelling in kind.words}
    if word.lower() == "all":
        return set(kinds()), ""
    kind = known.get(word.lower())
    if kind is None:
        hint = suggestion(word, known) or f"; known are {', '.join(item.plural for item in kinds().values())}, all"
        return set(), f'unknown kind "{word[:80]}"{hint}'
    return {kind.kind}, ""
