"""How the process holds memory: asked of malloc itself, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

_HEAPS = """
import ctypes, sys, threading
from agent import memory
if sys.argv[1] == "one":
    memory.one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
all_of_them = threading.Barrier(4)
def allocate():
    libc.malloc(50_000)
    all_of_them.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.parametrize(("asked", "one"), [("one", True), ("as it is", False)])
def test_threads_allocate_from_one_heap_if_asked_to(asked: str, *, one: bool) -> None:
    done = subprocess.run([sys.executable, "-c", _HEAPS, asked], capture_output=True, text=True, check=True)
    assert (done.stdout.count("<heap nr=") == 1) is one
