"""One guest: QEMU with software emulation, a hard limit on its time, and no network. It answers with a tar archive on its last disk."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.kernels.errors import MatrixError

ANSWER_BYTES = 64 << 20
QEMU = "qemu-system-x86_64"


@dataclass(frozen=True, slots=True)
class Disks:
    """What a guest is made of. The root is shared: what guests write to it is thrown away."""

    kernel: Path
    initramfs: Path
    root: Path
    modules: Path
    source: Path


@dataclass(frozen=True, slots=True)
class Ran:
    """How a boot ended: `answer` is the directory with what the guest reported, None if it never did."""

    seconds: float
    answer: Path | None
    why: str


def command(disks: Disks, answer: Path, console: Path, processor: str, *, cpus: int, memory_mib: int) -> list[str]:
    """QEMU's command line. However the matrix ends, its guests end with it: setpriv(1)."""
    argv = [
        "setpriv", "--pdeathsig", "KILL", QEMU, "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", processor, "-smp", str(cpus), "-m", str(memory_mib),
        "-display", "none", "-no-reboot", "-nic", "none", "-monitor", "none", "-serial", f"file:{console}", "-device", "virtio-rng-pci",
        "-kernel", str(disks.kernel), "-initrd", str(disks.initramfs), "-append", "console=ttyS0 loglevel=4 panic=-1 mitigations=off",
    ]  # fmt: skip
    for path, options in (
        (disks.root, "snapshot=on"),
        (disks.modules, "readonly=on"),
        (disks.source, "readonly=on"),
        (answer, "cache=unsafe"),
    ):
        argv += ["-drive", f"file={path},if=virtio,format=raw,{options}"]
    return argv


def run(disks: Disks, directory: Path, processor: str, *, limit_s: float, cpus: int = 2, memory_mib: int = 3072) -> Ran:
    """Boot a guest and wait for its end, at most `limit_s`; its console goes to `directory`/console.log."""
    if shutil.which(QEMU) is None:
        raise MatrixError(f"{QEMU} is missing: install qemu-system-x86 (scripts/setup kernels)")
    disk, console, answer = directory / "answer.tar", directory / "console.log", directory / "answer"
    shutil.rmtree(answer, ignore_errors=True)
    with disk.open("wb") as file:
        file.truncate(ANSWER_BYTES)
    begun = time.monotonic()
    with (directory / "qemu.log").open("wb") as log:
        guest = subprocess.Popen(
            command(disks, disk, console, processor, cpus=cpus, memory_mib=memory_mib), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            code = guest.wait(limit_s)
            why = "" if code == 0 else f"QEMU ended with {code}: {(directory / 'qemu.log').read_text().strip()}"
        except subprocess.TimeoutExpired:
            why = f"the guest was stopped after {limit_s:.0f} s"
        finally:
            guest.kill()
            guest.wait()
    seconds = time.monotonic() - begun
    try:
        with tarfile.open(disk) as archive:
            answer.mkdir()
            for member in archive:
                if member.isfile():
                    (answer / Path(member.name).name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]  # it is a file
    except tarfile.ReadError:
        return Ran(seconds, None, why or f"the guest ended without an answer: see {console}")
    finally:
        disk.unlink()
    return Ran(seconds, answer, why)
