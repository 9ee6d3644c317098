"""`make demo`: the main job, done before your eyes and checked. Brings the shop up, drives it with real clients, prints what was expected and seen.

Exits 0 only if every expectation held. Leaves nothing behind unless KEEP=1. Uses the lab's Python interface and the commands that users
have; it reads no internals of agent or controller.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lab import netns, paths, topology
from lab.cli import SHOP, progress
from lab.errors import LabError, StartFailed
from lab.lab import Lab, Progress

CALLS = 23
SPLIT_CALLS = 500
DENIED_WITHIN_MS = 100


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of an expectation."""

    text: str
    ok: bool


@dataclass(frozen=True, slots=True)
class Expectation:
    """One promise and how to look whether it holds."""

    text: str
    look: Callable[[Lab], Seen]


def the_shop_works(lab: Lab) -> Seen:
    """One page needs both services: the cart over HTTP, redis over plain TCP."""
    run = lab.exec("other", ["curl", "-sS", "--max-time", "10", "http://frontend/"])
    page = _json(run.stdout)
    cart = page.get("cart", {})
    text = f"visit {page.get('visits')}, cart answered by {cart.get('pod')}" if cart else _said(run)
    return Seen(text, bool(cart) and isinstance(page.get("visits"), int))


def redis_sees_the_frontend(lab: Lab) -> Seen:
    """Nothing stands between two applications on one node if each sees the other's own address."""
    expected = lab.topology.pod("frontend").addresses
    peers = []
    for host in ("redis", "fd96::20"):
        run = lab.exec("frontend", ["redis-cli", "-h", host, "CLIENT", "LIST"])
        mine = [line for line in run.stdout.splitlines() if "cmd=client" in line]
        found = re.search(r" addr=(\S+):\d+ ", mine[0]) if mine else None
        peers.append(found[1].strip("[]") if found else _said(run))
    return Seen(f"CLIENT LIST says {' and '.join(peers)}", sorted(peers) == sorted(expected))


def envoy_stands_still(lab: Lab) -> Seen:
    """Envoy's connection counters do not move with redis calls, and do with one HTTP call (so this could fail)."""
    before = _connections(lab, "node-1")
    run = lab.exec("frontend", ["sh", "-c", f"for i in $(seq {CALLS}); do redis-cli -h redis INCR demo || exit 1; done"])
    between = _connections(lab, "node-1")
    lab.exec("frontend", ["curl", "-sS", "--max-time", "10", "http://cart/items"])
    after = _connections(lab, "node-1")
    answered = run.returncode == 0 and len(run.stdout.split()) == CALLS
    text = f"{CALLS} redis calls: +{between - before} Envoy connections; one HTTP call: +{after - between}"
    return Seen(text if answered else _said(run), answered and between == before and after > between)


def redis_is_denied_at_once(lab: Lab) -> Seen:
    """An L4 policy refuses in the kernel, when the connection is made."""
    script = 'start=$(date +%s%N); redis-cli -h redis PING; code=$?; echo "took $((($(date +%s%N) - start) / 1000)) $code"'
    run = lab.exec("other", ["sh", "-c", script])
    found = re.search(r"took (\d+) (\d+)", run.stdout)
    milliseconds = int(found[1]) / 1000 if found else math.inf
    refused = found is not None and found[2] != "0" and "PONG" not in run.stdout
    what = (run.stderr.strip() or run.stdout.strip()).splitlines()[0]
    return Seen(f"{what} ({milliseconds:.1f} ms)", refused and milliseconds < DENIED_WITHIN_MS)


def the_denial_names_its_rule(lab: Lab) -> Seen:
    """`trace` and the metrics both know which rule refused."""
    before = _denials(lab, "node-1", "redis-clients")
    lab.exec("other", ["redis-cli", "-h", "redis", "PING"])
    counted = _denials(lab, "node-1", "redis-clients") - before
    plan = _plan(lab, "node-1", "other", "redis")
    text = f"trace: {plan.get('verdict')} by {plan.get('rule')}; mesh_policy_verdicts_total: +{counted:.0f}"
    return Seen(text, plan.get("verdict") == "DENY" and "redis-clients" in str(plan.get("rule")) and counted > 0)


def a_503_is_tried_again(lab: Lab) -> Seen:
    """Calls succeed although one pod answers every one of them with 503."""
    before = _counters(lab, "cart-v1-1")["GET /flaky 503"]
    codes = _codes(lab, "frontend", f"http://cart/flaky?[1-{CALLS}]")
    failed = _counters(lab, "cart-v1-1")["GET /flaky 503"] - before
    return Seen(f"caller saw {_tally(codes)}; cart-v1-1 answered 503 {failed} times", codes == {"200": CALLS} and failed > 0)


