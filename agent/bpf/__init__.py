"""Compile, load, pin and attach the kernel programs; the only place that knows map layouts. No ctypes object leaves this package."""
