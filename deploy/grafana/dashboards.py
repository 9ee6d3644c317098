"""The six dashboards. What each metric means stands in /metrics itself (HELP); `instance` is the node's name (deploy/prometheus/scrape.yaml)."""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.models import dashboard

from deploy.grafana.panels import BAD_IF_ANY, DAYS_LEFT, FILL, GOOD_IF_ONE, RATIO_OF_ERRORS, Query, board, graph, number, rows, variable

_I = "$__rate_interval"
_OUT = 'direction="outbound"'
"""Each call is counted where it leaves; where it arrives it may be counted once more."""
_DENIED = 'verdict="deny",reason!~"no_port|no_backend|no_listener",rule!~"meshagent/probe:.*"'
"""Somebody was not allowed to. Not that nobody is there to answer: a name with addresses of both families is looked up with two connected datagram sockets,
which no service has a port for (RFC 6724, getaddrinfo(3)). Nor the agents' own probe. Services without a ready endpoint have a panel and an alert of their own
(`_DESERTED`), and a waypoint that does not listen is one that is not ready.
"""
_DESERTED = 'verdict="deny",reason="no_backend",source_namespace!="meshagent"'
"""The agents' own probe calls a service that never has endpoints (agent/probe.py)."""
_FLAGGED = 'response_flags!=""'
_REFUSED = 'response_code=~"401|403"'
_FAILED = 'response_code=~"5..|0"'
_NODE = variable("node", "Node", "label_values(mesh_ready, instance)", multi=True)
_NAMESPACE = variable("namespace", "Namespace", "label_values(mesh_tcp_connections_opened_total, destination_namespace)", multi=True)
_SERVICE = variable(
    "service",
    "Service",
    'label_values(mesh_tcp_connections_opened_total{destination_namespace=~"$namespace",destination_service!=""}, destination_service)',
)
_WORKLOAD = variable("workload", "Workload", 'label_values(mesh_redirect_drift{namespace=~"$namespace"}, workload)')
_P99_BY_SERVICE = (
    f"histogram_quantile(0.99, sum by (le,destination_service) (rate(mesh_request_duration_seconds_bucket{{{{{{}}}}}}[{_I}])))"
)
_QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


def rate(metric: str, *conditions: str, by: str = "") -> str:
    """Sum of a counter's rate, by labels."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped}(rate({metric}{{{','.join(conditions)}}}[{_I}]))"


def gauge(metric: str, *conditions: str, by: str = "", how: str = "sum") -> str:
    """Sum (or max, min) of a gauge, by labels."""
    grouped = f" by ({by})" if by else ""
    return f"{how}{grouped}({metric}{{{','.join(conditions)}}})"


def share(metric: str, part: str, *conditions: str, by: str = "") -> str:
    """Which share of a counter's rate has `part`; 0 where none has."""
    whole = rate(metric, *conditions, by=by)
    return f"({rate(metric, part, *conditions, by=by)} or 0 * {whole}) / ({whole} > 0)"


def quantiles(metric: str, *conditions: str) -> list[Query]:
    """Three lines of a histogram."""
    return [
        Query(f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{{{','.join(conditions)}}}[{_I}])))", label)
        for label, q in _QUANTILES
    ]


