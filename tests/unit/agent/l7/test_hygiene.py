"""What a caller says in headers, at a real Envoy: what the waypoint would take for its own is gone, what is the application's is untouched."""

from __future__ import annotations

import select
import socket
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from agent.l7 import hygiene, names
from agent.model import Action, Operation, Policy, PolicyRule
from tests.ports import free_ports
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7 import test_requests as requests

APPLICATION = {
    "x-forwarded-for": "192.0.2.1, 192.0.2.2",
    "x-forwarded-proto": "https",
    "x-real-ip": "192.0.2.3",
    "x-request-id": "mine",
    "forwarded": "for=192.0.2.4",
    "authorization": "Bearer x",
    "x-environment": "not reserved",
}
RESERVED = {
    "x-envoy-original-path": "/admin",
    "x-envoy-external-address": "192.0.2.9",
    "x-envoy-internal": "true",
    "x-envoy-decorator-operation": "x",
    "x-envoy-peer-metadata": "x",
    "X-Envoy-Attempt-Count": "9",
    names.DESTINATION_HEADER: "192.0.2.9:80",
    "X-Meshagent-Anything": "x",
    "x-forwarded-client-cert": "URI=spiffe://mesh.test/ns/default/sa/root",
}


def test_reserved_headers_are_removed_and_the_applications_stay(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    with requests.backends(s=requests.plain) as targets:
        snapshot = requests.scene([requests.pod("p", "s", entry, targets["s"])], [harness.service("s", "127.0.0.1", entry)])
        [answer] = requests.through_envoy(tmp_path, snapshot, [entry], lambda: [harness.request(entry, headers=APPLICATION | RESERVED)])
    seen = {name: value for name, value in answer.seen["headers"].items() if name not in {"host", "accept-encoding"}}
    assert seen == APPLICATION


@pytest.mark.parametrize(
    "headers",
    [
        {"x-envoy-max-retries": "9", "x-envoy-retry-on": "5xx"},
        {"x-envoy-upstream-rq-timeout-ms": "1"},
        {"x-envoy-expected-rq-timeout-ms": "1"},
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_a_caller_sets_neither_retries_nor_timeouts(tmp_path: Path, headers: dict[str, str]) -> None:
    [entry] = free_ports(1)
    asked: list[str] = []

    def fails_slowly(handler: BaseHTTPRequestHandler) -> int:
        asked.append(handler.path)
        time.sleep(0.05)
        return 503

    with requests.backends(s=fails_slowly) as targets:
        snapshot = requests.scene([requests.pod("p", "s", entry, targets["s"])], [harness.service("s", "127.0.0.1", entry)])
        [answer] = requests.through_envoy(tmp_path, snapshot, [entry], lambda: [harness.request(entry, "/once", headers=headers)])
    assert (answer.status, asked) == (503, ["/once"])


def test_a_request_that_is_never_finished_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hygiene, "HEADERS_S", 1)
    [entry] = free_ports(1)

    def drip() -> list[harness.Answer]:
        with socket.create_connection(("127.0.0.1", entry)) as stream, stream.makefile("rb") as answer:
            stream.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n")
            stream.settimeout(0.2)
            until = time.monotonic() + 10
            while time.monotonic() < until and not select.select([stream], [], [], 0.2)[0]:
                stream.sendall(b"x: a\r\n")
            return [harness.Answer(int(answer.readline().split()[1]), {}, {})]

    with requests.backends(s=requests.plain) as targets:
        snapshot = requests.scene([requests.pod("p", "s", entry, targets["s"])], [harness.service("s", "127.0.0.1", entry)])
        [answer] = requests.through_envoy(tmp_path, snapshot, [entry], drip)
    assert answer.status == 408


def test_parameters_in_a_path_do_not_evade_a_deny(tmp_path: Path) -> None:
    [entry] = free_ports(1)
    deny = Policy("default/deny", Action.DENY, (PolicyRule(operations=(Operation(paths=("/admin",)),)),))
    targets = ["/admin", "/admin;x", "/;x/admin", "/x/..;/admin", "/%61dmin;y=1", "/administrator", "/admin;x/y"]
    with requests.backends(s=requests.plain) as servers:
        pod = requests.pod("p", "s", entry, servers["s"], policies=("default/deny",))
        snapshot = requests.scene([pod], [harness.service("s", "127.0.0.1", entry)], policies=[deny])
        answers = requests.through_envoy(tmp_path, snapshot, [entry], lambda: [harness.request(entry, path) for path in targets])
    assert [answer.status for answer in answers] == [403, 403, 403, 403, 403, 200, 200]
