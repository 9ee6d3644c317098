"""The connection to an API server: requests, lists by the page, watches by the line. Knows nothing about kinds.

Where it is and who we are to it `controller.kubernetes.access` knows. What comes from it is bounded here: a page that is too large is asked for again in
smaller ones, and a line that is too long ends the watch.
https://kubernetes.io/docs/reference/using-api/api-concepts/.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx2
from lightkube.core.exceptions import ConfigError

from controller.errors import ControllerError
from controller.kubernetes.access import Access, words

logging.getLogger("httpx2").setLevel(logging.WARNING)  # which says each request at INFO
MAX_PAGE: Final = 64 << 20
"""Bytes. Objects may have 1.5 MiB each (etcd's limit), so a page of 500 of those is asked for in parts."""
MAX_LINE: Final = 8 << 20
"""Bytes of one event of a watch."""
MAX_ERROR: Final = 1 << 16
TIMEOUT_S: Final = 30.0


class Unreachable(Exception):
    """There is no answer, or none that can be understood; str() says why."""


class TooLarge(Exception):
    """A page has more than MAX_PAGE bytes."""


class ApiError(Exception):
    """The API server's own refusal (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/)."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code, self.reason, self.message = code, reason, message


class Api:
    """See the module. One for all that this controller asks; belongs to the event loop."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self.url = access.url

    @classmethod
    def connect(cls, kubeconfig: Path | None = None, context: str = "") -> Api:
        """Prepare the connection that a kubeconfig file describes, or else that of the pod this runs in. Raises ControllerError; asks nothing yet."""
        if kubeconfig is None and not {"KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"} <= os.environ.keys():
            raise ControllerError(
                "no API server: KUBERNETES_SERVICE_HOST is not set, so this runs in no pod of Kubernetes; give --kubeconfig"
            )
        return cls(Access(kubeconfig, context))

    async def get(self, path: str, params: Mapping[str, str]) -> bytes:
        """Return the body of an answer. Raises ApiError, Unreachable and TooLarge."""
        async with self._stream("GET", path, params, TIMEOUT_S) as response:
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MAX_PAGE:
                    raise TooLarge
            return bytes(body)

    @asynccontextmanager
    async def watch(self, path: str, params: Mapping[str, str], silence_s: float) -> AsyncIterator[AsyncIterator[bytes]]:
        """Enter a watch, whose lines are JSON objects; one that says nothing for `silence_s` is over. Raises ApiError and Unreachable."""
        async with self._stream("GET", path, {**params, "watch": "1"}, silence_s) as response:
            yield _lines(response)

    async def send(self, method: str, path: str, body: Any, content_type: str = "application/json", **params: str) -> dict[str, Any]:
        """Write something; return the object that came of it. Raises ApiError and Unreachable."""
        async with self._stream(method, path, params, TIMEOUT_S, json.dumps(body).encode(), content_type) as response:
            return _object(await response.aread())

    async def close(self) -> None:
        """Give up all connections."""
        await self._access.close()

    @asynccontextmanager
    async def _stream(
        self, method: str, path: str, params: Mapping[str, str], read_s: float, body: bytes | None = None, content_type: str = ""
    ) -> AsyncIterator[httpx2.Response]:
        headers = {"Accept": "application/json", "User-Agent": "mesh-controller"} | ({"Content-Type": content_type} if content_type else {})
        try:
            timeout = httpx2.Timeout(TIMEOUT_S, read=read_s)
            async with (
                self._access.client() as client,
                client.stream(method, path, params=dict(params), content=body, headers=headers, timeout=timeout) as response,
            ):
                if response.is_error:
                    raise await _refusal(response)
                yield response
        except (httpx2.HTTPError, httpx2.StreamError, ConfigError, OSError) as error:
            raise Unreachable(f"{self.url}: {words(error)}") from error


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
    held = b""
    async for part in response.aiter_bytes():
        *whole, held = (held + part).split(b"\n")
        for line in whole:
            if line.strip():
                yield line
        if len(held) > MAX_LINE:
            raise Unreachable(f"an event of more than {MAX_LINE >> 20} MiB")


async def _refusal(response: httpx2.Response) -> ApiError:
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) > MAX_ERROR:
            break
    try:
        said = _object(body)
    except Unreachable:  # a proxy on the way answers as it likes
        said = {}
    reason, message = said.get("reason"), said.get("message")
    return ApiError(
        response.status_code,
        reason[:80] if isinstance(reason, str) else "?",
        message[:400] if isinstance(message, str) else body[:200].decode(errors="replace"),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unreachable("an answer that is no JSON") from error
    if not isinstance(found, dict):
        raise Unreachable("an answer that is no object")
    return found