def mesh() -> dashboard.Dashboard:
    """Everything at one look."""
    to_service = (
        "Service",
        "/d/meshagent-service?var-service=${__data.fields.destination_service}&${__url_time_range}&var-datasource=${datasource}",
    )
    return board(
        "meshagent-mesh",
        "Mesh",
        "The whole mesh: is it well, who talks, what fails, what is denied.",
        [],
        [
            (
                "Health",
                [
                    number("Nodes ready", "percentunit", "sum(mesh_ready) / count(mesh_ready)", steps=GOOD_IF_ONE, about="1 = every node."),
                    number("Nodes", "short", "count(mesh_ready)"),
                    number("Workloads in the data path", "short", "sum(mesh_workloads_redirected)"),
                    number("Workloads that should be and are not", "short", "sum(mesh_redirect_drift)", steps=BAD_IF_ANY),
                    number("Waypoints ready", "percentunit", "sum(mesh_waypoint_ready) / count(mesh_waypoint_ready)", steps=GOOD_IF_ONE),
                    number("First certificate ends in", "s", "min(mesh_identity_expiry_timestamp_seconds > 0) - time()", steps=DAYS_LEFT),
                ],
            ),
            (
                "Requests (L7)",
                [
                    graph(
                        "Requests by service",
                        "reqps",
                        Query(rate("mesh_requests_total", _OUT, by="destination_service"), "{{destination_service}}"),
                    ),
                    graph(
                        "Errors by service",
                        "percentunit",
                        Query(share("mesh_requests_total", _FAILED, _OUT, by="destination_service"), "{{destination_service}}"),
                        steps=RATIO_OF_ERRORS,
                        about="Share of requests with 5xx or without an answer.",
                    ),
                    graph("Duration", "s", *quantiles("mesh_request_duration_seconds", _OUT)),
                    graph(
                        "Answers by code",
                        "reqps",
                        Query(rate("mesh_requests_total", _OUT, by="response_code"), "{{response_code}}"),
                        stacked=True,
                    ),
                ],
            ),
            (
                "Connections (L4)",
                [
                    graph(
                        "New connections by service",
                        "cps",
                        Query(rate("mesh_tcp_connections_opened_total", _OUT, by="destination_service"), "{{destination_service}}"),
                    ),
                    graph(
                        "Failed connections",
                        "cps",
                        Query(
                            rate("mesh_tcp_connections_failed_total", _OUT, by="destination_service,errno"),
                            "{{destination_service}} {{errno}}",
                        ),
                    ),
                    graph(
                        "Denied by policy",
                        "cps",
                        Query(rate("mesh_policy_verdicts_total", _DENIED, by="rule"), "{{rule}}"),
                        about="Connections and UDP flows that L4 policy refused, by rule.",
                    ),
                    graph(
                        "Calls of services without a ready endpoint",
                        "cps",
                        Query(
                            rate("mesh_policy_verdicts_total", _DESERTED, by="destination_service"),
                            "{{destination_service}}",
                        ),
                        about="Connections and UDP flows that were refused because nobody is there to answer, by service.",
                    ),
                    graph(
                        "Throughput",
                        "Bps",
                        Query(rate("mesh_tcp_sent_bytes_total", _OUT), "sent"),
                        Query(rate("mesh_tcp_received_bytes_total", _OUT), "received"),
                    ),
                    graph(
                        "Encryption of new connections",
                        "percentunit",
                        Query(share("mesh_tcp_connections_opened_total", 'security_policy="mutual_tls"', _OUT), "mutual TLS"),
                        about="Share of connections that go through tunnels; within a node there is no need for one.",
                    ),
                    graph(
                        "Living connections",
                        "short",
                        Query(gauge("mesh_tcp_connections_active", _OUT, by="destination_service"), "{{destination_service}}"),
                    ),
                ],
            ),
            (
                "Services",
                [
                    rows(
                        "Services",
                        "short",
                        Query(
                            rate("mesh_tcp_connections_opened_total", _OUT, 'destination_service!=""', by="destination_service"),
                            "connections/s",
                        ),
                        Query(rate("mesh_requests_total", _OUT, by="destination_service"), "requests/s"),
                        Query(share("mesh_requests_total", _FAILED, _OUT, by="destination_service"), "share of errors"),
                        link=to_service,
                    )
                ],
            ),
        ],
    )


