"""The load generators: their command lines, and what they print turned into numbers. Called by the benchmarks; runs nothing itself.

All of them but h2load are closed loops: the next message is sent when the answer to the last one is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

MESSAGE_BYTES = 64
_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6}


class ToolFailed(Exception):
    """A load generator said that something went wrong, or nothing that could be read: no number comes of that run."""


@dataclass(frozen=True, slots=True)
class PingPong:
    """Round-trip times of one connection, microseconds."""

    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class Http:
    """What wrk measured: latencies are microseconds."""

    requests: int
    per_second: float
    p50_us: float
    p99_us: float


def sockperf_server(address: str, port: int) -> list[str]:
    """Return the command of the program that sends each message back."""
    return ["sockperf", "server", "--tcp", "-i", address, "-p", str(port)]


def sockperf(address: str, port: int, seconds: int, rate: int | None = None) -> list[str]:
    """Return the command of a ping-pong over one TCP connection (sockperf blocks in recvfrom, it does not spin).

    With a `rate`, messages a second, the next message waits for its time; for that it spins.
    """
    argv = ["sockperf", "ping-pong", "--tcp", "-i", address, "-p", str(port), "-m", str(MESSAGE_BYTES), "-t", str(seconds), "--full-rtt"]
    return argv if rate is None else [*argv, "--mps", str(rate)]


def parse_sockperf(text: str) -> PingPong:
    """Read sockperf's percentiles."""
    found = {name: float(value) for name, value in re.findall(r"percentile (\d+\.\d+) =\s+([\d.]+)", text)}
    if "50.000" not in found or "99.000" not in found or "dropped messages = 0;" not in text:
        raise ToolFailed(f"sockperf: {_last(text)}")
    return PingPong(found["50.000"], found["99.000"])


def wrk(url: str, connections: int, seconds: int, headers: Sequence[str] = ()) -> list[str]:
    """Return the command of a load of HTTP/1.1 requests from one thread."""
    argv = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{seconds}s", "--latency"]
    return [*argv, *(part for header in headers for part in ("-H", header)), url]


def parse_wrk(text: str) -> Http:
    """Read wrk's report; ToolFailed if any request failed, because failing is quicker than working."""
    total = re.search(r"(\d+) requests in ", text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    percentiles = {name: float(value) * _UNITS[unit] for name, value, unit in re.findall(r"(\d+)%\s+([\d.]+)(us|ms|s|m)\b", text)}
    if total is None or rate is None or "50" not in percentiles or "99" not in percentiles:
        raise ToolFailed(f"wrk: {_last(text)}")
    for complaint in ("Socket errors", "Non-2xx"):
        if complaint in text:
            raise ToolFailed("wrk: " + next(line.strip() for line in text.splitlines() if complaint in line))
    return Http(int(total[1]), float(rate[1]), percentiles["50"], percentiles["99"])


def h2load(url: str, connections: int, each: int, seconds: int, log: str, headers: Sequence[str] = ()) -> list[str]:
    """Return the command of an open loop of HTTP/1.1 requests, `each` a second on every connection; it writes a line for each request into `log`.

    At most 100 a second and connection: h2load looks at its clock every 10 ms (nghttp2, src/h2load.cc, rps_watcher), and would send bursts.
    """
    if each > H2LOAD_MOST:
        raise ValueError(f"{each} requests a second on one connection are more than h2load spreads evenly: {H2LOAD_MOST}")
    argv = ["h2load", "--h1", "-t", "1", "-c", str(connections), f"--rps={each}", "-D", str(seconds), f"--log-file={log}"]
    return [*argv, *(part for header in headers for part in ("-H", header)), url]


def parse_h2load(log: str, connections: int, each: int) -> Http:
    """Read h2load's log: latencies from the moment in which a request was due, not from that in which it was sent.

    A request that has to wait because the one before it on its connection is not answered is late, and its caller waits from when it was due
    (https://www.scylladb.com/2021/04/22/on-coordinated-omission/). The first request of each connection sets its schedule. The log does not say
    which connection a line belongs to: what is sent n-th is what was due n-th. ToolFailed if any request failed.
    """
    rows = sorted((int(start), int(status), int(took)) for start, status, took in (line.split()[:3] for line in log.splitlines()))
    bad = [status for _, status, _ in rows if not 200 <= status < 300]
    if bad or len(rows) <= connections:
        raise ToolFailed(f"h2load: {len(bad)} of {len(rows)} requests failed, the first with status {bad[0] if bad else '-'}")
    first = [start for start, _, _ in rows[:connections]]
    late = sorted(
        max(0.0, start - (first[number % connections] + number // connections * 1e6 / each)) + took
        for number, (start, _, took) in enumerate(rows)
    )
    lasted = (rows[-1][0] - rows[0][0]) / 1e6
    return Http(len(rows), len(rows) / lasted, _at(late, 50), _at(late, 99))


H2LOAD_MOST = 100


def _at(ordered: Sequence[float], percent: int) -> float:
    """Nearest rank."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def iperf(address: str, port: int, seconds: int) -> list[str]:
    """Return the command that sends as much as it can over one TCP connection."""
    return ["iperf3", "--client", address, "--port", str(port), "--time", str(seconds), "--json"]


def parse_iperf(text: str) -> float:
    """Read the bits per second that arrived."""
    try:
        report = json.loads(text)
        return float(report["end"]["sum_received"]["bits_per_second"])
    except (ValueError, KeyError, TypeError) as error:
        raise ToolFailed(f"iperf3: {_last(text)}") from error


def nginx(port: int, answer: str = "ok") -> str:
    """Return the configuration of an nginx whose answers cost as little as can be: one process, few bytes, no log, no file but its pid's.

    That one it removes when it ends: "pid /dev/null" took the device away.
    """
    return (
        f"daemon off; master_process off; pid /run/meshbench-nginx-{port}.pid; error_log stderr;\n"
        "events { worker_connections 1024; }\n"
        "http {\n"
        "  access_log off; keepalive_requests 1000000000; keepalive_time 1d;\n"
        f"  server {{ listen {port} backlog=4096; default_type text/plain; location / {{ return 200 {answer}; }} }}\n"
        "}\n"
    )


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "printed nothing"
