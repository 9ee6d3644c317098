"""Tests against a real API server: `make test-kubernetes`."""
