"""How long signing may take, and how long an agent waits for it: each is longer than what it waits for, so that nothing is signed that nobody gets."""

from __future__ import annotations

from typing import Final

COMMAND_S: Final = 30.0
"""One run of the operator's command (`--ca-command`)."""
BEGIN_S: Final = 30.0
"""Of the certificates that are asked for in one call, those whose command has not begun within this are refused."""
ANSWER_S: Final = COMMAND_S + BEGIN_S
"""So a call is worked on for at most this."""
CALL_S: Final = ANSWER_S + 15.0
"""How long an agent waits: also for a turn, since a controller works on some calls at a time. That the controller's machine is away is noticed sooner."""
