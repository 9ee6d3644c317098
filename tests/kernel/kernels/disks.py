"""What a guest reads: its root file system, the modules of its kernel, its initramfs, the tree under test.

The root is the host's own user space as far as the tests need it: Debian packages with what they depend on, and .venv. It is made once and kept
until a package or a Python package changes. Guests write to throw-away copies (QEMU's snapshot mode).
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.kernel.kernels.errors import MatrixError

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]
BUSYBOX = Path("/bin/busybox")
BOOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_rng", "ext4")
"""What it takes to mount the root; what a kernel has built in is passed over. All others are loaded on demand from the modules' disk."""

PACKAGES = ("python3", "bash", "coreutils", "util-linux", "mount", "hostname", "procps", "kmod", "ca-certificates")
"""What makes a guest a machine. What the tests need is named in one place, scripts/setup."""
UNUSED = re.compile(r"/usr/share/(doc|man|info|locale|lintian|icons|bug)/|/usr/lib/(gcc|llvm-\d+/(include|build))/|/usr/include/c\+\+/")
SECRETS = re.compile(r"/etc/(g?shadow|ssl/private|ssh|sudoers|apt/auth)")
LAYOUT = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
MOUNT_POINTS = ("proc", "sys", "dev", "run", "tmp", "root", "var/lib", "var/log", "var/tmp", "usr/lib/modules", "mnt")


def closure(roots: Iterable[str], depends: Mapping[str, str], provided_by: Mapping[str, str]) -> list[str]:
    """Installed packages that `roots` need, themselves included. `depends` has the installed ones; `provided_by` maps virtual names to them."""
    found: set[str] = set()
    todo = list(roots)
    while todo:
        name = todo.pop()
        name = name if name in depends else provided_by.get(name, "")
        if not name or name in found:
            continue
        found.add(name)
        for clause in depends[name].split(","):
            todo += [re.sub(r"[:( ].*", "", choice.strip()) for choice in clause.split("|")]
    return sorted(found)


def installed() -> tuple[dict[str, str], dict[str, str], dict[str, str], list[str]]:
    """Of the host's packages: what they depend on, who provides virtual names, versions, and which are essential."""
    form = "${db:Status-Abbrev}\t${Package}\t${Version}\t${Essential}\t${Provides}\t${Pre-Depends},${Depends}\n"
    text = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True).stdout
    depends: dict[str, str] = {}
    provided_by: dict[str, str] = {}
    versions: dict[str, str] = {}
    essential: list[str] = []
    for line in text.splitlines():
        state, name, version, vital, provides, needs = line.split("\t")
        if state.strip() != "ii":
            continue
        depends[name], versions[name] = needs, version
        if vital == "yes":
            essential.append(name)
        for virtual in provides.split(","):
            provided_by.setdefault(re.sub(r"[:( ].*", "", virtual.strip()), name)
    return depends, provided_by, versions, essential


def real(path: str) -> str:
    """A path with the directories above it resolved: packages say /bin/sh where /bin is a link to /usr/bin."""
    parent, name = os.path.split(path)
    return str(Path(os.path.realpath(parent)) / name)


def files_of(packages: list[str]) -> list[str]:
    """The files of installed packages, and the byte code that was made for theirs."""
    text = subprocess.run(["dpkg-query", "-L", *packages], capture_output=True, text=True, check=True).stdout
    found: set[str] = set()
    for path in set(text.splitlines()):
        if not path.startswith("/") or UNUSED.search(path + "/") or path.startswith("/etc"):
            continue
        file = Path(real(path))
        if not os.path.lexists(file) or (file.is_dir() and not file.is_symlink()):
            continue
        found.add(str(file))
        if file.suffix == ".py":
            found.update(map(str, file.parent.glob(f"__pycache__/{file.stem}.*.pyc")))
    return sorted(found)


def root(image: Path) -> None:
    """Make the root file system, unless the one that is there was made of the same things."""
    depends, provided_by, versions, essential = installed()
    tests_need = subprocess.run([REPOSITORY / "scripts" / "setup", "packages"], capture_output=True, text=True, check=True).stdout.split()
    roots = [*essential, *PACKAGES, *tests_need]
    missing = [name for name in roots if name not in depends and name not in provided_by]
    if missing:
        raise MatrixError(f"Debian packages that guests need are not installed: {' '.join(missing)}: run scripts/setup kernels")
    packages = closure(roots, depends, provided_by)
    stamps = [p.read_text() for p in sorted(REPOSITORY.glob(".venv/.setup-*"))]
    key = hashlib.sha256(
        repr(([(p, versions[p]) for p in packages], stamps, str(REPOSITORY), Path(__file__).read_text())).encode()
    ).hexdigest()
    stamp = image.with_suffix(".key")
    if image.exists() and stamp.exists() and stamp.read_text() == key:
        return
    stamp.unlink(missing_ok=True)
    tree = image.with_suffix(".tree")
    shutil.rmtree(tree, ignore_errors=True)
    for directory in (*MOUNT_POINTS, str(REPOSITORY).lstrip("/")):
        (tree / directory).mkdir(parents=True, exist_ok=True)
    for link in map(Path, LAYOUT):
        if link.is_symlink():
            (tree / link.name).symlink_to(link.readlink())
    etc = [str(p) for p in Path("/etc").rglob("*") if not SECRETS.match(str(p)) and (p.is_symlink() or p.is_file())]
    _copy([*files_of(packages), *etc, str(REPOSITORY / ".venv")], tree)
    _file_system(tree, image, spare_mib=512)
    shutil.rmtree(tree)
    stamp.write_text(key)