def service() -> dashboard.Dashboard:
    """One service, as its callers see it."""
    to = 'destination_service="$service"'
    seen = (to, _OUT)
    return board(
        "meshagent-service",
        "Service",
        "One service as its callers see it: rate, errors, duration, retries, endpoints, connections.",
        [_NAMESPACE, _SERVICE],
        [
            (
                "Service",
                [
                    number("Requests", "reqps", rate("mesh_requests_total", *seen)),
                    number("Errors", "percentunit", share("mesh_requests_total", _FAILED, *seen), steps=RATIO_OF_ERRORS),
                    number("p99", "s", quantiles("mesh_request_duration_seconds", *seen)[-1].expr),
                    number("New connections", "cps", rate("mesh_tcp_connections_opened_total", *seen)),
                    number(
                        "Endpoints",
                        "short",
                        f"max(mesh_endpoints_healthy{{{to}}})",
                        steps=GOOD_IF_ONE,
                        about="Ready and neither ejected nor failing checks.",
                    ),
                    number("Ejected", "short", f"max(mesh_endpoints_ejected{{{to}}}) or max(0 * mesh_endpoints{{{to}}})", steps=BAD_IF_ANY),
                ],
            ),
            (
                "Requests",
                [
                    graph(
                        "By code", "reqps", Query(rate("mesh_requests_total", *seen, by="response_code"), "{{response_code}}"), stacked=True
                    ),
                    graph("Duration", "s", *quantiles("mesh_request_duration_seconds", *seen)),
                    graph(
                        "By caller",
                        "reqps",
                        Query(
                            rate("mesh_requests_total", *seen, by="source_namespace,source_workload"),
                            "{{source_namespace}}/{{source_workload}}",
                        ),
                    ),
                    graph(
                        "By endpoint",
                        "reqps",
                        Query(rate("mesh_requests_total", *seen, by="destination_workload"), "{{destination_workload}}"),
                    ),
                    graph("By route", "reqps", Query(rate("mesh_requests_total", *seen, by="route"), "{{route}}")),
                    graph(
                        "Why Envoy answered itself",
                        "reqps",
                        Query(
                            f"{rate('mesh_requests_total', *seen, _FLAGGED, by='response_flags')} or on() vector(0)", "{{response_flags}}"
                        ),
                        about="Response flags of Envoy; answers of the application, and of policy, have none.",
                    ),
                    graph(
                        "Bytes",
                        "Bps",
                        Query(
                            rate("mesh_request_bytes_total", 'destination_namespace=~"$namespace"', by="destination_service"),
                            "to {{destination_service}}",
                        ),
                        Query(
                            rate("mesh_response_bytes_total", 'destination_namespace=~"$namespace"', by="destination_service"),
                            "from {{destination_service}}",
                        ),
                        about="Of all services in the namespace, with headers and retries.",
                    ),
                    graph(
                        "Retries, timeouts, ejections",
                        "ops",
                        *(
                            Query(f'sum(rate(mesh_{name}_total{{destination_namespace=~"$namespace"}}[{_I}])) or on() vector(0)', label)
                            for name, label in (
                                ("request_retries", "retries"),
                                ("request_retries_refused", "retries refused"),
                                ("request_timeouts", "timeouts"),
                                ("endpoint_ejections", "ejections"),
                                ("requests_refused", "beyond limits"),
                                ("backend_connect_failures", "no connection"),
                            )
                        ),
                        about="Of all services in the namespace: a route's backends can be other services than the one that was dialled.",
                    ),
                ],
            ),
            (
                "Connections",
                [
                    graph(
                        "New connections by caller",
                        "cps",
                        Query(
                            rate("mesh_tcp_connections_opened_total", *seen, by="source_namespace,source_workload"),
                            "{{source_namespace}}/{{source_workload}}",
                        ),
                    ),
                    graph("Handshake", "s", *quantiles("mesh_tcp_connect_duration_seconds", *seen)),
                    graph(
                        "Throughput",
                        "Bps",
                        Query(rate("mesh_tcp_sent_bytes_total", *seen), "to the service"),
                        Query(rate("mesh_tcp_received_bytes_total", *seen), "from the service"),
                    ),
                    graph(
                        "Failed",
                        "cps",
                        Query(f"{rate('mesh_tcp_connections_failed_total', *seen, by='errno')} or on() vector(0)", "{{errno}}"),
                    ),
                ],
            ),
        ],
    )


