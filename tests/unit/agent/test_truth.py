"""How what was found of drift, the probe and foreign programs becomes metrics."""

from __future__ import annotations

from agent import telemetry
from agent.report import ControllerStatus, ForeignProgram, ProbeStatus, Status, WaypointStatus, WorkloadStatus


def test_drift_the_probe_and_foreign_programs_are_metrics() -> None:
    workloads = tuple(
        WorkloadStatus("default", name, enrolled=enrolled, redirected=not drift, identity="", drift=drift)
        for name, enrolled, drift in (("good", True, False), ("stray", True, True), ("outside", False, False))
    )
    status = Status(
        ready=False, node="n", hooks=(), waypoint=WaypointStatus(ready=True, version="1", pid=1, nacks=0),
        controller=ControllerStatus(connected=True, version="v", lag_seconds=None), workloads=workloads, problems=(),
        probe=ProbeStatus(works=False, age_seconds=1.0), foreign_programs=(ForeignProgram(1, "guard", "cgroup_inet4_connect", "/"),),
    )  # fmt: skip
    found = {(s.name, *s.labels.values()): s.value for family in telemetry._truth(status) for s in family.samples}
    assert {key: value for key, value in found.items() if key[0] == "mesh_redirect_drift"} == {
        ("mesh_redirect_drift", "good", "default"): 0.0,
        ("mesh_redirect_drift", "stray", "default"): 1.0,
    }
    assert found["mesh_probe_success",] == 0.0
    assert found["mesh_foreign_programs", "cgroup_inet4_connect"] == 1.0
