"""The Join and Identity services: who may have what. They ask the model and the attestors, and leave the making to the certificate authority.

A node is what its proof (Join) or its certificate (everything else) says. A workload's identity follows from the model alone: it must be placed on the
node that asks. Each issue and each refusal is one line of the logger `controller.identity.audit`, without secrets.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import grpc
from cryptography import x509

from controller import metrics
from controller.errors import ControllerError
from controller.identity.attest import Attestor
from controller.identity.ca import CertificateAuthority
from controller.identity.certificates import Chain, Order
from controller.identity.csr import public_key
from controller.identity.jwt import check_audience
from controller.identity.lapse import Clock
from controller.identity.names import SHOWN, node_id, node_of, shown, workload_id
from controller.identity.refusals import Refused, SigningFailed, Unavailable
from controller.identity.trust import der
from controller.peers import is_local, serial, uris
from meshapi import discovery_pb2, identity_pb2_grpc
from meshapi import identity_pb2 as pb

_log = logging.getLogger(__name__)
_audit = logging.getLogger("controller.identity.audit")

MAX_WORKLOADS: Final = 1000  # in one call; Kubernetes recommends at most 110 pods on a node
BURST: Final = 5000  # certificates that a node may ask for at once, and how fast that fills up again
PER_S: Final = 1.0
MAX_STREAMS: Final = 64  # of one node
JOIN_BURST: Final = 60  # the same for joins, of which a Kubernetes token allows any number
JOIN_PER_S: Final = 1 / 60
JWT_BURST: Final = 5000
JWT_PER_S: Final = 50.0
_LATER: Final = "the controller cannot sign now; its log says why; asking again later may help"
Context = grpc.aio.ServicerContext[Any, Any]
FindWorkload = Callable[[str], discovery_pb2.Workload | None]
_BAD_REQUEST: Final = frozenset({"node-name", "proof", "audience", "count"})


@dataclass(slots=True)
class Budget:
    """How much each node may still ask for (a token bucket): one that asks without end must not fill the controller's disk."""

    burst: float
    per_s: float
    monotonic: Clock
    left: dict[str, tuple[float, float]]

    def take(self, node: str, count: int) -> None:
        """Raise Refused if the node has asked for too much."""
        now = self.monotonic()
        amount, since = self.left.get(node, (self.burst, now))
        amount = min(self.burst, amount + (now - since) * self.per_s)
        if amount < count:
            self.left[node] = (amount, now)
            raise Refused(
                "budget",
                f"node {node} has asked for more than {self.burst:.0f} identities in a short time: wait {count / self.per_s:.0f} s",
            )
        self.left[node] = (amount - count, now)


class JoinService(identity_pb2_grpc.JoinServicer):
    """Gives a node its first certificate. Served on a port of its own, where nobody has one."""

    def __init__(self, ca: CertificateAuthority, tokens: Attestor, kubernetes: Attestor | None, monotonic: Clock) -> None:
        self._ca, self._tokens, self._kubernetes = ca, tokens, kubernetes
        self._budget = Budget(JOIN_BURST, JOIN_PER_S, monotonic, {})

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:  # noqa: N802
        """Check the request, then the proof, then sign: a bad request costs no token."""
        node, peer = request.node, context.peer()
        try:
            identity = node_id(self._ca.trust_domain, node)
            order = Order(identity, public_key(request.csr), request.csr, self._ca.settings.lifetime_s, node)
            attestor, proof = self._attestor(request)
            async with attestor.proven(node, proof) as proven:
                self._budget.take(node, 1)  # after the proof: who has none uses nothing up
                knew = await self._ca.in_thread(self._ca.newest, node)
                chain = await _one(self._ca, replace(order, alone=proven.alone, knew=knew))
        except (Refused, Unavailable, ControllerError) as error:
            await _abort(context, "join", node, error)
            raise
        _issued("join", node, chain[0], identity, peer, proof=proven.shown)
        bundle = self._ca.trust.current
        self._ca.delivered(node, bundle)
        return pb.JoinResponse(chain=[der(certificate) for certificate in chain], trust=bundle)

    def _attestor(self, request: pb.JoinRequest) -> tuple[Attestor, str]:
        kind = request.WhichOneof("proof")
        if kind == "token":
            return self._tokens, request.token
        if kind == "service_account_token" and self._kubernetes is not None:
            return self._kubernetes, request.service_account_token
        if kind is not None:
            raise Refused(
                "proof", "this controller does not check service-account tokens: start it with --kubernetes-api, or use a join token"
            )
        raise Refused("proof", "a join token or a service-account token is needed: make one with `mesh-controller token create`")


