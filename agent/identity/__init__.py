"""Workload keys and certificates. Never writes a private key to a disk."""
