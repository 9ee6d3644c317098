"""Debian's kernel packages: found in a suite's package index, fetched and verified by apt, unpacked.

apt runs with lists, cache and sources of its own in the work directory, so that the host's package state is not touched; the archive's address and how
to reach it (proxy, mirror) come from the host's configuration.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.kernels.errors import MatrixError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR_VARIABLE = "MESH_DEBIAN_MIRROR"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in the archive: `release` is what `uname -r` says in it; `packages` are (name, version) of all that hold its files."""

    release: str
    version: str
    packages: tuple[tuple[str, str], ...]


def stanzas(index: str, wanted: str) -> Iterator[dict[str, str]]:
    """The entries of a Packages file whose package name matches the expression `wanted` as a whole. Format: deb-control(5)."""
    for block in re.split(r"\n\n+", index):
        name = re.match(r"Package: (\S+)", block)
        if name and re.fullmatch(wanted, name[1]):
            yield {
                key: value for key, separator, value in (line.partition(": ") for line in block.splitlines()) if separator and key[0] != " "
            }


def compare(left: str, right: str) -> int:
    """Order of two Debian versions, as dpkg has it: negative, 0 or positive."""
    for relation, answer in (("lt", -1), ("gt", 1)):
        if subprocess.run(["dpkg", "--compare-versions", left, relation, right], check=False).returncode == 0:
            return answer
    return 0


def newest(index: str, package: str) -> dict[str, str]:
    """The entry of a package with the highest version."""
    found = list(stanzas(index, re.escape(package)))
    if not found:
        raise MatrixError(f"no package {package} in the index: the suite may have moved to an archive that apt is not configured for")
    best = found[0]
    for other in found[1:]:
        best = other if compare(other["Version"], best["Version"]) > 0 else best
    return best


def exact(depends: str) -> Iterator[tuple[str, str]]:
    """The (name, version) of dependencies on exactly one version."""
    yield from re.findall(r"(?:^|, )(\S+) \(= ([^)]+)\)", depends)


def kernel(index: str, flavour: str) -> Kernel:
    """The kernel that a suite's meta package `linux-image-FLAVOUR` stands for.

    The image package is a dependency of the meta package. Until Linux 6.x it holds kernel and modules; since 7.x it depends on
    linux-binary-*, linux-modules-* and linux-base-* of the same version, which hold them.
    """
    meta = newest(index, f"linux-image-{flavour}")
    for name, version in exact(meta.get("Depends", "")):
        release = re.fullmatch(r"linux-image-(\d\S*)", name)
        if release:
            image = newest(index, name)
            parts = [(n, v) for n, v in exact(image.get("Depends", "")) if n.endswith(release[1])]
            return Kernel(release[1], version, ((name, version), *parts))
    raise MatrixError(f"linux-image-{flavour} {meta['Version']} depends on no kernel: {meta.get('Depends')}")


def mirror() -> str:
    """The archive that apt on this host is configured for, or $MESH_DEBIAN_MIRROR (hosts that are not Debian)."""
    named = os.environ.get(MIRROR_VARIABLE)
    if named:
        return named
    run = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Identifier: Packages", "Origin: Debian", "Label: Debian"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    uris = run.stdout.split()
    if not uris:
        raise MatrixError(f"apt knows no Debian archive: run apt-get update, or set {MIRROR_VARIABLE} to the address of one")
    return uris[0]


class Apt:
    """An apt that knows only the archive's suites of the matrix."""

    def __init__(self, directory: Path, suites: tuple[str, ...]) -> None:
        if not KEYRING.exists():
            raise MatrixError(f"{KEYRING} is missing, so packages cannot be verified: install debian-archive-keyring")
        self.directory = directory
        for name in ("lists/partial", "cache/archives/partial", "debs"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        sources = directory / "sources.list"
        sources.write_text("".join(f"deb [arch=amd64 signed-by={KEYRING}] {mirror()} {suite} main\n" for suite in suites))
        self._options = [
            f"Dir::Etc::SourceList={sources}", "Dir::Etc::SourceParts=-", f"Dir::State::Lists={directory / 'lists'}",
            f"Dir::Cache={directory / 'cache'}", "Acquire::Languages=none", "Acquire::GzipIndexes=false", "APT::Sandbox::User=",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false", "APT::Update::Post-Invoke-Success::=",
        ]  # fmt: skip

    def update(self) -> None:
        """Fetch the suites' package indexes, or what changed of them."""
        self._run("update", "-qq")

    def kernel(self, suite: str, flavour: str) -> Kernel:
        """The newest kernel of a suite."""
        for name in self._run("indextargets", "--format", "$(FILENAME)", "Identifier: Packages", f"Release: {suite}").split():
            if Path(name).exists():
                return kernel(Path(name).read_text(), flavour)
        raise MatrixError(f"the archive has no suite {suite}: it may have moved to an archive of old releases")

    def unpack(self, found: Kernel, into: Path) -> Path:
        """Download a kernel's packages and unpack them below `into`, unless that was done before; return where."""
        tree = into / f"{found.release}_{found.version}"
        if tree.is_dir():
            return tree
        half = tree.with_name(f"{tree.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        for name, version in found.packages:
            debs = self.directory / "debs"
            self._run("download", "-qq", f"{name}={version}", cwd=debs)
            deb = next(debs.glob(f"{name}_*.deb"))
            run = subprocess.run(["dpkg-deb", "-x", deb, half], capture_output=True, text=True, check=False)
            if run.returncode != 0:
                raise MatrixError(f"{deb} cannot be unpacked: {run.stderr.strip()}: the disk may be full")
            deb.unlink()
        if not (half / "lib").exists():  # packages made for a merged /usr
            (half / "lib").symlink_to("usr/lib")
        subprocess.run(["/sbin/depmod", "-b", half, found.release], check=True)  # a package does that when it is installed
        half.rename(tree)
        return tree

    def _run(self, *arguments: str, cwd: Path | None = None) -> str:
        argv = ["apt-get", *(word for option in self._options for word in ("-o", option)), *arguments]
        run = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=cwd)
        if run.returncode != 0:
            raise MatrixError(f"apt-get {' '.join(arguments)} failed: {run.stderr.strip() or run.stdout.strip()}")
        return run.stdout
