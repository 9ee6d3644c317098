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
    renews = None if begins is None or ends is None else (begins + ends) / 2
    return CertificateStatus(
        workload, f"spiffe://mesh.local/{workload}", not_before=begins, expires_at=ends, renews_at=renews, problem=problem
    )


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


@pytest.mark.parametrize(("renews", "expected"), [(NOW + 10, Severity.OK), (NOW - 97, Severity.OK), (NOW - 103, Severity.WARNING)])
def test_one_that_was_dated_back_is_late_by_when_it_was_to_be_renewed_and_not_by_its_age(renews: float, expected: Severity) -> None:
    (found,) = running.certificates(identity(replace(certificate("shop/a", NOW - 400, NOW + 100), renews_at=renews)), NOW)
    assert found.severity is expected, found


def signed(name: str, begins: float, ends: float) -> CertificateStatus:
    """One that lasts for another day, by an authority with these times."""
    one = certificate(f"shop/{name}", NOW - DAY, NOW + DAY)
    return replace(one, authority=f"CN=from {begins - NOW:.0f}", authority_begins_at=begins, authority_ends_at=ends)


@pytest.mark.parametrize(
    ("begins", "ends", "expected"),
    [
        pytest.param(NOW - 7.1 * DAY, NOW + DAY, Severity.WARNING, id="its last eighth"),
        pytest.param(NOW - 6.9 * DAY, NOW + DAY, Severity.OK, id="whoever replaces it has time"),
        pytest.param(NOW - DAY, NOW + DAY, Severity.OK, id="short by design"),
        pytest.param(NOW - 23 * DAY, NOW + DAY + 1, Severity.OK, id="not cut"),
    ],
)
def test_certificates_that_end_with_what_signs_them_are_one_warning_once_it_should_have_been_replaced(
    begins: float, ends: float, expected: Severity
) -> None:
    (found,) = running.certificates(identity(*(signed(name, begins, ends) for name in "abc"), node=signed("", begins, ends)), NOW)
    assert found.severity is expected, found
    if expected is Severity.WARNING:
        assert (found.what, found.where) == (
            "what signs them ends on 1970-01-13 13:46 UTC, in 24.0 h, and they with it",
            f"CN=from {begins - NOW:.0f}",
        )
        assert "mesh-controller ca rotate" in found.next_step


def test_what_an_authority_has_signed_that_was_replaced_is_renewed_in_time() -> None:
    old, new = signed("a", NOW - 23 * DAY, NOW + DAY), signed("b", NOW - DAY / 2, NOW + 23 * DAY)
    (found,) = running.certificates(identity(old, new), NOW)
    assert found.severity is Severity.OK, found


def test_who_is_late_is_named_and_says_nothing_of_the_authority() -> None:
    late = [replace(signed(name, NOW - 23 * DAY, NOW + DAY), renews_at=NOW - 2 * DAY) for name in "ab"]
    assert [found.what for found in running.certificates(identity(*late), NOW)] == [
        f"that of shop/{name} is not renewed; it ends in 24.0 h" for name in "ab"
    ]


def test_the_nodes_own_certificate_is_among_them_and_none_is_fine_without_an_authority() -> None:
    (found,) = running.certificates(identity(node=certificate("", NOW - DAY, NOW - 1)), NOW)
    assert (found.severity, "this node" in found.what) == (Severity.ERROR, True)
    for none in (identity(mode="off"), identity()):
        (found,) = running.certificates(none, NOW)
        assert found.severity is Severity.OK
