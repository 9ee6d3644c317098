"""Benchmarks: each prints one JSON object per result and appends it to build/bench/results.jsonl."""