def kernel_image(tree: Path) -> Path:
    """The kernel in unpacked packages: /boot/vmlinuz-*, or below /usr since Linux 7."""
    for image in tree.glob("**/vmlinuz*"):
        return image
    raise MatrixError(f"{tree} has no kernel image: Debian has laid out its packages in a new way, and this must follow")


def modules(tree: Path, release: str, image: Path) -> None:
    """Make the disk with a kernel's modules, once."""
    if not image.exists():
        half = image.with_suffix(".half")
        _file_system(tree / "lib" / "modules", half, spare_mib=8)
        if not (tree / "lib" / "modules" / release / "modules.dep").exists():
            raise MatrixError(f"{tree} has no modules of {release}: remove it and run again")
        half.rename(image)


def boot_modules(dependencies: str, wanted: tuple[str, ...]) -> list[str]:
    """Files of `wanted` modules and of those they need, each after what it needs. `dependencies` is the text of modules.dep (depmod(8))."""
    needs = {file: rest.split() for file, _, rest in (line.partition(":") for line in dependencies.splitlines())}
    by_name = {Path(file).name.split(".")[0].replace("-", "_"): file for file in needs}
    order: list[str] = []
    for name in wanted:
        if name in by_name:
            order += [f for f in (*reversed(needs[by_name[name]]), by_name[name]) if f not in order]
    return order


def initramfs(tree: Path, release: str, job: str, path: Path) -> None:
    """Write the initramfs of one boot, with its job."""
    if not BUSYBOX.exists():
        raise MatrixError(f"{BUSYBOX} is missing: install busybox-static (scripts/setup kernels)")
    base = tree / "lib" / "modules" / release
    entries: list[tuple[str, int, bytes]] = [(name, 0o40755, b"") for name in ("bin", "modules", "dev", "root")]
    entries += [("bin/busybox", 0o100755, BUSYBOX.read_bytes()), ("init", 0o100755, (HERE / "init.sh").read_bytes())]
    entries += [("guest.sh", 0o100755, (HERE / "guest.sh").read_bytes()), ("job.sh", 0o100644, job.encode())]
    order = []
    for file in boot_modules((base / "modules.dep").read_text(), BOOT_MODULES):
        data = (base / file).read_bytes()
        name = Path(file).name.removesuffix(".xz")
        entries.append((f"modules/{name}", 0o100644, lzma.decompress(data) if file.endswith(".xz") else data))
        order.append(name)
    entries.append(("modules/order", 0o100644, "".join(f"{name}\n" for name in order).encode()))
    path.write_bytes(cpio(entries))


def cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """An archive of (name, mode, data) in the "newc" format: Documentation/driver-api/early-userspace/buffer-format.rst."""
    archive = bytearray()
    for number, (name, mode, data) in enumerate((*entries, ("TRAILER!!!", 0, b"")), 1):
        words = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % word for word in words) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def checkout(path: Path, commit: str, *, work_tree: bool) -> str:
    """Write the tree under test as a tar archive: a commit, or with `work_tree` the files as they are now. Return what it is."""
    git = ["git", "-c", f"safe.directory={REPOSITORY}", "-C", str(REPOSITORY)]
    run = subprocess.run([*git, "rev-parse", "--short", f"{commit}^{{commit}}"], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise MatrixError(f"git knows no commit {commit!r} in {REPOSITORY}: {run.stderr.strip()}")
    commit = run.stdout.strip()
    if not work_tree:
        subprocess.run([*git, "archive", "--format=tar", "-o", path, commit], check=True)
        return commit
    names = subprocess.run([*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, check=True).stdout
    kept = b"\0".join(n for n in names.split(b"\0") if n and (REPOSITORY / os.fsdecode(n)).exists())
    subprocess.run(["tar", "-C", REPOSITORY, "--null", "-T", "-", "-cf", path], input=kept, check=True)
    return f"{commit} and the work tree's changes"


def _copy(paths: list[str], tree: Path) -> None:
    reader = subprocess.Popen(
        ["tar", "-C", "/", "--ignore-failed-read", "--warning=none", "--null", "-T", "-", "-cf", "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    writer = subprocess.Popen(["tar", "-C", tree, "-xf", "-"], stdin=reader.stdout)
    assert reader.stdin is not None
    assert reader.stdout is not None
    reader.stdout.close()
    reader.stdin.write(b"\0".join(os.fsencode(p.lstrip("/")) for p in paths))
    reader.stdin.close()
    if reader.wait() != 0 or writer.wait() != 0:
        raise MatrixError(f"the guest's root could not be copied to {tree}: the disk may be full")


def _file_system(tree: Path, image: Path, spare_mib: int) -> None:
    """Make an ext4 file system of a directory, without root and without mounting (mke2fs(8), -d)."""
    used = int(subprocess.run(["du", "-sk", tree], capture_output=True, text=True, check=True).stdout.split()[0])
    files = sum(1 for _ in tree.rglob("*"))
    image.unlink(missing_ok=True)
    argv = [
        "/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-E", "root_owner=0:0", "-N", str(files + 20000),
        "-d", str(tree), str(image), f"{int(used * 1.1) // 1024 + spare_mib}M",
    ]  # fmt: skip
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        image.unlink(missing_ok=True)
        raise MatrixError(f"mke2fs cannot make {image}: {run.stderr.strip()}")
