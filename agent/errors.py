"""Failures that an operator can act on. Each message says what, where, the likely cause and the next step, in lower case, on one line."""

from __future__ import annotations


class MeshError(Exception):
    """Base of every failure that is shown to people as one line instead of a traceback."""


class EnvironmentUnfit(MeshError):
    """This machine lacks something the agent needs: a kernel feature, a right, a mount, a program."""


class AlreadyRunning(MeshError):
    """Another agent holds this node's lock."""


class LayoutMismatch(MeshError):
    """A map or record does not have the size that the compiled programs say it has."""


class KernelRefused(MeshError):
    """A bpf(2) call failed: the verifier, a full map, a missing right."""


class NotFound(MeshError):
    """A name that was asked for does not exist; the message suggests the nearest ones."""
