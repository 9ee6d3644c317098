"""`meshagent policy try` against the shop: real calls, proposed policies, and policies that are made of what was called."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lab import paths
from lab.cli import SHOP
from lab.lab import Lab
from tests.kernel import shop

pytestmark = pytest.mark.kernel

CALLS = 7
REDIS = "http://10.96.0.20:6379/"
"""For a client that tries once: redis-cli does it again."""
DENY_REDIS = shop.DENY_FRONTEND.format(app="redis")
DENY_ITEMS = """
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: no-items}
spec:
  selector: {matchLabels: {app: cart}}
  action: DENY
  rules: [{to: [{operation: {methods: [GET], paths: ["/items*"]}}]}]
"""


def tried(lab: Lab, *arguments: str, document: str = "") -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Exit code, rows and summary of `meshagent policy try -o json`."""
    file = paths.RUN / "try.yaml"
    file.write_text(document)
    given = ["-f", str(file)] if document else []
    run = lab.meshagent("policy", "try", *given, *arguments, "-o", "json")
    assert run.stdout, run.stderr
    *rows, summary = map(json.loads, run.stdout.splitlines())
    return run.returncode, rows, summary


def node(name: str) -> tuple[str, str]:
    return "--run-dir", str(paths.agent_run(name))


def test_a_proposed_deny_lists_the_connections_that_it_would_end(lab: Lab) -> None:
    tried(lab, *node("node-1"), document=DENY_REDIS)
    for _ in range(CALLS):
        assert shop.ping(lab, "frontend") == "PONG"
        assert shop.codes(lab, "other", REDIS) == {"curl 7": 1}
    code, rows, summary = tried(lab, *node("node-1"), document=DENY_REDIS)
    found = [(r["change"], r["source"], r["destination"], r["method"], r["path"], r["count"], r["rule"]) for r in rows]
    assert found == [("newly denied", "default/frontend", "default/redis:6379", "", "", CALLS, "default/deny-frontend[0]")]
    assert code == 1
    assert summary["unchanged"] >= CALLS
    assert shop.ping(lab, "frontend") == "PONG"  # nothing is enforced


def test_a_proposed_deny_lists_the_requests_that_it_would_refuse(lab: Lab) -> None:
    assert shop.codes(lab, "frontend", f"http://cart/items?secret=[1-{CALLS}]") == {"200": CALLS}
    assert shop.codes(lab, "frontend", f"http://cart/admin/counters?[1-{CALLS}]") == {"403": CALLS}
    code, rows, _ = tried(lab, *node("node-1"), document=DENY_ITEMS)
    found = [(r["change"], r["source"], r["destination"], r["method"], r["path"], r["count"], r["rule"]) for r in rows]
    assert found == [("newly denied", "default/frontend", "default/cart:80", "GET", "/items", CALLS, "default/no-items[0]")]
    assert code == 1


def test_policies_that_are_in_force_already_change_nothing(lab: Lab) -> None:
    code, rows, summary = tried(lab, *node("node-1"), document=(SHOP / "mesh" / "policies.yaml").read_text())
    assert (code, rows) == (0, [])
    assert summary["unchanged"] > 0


def test_without_a_policy_the_calls_that_it_denies_are_newly_allowed(lab: Lab) -> None:
    code, rows, _ = tried(lab, "--delete", "redis-clients", "--controller", shop.CONTROLLER)
    found = [(r["change"], r["source"], r["destination"], r["count"]) for r in rows]
    assert (code, found) == (1, [("newly allowed", "default/other", "default/redis:6379", CALLS)])


def test_what_depends_on_what_is_not_recorded_is_undecided(lab: Lab) -> None:
    document = DENY_ITEMS + '      when: [{key: "request.headers[x-role]", values: [guest]}]\n'
    document = document.replace(
        'rules: [{to: [{operation: {methods: [GET], paths: ["/items*"]}}]}]', "rules:\n    - to: [{operation: {methods: [GET]}}]"
    )
    code, rows, _ = tried(lab, *node("node-1"), document=document)
    assert code == 1
    assert {(r["change"], r["destination"], r["path"], r["rule"]) for r in rows} == {
        ("undecided", "default/cart:80", "/items", "default/no-items[0]")
    }


def test_a_bad_file_is_refused_with_the_field_named(lab: Lab) -> None:
    for place in (node("node-1"), ("--controller", shop.CONTROLLER)):
        path = paths.RUN / "try.yaml"
        path.write_text(
            DENY_ITEMS.replace("methods: [GET]", "methods: GET") + "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n"
        )
        run = lab.meshagent("policy", "try", "-f", str(path), *place)
        assert (run.returncode, run.stdout) == (1, "")
        assert f"{path}:8 AuthorizationPolicy/no-items spec.rules[0].to[0].operation.methods:" in run.stderr
        assert "only AuthorizationPolicy can be tried" in run.stderr


def test_policies_made_of_traffic_keep_it_going_and_deny_a_new_caller(lab: Lab) -> None:
    policies = (SHOP / "mesh" / "policies.yaml").read_text()
    wide = "---\n".join(text for text in policies.split("---\n") if "action: ALLOW" in text)
    with shop.changed(lab):
        shop.delete(lab, wide)
    try:
        for number in range(CALLS):
            assert shop.ping(lab, "frontend") == "PONG"
            assert shop.codes(lab, "frontend", f"http://cart/items/{1000 + number}/price") == {"404": 1}
            assert shop.codes(lab, "frontend", "http://cart/items") == {"200": 1}
        # from the receiver's node too: nobody was told who calls from outside of the mesh
        run = lab.meshagent("policy", "try", "--from-traffic", "default", "--controller", shop.CONTROLLER)
        assert run.returncode == 0, run.stderr
        assert "default/frontend" in run.stdout
        _, rows, _ = tried(lab, "--controller", shop.CONTROLLER, document=run.stdout)
        assert {(r["change"], r["source"], r["destination"]) for r in rows} == {("newly denied", "default/other", "default/redis:6379")}
        assert shop.ping(lab, "other") == "PONG"
        with shop.applied(lab, run.stdout):
            shop.takes(lambda: shop.codes(lab, "frontend", "http://cart/flaky") == {"403": 1})
            assert shop.ping(lab, "frontend") == "PONG"
            assert shop.codes(lab, "frontend", "http://cart/items/9999/price") == {"404": 1}
            assert shop.codes(lab, "frontend", "http://cart/items") == {"200": 1}
            assert "not permitted" in shop.ping(lab, "other")
            assert shop.codes(lab, "other", "http://cart/items") == {"403": 1}
    finally:
        with shop.changed(lab):
            lab.apply(policies)
