"""`python -m tests.fuzz.worker LIBRARY SEED NOTE TARGET=INPUTS...`: targets in a process that may crash.

NOTE is a file that always begins with the length and the bytes of the input at hand, for when it does. What a target
raises is a finding; after MAX_FINDINGS its turn is over. Prints a line of JSON for each target when it is done.
"""

from __future__ import annotations

import json
import mmap
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz.build import load
from tests.fuzz.campaign import MAX_INPUT_BYTES, Campaign, Counts
from tests.fuzz.target import Target

MAX_FINDINGS = 5
NOTE_BYTES = 8 + MAX_INPUT_BYTES
_PATIENCE_S = 120
"""For _ALARM_EVERY inputs; a process that takes longer hangs, and SIGALRM ends it."""
_ALARM_EVERY = 256


def targets() -> dict[str, tuple[type[Target], bool]]:
    """By name: the target, and whether coverage guides it."""
    from tests.fuzz import texts, wire

    guided = (wire.Headers, wire.Server, wire.Client)
    blind = (texts.Handshake, texts.Addresses, texts.Configuration, texts.Checkpoint, texts.Stored, texts.Keys)
    return {target.name: (target, target in guided) for target in (*guided, *blind)}


def fuzzed(target: Target, inputs: int, seed: int, counts: Counts | None, noted: mmap.mmap) -> dict[str, Any]:
    """The report of one target."""
    findings: list[dict[str, str]] = []

    def run(data: bytes) -> None:
        noted[: 8 + len(data)] = struct.pack("<Q", len(data)) + data
        try:
            target.run(data)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{error!r} at {Path(where.filename).name}:{where.lineno}"
            findings.append({"input": data.hex(), "what": what})

    campaign = Campaign(run, random.Random(seed), counts)
    begin = time.monotonic()
    signal.alarm(_PATIENCE_S)
    campaign.start(target.seeds())
    memory = _peak_mib()
    while campaign.inputs < inputs and len(findings) < MAX_FINDINGS:
        if campaign.inputs % _ALARM_EVERY == 0:
            signal.alarm(_PATIENCE_S)
        campaign.step()
    signal.alarm(0)
    return {
        "inputs": campaign.inputs,
        "edges": campaign.edges,
        "corpus": len(campaign.corpus),
        "seconds": round(time.monotonic() - begin, 1),
        "grown_mib": _peak_mib() - memory,
        "findings": findings,
    }


def main(library: str, seed: int, note: Path, plan: dict[str, int]) -> None:
    """Fuzzes the plan's targets: inputs by name."""
    counts = load(Path(library))
    with note.open("r+b") as file, mmap.mmap(file.fileno(), NOTE_BYTES) as noted:
        for name, inputs in plan.items():
            kind, guided = targets()[name]
            with tempfile.TemporaryDirectory() as scratch:
                report = fuzzed(kind(Path(scratch)), inputs, seed, counts if guided else None, noted)
            print(json.dumps({"target": name, **report}), flush=True)


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    wanted = (argument.partition("=") for argument in sys.argv[4:])
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), {name: int(inputs) for name, _, inputs in wanted})
