"""The Proposals service: what the model would be with other AuthorizationPolicies. Nothing is stored or published. Served by `controller.server`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc

from controller.mesh import Mesh
from controller.objects import Key, Object
from controller.peers import is_local, uris
from controller.schema import read_or_problems
from meshapi import discovery_pb2, proposal_pb2_grpc
from meshapi import proposal_pb2 as pb

KIND: Final = "AuthorizationPolicy"
MAX_BYTES: Final = 4 << 20
"""Of all documents of one question."""
MAX_BYTES_OF_NODES: Final = 256 << 10
"""A node asks for whoever sits there."""
MAX_WAITING: Final = 4
Context = grpc.aio.ServicerContext[Any, Any]


class Proposals(proposal_pb2_grpc.ProposalsServicer):
    """See the module. One question is compiled at a time: each costs as much as a change of the model."""

    def __init__(self, mesh: Mesh, trust_domain: str) -> None:
        self._mesh = mesh
        self._admin = f"spiffe://{trust_domain}/meshagent/admin"
        self._nodes = f"spiffe://{trust_domain}/meshagent/node/"
        self._thread = ThreadPoolExecutor(1, "proposals")
        """One, and none of those in which the model is compiled: it goes on when its caller has gone away."""
        self._open = 0

    async def Compile(self, request: pb.CompileRequest, context: Context) -> pb.CompileResponse:  # noqa: N802  gRPC's names
        """Answer with the difference, or with what is wrong."""
        found = uris(context)
        if not is_local(context) and not any(map(self._may, found)):
            names = ", ".join(found) or "no URI"
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, f"the client certificate must name an administrator or a node; it names {names}"
            )
        most = MAX_BYTES if is_local(context) or self._admin in found else MAX_BYTES_OF_NODES
        if sum(len(document.yaml) for document in request.documents) > most:
            more = "" if most == MAX_BYTES else ", or ask as an administrator"
            return pb.CompileResponse(problems=[f"the files are larger than {most / (1 << 20):g} MiB together: give fewer{more}"])
        if self._open >= MAX_WAITING:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WAITING} others are asking: try again in a moment")
        self._open += 1
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._compiled, request)
        work.add_done_callback(self._done)
        return await asyncio.shield(work)

    def _done(self, work: asyncio.Future[pb.CompileResponse]) -> None:
        self._open -= 1
        if not work.cancelled():
            work.exception()  # whoever still waits has it, too

    def _may(self, uri: str) -> bool:
        return uri == self._admin or uri.startswith(self._nodes)

    def _compiled(self, request: pb.CompileRequest) -> pb.CompileResponse:
        objects = self._mesh.state.objects
        proposed, problems = _read(request)
        gone = {_key(name) for name in request.deleted}
        for key in sorted(gone):
            if key not in objects:
                problems.append(f"there is no {key} to delete: 'meshagent get authz' lists them")
            elif key in proposed:
                problems.append(f"{key} is to be deleted, and is in a file: give one of the two")
        if problems:
            return pb.CompileResponse(problems=problems)
        staged = {key: item for key, item in objects.items() if key not in gone} | proposed
        before = self._mesh.compiled.entities
        return pb.CompileResponse(proposal=difference(before, self._mesh.compile(staged).entities))


def _key(name: str) -> Key:
    """`NAME` is short for `default/NAME`."""
    namespace, slash, rest = name.partition("/")
    return Key(KIND, namespace, rest) if slash else Key(KIND, "default", name)


def _read(request: pb.CompileRequest) -> tuple[dict[Key, Object], list[str]]:
    """The policies in the files, and what is wrong with these."""
    found: dict[Key, Object] = {}
    problems: list[str] = []
    for document in request.documents:
        checked, problem = read_or_problems(document.yaml, document.origin or "stdin")
        problems += [str(problem)] if problem else []
        for one in checked:
            problems += map(str, one.problems)
            if one.object is None:
                continue
            key, item = one.object.key, one.object
            if key.kind != KIND:
                problems.append(str(item.problem((), f"only {KIND} can be tried: take it out of the file")))
            elif key in found:
                problems.append(str(item.problem((), f"is there twice, first at {found[key].file}:{found[key].line}")))
            else:
                found[key] = item
    return found, problems


def difference(before: Mapping[str, discovery_pb2.Entity], after: Mapping[str, discovery_pb2.Entity]) -> pb.Proposal:
    """What policies say, and whom they protect, in `after` other than in `before`."""
    result = pb.Proposal()
    for name, entity in after.items():
        old = before.get(name)
        kind, _, qualified = name.partition("/")
        if kind == "policy" and (old is None or old.policy != entity.policy):
            result.policies.append(entity.policy)
        elif kind == "workload" and old is not None and old.workload.policies != entity.workload.policies:
            result.workloads.append(_protected(qualified, entity.workload.policies))
        elif kind == "service" and old is not None and old.service.external.policies != entity.service.external.policies:
            result.services.append(_protected(qualified, entity.service.external.policies))
    result.removed.extend(sorted(name.partition("/")[2] for name in before.keys() - after.keys() if name.startswith("policy/")))
    return result


def _protected(name: str, policies: Iterable[str]) -> pb.Protected:
    return pb.Protected(name=name, policies=policies)
