"""Tests of controller.kubernetes without an API server, or with one that lies; tests/kubernetes has the real one."""
