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
