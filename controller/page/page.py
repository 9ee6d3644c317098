"""The page itself: what is at which path, and who may have it. Started and stopped by `controller.server`.

The files are everybody's who can connect; what they show, `/graph.json` and `/plan.json`, is for who shows the token, where there is one. The token comes in
a header (RFC 6750) that no browser sends by itself, so no other site can use it. Hosts are checked, so that no name of somebody else's can be made to lead
here (DNS rebinding), and no page of another site may read anything. Nothing can be changed here: GET is all there is.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Callable
from importlib import resources
from typing import Final

from controller.errors import ControllerError
from controller.page.http import HttpServer, Request, Response, refusal
from controller.page.live import Entities, Live, Relay
from controller.page.settings import PageSettings, Place, place

_log = logging.getLogger(__name__)

_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_JSON: Final = "application/json"
_OWN_SITES: Final = {"same-origin", "none"}
"""Sec-Fetch-Site of what our own page, or somebody at the address bar, asks: https://www.w3.org/TR/fetch-metadata/."""


class Page:
    """See the module."""

    def __init__(self, settings: PageSettings, relay: Relay, entities: Callable[[], Entities]) -> None:
        """`relay` asks nodes, `entities` is the compiled model of now. Raises ControllerError for settings that cannot be served."""
        self.place: Place = place(settings)
        self._listen = settings.page_listen
        self._live = Live(relay, entities)
        static = resources.files(__package__) / "static"
        self._files = {path: Response(200, (static / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()}
        self._server = HttpServer(self.answer, _HEADERS)

    @property
    def port(self) -> int:
        """TCP port that is listened on; 0 for a unix socket."""
        return self._server.port

    async def start(self) -> None:
        """Listen. Raises ControllerError."""
        where = self.place
        try:
            if where.socket is None:
                await self._server.listen_tcp(where.host, where.port, where.tls)
            else:
                if where.socket.exists() and not where.socket.is_socket():
                    raise ControllerError(f"--page-listen {self._listen}: this is a file and no socket, and is left as it is")
                where.socket.unlink(missing_ok=True)
                await self._server.listen_unix(where.socket)
        except OSError as error:
            raise ControllerError(f"cannot listen on {self._listen} for the page: {error.strerror}; give another --page-listen") from error
        _log.info("page serving", extra={"listen": self._listen, "port": self.port, "token": "needed" if where.token else "not needed"})

    async def stop(self) -> None:
        """End everything."""
        await self._live.stop()
        if await self._server.stop() and self.place.socket is not None:
            self.place.socket.unlink(missing_ok=True)

    async def answer(self, request: Request) -> Response:
        """Answer one request."""
        if (objection := self._objection(request)) is not None:
            return objection
        if (found := self._files.get(request.path)) is not None:
            return found
        if request.path == "/graph.json":
            return Response(200, await self._live.graph(), _JSON)
        plan = await self._live.plan(request.parameters.get("source", ""), request.parameters.get("destination", ""))
        return Response(200, await asyncio.to_thread(lambda: json.dumps(plan).encode()), _JSON)

    def _objection(self, request: Request) -> Response | None:
        """Why a request is not answered as it wishes; None if it is."""
        if _host(request) not in self.place.names:
            return refusal(421, f"this page is not called that: use {', '.join(sorted(self.place.names))}")
        if request.path in self._files:
            return None
        if request.path not in {"/graph.json", "/plan.json"}:
            return refusal(404, "there is /, /graph.json and /plan.json")
        if request.headers.get("sec-fetch-site", "none") not in _OWN_SITES:
            return refusal(403, "another site's page asks")
        if not self._may(request):
            return refusal(401, "show the token of --page-token-file: Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")
        return None

    def _may(self, request: Request) -> bool:
        if not self.place.token:
            return True
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode("latin-1"), self.place.token)


def _host(request: Request) -> str:
    """The host by which the page was called, without its port: `ssh -L` may have changed that."""
    host = request.headers.get("host", "").lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
