"""`python -m deploy.definitions` writes meshapi/definitions.json from deploy/crds, for `meshagent check`; with --check it says whether it is up to date."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ruamel.yaml import YAML

from agent.check import definitions

HERE = Path(__file__).parent
TARGET = HERE.parent / "meshapi" / "definitions.json"


def text() -> str:
    """What the file has to be: one line for each definition."""
    reader = YAML(typ="safe", pure=True)
    documents = [reader.load(path.read_text()) for path in sorted((HERE / "crds").glob("*.yaml"))]
    lines = (f"{json.dumps(one['metadata']['name'])}: {json.dumps(definitions.described(one), sort_keys=True)}" for one in documents)
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    """Write or compare; 1 if the file differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if the file is not up to date")
    if parser.parse_args(arguments).check:
        if not TARGET.exists() or TARGET.read_text() != text():
            sys.stderr.write("meshapi/definitions.json is not what deploy/crds says: run 'make generate' and commit\n")
            return 1
        sys.stdout.write("definitions are up to date\n")
        return 0
    TARGET.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
