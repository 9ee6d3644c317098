"""Which kernels are tested with which tests: the one place to change for that."""

from __future__ import annotations

from dataclasses import dataclass

FLAVOUR = "cloud-amd64"
"""Debian's build for virtual machines: the generic one without drivers for real hardware."""


PROCESSOR = "max,la57=off"
"""QEMU's emulated processor. 5-level page tables make emulated memory access slower for nothing."""

WITHOUT_CMPXCHG16B = f"{PROCESSOR},cx16=off"
"""For Linux 6.12: with the instruction, the one boot that was tried panicked within seconds in QEMU 7.2 (Debian 12), by a double fault right after it in
__kmalloc_noprof. Not for the newest: in the one run without it, every socket storage failed on Linux 7.2 (`storage_failed`) and the programs refused
every connection, as they must when they cannot store. Neither was tried often enough to be sure of the cause."""


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel of the matrix: the newest of a Debian `suite`. A `refused` one must stop the agent with the missing feature's name."""

    name: str
    suite: str
    refused: bool = False
    processor: str = PROCESSOR


ROWS = (
    Row("6.1", "bookworm"),
    Row("6.12", "trixie", processor=WITHOUT_CMPXCHG16B),
    Row("newest", "sid"),
    Row("5.10", "bullseye", refused=True),
)


@dataclass(frozen=True, slots=True)
class Suite:
    """A pytest run in a guest. `selection` are pytest's arguments; `budget_s` is what it may take before pytest is interrupted."""

    name: str
    selection: tuple[str, ...]
    budget_s: int


_DATAPATH = tuple(
    f"tests/kernel/test_{name}.py"
    for name in ("connect", "receiver", "udp", "egress", "balance", "policy", "tunnel", "waypoint_namespaces", "holding")
)
_RESTART = ("tests/kernel/test_restart.py",)

SUITES = (
    # Every hook of the data path: what a kernel can break.
    Suite("datapath", _DATAPATH, budget_s=3600),
    # Each test compiles and verifies all programs several times, which takes minutes in emulation.
    Suite("restart", _RESTART, budget_s=5400),
    # What else needs no controller. Some of these tests and the acceleration's self-test have time limits that emulation does not meet.
    Suite(
        "more",
        (
            *(
                "tests/kernel",
                "--ignore-glob=*/test_mesh_*.py",
                "--ignore=tests/kernel/test_lab.py",
                "--ignore=tests/kernel/test_wireguard.py",
            ),
            *(f"--ignore={f}" for f in (*_DATAPATH, *_RESTART)),
        ),
        budget_s=1500,
    ),
    # Between nodes, on kernels that have it, as Debian's do.
    Suite("wireguard", ("tests/kernel/test_wireguard.py",), budget_s=1200),
    # The whole mesh, with Envoy and controller. Its tests promise times too.
    Suite("mesh", ("tests/kernel", "--ignore-glob=*/test_[!m]*.py"), budget_s=1500),
)

DEFAULT_SUITES = ("datapath", "restart")

TEST_TIMEOUT_S = 1200
"""pytest's timeout for one test; 120 s on a real machine. Software emulation is ten times slower, and more with two guests."""

MISSING_FEATURE = "bpf_get_netns_cookie"
"""What the agent must name when it refuses a kernel."""
