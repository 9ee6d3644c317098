"""How the demo reads metrics."""

from __future__ import annotations

from lab.demo import samples, tables

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


PAIR = (
    'source_workload="a",destination_workload="b",destination_service="default/s",direction="outbound",port="80",'
    'source_namespace="default",destination_namespace="default",security_policy="none"'
)
PAGE = "".join(
    f"# TYPE {name} {kind}\n" + "".join(f"{line}\n" for line in lines)
    for name, kind, lines in (
        ("mesh_tcp_connections_opened", "counter", [f"mesh_tcp_connections_opened_total{{{PAIR}}} 4"]),
        (
            "mesh_tcp_connections_closed",
            "counter",
            [
                f'mesh_tcp_connections_closed_total{{{PAIR},reason="normal"}} 2',
                f'mesh_tcp_connections_closed_total{{{PAIR},reason="reset"}} 1',
            ],
        ),
        ("mesh_tcp_sent_bytes", "counter", [f"mesh_tcp_sent_bytes_total{{{PAIR}}} 1009"]),
        ("mesh_tcp_received_bytes", "counter", [f"mesh_tcp_received_bytes_total{{{PAIR}}} 7"]),
        (
            "mesh_tcp_connect_duration_seconds",
            "histogram",
            [f'mesh_tcp_connect_duration_seconds_bucket{{{PAIR},le="+Inf"}} 4', f"mesh_tcp_connect_duration_seconds_sum{{{PAIR}}} 0.002"],
        ),
        ("mesh_tcp_rtt_seconds", "histogram", [f"mesh_tcp_rtt_seconds_sum{{{PAIR}}} 0.0003"]),
    )
)


def test_the_table_shows_one_row_a_pair() -> None:
    connections, verdicts = tables(PAGE)
    assert [list(column.cells) for column in connections.columns] == [
        ["a"], ["b (default/s)"], ["outbound"], ["80"], ["4"], ["3"], ["1009"], ["7"], ["500"], ["100"],
    ]  # fmt: skip
    assert verdicts.row_count == 0


def test_samples_are_summed_over_what_labels_are_not_asked_for() -> None:
    assert samples(METRICS, "mesh_policy_verdicts_total", 'verdict="deny"') == 10.0
    assert samples(METRICS, "mesh_policy_verdicts_total", 'verdict="deny"', "redis-clients") == 3.0
    assert samples(METRICS, "mesh_policy_verdicts", 'verdict="deny"') == 0.0
