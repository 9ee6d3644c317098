"""The load generators: their command lines, and what they print turned into numbers. Called by the benchmarks; runs nothing itself.

All of them are closed loops: the next message is sent when the answer to the last one is there.
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


def sockperf(address: str, port: int, seconds: int) -> list[str]:
    """Return the command of a ping-pong over one TCP connection (sockperf blocks in recvfrom, it does not spin)."""
    return ["sockperf", "ping-pong", "--tcp", "-i", address, "-p", str(port), "-m", str(MESSAGE_BYTES), "-t", str(seconds), "--full-rtt"]


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


def nginx(port: int) -> str:
    """Return the configuration of an nginx whose answers cost as little as can be: one process, two bytes, no log, no file."""
    return (
        "daemon off; master_process off; pid /dev/null; error_log stderr;\n"
        "events { worker_connections 1024; }\n"
        "http {\n"
        "  access_log off; keepalive_requests 1000000000; keepalive_time 1d;\n"
        f"  server {{ listen {port} backlog=4096; default_type text/plain; location / {{ return 200 ok; }} }}\n"
        "}\n"
    )


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "printed nothing"