def workload() -> dashboard.Dashboard:
    """One workload, from both sides."""
    calls = ('source_namespace=~"$namespace"', 'source_workload="$workload"', _OUT)
    serves = ('destination_namespace=~"$namespace"', 'destination_workload="$workload"')
    inward = (*serves, 'direction="inbound"')
    own = '{namespace=~"$namespace",workload="$workload"}'
    return board(
        "meshagent-workload",
        "Workload",
        "One workload: what it calls, who calls it, what was denied, its certificate.",
        [_NAMESPACE, _WORKLOAD],
        [
            (
                "Workload",
                [
                    number(
                        "Not redirected",
                        "short",
                        f"max(mesh_redirect_drift{own})",
                        steps=BAD_IF_ANY,
                        about="1: its connections should be in the data path and are not.",
                    ),
                    number("Certificate ends in", "s", f"max(mesh_identity_expiry_timestamp_seconds{own}) - time()", steps=DAYS_LEFT),
                    number("Certificate trouble", "short", f"max(mesh_identity_renewal_failing{own})", steps=BAD_IF_ANY),
                    number("Living connections, out", "short", f"{gauge('mesh_tcp_connections_active', *calls)} or on() vector(0)"),
                    number("Living connections, in", "short", f"{gauge('mesh_tcp_connections_active', *inward)} or on() vector(0)"),
                    number(
                        "Denied",
                        "cps",
                        f"({rate('mesh_policy_verdicts_total', _DENIED, *calls[:2])} or on() vector(0))"
                        f" + ({rate('mesh_policy_verdicts_total', _DENIED, *serves)} or on() vector(0))",
                        steps=((None, "green"), (0.001, "orange")),
                    ),
                ],
            ),
            (
                "What it calls",
                [
                    graph(
                        "Requests by service and code",
                        "reqps",
                        Query(
                            f"{rate('mesh_requests_total', *calls, by='destination_service,response_code')} or on() vector(0)",
                            "{{destination_service}} {{response_code}}",
                        ),
                    ),
                    graph(
                        "Duration",
                        "s",
                        Query(
                            f"{_P99_BY_SERVICE.format(','.join(calls))} or on() vector(0)",
                            "{{destination_service}} p99",
                        ),
                    ),
                    graph(
                        "New connections by service",
                        "cps",
                        Query(
                            f"{rate('mesh_tcp_connections_opened_total', *calls, by='destination_service')} or on() vector(0)",
                            "{{destination_service}}",
                        ),
                    ),
                    graph(
                        "Failed connections",
                        "cps",
                        Query(
                            f"{rate('mesh_tcp_connections_failed_total', *calls, by='destination_service,errno')} or on() vector(0)",
                            "{{destination_service}} {{errno}}",
                        ),
                    ),
                    graph(
                        "Bytes",
                        "Bps",
                        Query(f"{rate('mesh_tcp_sent_bytes_total', *calls)} or on() vector(0)", "sent"),
                        Query(f"{rate('mesh_tcp_received_bytes_total', *calls)} or on() vector(0)", "received"),
                    ),
                    graph(
                        "Names: UDP flows",
                        "cps",
                        Query(
                            f"{rate('mesh_udp_flows_opened_total', *calls, by='destination_service')} or on() vector(0)",
                            "{{destination_service}}",
                        ),
                    ),
                ],
            ),
            (
                "Who calls it",
                [
                    graph(
                        "Requests by caller",
                        "reqps",
                        Query(
                            f"{rate('mesh_requests_total', *serves, _OUT, by='source_workload')} or on() vector(0)", "{{source_workload}}"
                        ),
                        about="Counted at the caller's waypoint.",
                    ),
                    graph(
                        "New connections by caller",
                        "cps",
                        Query(
                            f"{rate('mesh_tcp_connections_opened_total', *inward, by='source_workload')} or on() vector(0)",
                            "{{source_workload}}",
                        ),
                    ),
                    graph(
                        "Bytes",
                        "Bps",
                        Query(f"{rate('mesh_tcp_sent_bytes_total', *inward)} or on() vector(0)", "sent"),
                        Query(f"{rate('mesh_tcp_received_bytes_total', *inward)} or on() vector(0)", "received"),
                    ),
                    graph(
                        "Verdicts by rule",
                        "cps",
                        Query(
                            f"{rate('mesh_policy_verdicts_total', *serves, by='verdict,rule')} or on() vector(0)", "{{verdict}} {{rule}}"
                        ),
                    ),
                ],
            ),
        ],
    )


