"""`python -m expertmesh.platform.checkpoints.demo`: build the demo checkpoint, print where it is as a JSON line."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from expertmesh.errors import ExpertMeshError
from expertmesh.platform.checkpoints.demo import demo_checkpoint
from expertmesh.platform.config import ModelConfig


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m expertmesh.platform.checkpoints.demo", description=__doc__)
    parser.add_argument("--cache-dir", type=Path, help="default: the one that serving uses")
    parser.add_argument("--evaluate", action="store_true", help="also measure perplexity against the dense original")
    chosen = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        folder = demo_checkpoint(chosen.cache_dir or ModelConfig().resolved_cache_dir, _show)
        report: dict[str, object] = {"path": str(folder), "seconds": round(time.monotonic() - started, 1)}
        if chosen.evaluate:
            from expertmesh.platform.checkpoints.demo.evaluate import evaluate

            report |= asdict(evaluate(folder))
    except ExpertMeshError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


def _show(what: str, fraction: float) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{fraction:4.0%} {what}", end="\n" if fraction >= 1 else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
