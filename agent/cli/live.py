"""How `meshagent trace` looks to people: as text, every hop on a line of its own, or as a table that grows on a terminal.

What is shown came from applications and from other machines: it is text and nothing else, whatever a terminal or rich would make of it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from meshapi.text import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Show = Callable[[dict[str, Any]], None]
_WELL = {"closed", "sent"}
_PLACE = 8
"""Lines of a terminal that the table leaves free: the plan's last ones, its own head and its foot."""


def is_terminal() -> bool:
    """Does somebody look at the output?"""
    return sys.stdout.isatty()


def as_text(document: dict[str, Any]) -> None:
    """Print one document of a trace."""
    lines = {"plan": _plan, "connection": _connection}.get(document["kind"], _notice)(document)
    for line in lines:
        click.echo(shown(line))


@contextlib.contextmanager
def table() -> Iterator[Show]:
    """What takes the documents of a trace; connections are rows of a table, the newest at its end, for as long as the block lasts."""
    from rich.console import Console  # noqa: PLC0415  the daemon imports this module and must not pay for it
    from rich.live import Live  # noqa: PLC0415

    console = Console(highlight=False)
    rows = Shown(console)
    with Live(console=console, get_renderable=rows.table, refresh_per_second=8, vertical_overflow="visible") as live:

        def show(document: dict[str, Any]) -> None:
            if document["kind"] == "plan":
                for line in _plan(document):
                    live.console.print(shown(line), markup=False, soft_wrap=True)
            else:
                rows.take(document)

        yield show


class Shown:
    """The rows that fit on a terminal, and what stands below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: deque[dict[str, Any]] = deque(maxlen=500)
        self._count = 0
        self._missed = 0
        self._error_ns = 0
        self._notices: deque[str] = deque(maxlen=3)

    def take(self, document: dict[str, Any]) -> None:
        """Add a connection or a notice."""
        if document["kind"] == "connection":
            self._rows.append(document)
            self._count += 1
            self._error_ns = document.get("clockErrorNs") or self._error_ns
        elif document.get("missed"):
            self._missed = document["missed"]
        else:
            self._notices.append(str(document.get("text", "")))

    def table(self) -> Table:
        """What to draw now."""
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table("time", "outcome", "call", "hops", box=None, pad_edge=False, caption_justify="left")
        room = max(3, self._console.height - _PLACE - len(self._notices))
        chosen: deque[dict[str, Any]] = deque()
        for row in reversed(self._rows):
            room -= 2 if row["nextStep"] else 1
            if room < 0 and chosen:
                break
            chosen.appendleft(row)
        for row in chosen:
            at = time.strftime("%H:%M:%S", time.localtime(row.get("beganNs", 0) / 1e9))
            hops = Text(shown(_hops(row)))
            if row["nextStep"]:
                hops.append("\n").append(shown(row["nextStep"]), style="yellow")
            table.add_row(at, Text(shown(row["outcome"]), style=_colour(row["outcome"])), Text(shown(_call(row))), hops)
        foot = f"{self._count} shown, {self._missed} events missed"
        if self._error_ns:
            foot += f", clocks of the nodes agree within {_duration(self._error_ns)}"
        table.caption = Text("\n".join(shown(line) for line in (*self._notices, foot)), style="dim")
        return table


def _colour(outcome: str) -> str:
    return "green" if outcome in _WELL or outcome[:1] in {"1", "2", "3"} else "red"


def _call(c: dict[str, Any]) -> str:
    request: dict[str, Any] = next((hop for hop in c["hops"] if "method" in hop), {})
    return f"{request['method']} {request.get('path', '')}" if request else str(c["destination"])


def _hops(c: dict[str, Any]) -> str:
    """On one line; the node is named where it is another one than before."""
    node, parts = "", []
    for hop in c["hops"]:
        where = "" if hop["node"] == node else f"{hop['node']} "
        node = hop["node"]
        parts.append(f"{where}{hop['at']} {_duration(hop['durationNs'])}")
    return " > ".join(parts)


def _plan(p: dict[str, Any]) -> Iterator[str]:
    rule = f"  rule {p['rule']}" if p["rule"] else ""
    yield f"{p['source']}  ->  {p['destination']}"
    yield f"  verdict     {p['verdict']}{rule}"
    if p.get("audit"):
        yield f"  audit       enforcing {p['audit']} would deny"
    yield f"  level       {p['level']}: {p['reason']}"
    for n, b in enumerate(p["backends"]):
        yield f"  {'backends' if not n else '':11} {b['share']:7.1%}  {b['workload']}  {b['address']}  on {b['node']}"
    yield f"  encryption  {p['encryption']}"
    yield f"  fail mode   {p['failMode']}"
    for problem in p["problems"]:
        yield f"  problem     {problem}"


def _connection(c: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{c['source']}  ->  {c['destination']}   {c['outcome']}"
    for hop in c["hops"]:
        facts = "  ".join(f"{k.removesuffix('Ns')} {_fact(k, v)}" for k, v in hop.items() if k not in {"at", "node", "durationNs"})
        yield f"  {hop['at']:10} {hop['node']:8} {_duration(hop['durationNs']):>9}  {facts}"
    if c.get("clockErrorNs"):
        yield f"  clocks      of the nodes agree within {_duration(c['clockErrorNs'])}"
    if c["nextStep"]:
        yield f"  next step   {c['nextStep']}"


def _notice(n: dict[str, Any]) -> Iterator[str]:
    yield f"  notice      {n.get('text', '')}"


def _fact(key: str, value: object) -> str:
    if key.endswith("Ns") and isinstance(value, int):
        return _duration(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _duration(ns: int) -> str:
    for limit, unit, scale in ((1_000, "ns", 1), (1_000_000, "µs", 1_000), (1_000_000_000, "ms", 1_000_000)):
        if ns < limit:
            return f"{ns / scale:.4g} {unit}"
    return f"{ns / 1_000_000_000:.4g} s"
