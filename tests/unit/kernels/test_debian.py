"""Kernels are found in a Packages index the way apt would find them."""

from __future__ import annotations

import pytest

from tests.kernel.kernels import debian
from tests.kernel.kernels.errors import MatrixError

ONE_PACKAGE = """\
Package: linux-image-6.1.0-47-cloud-amd64
Version: 6.1.170-3
Depends: kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool
Description: Linux 6.1 for x86-64 cloud (signed)
 Package: not-a-field

Package: linux-image-6.1.0-50-cloud-amd64
Version: 6.1.176-1
Depends: kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool

Package: linux-image-cloud-amd64
Version: 6.1.170-3
Depends: linux-image-6.1.0-47-cloud-amd64 (= 6.1.170-3)

Package: linux-image-cloud-amd64
Version: 6.1.176-1
Depends: linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1)

Package: linux-image-cloud-amd64-dbg
Version: 9-1
Depends: linux-image-9-cloud-amd64-dbg (= 9-1)
"""

SPLIT_PACKAGES = """\
Package: linux-image-7.2.13+deb14-cloud-amd64
Version: 7.2.13-1
Depends: dracut | initramfs-tools (>= 0.120), linux-base-7.2.13+deb14-cloud-amd64 (= 7.2.13-1), \
linux-binary-7.2.13+deb14-cloud-amd64 (= 7.2.13-1), linux-modules-7.2.13+deb14-cloud-amd64 (= 7.2.13-1)

Package: linux-image-cloud-amd64
Version: 7.2.13-1
Depends: linux-image-7.2.13+deb14-cloud-amd64 (= 7.2.13-1)
"""


def test_the_newest_meta_package_names_the_kernel() -> None:
    found = debian.kernel(ONE_PACKAGE, "cloud-amd64")
    assert found.release == "6.1.0-50-cloud-amd64"
    assert found.version == "6.1.176-1"
    assert found.packages == (("linux-image-6.1.0-50-cloud-amd64", "6.1.176-1"),)


def test_a_kernel_in_several_packages_is_fetched_whole() -> None:
    found = debian.kernel(SPLIT_PACKAGES, "cloud-amd64")
    assert found.release == "7.2.13+deb14-cloud-amd64"
    assert [name.split("-")[1] for name, _ in found.packages] == ["image", "base", "binary", "modules"]
    assert {version for _, version in found.packages} == {"7.2.13-1"}


def test_a_suite_without_kernel_is_an_error_with_the_packages_name() -> None:
    with pytest.raises(MatrixError, match="linux-image-cloud-amd64"):
        debian.kernel("Package: bash\nVersion: 5\n", "cloud-amd64")


def test_a_meta_package_that_names_no_kernel_is_an_error() -> None:
    with pytest.raises(MatrixError, match="depends on no kernel"):
        debian.kernel("Package: linux-image-cloud-amd64\nVersion: 1-1\nDepends: kmod\n", "cloud-amd64")


@pytest.mark.parametrize(
    ("left", "right"),
    [
        pytest.param("6.1.99-1", "6.1.176-1", id="numbers are not text"),
        pytest.param("6.12~rc7-1", "6.12-1", id="a candidate is older"),
        pytest.param("6.1.176-1", "6.1.176-1+b1", id="a rebuild is newer"),
    ],
)
def test_versions_have_dpkgs_order(left: str, right: str) -> None:
    assert debian.compare(left, right) < 0 < debian.compare(right, left)
    assert debian.compare(left, left) == 0


def test_only_dependencies_on_one_version_count() -> None:
    assert list(debian.exact("a (= 1), b (>= 2), c, d | e, linux-x+y (= 3-1+b1)")) == [("a", "1"), ("linux-x+y", "3-1+b1")]
