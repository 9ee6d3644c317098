"""The page over real sockets: what is served, to whom, and what hostile clients get."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from controller.errors import ControllerError
from controller.page import http
from controller.page.page import Page
from controller.page.settings import PageSettings
from tests.unit.controller.harness import Authority
from tests.unit.controller.page.harness import PLAN, TOKEN, Relay, get, raw, serving, token_file

HEADERS = ("content-security-policy", "x-content-type-options", "referrer-policy", "cross-origin-resource-policy", "cache-control")
SHOWN = f"Authorization: Bearer {TOKEN}"


def run(scenario: Callable[[Page], Awaitable[None]], *args: Any, **given: Any) -> None:
    async def body() -> None:
        async with serving(*args, **given) as page:
            await asyncio.wait_for(scenario(page), 60)

    asyncio.run(body())


def test_the_files_and_the_graph_are_served_with_strict_headers() -> None:
    async def scenario(page: Page) -> None:
        for path, kind in (
            ("/", "text/html"),
            ("/page.js", "text/javascript"),
            ("/page.css", "text/css"),
            ("/graph.json", "application/json"),
        ):
            status, headers, body = await get(page, path)
            assert (status, headers["content-type"].partition(";")[0], bool(body)) == (200, kind, True)
            assert headers["content-security-policy"].startswith(
                "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"
            )
            assert "unsafe" not in headers["content-security-policy"]
            assert [name for name in HEADERS if name not in headers] == []
        graph = json.loads(body)
        assert graph["nodes"] == ["node-1", "node-2"]
        calls = {(call["source"], call["destination"]): call for arrow in graph["arrows"] for call in arrow["calls"]}
        assert calls["default/other", "default/redis"]["plan"] == "default/redis:6379"
        assert calls["", "default/cart-1"]["plan"] == ""

    run(scenario)


def test_nothing_in_the_files_is_inline_or_from_elsewhere() -> None:
    async def scenario(page: Page) -> None:
        html, script, style = [(await get(page, path))[2].decode() for path in ("/", "/page.js", "/page.css")]
        assert "<style" not in html
        assert html.count("<script") == html.count('<script src="page.js" defer></script>') == 1
        for text in (html, script, style):
            assert [
                word
                for word in ("innerHTML", "insertAdjacent", "document.write", "eval(", "style=", "onclick", "//cdn", "url(")
                if word in text
            ] in (
                [],
                ["url("],  # markers of arrows: #end-STATE
            )

    run(scenario)


def test_a_plan_is_asked_of_the_node_without_a_call() -> None:
    relay = Relay()

    async def scenario(page: Page) -> None:
        status, _, body = await get(page, "/plan.json?source=default/other&destination=default/redis:6379")
        assert (status, json.loads(body)) == (200, PLAN)
        (asked,) = relay.asked
        assert (asked.trace.source, asked.trace.destination, asked.trace.probe, asked.trace.duration_s) == (
            "default/other",
            "default/redis:6379",
            False,
            0,
        )

    run(scenario, relay)


@pytest.mark.parametrize(
    "query",
    [
        "",
        "source=default/other",
        "source=default/nobody&destination=default/redis",
        "source=default/other&destination=a%0ab/c",
        "source=x&destination=" + "a" * 999,
    ],
)
def test_a_plan_of_what_does_not_exist_is_not_asked_for(query: str) -> None:
    relay = Relay()

    async def scenario(page: Page) -> None:
        status, _, body = await get(page, f"/plan.json?{query}")
        assert (status, list(json.loads(body))) == (200, ["error"])
        assert relay.asked == []

    run(scenario, relay)


@pytest.mark.parametrize(
    "path",
    [
        "/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/static/index.html",
        "/page.js/",
        "//page.js",
        "/index.html",
        "/page.js%00",
        "/graph.json/..",
        "/.",
        "/settings.py",
    ],
)
def test_other_paths_are_not_found(path: str) -> None:
    async def scenario(page: Page) -> None:
        status, _, body = await get(page, path)
        assert (status, body) == (404, b"there is /, /graph.json and /plan.json\n")

    run(scenario)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:8080", 200), ("127.0.0.1:1", 200), ("[::1]:5", 200),
        ("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.nip.io", 421), ("", 421), ("[::1", 200), ("10.0.0.1", 421), ("localhost@evil", 421),
    ],
)  # fmt: skip
def test_a_name_that_is_not_the_pages_is_refused(host: str, status: int) -> None:
    """DNS rebinding: a stranger's name that leads to 127.0.0.1 makes a browser take us for that stranger's site."""

    async def scenario(page: Page) -> None:
        for path in ("/", "/graph.json"):
            assert (await get(page, path, host=host))[0] == status

    run(scenario)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, id="no-host"),
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", 421, id="http-1.0-without-host"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400, id="two-hosts"),
        pytest.param(b"GET http://evil/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, id="absolute-form"),
        pytest.param(b"POST /graph.json HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc", 405, id="post"),
        pytest.param(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, id="head"),
        pytest.param(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, id="options"),
        pytest.param(b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, id="connect"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nabcde", 413, id="body"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 413, id="chunks"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 431, id="long-header"),
        pytest.param(b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431, id="long-path"),
        pytest.param(b"GET /?" + b"a=1&" * 100 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, id="many-parameters"),
        pytest.param(b"GET /?a=%ff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, id="not-utf-8"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, id="tls-to-plaintext"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c: d\r\nX : y\r\n\r\n", 400, id="space-before-colon"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 405, id="http-2"),
    ],
)
def test_what_is_not_a_plain_get_is_refused_and_the_connection_ends(request_: bytes, status: int) -> None:
    async def scenario(page: Page) -> None:
        answer = await raw(page, request_)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
        assert b"content-security-policy" in answer.lower()
        assert answer.count(b"HTTP/1.1") == 1
        assert (await get(page, "/"))[0] == 200, "others are served"

    run(scenario)


def test_a_connection_serves_several_requests() -> None:
    async def scenario(page: Page) -> None:
        one = b"GET /page.css HTTP/1.1\r\nHost: localhost\r\n\r\n"
        last = b"GET /page.css HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert (await raw(page, one * 5 + last)).count(b"HTTP/1.1 200 ") == 6

    run(scenario)


def test_a_client_that_sends_its_request_slowly_is_dropped_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_S", 1.0)

    async def scenario(page: Page) -> None:
        async def slowly() -> float:
            started = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", page.port)
            end = asyncio.create_task(reader.read(-1))
            for byte in b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10_000:
                if end.done():
                    break
                writer.write(bytes((byte,)))
                await asyncio.sleep(0.1)
            assert await end == b""
            writer.close()
            return time.monotonic() - started

        slow = [asyncio.create_task(slowly()) for _ in range(23)]
        await asyncio.sleep(0.3)
        started = time.monotonic()
        assert (await get(page, "/"))[0] == 200
        assert time.monotonic() - started < 0.5
        assert all(0.9 < took < 3 for took in await asyncio.gather(*slow))

    run(scenario)


def test_a_client_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WRITE_S", 0.5)

    async def scenario(page: Page) -> None:
        page._files["/page.js"] = http.Response(200, b"x" * (8 << 20))
        _, writer = await asyncio.open_connection("127.0.0.1", page.port, limit=1)
        writer.write(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(0.2)
        assert len(page._server._connections) == 1
        await asyncio.sleep(1)
        assert not page._server._connections
        writer.close()

    run(scenario)


def test_connections_beyond_the_limit_end_at_once_and_there_is_room_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MOST_CONNECTIONS", 5)

    async def scenario(page: Page) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", page.port) for _ in range(5)]
        await asyncio.sleep(0.1)
        reader, writer = await asyncio.open_connection("127.0.0.1", page.port)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read(1) == b""
        writer.close()
        for _, one in idle:
            one.close()
        await asyncio.sleep(0.1)
        assert (await get(page, "/"))[0] == 200

    run(scenario)


def test_who_never_begins_tls_has_a_place_too_and_loses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MOST_CONNECTIONS", 5)
    monkeypatch.setattr(http, "HEAD_S", 1.0)
    authority = Authority(tmp_path, "ca")
    own = authority.issue("page")
    client = ssl.create_default_context(cafile=str(authority.ca))

    async def scenario(page: Page) -> None:
        silent = [await asyncio.open_connection("127.0.0.1", page.port) for _ in range(23)]
        await asyncio.sleep(0.2)
        assert sum(reader.at_eof() for reader, _ in silent) == 23 - 5
        await asyncio.sleep(1.5)
        assert (await get(page, "/", SHOWN, host="127.0.0.1", tls=client))[0] == 200
        for _, writer in silent:
            writer.close()

    run(scenario, token=token_file(tmp_path), tls=own)


def test_data_is_for_who_shows_the_token_and_the_files_are_for_everybody(tmp_path: Path) -> None:
    async def scenario(page: Page) -> None:
        assert (await get(page, "/"))[0] == 200
        for path in ("/graph.json", "/plan.json?source=default/other&destination=default/redis"):
            wrong = (TOKEN[:-1], TOKEN + "0", "", "\xff" * 64, f"{TOKEN} {TOKEN}", f"{TOKEN}, {TOKEN}")
            for header in (
                *(f"Authorization: Bearer {one}" for one in wrong),
                f"Authorization: Basic {TOKEN}",
                f"Cookie: token={TOKEN}",
                "X: y",
            ):
                status, headers, body = await get(page, path, header)
                assert (status, headers.get("www-authenticate")) == (401, "Bearer"), header
                assert b"default" not in body
            assert (await get(page, f"{path}&token={TOKEN}"))[0] == 401 if "?" in path else True
            assert (await get(page, path, SHOWN))[0] == 200

    run(scenario, token=token_file(tmp_path))


@pytest.mark.parametrize(("site", "status"), [("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)])
def test_pages_of_other_sites_get_no_data(site: str, status: int) -> None:
    async def scenario(page: Page) -> None:
        assert (await get(page, "/graph.json", f"Sec-Fetch-Site: {site}"))[0] == status

    run(scenario)


def test_over_tls_the_names_of_the_certificate_are_the_pages(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    own = authority.issue("page")
    client = ssl.create_default_context(cafile=str(authority.ca))

    async def scenario(page: Page) -> None:
        assert (await get(page, "/graph.json", SHOWN, host="127.0.0.1", tls=client))[0] == 200
        assert (await get(page, "/graph.json", host="127.0.0.1", tls=client))[0] == 401
        assert (await get(page, "/graph.json", SHOWN, host="evil.example", tls=client))[0] == 421
        with pytest.raises((ConnectionError, asyncio.TimeoutError, ValueError, IndexError)):
            await get(page, "/", host="127.0.0.1")

    run(scenario, token=token_file(tmp_path), tls=own)


def test_a_unix_socket_is_for_its_owner_alone_and_goes_with_the_page(tmp_path: Path) -> None:
    path = tmp_path / "page.sock"

    async def scenario(page: Page) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (await get(page, "/graph.json"))[0] == 200
        assert (await get(page, "/graph.json", host="evil.example"))[0] == 421

    run(scenario, listen=f"unix:{path}")
    assert not path.exists()


def test_a_file_in_the_sockets_place_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")

    async def scenario(_: Page) -> None: ...

    with pytest.raises(ControllerError, match="this is a file and no socket"):
        run(scenario, listen=f"unix:{path}")
    assert path.read_text() == "data"


def test_a_port_that_is_taken_is_said() -> None:
    async def scenario(page: Page) -> None:
        again = Page(PageSettings(f"127.0.0.1:{page.port}"), Relay(), dict)
        with pytest.raises(ControllerError, match=r"cannot listen on .* for the page: .*give another --page-listen"):
            await again.start()
        await again.stop()

    run(scenario)


@pytest.mark.parametrize(
    ("listen", "files", "message"),
    [
        pytest.param("0.0.0.0:0", "", "--page-token-file, --page-tls-cert, --page-tls-key is not given", id="everybody"),
        pytest.param("[::]:0", "token", "--page-tls-cert, --page-tls-key is not given", id="token-in-plaintext"),
        pytest.param("10.0.0.1:80", "tls", "--page-token-file is not given", id="no-token"),
        pytest.param("127.0.0.1:0", "cert", "belong together", id="half"),
        pytest.param("unix:/x", "tls", "is a unix socket: it has no TLS", id="tls-on-unix"),
        pytest.param("page", "", "is neither ADDRESS:PORT nor unix:PATH", id="no-port"),
        pytest.param("example.com:80", "", "is neither ADDRESS:PORT nor unix:PATH", id="name"),
        pytest.param("127.0.0.1:0", "short", "holds no token of 32 or more", id="short-token"),
        pytest.param("127.0.0.1:0", "open", "can be opened by everybody on this machine: chmod o=", id="open-token"),
        pytest.param("127.0.0.1:0", "missing", "cannot read --page-token-file", id="missing-token"),
        pytest.param("127.0.0.1:0", "swapped", "are no PEM certificate and its unencrypted key", id="swapped"),
    ],
)
def test_what_would_show_the_mesh_to_strangers_or_cannot_work_is_refused(tmp_path: Path, listen: str, files: str, message: str) -> None:
    own = Authority(tmp_path, "ca").issue("page")
    token = {
        "token": lambda: token_file(tmp_path),
        "short": lambda: token_file(tmp_path, "tooshort"),
        "open": lambda: token_file(tmp_path, mode=0o644),
        "missing": lambda: tmp_path / "none",
    }.get(files, lambda: None)()
    certificate = {"tls": own.certificate, "cert": own.certificate, "swapped": own.key}.get(files)
    key = {"tls": own.key, "swapped": own.certificate}.get(files)
    with pytest.raises(ControllerError, match=message) as found:
        Page(PageSettings(listen, token, certificate, key), Relay(), dict)
    assert TOKEN not in str(found.value)
    assert "tooshort" not in str(found.value)


def test_the_token_does_not_show_in_a_repr(tmp_path: Path) -> None:
    page = Page(PageSettings("127.0.0.1:0", token_file(tmp_path)), Relay(), dict)
    assert page.place.token == TOKEN.encode()
    assert TOKEN not in repr(page.place)