def agent() -> dashboard.Dashboard:
    """Agents and controller."""
    on = 'instance=~"$node"'
    by_node = "{{instance}}"
    return board(
        "meshagent-agent",
        "Agent and controller",
        "Is each node's data path in force, is it up to date, how full are its tables; the controller.",
        [_NODE],
        [
            (
                "Node",
                [
                    number("Ready", "percentunit", f"sum(mesh_ready{{{on}}}) / count(mesh_ready{{{on}}})", steps=GOOD_IF_ONE),
                    number("Kernel programs in force", "percentunit", f"avg(mesh_hook_effective{{{on}}})", steps=GOOD_IF_ONE),
                    number("Live probe", "percentunit", f"min(mesh_probe_success{{{on}}})", steps=GOOD_IF_ONE),
                    number("Connected to the controller", "percentunit", f"avg(mesh_controller_connected{{{on}}})", steps=GOOD_IF_ONE),
                    number("Not redirected", "short", f"sum(mesh_redirect_drift{{{on}}})", steps=BAD_IF_ANY),
                    number(
                        "Events dropped",
                        "cps",
                        f'sum(rate(mesh_datapath_events_total{{{on},event=~"event_dropped|event_suppressed"}}[{_I}]))',
                        steps=((None, "green"), (0.001, "orange")),
                    ),
                ],
            ),
            (
                "Agent",
                [
                    graph("Configuration's lag", "s", Query(gauge("mesh_config_lag_seconds", on, by="instance", how="max"), by_node)),
                    graph(
                        "Table fill",
                        "percentunit",
                        Query(f"max by (instance,map) (mesh_map_entries{{{on}}} / mesh_map_capacity{{{on}}})", "{{instance}} {{map}}"),
                        steps=FILL,
                    ),
                    graph(
                        "Rare events in kernel programs",
                        "cps",
                        Query(rate("mesh_datapath_events_total", on, by="instance,event"), "{{instance}} {{event}}"),
                    ),
                    graph(
                        "Verdicts", "cps", Query(rate("mesh_policy_verdicts_total", on, by="instance,verdict"), "{{instance}} {{verdict}}")
                    ),
                    graph(
                        "Agent's memory",
                        "bytes",
                        Query(gauge("process_resident_memory_bytes", on, 'job="meshagent"', by="instance", how="max"), by_node),
                    ),
                    graph(
                        "Agent's CPU",
                        "percentunit",
                        Query(rate("process_cpu_seconds_total", on, 'job="meshagent"', by="instance"), by_node),
                        about="1 = one CPU.",
                    ),
                    graph(
                        "Connections closed by changed policies",
                        "cps",
                        Query(rate("mesh_connections_closed_by_policy_total", on, by="instance"), by_node),
                    ),
                    graph(
                        "Start: time to load programs",
                        "s",
                        Query(gauge("mesh_loader_seconds", on, by="instance", how="max"), by_node),
                        about="0: they were pinned and served on.",
                    ),
                ],
            ),
            (
                "Controller",
                [
                    number("Agents connected", "short", "sum(mesh_controller_agents)", steps=GOOD_IF_ONE),
                    number("Problems in resources", "short", "sum(mesh_controller_problems)", steps=BAD_IF_ANY),
                    number("Last reload took", "s", "max(mesh_controller_reload_seconds)"),
                    number("Objects", "short", "sum(mesh_controller_objects)"),
                    graph(
                        "Responses",
                        "ops",
                        Query(rate("mesh_controller_discovery_responses_total"), "sent"),
                        Query(rate("mesh_controller_discovery_acks_total"), "taken"),
                        Query(f"{rate('mesh_controller_discovery_nacks_total')} or on() vector(0)", "refused"),
                    ),
                    graph("Objects by kind", "short", Query("sum by (kind) (mesh_controller_objects)", "{{kind}}")),
                ],
            ),
        ],
    )


