"""Nodes of a Kubernetes cluster: the agent's projected service-account token, checked by the API server. Behind the same interface as join tokens.

The API server says of a token that is bound to a pod on which node that pod runs: `authentication.kubernetes.io/node-name` in `status.user.extra` of a
TokenReview, since Kubernetes 1.30 (https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/#schema-for-service-account-private-claims).
The node that the agent says it is must be that one. A TokenReview that does not name our audience came from a server that did not check it
(https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-review-v1/#TokenReviewStatus).
"""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from controller.errors import ControllerError
from controller.identity.names import SHOWN
from controller.identity.proof import Proof
from controller.identity.refusals import Refused, Unavailable
from meshapi.join import AUDIENCE

TIMEOUT_S: Final = 10.0
MAX_TOKEN: Final = 16_384
MAX_ANSWER: Final = 1 << 20
PARALLEL: Final = 8
_PATH: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
_NODE: Final = "authentication.kubernetes.io/node-name"
_POD: Final = "authentication.kubernetes.io/pod-name"


@dataclass(frozen=True, slots=True)
class ApiServer:
    """How to reach the API server, and whose tokens are believed."""

    url: str
    """https://HOST[:PORT]."""
    ca: Path
    """Who signed its certificate, PEM."""
    token: Path
    """The controller's own service-account token; read for each call, because the kubelet replaces it."""
    agent: str
    """NAMESPACE/NAME of the agents' service account."""

    def check(self) -> None:
        """Raise ControllerError for whatever can be seen to be wrong before the first node joins."""
        parts = urlsplit(self.url)
        if parts.scheme != "https" or not parts.hostname:
            raise ControllerError(f"--kubernetes-api {self.url!r} is not https://HOST[:PORT]: tokens are sent there")
        if self.agent.count("/") != 1 or not all(self.agent.split("/")):
            raise ControllerError(f"--kubernetes-agent {self.agent!r} is not NAMESPACE/SERVICE-ACCOUNT")
        try:
            ssl.create_default_context(cafile=self.ca)
        except (OSError, ssl.SSLError) as error:
            raise ControllerError(
                f"--kubernetes-ca {self.ca} cannot be used: {error.strerror or error}; it must hold PEM certificates"
            ) from error
        _own_token(self.token)


class KubernetesAttestor:
    """Asks the API server whose token it is."""

    def __init__(self, server: ApiServer, barred: Callable[[], Collection[str]]) -> None:
        """`barred` names nodes that an operator has revoked and not restored; it blocks, and raises ControllerError."""
        self._server, self._barred = server, barred
        self._threads = ThreadPoolExecutor(PARALLEL, thread_name_prefix="token-review")

    @asynccontextmanager
    async def proven(self, node: str, proof: str) -> AsyncIterator[Proof]:
        """Enter if the API server knows the token, for us, as the agent's on this node."""
        if not 0 < len(proof) <= MAX_TOKEN or not proof.isascii() or not proof.isprintable():
            raise Refused("service-account-token", "the service-account token is empty, overlong or no token")
        answer = await asyncio.get_running_loop().run_in_executor(self._threads, _review, self._server, proof)
        pod = read_review(answer, self._server.agent, node)
        if node in await asyncio.get_running_loop().run_in_executor(self._threads, self._barred):
            raise Refused(
                "node-revoked",
                f"node {node} was revoked, and whoever has it gets service-account tokens: an operator lets it come back with "
                f"`mesh-controller ca restore {node}`",
            )
        yield Proof(f"pod {pod}")

    def close(self) -> None:
        """Give the threads up; what they ask is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def read_review(answer: bytes, agent: str, node: str) -> str:
    """Return NAMESPACE/NAME of the pod whose token was reviewed. Raises Refused, and Unavailable if the answer is no TokenReview."""
    try:
        review = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise Unavailable("the API server's answer to a TokenReview is no JSON") from error
    status = _mapping(_mapping(review).get("status"))
    if _mapping(review).get("kind") != "TokenReview" or not status:
        raise Unavailable("the API server's answer is no TokenReview with a status")
    if status.get("authenticated") is not True:
        said = status.get("error")
        raise Refused(
            "service-account-token",
            f"the API server does not accept the service-account token: {said[:SHOWN] if isinstance(said, str) else 'no reason given'}; "
            f"it must be projected for audience {AUDIENCE!r} and not be expired",
        )
    if AUDIENCE not in _texts(status.get("audiences")):
        raise Refused(
            "service-account-audience", f"the service-account token is not for audience {AUDIENCE!r}: project one (volumes[].projected)"
        )
    user = _mapping(status.get("user"))
    namespace, _, name = agent.partition("/")
    if user.get("username") != f"system:serviceaccount:{namespace}:{name}":
        raise Refused(
            "service-account-name", f"the token is of {str(user.get('username'))[:SHOWN]!r}, not of the agents' service account {agent}"
        )
    extra = _mapping(user.get("extra"))
    nodes, pods = _texts(extra.get(_NODE)), _texts(extra.get(_POD))
    if len(nodes) != 1 or len(pods) != 1:
        raise Refused(
            "service-account-unbound",
            "the token does not say on which node its pod runs: it must be a projected one (not a secret's), and Kubernetes 1.30 or newer",
        )
    if nodes[0] != node:
        raise Refused(
            "service-account-node",
            f"the token's pod runs on node {nodes[0][:SHOWN]}, not on {node}: --node must be spec.nodeName of the pod",
        )
    return f"{namespace}/{pods[0][:SHOWN]}"


def _review(server: ApiServer, token: str) -> bytes:
    """POST a TokenReview and return the answer. Raises Unavailable; blocks for at most some TIMEOUT_S."""
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token, "audiences": [AUDIENCE]}}
    parts = urlsplit(server.url)
    try:
        own = _own_token(server.token)
        context = ssl.create_default_context(cafile=server.ca)
        connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S, context=context)
        try:
            headers = {"Authorization": f"Bearer {own}", "Content-Type": "application/json", "Accept": "application/json"}
            connection.request("POST", parts.path.rstrip("/") + _PATH, json.dumps(body), headers)
            with connection.getresponse() as response:
                answer = response.read(MAX_ANSWER + 1)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ControllerError, ValueError) as error:
        raise Unavailable(f"the API server {server.url} does not answer: {error}") from error
    if response.status in {401, 403}:
        raise Unavailable(
            f"the API server {server.url} does not let the controller review tokens (status {response.status}): bind ClusterRole system:auth-delegator "
            "to its service account, and check --kubernetes-token"
        )
    if response.status not in {200, 201} or len(answer) > MAX_ANSWER:
        raise Unavailable(f"the API server {server.url} answers a TokenReview with status {response.status} and {len(answer)} bytes")
    return answer


def _own_token(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ControllerError(f"cannot read --kubernetes-token {path}: {getattr(error, 'strerror', None) or 'not a token'}") from error
    if not text or not text.isprintable():
        raise ControllerError(f"--kubernetes-token {path} holds no token")
    return text


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
