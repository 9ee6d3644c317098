"""What can go wrong with a matrix run, as one line for people."""

from __future__ import annotations


class MatrixError(Exception):
    """A kernel cannot be fetched, a disk cannot be made, a guest did not answer: what, where, likely cause, next step."""
