"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# A machine that has something else to do for a moment must not make a test fail: how long things may take is the benchmarks' business.
settings.register_profile("meshagent", deadline=None)
settings.load_profile("meshagent")
