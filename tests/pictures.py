"""Pictures for the docs, from a real run of the lab: `make pictures`. Needs root, and the lab must be down."""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from lab import paths, topology
from lab.cli import SHOP
from lab.lab import Lab
from tests.browser import browsing
from tests.kernel import shop

GRAPH = Path("docs/graph.png")
MOST_BYTES = 200_000
CALLS = (
    ("other", "http://frontend/"), ("other", "redis://redis:6379"), ("frontend", "http://cart/items"), ("client", "redis://10.77.1.40:6379"),
)  # fmt: skip


@contextmanager
def page_port() -> Iterator[int]:
    """A port of this machine that leads to the page's unix socket: browsers cannot open that."""
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_page, to_page = await asyncio.open_unix_connection(paths.PAGE_SOCKET)
        await asyncio.gather(pump(reader, to_page), pump(from_page, writer), return_exceptions=True)

    async def serve() -> None:
        over = asyncio.Event()
        server = await asyncio.start_server(lead, "127.0.0.1", 0)
        started.set_result((server.sockets[0].getsockname()[1], asyncio.get_running_loop(), over))
        await over.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    port, loop, over = started.result(20)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


def graph(lab: Lab) -> bytes:
    """The page while the shop works, with the plan of a denied call, PNG."""
    chosen = '[data-key="workload default/other > service default/redis"] text'
    with (
        tempfile.TemporaryDirectory() as profile,
        shop.loads(lab, *CALLS),
        page_port() as port,
        browsing(Path(profile), (1900, 720)) as browser,
    ):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until(lambda: re.search(r"over \d\d s", browser.text("#state")), 60)  # the window has its whole length
        browser.click(chosen)
        browser.until(lambda: "verdict" in browser.text("#details"))
        width = browser.run("return document.getElementById('graph').clientWidth")
        browser.until(lambda: browser.run("return document.getElementById('graph').clientWidth") != width)  # drawn anew beside the details
        return browser.picture()


def main() -> int:
    """Make them all."""
    lab = Lab(topology.load(SHOP / "lab.yaml"))
    lab.up()
    try:
        lab.apply(SHOP / "mesh")
        lab.settle()
        picture = graph(lab)
    finally:
        left = lab.down()
    assert not left, left
    assert len(picture) < MOST_BYTES, f"{GRAPH} would have {len(picture)} bytes"
    GRAPH.parent.mkdir(exist_ok=True)
    GRAPH.write_bytes(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