def the_weights_hold(lab: Lab) -> Seen:
    """The split is 80/20 within four standard deviations of a binomial distribution."""
    run = lab.exec("frontend", ["curl", "-sS", "--max-time", "60", f"http://cart/items?[1-{SPLIT_CALLS}]"], timeout=90)
    versions = Counter(str(_json(line).get("version")) for line in run.stdout.splitlines())
    allowed = 4 * math.sqrt(SPLIT_CALLS * 0.8 * 0.2)
    good = versions["v1"] + versions["v2"] == SPLIT_CALLS and abs(versions["v1"] - 0.8 * SPLIT_CALLS) <= allowed
    return Seen(f"{SPLIT_CALLS} calls: v1 {versions['v1']}, v2 {versions['v2']} (400 ± {allowed:.0f} to v1)", good)


def a_path_is_denied(lab: Lab) -> Seen:
    """An L7 policy refuses one path and not the other, on the same service."""
    open_path = _codes(lab, "frontend", "http://cart/items")
    closed_path = _codes(lab, "frontend", "http://cart/admin/counters")
    return Seen(f"/items {_tally(open_path)}, /admin/counters {_tally(closed_path)}", open_path == {"200": 1} and closed_path == {"403": 1})


def outside_is_stopped_at_http(lab: Lab) -> Seen:
    """Dialling a protected pod's own address does not get round its policy, in either family."""
    before = _counters(lab, "cart-v1-1")
    codes = [_codes(lab, "client", f"http://{address}:8080/items") for address in _hosts(lab, "cart-v1-1")]
    arrived = _counters(lab, "cart-v1-1")["GET /items 200"] - before["GET /items 200"]
    text = f"IPv4 {_tally(codes[0])}, IPv6 {_tally(codes[1])}; {arrived} requests reached the pod"
    return Seen(text, arrived == 0 and all(code["200"] == 0 for code in codes))


def outside_is_stopped_at_redis(lab: Lab) -> Seen:
    """The same at layer 4."""
    said = []
    for address in lab.topology.pod("redis").addresses:
        try:
            run = lab.exec("client", ["redis-cli", "-h", address, "PING"], timeout=3)
            said.append(_said(run))
        except subprocess.TimeoutExpired:
            said.append("no answer within 3 s")
    return Seen("; ".join(said), not any("PONG" in text for text in said))


def outside_reaches_the_unprotected(lab: Lab) -> Seen:
    """Without a policy the same caller gets through: what stopped it was the policy."""
    codes = [_codes(lab, "client", f"http://{address}:8080/healthz") for address in _hosts(lab, "frontend")]
    return Seen(f"IPv4 {_tally(codes[0])}, IPv6 {_tally(codes[1])}", codes == [{"200": 1}, {"200": 1}])


def nothing_is_readable_between_nodes(lab: Lab) -> Seen:
    """Requests to pods of the other node carry a secret; a packet socket on the wire between the nodes looks for it."""
    secret = secrets.token_hex(16).encode()
    with netns.inside(paths.WIRE_NETNS, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))) as wire:
        wire.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 24)
        codes = _codes(lab, "frontend", f"http://cart/items?{secret.decode()}[1-{CALLS}]")
        wire.setblocking(False)
        frames = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(wire.recv(65536))
    tunnelled = sum(_HBONE_PORT in (frame[34:36], frame[36:38], frame[54:56], frame[56:58]) for frame in frames)
    read = sum(secret in frame for frame in frames)
    text = f"{_tally(codes)}; {tunnelled} frames of tunnels on the wire, {read} with the secret"
    return Seen(text, codes == {"200": CALLS} and tunnelled > 0 and read == 0)


_ETH_P_ALL = 3  # include/uapi/linux/if_ether.h
_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h
_HBONE_PORT = (15008).to_bytes(2, "big")

EXPECTATIONS = (
    Expectation("The shop works: other -> frontend -> cart (L7) and redis (L4)", the_shop_works),
    Expectation("Same-node L4 goes app to app: redis sees the frontend's own addresses", redis_sees_the_frontend),
    Expectation("... and no proxy is in the path: Envoy's counters stand still", envoy_stands_still),
    Expectation(f"L4 is denied at once (under {DENIED_WITHIN_MS} ms): other -> redis", redis_is_denied_at_once),
    Expectation("... and the denial has the rule's name", the_denial_names_its_rule),
    Expectation("A call whose first backend answers 503 succeeds by retry", a_503_is_tried_again),
    Expectation("HTTPRoute weights hold: cart-v1 80, cart-v2 20", the_weights_hold),
    Expectation("An L7 path is denied with 403", a_path_is_denied),
    Expectation("Between nodes it is mTLS: frontend -> cart", nothing_is_readable_between_nodes),
    Expectation("From outside the mesh to a protected pod address is stopped: cart", outside_is_stopped_at_http),
    Expectation("... and redis", outside_is_stopped_at_redis),
    Expectation("... and to an unprotected pod address works", outside_reaches_the_unprotected),
)