class IdentityService(identity_pb2_grpc.IdentityServicer):
    """Everything that a node with a certificate may ask for."""

    def __init__(self, ca: CertificateAuthority, workload: FindWorkload, monotonic: Clock) -> None:
        self._ca, self._workload = ca, workload
        self._budget = Budget(BURST, PER_S, monotonic, {})
        self._streams: Counter[str] = Counter()
        self._at_work: set[str] = set()
        """Nodes for which workloads' certificates are being signed: one request each, so that none has all the threads."""
        self._jwt_budget = Budget(JWT_BURST, JWT_PER_S, monotonic, {})

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.JoinResponse:  # noqa: N802
        """Give the node that asks a new certificate for itself."""
        node = await self._node("renew", context)
        try:
            self._budget.take(node, 1)
            identity = node_id(self._ca.trust_domain, node)
            order = Order(identity, public_key(request.csr), request.csr, self._ca.settings.lifetime_s, node, asker=serial(context))
            chain = await _one(self._ca, order)
        except (Refused, Unavailable) as error:
            await _abort(context, "renew", node, error)
            raise
        _issued("renew", node, chain[0], identity, context.peer())
        return pb.JoinResponse(chain=[der(certificate) for certificate in chain], trust=self._ca.trust.current)

    async def Sign(self, request: pb.SignRequest, context: Context) -> pb.SignResponse:  # noqa: N802
        """Give certificates for workloads of the node that asks; each is granted or refused by itself."""
        node = await self._node("sign", context)
        try:
            self._admit(node, len(request.workloads))
        except Refused as error:
            await _abort(context, "sign", node, error)
        self._at_work.add(node)
        work = asyncio.ensure_future(self._ca.in_thread(self._sign, node, request, context.peer(), serial(context)))
        work.add_done_callback(lambda _: self._at_work.discard(node))  # and not when the caller goes away: the thread goes on
        return await asyncio.shield(work)

    async def SignJwt(self, request: pb.SignJwtRequest, context: Context) -> pb.SignJwtResponse:  # noqa: N802
        """Give a JWT-SVID for a workload of the node that asks."""
        node = await self._node("jwt", context)
        try:
            self._jwt_budget.take(node, 1)
            check_audience(request.audience)
            identity = self._identity(node, request.workload)
            token, expires_at = await self._ca.jwt(identity, tuple(request.audience))
        except (Refused, Unavailable) as error:
            await _abort(context, "jwt", node, error)
            raise
        metrics.ISSUED.labels("jwt").inc()
        extra = {"call": "jwt", "node": node, "workload": request.workload, "identity": identity, "until": expires_at}
        _audit.info("identity issued", extra={**extra, "audience": [shown(name) for name in request.audience], "peer": context.peer()})
        return pb.SignJwtResponse(token=token, expires_at=expires_at)

    async def Trust(self, request: pb.TrustRequest, context: Context) -> AsyncIterator[pb.TrustBundle]:  # noqa: ARG002, N802
        """Stream what is trusted: at once, then each change."""
        node = await self._node("trust", context)
        if self._streams[node] >= MAX_STREAMS:
            error = Refused("budget", f"node {node} has {MAX_STREAMS} trust streams open: close some")
            await _abort(context, "trust", node, error)
        self._streams[node] += 1
        sequence = 0
        try:
            while True:
                bundle = await self._ca.trust.newer_than(sequence)
                sequence = bundle.sequence
                yield bundle
                self._ca.delivered(node, bundle)
        finally:
            self._streams[node] -= 1

    def _admit(self, node: str, count: int) -> None:
        if node in self._at_work:
            raise Refused("busy", f"node {node} has a request that is being signed: wait for its answer, there are other nodes")
        if count > MAX_WORKLOADS:
            raise Refused("count", f"{count} workloads in one call, at most {MAX_WORKLOADS}: ask in parts")
        self._budget.take(node, count)

    async def _node(self, call: str, context: Context) -> str:
        """Return the node that the caller's certificate names; exactly one URI name counts (X509-SVID, 5.2)."""
        found = [] if is_local(context) else uris(context)
        node = node_of(self._ca.trust_domain, found[0]) if len(found) == 1 else ""
        if not node:
            error = Refused(
                "caller", f"only a node's certificate may ask for identities; this caller has {', '.join(found)[:SHOWN] or 'none'}"
            )
            await _abort(context, call, "", error)
        return node

    def _sign(self, node: str, request: pb.SignRequest, peer: str, asker: str) -> pb.SignResponse:
        """Do everything that takes time for many workloads; in a worker thread."""
        answers = [pb.Signed() for _ in request.workloads]
        orders: dict[int, Order] = {}
        for index, asked in enumerate(request.workloads):
            try:
                identity = self._identity(node, asked.workload)
                orders[index] = Order(identity, public_key(asked.csr), asked.csr, self._ca.settings.lifetime_s, node, asker=asker)
            except Refused as error:
                answers[index].error = str(error)
                _refused("sign", node, error, peer, workload=shown(asked.workload))
        for (index, order), made in zip(orders.items(), self._ca.issue_now(list(orders.values())), strict=True):
            workload = request.workloads[index].workload
            if isinstance(made, SigningFailed):
                answers[index].error = _LATER
                _refused("sign", node, made, peer, workload=workload)
            else:
                answers[index].chain.extend(der(certificate) for certificate in made)
                _issued("sign", node, made[0], order.spiffe_id, peer, workload=workload)
        return pb.SignResponse(workloads=answers)

    def _identity(self, node: str, workload: str) -> str:
        """Return the SPIFFE ID that the model gives a workload, if it is one of the node's."""
        found = self._workload(workload)
        if found is None:
            raise Refused("workload-unknown", f"there is no workload {workload[:SHOWN]!r}: NAMESPACE/NAME of one that is in the model")
        if found.node != node:
            raise Refused("workload-elsewhere", f"workload {workload} is not on node {node}")
        if not found.enrolled:
            raise Refused(
                "workload-outside", f"workload {workload} is not in the mesh: it has no networkNamespace, or label meshagent.io/mode: none"
            )
        return workload_id(self._ca.trust_domain, found.namespace, found.service_account)


