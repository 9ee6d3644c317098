"""What `meshagent check` makes of an agent's own words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from agent.check import running
from agent.check.finding import Finding, Severity
from agent.report import CertificateStatus, ControllerStatus, IdentityStatus, ProbeStatus, Status, WaypointStatus, WorkloadStatus, as_json

NOW = 1_000_000.0
DAY = 86_400.0


def status(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "ready": True,
        "node": "node-1",
        "hooks": (),
        "waypoint": WaypointStatus(ready=True, version="1.40.0", pid=7, nacks=0),
        "controller": ControllerStatus(connected=True, version="v7", lag_seconds=0.023),
        "workloads": (WorkloadStatus("shop", "cart", enrolled=True, redirected=True, identity=""),),
        "problems": (),
        "version": "0.1.0",
    }
    document: dict[str, Any] = as_json(Status(**{**fields, **changes}))
    return document


def certificate(workload: str, begins: float | None, ends: float | None, problem: str = "") -> CertificateStatus:
    return CertificateStatus(workload, f"spiffe://mesh.local/{workload}", not_before=begins, expires_at=ends, problem=problem)


def identity(*workloads: CertificateStatus, mode: str = "on", node: CertificateStatus | None = None) -> dict[str, Any]:
    document: dict[str, Any] = as_json(IdentityStatus(mode=mode, node=node, workloads=workloads))
    return document


def worst(found: list[Finding]) -> Severity:
    assert all(one.next_step for one in found if one.severity is not Severity.OK)
    return max(one.severity for one in found)


def test_an_agent_that_is_well_has_no_warning() -> None:
    found = [*running.agent(status(), "0.1.0"), *running.envoy(status()["waypoint"]), *running.controller(status()["controller"])]
    assert worst(found) is Severity.OK
    assert len(found) == 3


@pytest.mark.parametrize(("own", "said"), [("0.2.0", "the agent is 0.2.0, this command 0.1.0"), ("", "older than 0.1")])
def test_an_agent_of_another_version_is_a_warning(own: str, said: str) -> None:
    found = list(running.agent(status(version=own), "0.1.0"))
    assert (worst(found), said in found[0].what) == (Severity.WARNING, True)


def test_an_agent_that_is_not_ready_is_an_error() -> None:
    assert worst(list(running.agent(status(ready=False), "0.1.0"))) is Severity.ERROR


def test_workloads_that_are_not_redirected_are_drift() -> None:
    drifted = WorkloadStatus("shop", "cart", enrolled=True, redirected=False, identity="", drift=True)
    found = list(running.agent(status(workloads=(drifted,)), "0.1.0"))
    assert worst(found) is Severity.ERROR
    assert any(one.check == "redirect drift" and "shop/cart" in one.what for one in found)


@pytest.mark.parametrize(("works", "expected"), [(False, Severity.ERROR), (True, Severity.OK), (None, Severity.OK)])
def test_a_live_probe_that_gets_through_is_an_error(works: bool | None, expected: Severity) -> None:
    assert worst(list(running.agent(status(probe=ProbeStatus(works, 1.0)), "0.1.0"))) is expected


@pytest.mark.parametrize(
    ("waypoint", "expected"),
    [
        (WaypointStatus(ready=False, version="", pid=None, nacks=0), Severity.ERROR),
        (WaypointStatus(ready=True, version="1.40.0", pid=7, nacks=3, rejected=1, last_nack="listener x: no"), Severity.ERROR),
        (WaypointStatus(ready=True, version="1.40.0", pid=7, nacks=3), Severity.OK),
    ],
    ids=["down", "refuses", "refused-once"],
)
def test_envoy_has_to_be_up_and_with_what_it_was_sent(waypoint: WaypointStatus, expected: Severity) -> None:
    assert worst(list(running.envoy(as_json(waypoint)))) is expected


@pytest.mark.parametrize(
    ("connected", "version", "expected"), [(False, "v7", Severity.ERROR), (True, "", Severity.WARNING), (True, "v7", Severity.OK)]
)
def test_the_controller_has_to_be_connected_and_to_have_said_something(connected: bool, version: str, expected: Severity) -> None:
    assert worst(list(running.controller(as_json(ControllerStatus(connected, version, None))))) is expected


@pytest.mark.parametrize(
    ("one", "expected", "said"),
    [
        pytest.param(certificate("shop/a", NOW - DAY, NOW + DAY), Severity.OK, "1 is in time", id="good"),
        pytest.param(certificate("shop/a", None, None, "no answer"), Severity.ERROR, "shop/a has none", id="none"),
        pytest.param(certificate("shop/a", NOW - 3 * DAY, NOW - DAY), Severity.ERROR, "ended 24.0 h ago", id="ended"),
        pytest.param(certificate("shop/a", NOW + 23, NOW + DAY), Severity.ERROR, "begins in 23 s", id="clock"),
        pytest.param(certificate("shop/a", NOW - 3 * DAY, NOW + 0.9 * DAY), Severity.WARNING, "is not renewed", id="overdue"),
        pytest.param(certificate("shop/a", NOW - DAY, NOW + DAY, "refused"), Severity.WARNING, "is not renewed", id="problem"),
    ],
)
def test_certificates_are_judged_by_their_time(one: CertificateStatus, expected: Severity, said: str) -> None:
    (found,) = running.certificates(identity(one), NOW)
    assert (found.severity, said in found.what) == (expected, True), found


@pytest.mark.parametrize(
    ("authority", "expected"),
    [(NOW + DAY, Severity.WARNING), (NOW + DAY + 1, Severity.OK), (None, Severity.OK)],
    ids=["cut", "not-cut", "none"],
)
def test_certificates_that_end_with_what_signs_them_are_one_warning(authority: float | None, expected: Severity) -> None:
    held = [replace(certificate(f"shop/{name}", NOW - DAY, NOW + DAY), authority_ends_at=authority) for name in "abc"]
    (found,) = running.certificates(identity(*held), NOW)
    assert (found.severity, "the certificate that signs them ends in 24.0 h" in found.what) == (expected, expected is Severity.WARNING), (
        found
    )


def test_the_nodes_own_certificate_is_among_them_and_none_is_fine_without_an_authority() -> None:
    (found,) = running.certificates(identity(node=certificate("", NOW - DAY, NOW - 1)), NOW)
    assert (found.severity, "this node" in found.what) == (Severity.ERROR, True)
    for none in (identity(mode="off"), identity()):
        (found,) = running.certificates(none, NOW)
        assert found.severity is Severity.OK
