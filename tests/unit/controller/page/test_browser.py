"""The page in a real browser: what is drawn, what a click shows, and that hostile names are text."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from controller.page.live import laid_out
from controller.page.page import Page
from meshapi.graph.answer import Answer
from meshapi.graph.merge import merge
from tests.browser import Browser, browsing
from tests.unit.controller.page.harness import CART, MARKUP, PLAN, REDIS, STRANGER, TOKEN, Relay, serving, token_file, usual

pytestmark = pytest.mark.timeout(180)
DENIED = '[data-key="workload default/other > service default/redis"]'
CALLED = '[data-key="workload default/frontend > service default/cart"]'
COLOUR = "return getComputedStyle(document.querySelector(arguments[0] + ' path')).stroke"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as running:
        yield running


@contextmanager
def page(relay: Relay, **given: Any) -> Iterator[Page]:
    """A page on an event loop in a thread of its own."""
    started: Future[tuple[Page, Callable[[], object]]] = Future()

    async def serve() -> None:
        over = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with serving(relay, **given) as running:
            started.set_result((running, lambda: loop.call_soon_threadsafe(over.set)))
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    running, end = started.result(20)
    try:
        yield running
    finally:
        end()
        thread.join()


def shown(browser: Browser, running: Page) -> None:
    browser.open(f"http://127.0.0.1:{running.port}/")
    browser.until(lambda: browser.run("return document.querySelectorAll('.box').length"))


def test_the_graph_is_drawn_and_a_denied_call_is_red(browser: Browser) -> None:
    with page(usual()) as running:
        shown(browser, running)
        boxes = browser.run("return [...document.querySelectorAll('.box text')].map((one) => one.textContent).sort()")
        assert boxes == ["default/cart", "default/cart-1", "default/frontend", "default/other", "default/redis", "outside the mesh"]
        red, orange = browser.run(COLOUR, DENIED), browser.run(COLOUR, CALLED)
        assert red in {"rgb(198, 40, 40)", "rgb(255, 107, 107)"}
        assert orange in {"rgb(194, 96, 0)", "rgb(255, 167, 38)"}
        assert browser.text(f"{CALLED} text") == "http 80 8.6/s, 0.5/s errors, p99 21 ms, mTLS"
        assert "mtls" in browser.run("return document.querySelector(arguments[0]).getAttribute('class')", CALLED)
        assert browser.text("#state") == "3 calls on node-1, node-2, over 5 s"
        assert browser.run("return document.getElementById('graph').clientWidth <= document.getElementById('canvas').clientWidth"), (
            "it fits"
        )
        complaints = [line for line in browser.console() if "favicon" not in line]
        assert complaints == [], "the page does what its own policy forbids"


def test_a_click_on_a_call_shows_the_plan_of_a_trace(browser: Browser) -> None:
    relay = usual()
    with page(relay) as running:
        shown(browser, running)
        browser.click(f"{DENIED} text")
        browser.until(lambda: "verdict" in browser.text("#details"))
        details = browser.text("#details")
        for words in (
            "default/other → default/redis",
            "plan of trace default/other default/redis:6379",
            "DENY",
            "no L7 feature is used",
            "100.0% default/redis-0",
        ):
            assert words in details
        asked = [one.trace for one in relay.asked if one.HasField("trace")]
        assert [(one.source, one.destination, one.probe) for one in asked] == [("default/other", "default/redis:6379", False)]
        before = browser.run("return document.querySelector('#details section')")
        browser.until(lambda: len([one for one in relay.asked if one.HasField("graph")]) >= 4)
        assert browser.run("return document.querySelector('#details section')") == before, "the plan stays while the graph goes on"


class Hostile:
    """In place of Live, which would not let such names in: who draws must not rely on that."""

    name = f'{MARKUP}</text></svg>"><script>document.title=2</script>'

    async def graph(self) -> bytes:
        named = replace(CART, source=f"default/{self.name}", destination=self.name)
        return json.dumps(laid_out(merge([Answer("node-1", 5.0, (named, REDIS), problems=(self.name,))]))).encode()

    async def plan(self, _source: str, _destination: str) -> Mapping[str, Any]:
        return PLAN

    async def stop(self) -> None: ...


def test_markup_in_names_rules_problems_and_plans_is_text(browser: Browser) -> None:
    with page(usual()) as running:
        running._live = cast("Any", Hostile())
        shown(browser, running)
        assert browser.run(
            "return [...document.querySelectorAll('title')].some((one) => one.textContent.includes(arguments[0]))", Hostile.name
        )
        assert browser.text("#problems li").endswith(Hostile.name)
        browser.click(f"{DENIED} text")
        browser.until(lambda: "verdict" in browser.text("#details"))
        assert f"default/{MARKUP}: no rule matches" in browser.text("#details")
        assert f"a problem with {MARKUP}" in browser.text("#details")
        assert browser.run("return document.querySelectorAll('img, body script, svg script').length") == 0
        assert browser.run("return document.title") == "meshagent"


def test_a_graph_that_changes_is_followed(browser: Browser) -> None:
    relay = usual()
    with page(relay) as running:
        shown(browser, running)
        relay.documents["node-1"] = Answer("node-1", 5.0, (CART,)).encode()
        browser.until(lambda: not browser.run("return document.querySelector(arguments[0])", DENIED))
        assert browser.run("return Boolean(document.querySelector(arguments[0]))", CALLED)


def test_the_token_is_asked_for_and_then_the_graph_is_there(browser: Browser, tmp_path: Path) -> None:
    with page(Relay(Answer("node-2", 5.0, (STRANGER,))), token=token_file(tmp_path)) as running:
        browser.open(f"http://127.0.0.1:{running.port}/")
        browser.until(lambda: browser.text("#state") == "this page wants a token")
        browser.type("#token", "wrong")
        browser.click("#door button")
        browser.until(lambda: browser.text("#state") == "the token is not the one that this controller was given")
        browser.type("#token", TOKEN)
        browser.click("#door button")
        browser.until(lambda: browser.run("return document.querySelectorAll('.box').length"))
        assert browser.run("return document.getElementById('door').hidden")
        assert browser.run("return document.cookie + Object.keys(localStorage) + Object.keys(sessionStorage) + location.href").endswith("/")