def waypoint() -> dashboard.Dashboard:
    """The nodes' Envoys."""
    on = 'instance=~"$node"'
    by_node = "{{instance}}"
    return board(
        "meshagent-waypoint",
        "Waypoint",
        "Each node's Envoy: is it there, what passes it, what it answers by itself, what it costs.",
        [_NODE],
        [
            (
                "Waypoint",
                [
                    number("Ready", "percentunit", f"avg(mesh_waypoint_ready{{{on}}})", steps=GOOD_IF_ONE),
                    number(
                        "Configurations refused",
                        "short",
                        f"sum(increase(mesh_xds_nacks_total{{{on}}}[1h]))",
                        steps=BAD_IF_ANY,
                        about="In the last hour.",
                    ),
                    number("Requests", "reqps", rate("mesh_requests_total", on)),
                    number("Requests under way", "short", f"sum(mesh_waypoint_requests_active{{{on}}})"),
                    number("Runs for", "s", f"min(mesh_waypoint_uptime_seconds{{{on}}})"),
                    number("Tells its numbers", "percentunit", f"min(mesh_waypoint_stats_up{{{on}}})", steps=GOOD_IF_ONE),
                ],
            ),
            (
                "Traffic",
                [
                    graph(
                        "Requests", "reqps", Query(rate("mesh_requests_total", on, by="instance,direction"), "{{instance}} {{direction}}")
                    ),
                    graph(
                        "Errors",
                        "percentunit",
                        Query(share("mesh_requests_total", _FAILED, on, by="instance"), by_node),
                        steps=RATIO_OF_ERRORS,
                    ),
                    graph("Duration", "s", *quantiles("mesh_request_duration_seconds", on)),
                    graph(
                        "Refused by policy",
                        "reqps",
                        Query(
                            f"{rate('mesh_requests_total', on, _REFUSED, by='instance,response_code')} or on() vector(0)",
                            "{{instance}} {{response_code}}",
                        ),
                    ),
                    graph(
                        "Connections", "short", Query(gauge("mesh_waypoint_connections", on, by="instance,side"), "{{instance}} {{side}}")
                    ),
                    graph("Into tunnels", "cps", Query(rate("mesh_tunnelled_connections_total", on, by="instance"), by_node)),
                    graph(
                        "Why Envoy answered itself",
                        "reqps",
                        Query(f"{rate('mesh_requests_total', on, _FLAGGED, by='response_flags')} or on() vector(0)", "{{response_flags}}"),
                    ),
                    graph("Rate limited", "reqps", Query(rate("mesh_requests_rate_limited_total", on, by="instance"), by_node)),
                    graph(
                        "Retries by service",
                        "reqps",
                        Query(
                            f"{rate('mesh_request_retries_total', on, by='destination_service')} or on() vector(0)",
                            "{{destination_service}}",
                        ),
                    ),
                    graph(
                        "Endpoints taken out",
                        "short",
                        Query(
                            f"{gauge('mesh_endpoints_ejected', on, by='instance,destination_service')} or on() vector(0)",
                            "{{instance}} {{destination_service}}",
                        ),
                    ),
                ],
            ),
            (
                "Cost",
                [
                    graph("Memory", "bytes", Query(gauge("mesh_waypoint_memory_bytes", on, by="instance", how="max"), by_node)),
                    graph(
                        "Listeners and clusters",
                        "short",
                        Query(gauge("mesh_waypoint_listeners", on, by="instance"), "{{instance}} listeners"),
                        Query(gauge("mesh_waypoint_clusters", on, by="instance"), "{{instance}} clusters"),
                    ),
                    graph(
                        "Time to read its numbers",
                        "s",
                        Query(gauge("mesh_waypoint_stats_read_seconds", on, by="instance", how="max"), by_node),
                    ),
                    graph(
                        "Requests not counted by name",
                        "short",
                        Query(gauge("mesh_request_series_full", on, by="instance"), "{{instance}} listeners that are full"),
                        Query(gauge("mesh_request_series_folded", on, by="instance"), "{{instance}} counted as other"),
                    ),
                ],
            ),
        ],
    )


