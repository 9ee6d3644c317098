"""`python -m deploy.grafana.build` writes the dashboards beside this file; with --check it says whether they are up to date, and changes nothing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.dashboards import all_of_them

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Write or compare; 1 if a file differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a file is not up to date")
    check = parser.parse_args(arguments).check
    wanted = {f"{name}.json": JSONEncoder(sort_keys=True, indent=1).encode(board) + "\n" for name, board in all_of_them().items()}
    found = {path.name: path.read_text() for path in HERE.glob("*.json")}
    if check:
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                sys.stderr.write(f"deploy/grafana/{name} is not what deploy/grafana says: run 'make generate' and commit\n")
                return 1
        sys.stdout.write("dashboards are up to date\n")
        return 0
    for name in found.keys() - wanted.keys():
        (HERE / name).unlink()
    for name, text in wanted.items():
        json.loads(text)
        (HERE / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
