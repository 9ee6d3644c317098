"""What goes into a guest's root and initramfs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernel.kernels import disks
from tests.kernel.kernels.errors import MatrixError

MODULES = """\
kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/fs/mbcache.ko.xz kernel/lib/crc16.ko.xz
kernel/fs/jbd2/jbd2.ko.xz:
kernel/fs/mbcache.ko.xz:
kernel/lib/crc16.ko.xz:
kernel/drivers/virtio/virtio-pci.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio.ko:
"""


def test_a_module_comes_after_what_it_needs_and_once() -> None:
    order = [Path(file).name.split(".")[0] for file in disks.boot_modules(MODULES, ("ext4", "virtio_pci", "ext4"))]
    assert order == ["crc16", "mbcache", "jbd2", "ext4", "virtio", "virtio-pci"]


def test_a_module_that_the_kernel_has_built_in_is_passed_over() -> None:
    assert disks.boot_modules(MODULES, ("virtio_blk",)) == []


def test_the_closure_follows_versions_choices_architectures_and_virtual_names() -> None:
    depends = {"a": "b (>= 1), c | d", "b": "", "d": "v:any", "e": "", "unused": ""}
    assert disks.closure(["a"], depends, {"v": "e"}) == ["a", "b", "d", "e"]


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    archive = disks.cpio([("bin", 0o40755, b""), ("bin/tool", 0o100755, b"12345"), ("empty", 0o100644, b"")])
    subprocess.run(["cpio", "-i", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "bin" / "tool").read_bytes() == b"12345"
    assert (tmp_path / "bin" / "tool").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "empty").read_bytes() == b""


def test_every_part_of_the_archive_starts_at_four_bytes() -> None:
    archive = disks.cpio([("a", 0o100644, b"x"), ("ab", 0o100644, b"xy")])
    starts = [at for at in range(len(archive)) if archive.startswith(b"070701", at)]
    assert len(starts) == 3
    assert all(at % 4 == 0 for at in [*starts, len(archive)])


def test_a_commit_that_git_does_not_know_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match="no-such-commit"):
        disks.checkout(tmp_path / "source.tar", "no-such-commit", work_tree=False)