def main() -> int:
    """Run the demo; return the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=150)
    keep = os.environ.get("KEEP", "") not in ("", "0")
    started = time.monotonic()
    try:
        with progress() as show:
            lab = Lab(topology.load(SHOP / "lab.yaml"), progress=show)
            lab.up()
    except StartFailed as error:
        console.print(error.log, style="dim", markup=False, highlight=False)
        console.print(f"[bold red]{escape(str(error))}[/]")
        return 1
    except LabError as error:
        console.print(f"[bold red]{escape(str(error))}[/]")
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the lab is down")
        return 130
    code = 1
    try:
        console.print(f"two nodes, a controller, an agent each: up after {time.monotonic() - started:.1f} s")
        code = _perform(lab, console)
    except KeyboardInterrupt:
        code = 130
    except LabError as error:
        console.print(f"[bold red]{escape(str(error))}[/]")
    finally:
        if code not in (0, 130):
            _print_logs(lab, console)
        code = _finish(lab, console, code, keep)
    console.print(f"{'all expectations held' if code == 0 else 'the demo failed'} in {time.monotonic() - started:.0f} s")
    return code


def _perform(lab: Lab, console: Console) -> int:
    """Apply the resources, look at every expectation, print what was seen; return the exit code."""
    with progress() as show:
        show("applying lab/shop/mesh")
        applied = lab.apply(SHOP / "mesh")
        show("waiting until both agents have it")
        lab.settle()
        results = _look(lab, show)
    console.print(applied.stdout.strip(), style="dim", markup=False, highlight=False)
    table = Table("", "expectation", "what was seen", show_lines=True)
    for expectation, seen in results:
        table.add_row("[green]ok[/]" if seen.ok else "[bold red]NO[/]", escape(expectation.text), escape(seen.text))
    console.print(table)
    console.rule("meshagent trace frontend cart --probe")
    trace = lab.ask("node-1", "trace", "frontend", "cart", "--probe", "--count", "1", "--duration", "5", "-o", "text")
    console.print((trace.stdout + trace.stderr).strip(), markup=False, highlight=False)
    console.rule("L4 metrics of node-1, from the kernel: what /metrics says")
    for metrics_table in tables(lab.metrics("node-1")):
        console.print(metrics_table)
    return 0 if all(seen.ok for _, seen in results) and trace.returncode == 0 else 1


def _look(lab: Lab, show: Progress) -> list[tuple[Expectation, Seen]]:
    results = []
    for expectation in EXPECTATIONS:
        show(expectation.text)
        try:
            seen = expectation.look(lab)
        except (LabError, OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
            seen = Seen(f"{type(error).__name__}: {error}", ok=False)
        results.append((expectation, seen))
    return results


def _finish(lab: Lab, console: Console, code: int, keep: bool) -> int:
    """Take the lab down, or say how; return the exit code."""
    if keep and code != 130:
        run = os.path.relpath(sys.executable) if sys.executable.startswith(str(SHOP.parents[1])) else sys.executable
        meshagent = run.removesuffix("python") + "meshagent"
        console.print(f"the lab stays up. Look around: {meshagent} lab status; {meshagent} lab exec frontend -- curl -s http://cart/items")
        console.print(f"Take it down: {meshagent} lab down", highlight=False)
        return code
    with progress() as show:
        lab.progress = show
        problems = lab.down()
    for problem in problems:
        console.print(f"[bold red]taking the lab down:[/] {escape(problem)}")
    return code or (1 if problems else 0)


def _print_logs(lab: Lab, console: Console) -> None:
    for name, text in lab.logs().items():
        if name == "controller" or name.startswith("agent-"):
            console.rule(f"end of the log of {name}")
            console.print(text, style="dim", markup=False, highlight=False)


_SHOWN = ("connections_closed_total", "sent_bytes_total", "received_bytes_total", "connect_duration_seconds_sum", "rtt_seconds_sum")


def tables(metrics: str) -> tuple[Table, Table]:
    """Return a /metrics page as people read it: one row a pair of workloads, and one row a verdict."""
    pairs: dict[tuple[str, ...], dict[str, float]] = {}
    verdicts = Table("source", "destination", "seen", "verdict", "rule or reason", "times", box=None, title="policy verdicts")
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            label = sample.labels
            if sample.name.startswith("mesh_tcp_") and not sample.name.endswith(("_bucket", "_created")):
                service = f" ({label['destination_service']})" if label["destination_service"] else ""
                pair = (label["source_workload"], label["destination_workload"] + service, label["direction"], label["port"])
                row = pairs.setdefault(pair, {})
                row[sample.name] = row.get(sample.name, 0.0) + sample.value
            elif sample.name == "mesh_policy_verdicts_total" and sample.value:
                who = (label["source_workload"], label["destination_workload"], label["direction"])
                verdicts.add_row(*who, label["verdict"], label["rule"] or label["reason"], f"{sample.value:.0f}")
    connections = Table(
        "source", "destination", "seen", "port", "opened", "closed", "sent B", "received B", "connect µs", "RTT µs", box=None
    )
    for names, row in sorted(pairs.items()):
        if opened := row.get("mesh_tcp_connections_opened_total", 0.0):  # a pair may have failures only
            total = {name: row.get(f"mesh_tcp_{name}", 0.0) for name in _SHOWN}
            closed, connect, rtt = (total[name] for name in ("connections_closed_total", "connect_duration_seconds_sum", "rtt_seconds_sum"))
            numbers = (
                opened,
                closed,
                total["sent_bytes_total"],
                total["received_bytes_total"],
                connect / opened * 1e6,
                rtt / (closed or 1) * 1e6,
            )
            connections.add_row(*names, *(f"{n:.0f}" for n in numbers))
    return connections, verdicts


def samples(metrics: str, name: str, *contain: str) -> float:
    """Return the sum of the samples of one metric whose labels contain all the given texts."""
    lines = [line for line in metrics.splitlines() if line.startswith(f"{name}{{") and all(text in line for text in contain)]
    return math.fsum(float(line.rpartition(" ")[2]) for line in lines)


def _denials(lab: Lab, node: str, rule: str) -> float:
    metrics = lab.metrics(node)
    return sum(samples(metrics, "mesh_policy_verdicts_total", f'verdict="{verdict}"', rule) for verdict in ("deny", "DENY"))


def _plan(lab: Lab, node: str, source: str, destination: str) -> dict[str, Any]:
    """Return the first object of `trace -o json`: what would happen."""
    run = lab.ask(node, "trace", source, destination, "-o", "json", "--duration", "0")
    return _json(run.stdout.partition("\n")[0])


def _connections(lab: Lab, node: str) -> int:
    """Return how many connections a node's Envoy has ever accepted or opened, its admin listener and those to the agent (records, configuration) aside."""
    wanted = re.compile(r"(listener\.(?!admin).*\.downstream_cx_total|cluster\.(?!meshagent-xds\.).*\.upstream_cx_total)$")
    stats = lab.envoy_stats(node)
    if not stats:
        raise LabError(f"the Envoy of {node} does not answer on its admin socket")
    return sum(value for name, value in stats.items() if wanted.match(name))


