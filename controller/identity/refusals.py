"""Why somebody does not get what they asked for. Raised below the services, turned into answers, audit lines and a counter by them."""

from __future__ import annotations


class Refused(Exception):
    """A request that must not be granted; `reason` is one word for the counter, the text is for people and never holds a secret."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Unavailable(Exception):
    """A request that cannot be answered now, because something else does not answer or answers nonsense. Asking again later may help.

    The text is for the controller's operator; who asked is told only that it is so.
    """


class SigningFailed(Unavailable):
    """The signer is away, or what it gave is wrong."""
