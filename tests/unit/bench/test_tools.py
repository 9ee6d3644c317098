"""Reading what the load generators print. The texts are what the programs of Debian 12 printed, cut to what matters."""

from __future__ import annotations

import pytest

from bench import tools

SOCKPERF = """sockperf: [Valid Duration] RunTime=0.549 sec; SentMessages=1828; ReceivedMessages=1828
sockperf: \x1b[2;35m====> avg-rtt=300.448 (std-dev=353.606)\x1b[0m
sockperf: # dropped messages = 0; # duplicated messages = 0; # out-of-order messages = 0
sockperf: ---> <MAX> observation = 6178.284
sockperf: ---> percentile 99.900 = 3544.669
sockperf: ---> percentile 99.000 =  868.160
sockperf: ---> percentile 50.000 =   83.097
sockperf: ---> <MIN> observation =   10.055
"""
WRK = """Running 1s test @ http://10.96.0.10:8080/
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     3.03ms    5.44ms  84.24ms   97.72%
    Req/Sec     6.11k     1.79k   12.11k    80.00%
  Latency Distribution
     50%  381.00us
     75%    2.91ms
     90%    5.07ms
     99%    1.05s
  6097 requests in 1.00s, 0.93MB read
Requests/sec:   6089.43
Transfer/sec:      0.93MB
"""


def test_sockperf_gives_percentiles() -> None:
    assert tools.parse_sockperf(SOCKPERF) == tools.PingPong(83.097, 868.16)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param(SOCKPERF.replace("dropped messages = 0", "dropped messages = 3"), id="lost messages"),
        pytest.param("sockperf: ERROR: Connection refused\n", id="refused"),
    ],
)
def test_sockperf_that_failed_gives_no_number(text: str) -> None:
    with pytest.raises(tools.ToolFailed, match="sockperf"):
        tools.parse_sockperf(text)


def test_wrk_gives_requests_and_microseconds() -> None:
    assert tools.parse_wrk(WRK) == tools.Http(6097, 6089.43, 381.0, 1_050_000.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param("  Non-2xx or 3xx responses: 7", "Non-2xx or 3xx responses: 7", id="errors of the server"),
        pytest.param("  Socket errors: connect 0, read 7, write 0, timeout 0", "read 7", id="errors of the socket"),
    ],
)
def test_wrk_with_failed_requests_gives_no_number(line: str, message: str) -> None:
    with pytest.raises(tools.ToolFailed, match=message):
        tools.parse_wrk(WRK + line + "\n")


def test_wrk_that_could_not_connect_gives_no_number() -> None:
    with pytest.raises(tools.ToolFailed, match="Connection refused"):
        tools.parse_wrk("unable to connect to 10.96.0.10:8080 Connection refused\n")


def test_iperf_gives_the_bits_that_arrived() -> None:
    assert tools.parse_iperf('{"end": {"sum_sent": {"bits_per_second": 9}, "sum_received": {"bits_per_second": 7.5e9}}}') == 7.5e9


def test_iperf_that_failed_gives_no_number() -> None:
    with pytest.raises(tools.ToolFailed, match="iperf3"):
        tools.parse_iperf('{"end": {}, "error": "unable to connect to server"}')


def test_a_ping_pong_may_have_a_rate() -> None:
    assert tools.sockperf("10.0.0.1", 5001, 1, 500) == [*tools.sockperf("10.0.0.1", 5001, 1), "--mps", "500"]


def test_nginx_answers_what_it_is_told() -> None:
    assert "return 200 ok;" in tools.nginx(8080)
    assert "/dev/" not in tools.nginx(8080), "nginx removes its pid file"
    assert "listen 8081 backlog=4096;" in tools.nginx(8081, "kkk")
    assert "return 200 kkk;" in tools.nginx(8081, "kkk")


def test_h2load_is_read_against_its_schedule() -> None:
    # Two connections, 100 requests a second on each. The first two are on time; then the server stalls for 30 ms.
    log = "1000000\t200\t100\n1005000\t200\t100\n1010000\t200\t30000\n1015000\t200\t25000\n1040000\t200\t100\n1040000\t200\t100\n"
    found = tools.parse_h2load(log, 2, 100)
    assert found.requests == 6
    assert found.p99_us == 30000.0
    assert found.p50_us == 15100.0, "sent 15 ms after it was due, although its answer took 0.1 ms"


@pytest.mark.parametrize("log", ["1\t200\t5\n2\t200\t5\n3\t503\t5\n", "1\t200\t5\n2\t-1\t5\n3\t200\t5\n", "1\t200\t5\n", ""])
def test_h2load_with_a_failed_request_or_hardly_any_is_no_result(log: str) -> None:
    with pytest.raises(tools.ToolFailed):
        tools.parse_h2load(log, 1, 100)


def test_more_than_h2load_spreads_evenly_is_refused() -> None:
    assert "--rps=100" in tools.h2load("http://a/", 32, 100, 1, "/tmp/log")  # noqa: S108  a name, nothing is written
    with pytest.raises(ValueError, match="spreads"):
        tools.h2load("http://a/", 32, 101, 1, "/tmp/log")  # noqa: S108
