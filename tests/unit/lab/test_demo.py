"""How the demo reads metrics."""

from __future__ import annotations

from lab.demo import samples, trim

METRICS = """# HELP mesh_tcp_sent_bytes_total bytes
# TYPE mesh_tcp_sent_bytes_total counter
mesh_tcp_sent_bytes_total{source_workload="a"} 23.0
mesh_tcp_sent_bytes_total{source_workload="b"} 0.0
mesh_tcp_sent_bytes_created{source_workload="a"} 1.7e+09
mesh_tcp_rtt_seconds_bucket{le="0.1",source_workload="a"} 7.0
mesh_tcp_rtt_seconds_sum{source_workload="a"} 0.7
mesh_policy_verdicts_total{rule="default/redis-clients",verdict="deny"} 3.0
mesh_policy_verdicts_total{rule="default/redis-clients",verdict="allow"} 5.0
mesh_policy_verdicts_total{rule="default/other",verdict="deny"} 7.0
process_cpu_seconds_total 1.0
"""


def test_trim_keeps_what_happened() -> None:
    assert [line.partition("{")[0] for line in trim(METRICS, 30)] == [
        "mesh_tcp_sent_bytes_total",
        "mesh_tcp_rtt_seconds_sum",
        *["mesh_policy_verdicts_total"] * 3,
    ]


def test_trim_says_how_much_it_left_out() -> None:
    assert trim(METRICS, 2)[-1] == "... 3 more"


def test_samples_are_summed_over_what_labels_are_not_asked_for() -> None:
    assert samples(METRICS, "mesh_policy_verdicts_total", 'verdict="deny"') == 10.0
    assert samples(METRICS, "mesh_policy_verdicts_total", 'verdict="deny"', "redis-clients") == 3.0
    assert samples(METRICS, "mesh_policy_verdicts", 'verdict="deny"') == 0.0
