"""Tells systemd that a service has started, how it is, that it is alive and that it ends (sd_notify(3)). Used by the daemon and the controller.

Without systemd there is no NOTIFY_SOCKET, and nothing is told. The variables leave the environment, so that no program that the service starts can speak
in its name. https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html, sd_watchdog_enabled.html.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from typing import Final

from meshapi.text import shown

BEAT_S: Final = 1.0
"""How often `beat` is to be called; WatchdogSec must be more than twice that."""


class Notifier:
    """One service's line to systemd. Never blocks and never fails: what could not be told is told with the next beat."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Take what systemd has put into the environment."""
        address = environment.pop("NOTIFY_SOCKET", "")
        interval, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address  # unix(7): abstract
        self._watched = bool(interval) and pid in {"", str(os.getpid())}
        self._told = ""

    def beat(self, status: str) -> None:
        """Say that the service is alive; with the first beat that it has started, and with each other `status` how it is."""
        status = shown(status)  # a line end would begin another assignment
        news = ["READY=1", f"STATUS={status}"] if status != self._told else []
        if self._send(*news, *(["WATCHDOG=1"] if self._watched else [])):
            self._told = status

    def stopping(self) -> None:
        """Say that the service ends."""
        self._send("STOPPING=1")

    def _send(self, *assignments: str) -> bool:
        if not self._address or not assignments:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as line:
                line.sendto("\n".join(assignments).encode(), self._address)
        except OSError:  # its queue is full, or systemd is being replaced (systemctl daemon-reexec)
            return False
        return True
