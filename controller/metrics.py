"""The controller's own metrics, in Prometheus' format; served by `controller.main` if it is asked to. Everything here may increment them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

REGISTRY = CollectorRegistry()

AGENTS = Gauge("mesh_controller_agents", "agents with an open discovery stream", registry=REGISTRY)
RESPONSES = Counter("mesh_controller_discovery_responses", "discovery responses sent", registry=REGISTRY)
ACKS = Counter("mesh_controller_discovery_acks", "discovery responses that agents took", registry=REGISTRY)
NACKS = Counter("mesh_controller_discovery_nacks", "discovery responses that agents refused", ["node"], registry=REGISTRY)
OBJECTS = Gauge("mesh_controller_objects", "objects in force", ["kind"], registry=REGISTRY)
PROBLEMS = Gauge("mesh_controller_problems", "things wrong in the source directory now", registry=REGISTRY)
RELOAD_SECONDS = Gauge("mesh_controller_reload_seconds", "how long the last reload of the source took", registry=REGISTRY)
STATUS_WRITES = Counter("mesh_controller_status_writes", "statuses written to the API server", registry=REGISTRY)
STATUS_FAILURES = Counter("mesh_controller_status_failures", "statuses and events that could not be written", registry=REGISTRY)
ISSUED = Counter("mesh_controller_identities_issued", "certificates and tokens issued: node, workload, jwt", ["kind"], registry=REGISTRY)
REFUSED = Counter("mesh_controller_identities_refused", "certificates and tokens refused, and why", ["reason"], registry=REGISTRY)
REVOKED = Gauge("mesh_controller_revoked_certificates", "revoked certificates that have not run out", registry=REGISTRY)
ROOTS = Gauge("mesh_controller_trusted_roots", "roots that are trusted; two during a rotation", registry=REGISTRY)
CA_EXPIRY = Gauge("mesh_controller_ca_expiry_timestamp_seconds", "when the signing certificate runs out; 0 = not known", registry=REGISTRY)
CA_PROBLEM = Gauge(
    "mesh_controller_ca_problem", "1 if the certificate authority cannot go on as it should; the log says why", registry=REGISTRY
)
SHARED_STATE = Gauge(
    "mesh_controller_shared_state_bytes",
    "size of ControllerState authority, which may have 1 MiB; 0 where one controller is alone",
    registry=REGISTRY,
)
QUOTA_REDIS = Gauge(
    "mesh_quota_redis_up", "1 if the counts of global limits are in Redis; 0 without, or while it is away", registry=REGISTRY
)
QUOTA_LIMIT = Gauge("mesh_quota_limit_requests_per_second", "what a global limit allows now", ["limit"], registry=REGISTRY)
QUOTA_DEMAND = Gauge("mesh_quota_demand_requests_per_second", "what its callers want, as far as it is known", ["limit"], registry=REGISTRY)
QUOTA_GRANTED = Gauge("mesh_quota_granted_requests_per_second", "what its callers were given", ["limit"], registry=REGISTRY)
QUOTA_REFUSED = Counter("mesh_quota_reports_refused", "callers in reports of nodes that may not speak for them", registry=REGISTRY)