async def _one(ca: CertificateAuthority, order: Order) -> Chain:
    (made,) = await ca.issue([order])
    if isinstance(made, SigningFailed):
        raise made
    return made


async def _abort(context: Context, call: str, node: str, error: Exception) -> None:
    """Write the audit line and end the call."""
    _refused(call, shown(node), error, context.peer())
    if not isinstance(error, Refused):
        await context.abort(grpc.StatusCode.UNAVAILABLE, _LATER)
    elif error.reason in _BAD_REQUEST or error.reason.startswith("csr-"):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    elif error.reason in {"budget", "busy"}:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))


def _refused(call: str, node: str, error: Exception, peer: str, **more: str) -> None:
    reason = error.reason if isinstance(error, Refused) else "unavailable"
    metrics.REFUSED.labels(reason).inc()
    _audit.warning("identity refused", extra={"call": call, "node": node, **more, "reason": reason, "error": str(error), "peer": peer})


def _issued(call: str, node: str, leaf: x509.Certificate, identity: str, peer: str, **more: str) -> None:
    metrics.ISSUED.labels("workload" if call == "sign" else "node").inc()
    extra: Mapping[str, object] = {
        "call": call,
        "node": node,
        **more,
        "identity": identity,
        "serial": f"{leaf.serial_number:x}",
        "until": int(leaf.not_valid_after_utc.timestamp()),
        "peer": peer,
    }
    _audit.info("identity issued", extra=extra)
