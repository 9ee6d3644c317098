"""Envoy: xDS snapshots, the delta ADS server, supervision, L7 telemetry. Must not touch BPF maps."""
