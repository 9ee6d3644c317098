"""Prints what an image is made of as a CycloneDX bill of materials: python -m deploy.materials ROOT NAME VERSION. `scripts/images` calls it.

Debian's packages are read from dpkg's status file, Python's from the metadata of what is installed in the virtual environment
(https://packaging.python.org/en/latest/specifications/core-metadata/); the meshagent project is the bill's subject, not one of its components.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

SUBJECT = "meshagent"


def debian(root: Path) -> Iterator[Component]:
    """Packages that are installed (dpkg(1), the file status)."""
    for entry in (root / "var/lib/dpkg/status").read_text().split("\n\n"):
        fields = HeaderParser().parsestr(entry)
        if fields["Status"] == "install ok installed":
            name, version = str(fields["Package"]), str(fields["Version"])
            where = {"arch": str(fields["Architecture"]), "distro": "debian-12"}
            yield _component(name, version, PackageURL("deb", "debian", name, version, where))


def python(root: Path) -> Iterator[Component]:
    """Distributions of the virtual environment."""
    for path in sorted(root.glob("opt/meshagent/venv/lib/python3*/site-packages")):
        for one in importlib.metadata.distributions(path=[str(path)]):
            name = one.metadata["Name"]
            if name != SUBJECT:
                yield _component(name, one.version, PackageURL("pypi", None, name.lower().replace("_", "-"), one.version))


def _component(name: str, version: str, where: PackageURL) -> Component:
    return Component(name=name, version=version, type=ComponentType.LIBRARY, purl=where, bom_ref=where.to_string())


def bill(root: Path, name: str, version: str) -> str:
    """The whole bill, JSON."""
    found = Bom(components=sorted([*debian(root), *python(root)]))
    found.metadata.component = Component(name=f"{SUBJECT}/{name}", version=version, type=ComponentType.CONTAINER)
    return make_outputter(found, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)


if __name__ == "__main__":
    image, called, release = sys.argv[1:]
    sys.stdout.write(bill(Path(image), called, release) + "\n")
