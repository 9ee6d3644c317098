"""Runs the kernel matrix and ends with 0 if every kernel gave the answer it must, with 1 if one did not, with 2 if it could not be run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.kernel.kernels import disks, machine, matrix, results
from tests.kernel.kernels.debian import Apt
from tests.kernel.kernels.disks import REPOSITORY
from tests.kernel.kernels.errors import MatrixError

BUILD = REPOSITORY / "build" / "kernels"
BOOT_S = 120
"""For what is not a test: boot, unpacking, interpreter start, the answer."""


def job(row: matrix.Row, suites: list[matrix.Suite], extra: list[str]) -> str:
    """The shell script that a guest runs in the tree under test."""
    lines = [f"cd {shlex.quote(str(REPOSITORY))}", "tar -xf /dev/vdc", "export MESH_REQUIRE_KERNEL=1 PYTHONDONTWRITEBYTECODE="]
    if row.refused:
        lines += [
            f"timeout {BOOT_S} .venv/bin/meshagent run --node node-1 --controller unix:/run/none >$RESULTS/agent.log 2>&1 </dev/null",
            "echo $? >$RESULTS/agent.exit",
            "ls /sys/fs/bpf >$RESULTS/bpffs",
        ]
    for suite in [] if row.refused else suites:
        pytest = ["-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "-o", f"timeout={matrix.TEST_TIMEOUT_S}", "--durations=10"]
        words = shlex.join([*pytest, f"--junitxml=/run/results/{suite.name}.xml", *suite.selection, *extra])
        lines += [f"timeout -s INT -k 60 {suite.budget_s} .venv/bin/python -m pytest {words}", f"echo $? >$RESULTS/{suite.name}.exit"]
    return "\n".join(lines) + "\n"


def judge(row: matrix.Row, suites: list[matrix.Suite], ran: machine.Ran, release: str) -> results.Result:
    """What a guest's answer means for its row."""
    if ran.answer is None:
        return results.Result(row.name, row.suite, release, ran.seconds, good=False, error=ran.why)
    if row.refused:
        said = (ran.answer / "agent.log").read_text()
        code = (ran.answer / "agent.exit").read_text().strip()
        good = code not in ("0", "124") and matrix.MISSING_FEATURE in said and not (ran.answer / "bpffs").read_text().strip()
        return results.Result(
            row.name, row.suite, release, ran.seconds, good, refusal=said or f"the agent said nothing and ended with {code}"
        )
    tests = tuple(results.read(suite.name, ran.answer) for suite in suites)
    return results.Result(row.name, row.suite, release, ran.seconds, all(t.good for t in tests), tests, error=ran.why)


def test(row: matrix.Row, suites: list[matrix.Suite], extra: list[str], apt: Apt, source: Path) -> results.Result:
    """Test one kernel."""
    try:
        kernel = apt.kernel(row.suite, matrix.FLAVOUR)
        tree = apt.unpack(kernel, BUILD / "linux")
        directory = BUILD / row.name
        directory.mkdir(exist_ok=True)
        modules = tree.parent / f"{tree.name}.ext4"
        disks.modules(tree, kernel.release, modules)
        disks.initramfs(tree, kernel.release, job(row, suites, extra), directory / "initramfs")
        image = disks.kernel_image(tree)
        limit = BOOT_S * 2 + (0 if row.refused else sum(s.budget_s + 60 for s in suites))
        say(f"{row.name}: Linux {kernel.release} from {row.suite}, console in {directory / 'console.log'}")
        ran = machine.run(
            machine.Disks(image, directory / "initramfs", BUILD / "root.ext4", modules, source), directory, row.processor, limit_s=limit
        )
        result = judge(row, suites, ran, f"{kernel.release} ({kernel.version})")
    except MatrixError as error:
        result = results.Result(row.name, row.suite, "", 0.0, good=False, error=str(error))
    say(f"{row.name}: {'good' if result.good else 'NOT GOOD'} after {result.seconds:.0f} s {result.error}")
    return result


def say(text: str) -> None:
    """Progress, for people."""
    print(f"==> {text}", file=sys.stderr, flush=True)


def main() -> int:
    """See the module."""
    names = [row.name for row in matrix.ROWS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernel.kernels", description="Run the kernel tests on Debian's stock kernels in QEMU."
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"which (default: all): {', '.join(names)}")
    parser.add_argument(
        "--suite",
        action="append",
        choices=[s.name for s in matrix.SUITES],
        help=f"run this suite, may be repeated (default: {', '.join(matrix.DEFAULT_SUITES)})",
    )
    parser.add_argument("--commit", default="HEAD", help="test this commit (default: HEAD)")
    parser.add_argument("--work-tree", action="store_true", help="test the files as they are, instead of a commit")
    parser.add_argument("--jobs", type=int, default=2, help="guests at a time, each with 2 CPUs and 3 GiB (default: 2)")
    parser.add_argument("--pytest", default="", metavar="ARGUMENTS", help="further arguments for pytest, such as '-k frontend'")
    options = parser.parse_args()
    unknown = sorted(set(options.kernels) - set(names))
    if unknown:
        parser.error(f"no kernel {', '.join(unknown)} in the matrix; there are {', '.join(names)}")
    rows = [row for row in matrix.ROWS if not options.kernels or row.name in options.kernels]
    suites = [suite for suite in matrix.SUITES if suite.name in (options.suite or matrix.DEFAULT_SUITES)]
    BUILD.mkdir(parents=True, exist_ok=True)
    try:
        source = disks.checkout(BUILD / "source.tar", options.commit, work_tree=options.work_tree)
        say(f"testing {source}; the guests' root file system")
        disks.root(BUILD / "root.ext4")
        say("Debian's package indexes")
        apt = Apt(BUILD / "apt", tuple(row.suite for row in rows))
        apt.update()
    except MatrixError as error:
        print(f"test-kernels: {error}", file=sys.stderr)
        return 2
    pool = ThreadPoolExecutor(options.jobs)
    try:
        found = list(pool.map(lambda row: test(row, suites, shlex.split(options.pytest), apt, BUILD / "source.tar"), rows))
    except KeyboardInterrupt:
        os._exit(130)  # without waiting for the guests: they end with this process
    results.store(found, BUILD / "results.json", source)
    for result in found:
        for tests in result.tests:
            for name, text in tests.failures.items():
                print(f"--- {result.kernel} {tests.suite} {name}\n{text}\n")
    print(results.table(found))
    return 0 if all(result.good for result in found) else 1


if __name__ == "__main__":
    sys.exit(main())