def identity() -> dashboard.Dashboard:
    """Certificates and encryption."""
    on = 'instance=~"$node"'
    return board(
        "meshagent-identity",
        "Identity",
        "Certificates: when they end, whether they can be renewed; how much is encrypted; the certificate authority.",
        [_NODE],
        [
            (
                "Certificates",
                [
                    number(
                        "First workload's ends in",
                        "s",
                        f"min(mesh_identity_expiry_timestamp_seconds{{{on}}} > 0) - time()",
                        steps=DAYS_LEFT,
                    ),
                    number(
                        "Workloads without one",
                        "short",
                        f"count(mesh_identity_expiry_timestamp_seconds{{{on}}} == 0) or on() vector(0)",
                        steps=BAD_IF_ANY,
                    ),
                    number("Cannot be renewed", "short", f"sum(mesh_identity_renewal_failing{{{on}}})", steps=BAD_IF_ANY),
                    number("Connected to the identity service", "percentunit", f"avg(mesh_identity_connected{{{on}}})", steps=GOOD_IF_ONE),
                    number("Trusted roots", "short", f"max(mesh_trust_roots{{{on}}})", about="Two during a rotation."),
                    number("Revoked certificates", "short", f"max(mesh_trust_revoked{{{on}}})"),
                ],
            ),
            (
                "Use",
                [
                    rows(
                        "Workloads' certificates end in",
                        "s",
                        Query(
                            f"sort(max by (namespace,workload) (mesh_identity_expiry_timestamp_seconds{{{on}}} > 0) - time())", "ends in"
                        ),
                        span=12,
                    ),
                    graph(
                        "Requests by encryption",
                        "reqps",
                        Query(rate("mesh_requests_total", on, _OUT, by="security_policy"), "{{security_policy}}"),
                        stacked=True,
                    ),
                    graph(
                        "New connections by encryption",
                        "cps",
                        Query(rate("mesh_tcp_connections_opened_total", on, _OUT, by="security_policy"), "{{security_policy}}"),
                        stacked=True,
                    ),
                    graph(
                        "Tunnels that end here",
                        "short",
                        Query(gauge("mesh_waypoint_connections", on, 'side="hbone"', by="instance"), "{{instance}}"),
                    ),
                    graph(
                        "Certificates that workloads got",
                        "ops",
                        Query(rate("mesh_identity_signed_total", on, by="instance"), "{{instance}}"),
                        Query(rate("mesh_identity_sign_failures_total", on, by="instance"), "{{instance}} failed"),
                    ),
                    graph(
                        "Workload API: refused callers",
                        "ops",
                        Query(rate("mesh_workload_api_refused_total", on, by="instance"), "{{instance}}"),
                    ),
                ],
            ),
            (
                "Certificate authority",
                [
                    number(
                        "Authority's certificate ends in",
                        "s",
                        "min(mesh_controller_ca_expiry_timestamp_seconds > 0) - time()",
                        steps=((None, "red"), (7 * 86400, "orange"), (30 * 86400, "green")),
                    ),
                    number("In trouble", "short", "max(mesh_controller_ca_problem)", steps=BAD_IF_ANY),
                    number("Roots the controller trusts", "short", "max(mesh_controller_trusted_roots)"),
                    number("Revoked and not run out", "short", "max(mesh_controller_revoked_certificates)"),
                    graph(
                        "Issued",
                        "ops",
                        Query(f"{rate('mesh_controller_identities_issued_total', by='kind')} or on() vector(0)", "{{kind}}"),
                    ),
                    graph(
                        "Refused",
                        "ops",
                        Query(f"{rate('mesh_controller_identities_refused_total', by='reason')} or on() vector(0)", "{{reason}}"),
                    ),
                ],
            ),
        ],
    )


def all_of_them() -> Mapping[str, dashboard.Dashboard]:
    """By the name of their file, without .json."""
    return {make.__name__: make() for make in (mesh, service, workload, agent, waypoint, identity)}
