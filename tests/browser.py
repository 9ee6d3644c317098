"""A headless Chromium, driven over W3C WebDriver by Debian's chromium-driver: what tests and pictures ask of a page.

https://www.w3.org/TR/webdriver2/. Not selenium: a dozen lines of HTTP do.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

START_S = 20.0


class Browser:
    """One window."""

    def __init__(self, port: int, profile: Path, size: tuple[int, int]) -> None:
        self._port = port
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        arguments.append(f"--window-size={size[0]},{size[1]}")
        wanted = {
            "browserName": "chrome",
            "acceptInsecureCerts": True,
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"args": arguments},
        }
        self._session = ""
        self._session = f"/session/{self._ask('POST', '/session', capabilities={'alwaysMatch': wanted})['sessionId']}"

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request(
            method, self._session + path, json.dumps(body) if method == "POST" else None, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        answer = json.loads(response.read())["value"]
        connection.close()
        assert response.status == 200, answer
        return answer

    def open(self, url: str) -> None:
        self._ask("POST", "/url", url=url)

    def run(self, script: str, *args: Any) -> Any:
        """What a function body returns in the page. The driver evaluates it, whatever the page's Content-Security-Policy says."""
        return self._ask("POST", "/execute/sync", script=script, args=list(args))

    def text(self, selector: str) -> str:
        """The text of the first element, "" if there is none."""
        return str(self.run("const found = document.querySelector(arguments[0]); return found ? found.textContent : ''", selector))

    def click(self, selector: str) -> None:
        """A real click of the mouse in the middle of an element."""
        self._ask("POST", f"/element/{self._element(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self._ask("POST", f"/element/{self._element(selector)}/value", text=text)

    def _element(self, selector: str) -> str:
        (reference,) = self._ask("POST", "/element", using="css selector", value=selector).values()
        return str(reference)

    def console(self) -> list[str]:
        """What the page has complained about since the last call: violations of its policy too."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", type="browser") if entry["level"] in {"SEVERE", "WARNING"}]

    def picture(self) -> bytes:
        """A screenshot, PNG."""
        return base64.b64decode(self._ask("GET", "/screenshot"))

    def until(self, condition: Callable[[], object], limit: float = 20.0) -> None:
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < limit, f"not true after {limit} s: {self.text('body')[:2000]}"
            time.sleep(0.05)

    def close(self) -> None:
        self._ask("DELETE", "")


@contextmanager
def browsing(profile: Path, size: tuple[int, int] = (1400, 700)) -> Iterator[Browser]:
    """A browser with a fresh profile. Without one on the machine the test is skipped; with MESH_REQUIRE_KERNEL=1 that is a failure."""
    if shutil.which("chromedriver") is None:
        (pytest.fail if os.environ.get("MESH_REQUIRE_KERNEL") == "1" else pytest.skip)(
            "chromium-driver is not installed: scripts/setup dev"
        )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    profile.mkdir(exist_ok=True)
    with (profile / "driver.log").open("w") as log:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=log, env={**os.environ, "HOME": str(profile)})
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "chromedriver does not answer"
                time.sleep(0.05)
        browser = Browser(port, profile, size)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(10)
