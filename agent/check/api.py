"""Questions to a Kubernetes API server: `meshagent check --kubernetes` and the kubectl plugin ask them. Blocking; knows nothing about kinds.

Where the server is and who we are to it is lightkube's business (kubeconfig files with certificates, tokens or plugins that make them, the service account of
a pod). The controller has a client of its own, which watches.
"""

from __future__ import annotations

import email.utils
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx2
from lightkube.config.client_adapter import ConnectionParams
from lightkube.config.kubeconfig import SERVICE_ACCOUNT, KubeConfig, SingleConfig
from lightkube.config.models import NameValue
from lightkube.core.exceptions import ConfigError

from agent.errors import NotFound

logging.getLogger("httpx2").setLevel(logging.WARNING)  # which says each request at INFO
TIMEOUT_S: Final = 15.0
_EXEC_V1, _EXEC_V1BETA1 = "client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"
_EXEC_REQUEST: Final = {"apiVersion": _EXEC_V1, "kind": "ExecCredential", "spec": {"interactive": False}}
_METADATA: Final = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
PAGE: Final = 500
MOST_PAGES: Final = 200
"""100,000 objects: more than Kubernetes supports nodes or namespaces."""


class Unreachable(Exception):
    """No answer, or none that can be understood; str() says why."""


class Refused(Exception):
    """The API server's own answer, when it is no good one (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/)."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Api:
    """One server, as one user. `namespace`: of the context."""

    def __init__(self, client: httpx2.Client, namespace: str) -> None:
        self._client = client
        self.namespace = namespace
        self.url = str(client.base_url).rstrip("/")
        self.ahead_s: float | None = None
        """By how much this machine's clock is ahead of the server's, from its last answer; to the second, as HTTP says it."""

    @classmethod
    def connect(cls, kubeconfig: Path | None = None, context: str = "") -> Api:
        """Prepare the connection that a kubeconfig file or, without any, the pod that this runs in describes. Raises NotFound; asks nothing yet."""
        where = f"kubeconfig {kubeconfig}" if kubeconfig else "the kubeconfig of this user, or the pod's service account"
        try:
            config = _config(kubeconfig or _default(), context)
            return cls(httpx2.Client(**ConnectionParams(timeout=httpx2.Timeout(TIMEOUT_S)).httpx_params(config)), config.namespace)
        except Exception as error:  # what a file of somebody else may raise in a parser of somebody else
            raise NotFound(f"cannot use {where}: {_words(error)}; give --kubeconfig and --context as kubectl has them") from error

    def __enter__(self) -> Api:  # noqa: PYI034 - typing.Self needs Python 3.11
        """Nothing more: a connection is made when it is needed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give up connections."""
        self._client.close()

    def get(self, path: str, params: Mapping[str, str] | None = None, *, metadata: bool = False) -> dict[str, Any]:
        """Return an object, or its metadata alone. Raises Refused and Unreachable."""
        return self._ask("GET", path, params or {}, None, _METADATA if metadata else "application/json")

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Ask by sending an object; return what came of it. Raises Refused and Unreachable."""
        return self._ask("POST", path, {}, body, "application/json")

    def items(self, path: str, selector: str = "") -> list[dict[str, Any]]:
        """Return all objects of a list, page by page. Raises Refused and Unreachable."""
        params = {"limit": str(PAGE)} | ({"labelSelector": selector} if selector else {})
        found: list[dict[str, Any]] = []
        for _ in range(MOST_PAGES):
            page = self.get(path, params)
            found += page.get("items") or []
            following = page.get("metadata", {}).get("continue")
            if not following:
                return found
            params["continue"] = following
        raise Unreachable(f"{path} has more than {MOST_PAGES * PAGE} objects")

    def _ask(self, method: str, path: str, params: Mapping[str, str], body: Mapping[str, Any] | None, accept: str) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, params=dict(params), json=body, headers={"Accept": accept})
        except (httpx2.HTTPError, ConfigError, OSError, ValueError, KeyError) as error:
            raise Unreachable(f"{self.url}: {_words(error)}") from error
        self._read_clock(answer.headers.get("Date", ""))
        try:
            found = answer.json()
        except ValueError:
            found = None
        if answer.is_error:
            said = found.get("message") if isinstance(found, dict) else ""
            raise Refused(answer.status_code, str(said or answer.reason_phrase)[:400])
        if not isinstance(found, dict):
            raise Unreachable(f"{self.url}: an answer that is no JSON object: is this an API server?")
        return found

    def _read_clock(self, date: str) -> None:
        try:
            self.ahead_s = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
        except ValueError:
            return


def _default() -> Path | None:
    """The file that kubectl would read: the first of $KUBECONFIG that is there, or ~/.kube/config."""
    given = [Path(name) for name in os.environ.get("KUBECONFIG", "").split(os.pathsep) if name]
    for path in given or [Path("~/.kube/config").expanduser()]:
        if path.is_file():
            return path
    if not given and Path(SERVICE_ACCOUNT, "token").exists():
        return None
    raise ConfigError(f"there is no {' nor '.join(map(str, given)) or '~/.kube/config'}")


def _config(file: Path | None, context: str) -> SingleConfig:
    config = (KubeConfig.from_file(file) if file else KubeConfig.from_service_account()).get(context or None)
    if config is None or config.user is None:
        raise ConfigError("it names no cluster or no user")
    if (plugin := config.user.exec) is not None and plugin.apiVersion == _EXEC_V1:
        # lightkube does not know this version by its name; it asks and answers as the one before, and the request is in the environment
        # (https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins).
        plugin.apiVersion = _EXEC_V1BETA1
        plugin.env = [*(plugin.env or ()), NameValue("KUBERNETES_EXEC_INFO", json.dumps(_EXEC_REQUEST))]
    return config


def _words(error: Exception) -> str:
    """An error's words, except of those that repeat what they were given: that may be a token."""
    if isinstance(error, ConfigError | OSError | httpx2.TransportError | json.JSONDecodeError) and not isinstance(
        error, httpx2.LocalProtocolError
    ):
        return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")
    return type(error).__name__
