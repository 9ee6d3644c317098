"""Runs in a network namespace of tests: asks ADDRESS PORT for a connection every 5 ms until its standard input ends, then says how many came to what, as JSON.

It waits for none of them longer than half a second, and none of them holds up the next.
"""

import collections
import errno
import json
import select
import socket
import sys
import time

EVERY_S, PATIENCE_S = 0.005, 0.5
_BYTES_ACKED = slice(120, 128)  # include/uapi/linux/tcp.h, struct tcp_info, tcpi_bytes_acked
address, port = sys.argv[1], int(sys.argv[2])
outcomes: collections.Counter[str] = collections.Counter()
waiting: collections.deque[tuple[float, socket.socket]] = collections.deque()


def outcome(one: socket.socket) -> str:
    """What came of it. Who was answered has had its SYN acknowledged, also if the connection has ended since."""
    if int.from_bytes(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)[_BYTES_ACKED], sys.byteorder):
        return "connected"
    error = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return errno.errorcode[error] if error else "unanswered"


def knock() -> None:
    """Ask once more, and look at those that have had their time."""
    one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    begun = one.connect_ex((address, port))
    if begun in {0, errno.EINPROGRESS}:
        waiting.append((time.monotonic(), one))
    else:
        outcomes[errno.errorcode[begun]] += 1
        one.close()
    while waiting and time.monotonic() - waiting[0][0] > PATIENCE_S:
        settle()


def settle() -> None:
    """Count the oldest, and let go of it."""
    _, one = waiting.popleft()
    outcomes[outcome(one)] += 1
    one.close()


print("knocking", flush=True)
following = time.monotonic()
while True:
    if select.select([0], [], [], max(0.0, following - time.monotonic()))[0]:
        break
    knock()
    following = max(following + EVERY_S, time.monotonic())
time.sleep(PATIENCE_S)
while waiting:
    settle()
print(json.dumps(outcomes))
