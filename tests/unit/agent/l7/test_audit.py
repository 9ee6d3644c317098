"""What an AUDIT policy would deny, told and counted."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from agent.l7 import audit
from agent.l7.access_log import RequestRecord
from agent.l7.snapshot import build
from agent.model import Action, Operation, Policy, PolicyRule
from tests.ports import free_ports
from tests.unit.agent.l7 import harness
from tests.unit.agent.l7 import test_requests as requests

RULE = "default/watch[0]"


def test_envoy_reports_only_requests_that_a_rule_matches_and_counts_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    [entry] = free_ports(1)
    watch = Policy("default/watch", Action.AUDIT, (PolicyRule(operations=(Operation(paths=("/admin*",)),)),))

    def told_so_far() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == "agent.l7.audit"]

    with requests.backends(s=requests.plain) as targets:
        pod = requests.pod("p", "s", entry, targets["s"], policies=(watch.name,))
        snapshot = requests.scene([pod], [harness.service("s", "127.0.0.1", entry)], policies=[watch])
        resources = build(snapshot, [harness.local(requests.CALLER)], trust_domain=harness.TRUST_DOMAIN)

        async def scenario() -> list[RequestRecord]:
            settings, traced = harness.config(tmp_path), list[RequestRecord]()
            reporter, told = audit.Reporter(), asyncio.Event()

            def tell(record: RequestRecord) -> None:
                reporter.on_record(record)
                if len(told_so_far()) == 2:
                    told.set()

            async with harness.waypoint(settings, traced.append, tell) as (server, _):
                await harness.applied(server, harness.on_loopback(resources, entry))
                for path in ("/", "/admin?token=x", "/admin/a", "/other"):
                    answer = await asyncio.to_thread(harness.request, entry, path)
                    assert answer.status == 200
                await asyncio.wait_for(told.wait(), 10)
                assert await asyncio.to_thread(audit.counts, settings.envoy_admin_socket) == {("outbound", RULE): 2}
            assert await asyncio.to_thread(audit.counts, settings.envoy_admin_socket) == {}, "Envoy is gone"
            return traced

        with caplog.at_level(logging.WARNING, "agent.l7.audit"):
            assert asyncio.run(scenario()) == [], "nothing is traced"
    said = sorted((record.getMessage(), record.__dict__["rule"], record.__dict__["path"]) for record in told_so_far())
    assert said == [("enforcing would deny", RULE, "/admin"), ("enforcing would deny", RULE, "/admin/a")]


def test_a_flood_is_told_in_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    reporter = audit.Reporter(lambda: now[0])
    record = RequestRecord(
        "inbound",
        "default/a",
        "GET",
        "/x",
        "a",
        "HTTP/1.1",
        200,
        (),
        "",
        RULE,
        "",
        "",
        "",
        False,
        "",
        "192.0.2.1:5",
        "",
        1,
        0,
        0,
        0,
        0,
        0,
        0,
    )
    with caplog.at_level(logging.WARNING, "agent.l7.audit"):
        for _ in range(101):
            reporter.on_record(record)
        assert len(caplog.records) == audit.LINES_PER_S
        now[0] = 1.0
        reporter.on_record(record)
    assert caplog.records[-1].__dict__["left_out"] == str(101 - audit.LINES_PER_S)
