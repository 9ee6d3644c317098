"""The demo's small shop: a topology (lab.yaml), mesh resources (mesh/) and the HTTP programs that run in its pods (server.py)."""
