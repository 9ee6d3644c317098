"""Grafana dashboards: built by `deploy.grafana.build`, committed as JSON."""
