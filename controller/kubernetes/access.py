"""Who we are to the API server and whom we take for it, as a kubeconfig file or the pod's service account says: read again when one of the files changes.

The kubelet replaces ca.crt and the token of a pod (https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/), and who rotates a cluster's
certificate authority replaces the certificates that a kubeconfig names (https://kubernetes.io/docs/tasks/tls/manual-rotation-of-ca-certificates/). How such
files are read is lightkube's business; a token file by itself it would read again after a 401 alone, and the API server takes tokens of pods for up to a
year (kube-apiserver's --service-account-extend-token-expiration). Used by `controller.kubernetes.api`.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2
from lightkube.config.client_adapter import ConnectionParams
from lightkube.config.kubeconfig import SERVICE_ACCOUNT, KubeConfig, SingleConfig
from lightkube.core.exceptions import ConfigError

from controller.errors import ControllerError
from controller.kubernetes import handshakes

_log = logging.getLogger(__name__)
CONNECTIONS: Final = 1024
"""One for each watch, of which Secrets of gateways need one each (`controller.kubernetes.secrets`)."""
ACCOUNT: Final = SERVICE_ACCOUNT
"""Where the kubelet puts a pod's."""
_KEEPALIVE: Final = [  # a server whose machine vanished is noticed within 30 s (tcp(7)); a watch may be silent for minutes
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
]
_Contents = tuple[bytes | None, ...]


@dataclass(slots=True, eq=False)
class _Client:
    """Connections that were made with what the files said at one time."""

    made: httpx2.AsyncClient
    server: str
    files: tuple[Path, ...]
    contents: _Contents
    users: int = 0
    """Requests that have not ended."""


class Access:
    """See the module. Belongs to the event loop that asks."""

    def __init__(self, kubeconfig: Path | None, context: str) -> None:
        """Without a kubeconfig file: of the pod this runs in. Raises ControllerError."""
        self._kubeconfig, self._context = kubeconfig, context
        self._where = f"--kubeconfig {kubeconfig}" if kubeconfig else "the pod's service account"
        self._failed = ""
        try:
            self._client = self._read()
        except Exception as error:  # what a file of somebody else may raise in a parser of somebody else
            raise ControllerError(f"cannot use {self._where}: {words(error)}") from error

    @property
    def url(self) -> str:
        """Of the API server."""
        return self._client.server

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx2.AsyncClient]:
        """Lend what to ask with. What was lent before goes on as it was made, until its request ends."""
        await self._look()
        held = self._client
        held.users += 1
        try:
            yield held.made
        finally:
            held.users -= 1
            await self._drop(held)

    async def close(self) -> None:
        """Give up all connections."""
        await self._client.made.aclose()

    async def _look(self) -> None:
        """Take up what the files say now. While they cannot be used, what they said before goes on."""
        before = self._client
        if _contents(before.files) == before.contents:
            self._failed = ""
            return
        try:
            found = self._read(before.server)
        except Exception as error:  # noqa: BLE001  as above
            if self._failed != words(error):
                self._failed = words(error)
                _log.error(
                    "credentials for the API server have changed and cannot be used: those before go on being used",
                    extra={"where": self._where, "error": self._failed},
                )
            return
        self._client, self._failed = found, ""
        _log.info("credentials for the API server were read again", extra={"where": self._where})
        await self._drop(before)

    async def _drop(self, held: _Client) -> None:
        if held is not self._client and not held.users:
            await held.made.aclose()

    def _read(self, server: str = "") -> _Client:
        """`server`: the only one that it may be. Raises whatever is wrong with the files."""
        first = (self._kubeconfig,) if self._kubeconfig else ()
        contents = _contents(first)  # before they are used: what is written meanwhile is a change
        config = _config(self._kubeconfig, self._context)
        user, cluster = config.user, config.cluster
        if server and cluster.server != server:
            raise ConfigError(f"it names another server, {_place(cluster.server)}: start the controller anew if that is meant")
        named = (user.client_cert, user.client_key, user.token_file) if user is not None else ()
        more = tuple(Path(config.abs_file(name)) for name in (cluster.certificate_auth, *named) if name)
        contents += _contents(more)
        if user is not None and user.token_file and not Path(user.token_file).read_text().strip():
            raise ConfigError(f"{user.token_file} has no token")
        parameters = ConnectionParams(trust_env=False).httpx_params(config)
        limits = httpx2.Limits(max_connections=CONNECTIONS)
        parameters["transport"] = handshakes.Transport(parameters.pop("verify"), limits, _KEEPALIVE)
        return _Client(httpx2.AsyncClient(**parameters), cluster.server, first + more, contents)


def _place(url: str) -> str:
    """Host and port, without who somebody is there (RFC 3986, section 3.2.1): that may be a password."""
    return url.rpartition("@")[2] if "@" in url else url


def words(error: Exception) -> str:
    """An error's words, except of those that repeat what they were given: that may be a token."""
    if not isinstance(error, ConfigError | OSError | httpx2.TransportError) or isinstance(error, httpx2.LocalProtocolError):
        return type(error).__name__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")


def _config(kubeconfig: Path | None, context: str) -> SingleConfig:
    found = KubeConfig.from_service_account(ACCOUNT) if kubeconfig is None else KubeConfig.from_file(kubeconfig)
    config = found.get(context or None)
    if config is None or config.user is None:
        raise ConfigError("it names no cluster or no user")
    if config.user.exec is not None:
        raise ConfigError("credentials of a plugin (exec) are not supported: give a token, a token file or a client certificate")
    if config.user.token_file:
        config.user.token_file = str(config.abs_file(config.user.token_file))
    return config


def _contents(files: tuple[Path, ...]) -> _Contents:
    """What is in them, because the kubelet writes all files of a pod's account anew with each token; None of one that cannot be read."""
    found: list[bytes | None] = []
    for file in files:
        try:
            found.append(file.read_bytes())
        except OSError:
            found.append(None)
    return tuple(found)