def _counters(lab: Lab, pod: str) -> Counter[str]:
    """Return what a cart has answered so far, asked over its own loopback."""
    run = lab.exec(pod, ["curl", "-sS", "--max-time", "5", "http://127.0.0.1:8080/admin/counters"])
    if run.returncode != 0:
        raise LabError(f"{pod} does not answer itself: {_said(run)}")
    return Counter(_json(run.stdout))


def _codes(lab: Lab, place: str, url: str) -> Counter[str]:
    """Return how often each status code (or curl error) came from a URL with curl's ranges."""
    argv = ["curl", "-sS", "--connect-timeout", "3", "--max-time", "30", "-o", "/dev/null", "-w", "%{http_code} %{exitcode}\\n", url]
    run = lab.exec(place, argv, timeout=120)
    pairs = [line.split() for line in run.stdout.splitlines()]
    return Counter(code if code != "000" else f"curl error {error}" for code, error in pairs)


def _hosts(lab: Lab, pod: str) -> list[str]:
    """Return a pod's addresses as URLs want them."""
    return [f"[{address}]" if ":" in address else address for address in lab.topology.pod(pod).addresses]


def _tally(codes: Counter[str]) -> str:
    return ", ".join(code if count == 1 else f"{count} x {code}" for code, count in sorted(codes.items())) or "nothing"


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _said(run: subprocess.CompletedProcess[str]) -> str:
    """Return the first line of what a command said, for the table."""
    lines = (run.stderr.strip() or run.stdout.strip()).splitlines()
    return lines[0] if lines else f"exit code {run.returncode}"


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
