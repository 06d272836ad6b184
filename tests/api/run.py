"""`python -m tests.api.run [--cases N] [--whole N] [--seed N] [--path TEXT] [--output FILE]`: a campaign's findings.

`--cases` are the requests to each slice of each operation (40), `--whole` those to each operation as a whole (20),
which take up to seconds each to make up. Prints JSON; the exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import write_family
from tests.api.campaign import Campaign
from tests.api.document import slices, whole
from tests.api.front import MODEL, served_front


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.api.run", description=__doc__)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--whole", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--path", default="", help="only operations whose path has this text")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_family(MODEL, Path(scratch) / MODEL)
        begin = time.monotonic()
        with served_front(folder) as (url, app):
            campaign = Campaign(url, arguments.seed)
            document = _only(app.openapi(), arguments.path)
            campaign.run(slices(document, MODEL), arguments.cases)
            campaign.run([whole(document, MODEL)] if arguments.whole else [], arguments.whole)
            campaign.close()
    report = campaign.report.as_dict()
    report["seconds"] = round(time.monotonic() - begin)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    sys.exit(1 if report["findings"] else 0)


def _only(document: dict[str, Any], wanted: str) -> dict[str, Any]:
    paths = {path: methods for path, methods in document["paths"].items() if wanted in path}
    return {**document, "paths": paths}


if __name__ == "__main__":
    main()
