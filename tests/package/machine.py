"""A virtual machine without a hypervisor: a Debian root of its own with systemd as process 1, in namespaces and a cgroup of its own.

For the packages it is a machine: systemd starts units with their sandboxes, a network namespace that belongs to it and has no way out, cgroup2 at
/sys/fs/cgroup, a BPF file system at /sys/fs/bpf. For the machine below it is a process: when that ends, all of it ends.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab import cgroup, netns

NAME = "meshvm"
BASE = ("systemd", "systemd-sysv", "dbus", "iproute2", "curl", "procps")
"""What a machine has before our packages come."""
SUITE = "bookworm"
START_S = 60.0
_BOOT = """
set -e
mount --make-rprivate /
mount --bind "$0" "$0"
mount -t proc proc "$0/proc"
mount -t sysfs sysfs "$0/sys"
mount -t cgroup2 none "$0/sys/fs/cgroup"
mount -t bpf bpf "$0/sys/fs/bpf"
mount -t tmpfs -o mode=755 none "$0/dev"
for name in null zero full random urandom tty; do touch "$0/dev/$name"; mount --bind "/dev/$name" "$0/dev/$name"; done
mkdir "$0/dev/pts" "$0/dev/shm"
mount -t devpts -o newinstance,ptmxmode=666 none "$0/dev/pts"
ln -s pts/ptmx "$0/dev/ptmx"
mount -t tmpfs none "$0/dev/shm"
mount -t tmpfs -o mode=755 none "$0/run"
cd "$0"
pivot_root . mnt
umount -l /mnt
mount --make-rshared /
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --show-status=no
"""


class Failed(Exception):
    """A command in the machine failed, or the machine does not start."""


def build_root(target: Path, depends: Sequence[str], cache: Path) -> None:
    """Unpack a Debian root with what packages depend on, from the mirrors of this machine's apt; it is kept in `cache`."""
    wanted = ",".join(sorted({*BASE, *depends}))
    stored = cache / f"root-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}.tar"
    if not stored.exists():
        made = stored.with_suffix(".new.tar")
        sources = [path for path in Path("/etc/apt/sources.list.d").glob("debian.*") if path.suffix in {".sources", ".list"}]
        sources = sources or [Path("/etc/apt/sources.list")]
        options = ["--variant=minbase", "--mode=root", "--quiet", f"--include={wanted}", '--aptopt=Acquire::Languages "none"']
        run = subprocess.run(["mmdebstrap", *options, SUITE, made, *sources], capture_output=True, text=True, check=False)
        if run.returncode:
            made.unlink(missing_ok=True)
            raise Failed(f"mmdebstrap: {run.stderr[-2000:]}")
        made.rename(stored)
    target.mkdir()
    subprocess.run(["tar", "-xf", stored, "-C", target], check=True)


@dataclass(slots=True)
class Machine:
    """One that runs."""

    root: Path
    pid: int
    """Its process 1, as seen from outside."""

    def run(self, *argv: str, stdin: str = "", timeout: float = 180.0) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as root, outside of every unit, and return what came of it."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-C", "env", "-i", "HOME=/root"]
        command = _inside(place() / "shell", *enter, "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *argv)
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)

    def said(self, *argv: str, stdin: str = "") -> str:
        """Run a command and return what it prints; Failed with all that it said if it fails."""
        run = self.run(*argv, stdin=stdin)
        if run.returncode:
            raise Failed(f"{' '.join(argv)}: exit code {run.returncode}\n{run.stdout}{run.stderr}")
        return run.stdout.strip()

    def shell(self, script: str) -> str:
        """Run lines of a shell that ends at the first failure."""
        return self.said("sh", "-ec", script)

    def write(self, path: str, text: str) -> None:
        """Write a file."""
        self.said("sh", "-c", f"mkdir -p $(dirname {path}) && cat > {path}", stdin=text)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.said("systemctl", "show", unit, "-p", name, "--value")


def place() -> Path:
    """The machine's cgroup, which it takes for the root of all."""
    return cgroup.mount_point() / NAME


def _inside(where: Path, *argv: str) -> list[str]:
    """The command line that runs a command in a cgroup."""
    return ["sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', str(where), *argv]


@contextmanager
def running(root: Path) -> Iterator[Machine]:
    """Boot what is in `root`; nothing of it is left afterwards but that directory."""
    where = cgroup.create(place())
    cgroup.create(where / "shell")
    netns.create(NAME)
    boot: subprocess.Popen[bytes] | None = None
    try:
        subprocess.run(["ip", "-n", NAME, "link", "set", "lo", "up"], check=True)
        unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--cgroup"]
        command = _inside(where, "nsenter", f"--net={netns.path(NAME)}", *unshare, "sh", "-c", _BOOT, str(root))
        with (root.parent / "console.log").open("wb") as console:
            boot = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        yield _started(root, boot)
    finally:
        if boot is not None:
            boot.send_signal(signal.SIGKILL)
            boot.wait(30)
        cgroup.kill(where)
        cgroup.remove(where)
        netns.delete(NAME)


def _started(root: Path, boot: subprocess.Popen[bytes]) -> Machine:
    deadline = time.monotonic() + START_S
    while True:
        children = Path(f"/proc/{boot.pid}/task/{boot.pid}/children").read_text().split() if boot.poll() is None else []
        found = Machine(root, int(children[0])) if children else None
        if found is not None and Path(f"/proc/{found.pid}/exe").readlink().name == "systemd":
            said = found.run("systemctl", "is-system-running", "--wait", timeout=START_S).stdout.strip()
            if said in {"running", "degraded"}:
                return found
        if boot.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"the machine does not start: {(root.parent / 'console.log').read_text()[-2000:]}")
        time.sleep(0.2)


def discard(root: Path) -> None:
    """Remove a root whose machine has ended."""
    shutil.rmtree(root, ignore_errors=True)
