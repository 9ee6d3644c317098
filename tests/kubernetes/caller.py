"""Runs in a pod of tests: asks a URL 20 times a second, each time over a connection that it keeps and over a new one, and says of each what came.

A line is `kept` or `new`, the status or the error's name, and the port of the kept connection.
"""

import http.client
import sys
import time
from urllib.parse import urlsplit

url = urlsplit(sys.argv[1])
host, path = url.netloc, url.path or "/"
kept = http.client.HTTPConnection(host, timeout=5)
start, count = time.monotonic(), 0


def ask(connection: http.client.HTTPConnection) -> str:
    """The status, after the whole answer."""
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
    except OSError as error:
        connection.close()
        return type(error).__name__
    except http.client.HTTPException as error:
        connection.close()
        return type(error).__name__
    return str(answer.status)


while True:
    print("kept", ask(kept), kept.sock.getsockname()[1] if kept.sock else 0)
    fresh = http.client.HTTPConnection(host, timeout=5)
    print("new", ask(fresh), 0, flush=True)
    fresh.close()
    count += 1
    time.sleep(max(0.0, start + count / 20 - time.monotonic()))
