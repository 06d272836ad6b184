"""`python -m tests.fuzz.run [--inputs N] [--seed N] [--target NAME] [--output FILE]`: every target, and what was found.

`--inputs` are the frames' inputs in all (1,000,000); each target that is read in Python gets a twentieth of them on
top. Prints JSON: `{"inputs": n, "findings": n, "targets": {name: {...}}}`; the exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fuzz.build import build, sanitizer_library
from tests.fuzz.worker import NOTE_BYTES

SHARES = {"header": 0.4, "server": 0.35, "client": 0.25}
"""Of the frames' inputs."""
TEXTS = ("handshake", "address", "config", "checkpoint", "kv", "keys")
_TEXTS_PART = 20
_MOST_GROWTH_MIB = 200
"""Beyond this a run has taken memory that it did not give back."""


def fuzz(library: Path, plan: Mapping[str, int], seed: int) -> dict[str, dict[str, Any]]:
    """The reports of the plan's targets (inputs by name). One that its process died of has that as its finding, with
    the input at hand, and the rest is run in another process."""
    reports: dict[str, dict[str, Any]] = {}
    while left := {name: inputs for name, inputs in plan.items() if name not in reports}:
        with tempfile.NamedTemporaryFile() as note:
            note.truncate(NOTE_BYTES)
            pairs = [f"{name}={inputs}" for name, inputs in left.items()]
            command = [sys.executable, "-m", "tests.fuzz.worker", str(library), str(seed), note.name, *pairs]
            done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
            noted = Path(note.name).read_bytes()
        for line in done.stdout.splitlines():
            report = json.loads(line)
            if report["grown_mib"] > _MOST_GROWTH_MIB:
                report["findings"].append({"input": "", "what": f"grew by {report['grown_mib']} MiB"})
            reports[report.pop("target")] = report
        if done.returncode:
            died = next(name for name in left if name not in reports)
            reports[died] = {"inputs": 0, "edges": 0, "corpus": 0, "findings": [_death(done, noted)]}
    return reports


def _environment() -> dict[str, str]:
    sanitizers = sanitizer_library()
    assert sanitizers is not None, "gcc has no sanitizers here"
    return {
        **os.environ,
        "LD_PRELOAD": str(sanitizers),
        # Python frees little at its end; what leaks while it runs is seen by the memory that it takes.
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=86:quarantine_size_mb=16",
        "PYTHONMALLOC": "malloc",  # so that the sanitizer knows each object
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def _death(done: subprocess.CompletedProcess[str], noted: bytes) -> dict[str, str]:
    (length,) = struct.unpack_from("<Q", noted)
    told = next((line for line in done.stderr.splitlines() if "ERROR" in line or "runtime error" in line), "")
    return {
        "input": noted[8 : 8 + length].hex(),
        "what": f"ended with {done.returncode}: {told or done.stderr[-2000:]}",
    }


def fuzz_all(library: Path, inputs: int, seed: int, only: str | None = None) -> dict[str, Any]:
    """All targets' reports."""
    plan = {name: int(inputs * share) for name, share in SHARES.items()}
    plan |= dict.fromkeys(TEXTS, inputs // _TEXTS_PART)
    reports = fuzz(library, {name: count for name, count in plan.items() if only in (None, name)}, seed)
    total = sum(report["inputs"] for report in reports.values())
    return {"inputs": total, "findings": sum(len(r["findings"]) for r in reports.values()), "targets": reports}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=[*SHARES, *TEXTS])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = fuzz_all(build(Path(folder)), arguments.inputs, arguments.seed, arguments.target)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    sys.exit(1 if report["findings"] else 0)


if __name__ == "__main__":
    main()
