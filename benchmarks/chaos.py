"""Does anything get lost or left behind while everything that can fail does?

    python -m benchmarks.chaos [--minutes 10] [--quick] [--seed 0]

The mesh of benchmarks.failover under the same constant traffic, and one fault after the other at random: kills and
hangs of shards, attention replicas, controller and KV server, and changes of scale. The next comes when the mesh is
whole again, or at once after it one time in four. At the end the mesh is left alone, and its open files, shared memory,
sockets and resident memory are compared with those at the beginning. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bare import engine_environment
from benchmarks.checkpoints import write_family
from benchmarks.failover import (
    ATTENTION,
    FAULTS,
    GIVE_UP_S,
    MODEL,
    REDUNDANCY,
    SHARDS,
    STREAMS,
    disturbed_mesh,
    still_there,
)
from benchmarks.traffic import Judge, Traffic, whole
from expertmesh import Client

AT_ONCE = 0.25
"""How often a fault follows before the last one is mended."""
WARM_S, CALM_S = 15.0, 15.0


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the mesh's processes hold, all together."""

    processes: int
    files: int
    """Open file descriptors."""
    sockets: int
    """Of these, sockets."""
    shared_memory: int
    """Entries of /dev/shm that are ours."""
    rss_mib: int


def holdings() -> Holdings:
    """Of every process below this one, now."""
    files = sockets = rss = count = 0
    for process in psutil.Process().children(recursive=True):
        with still_there():
            links = [str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir() if link.is_symlink()]
            files += len(links)
            sockets += sum(link.startswith("socket:") for link in links)
            rss += process.memory_info().rss
            count += 1
    shared = sum(1 for _ in Path("/dev/shm").glob("expertmesh-*"))
    return Holdings(count, files, sockets, shared, rss >> 20)


def is_whole(client: Client) -> bool:
    """Whether the mesh has everything that it should have."""
    try:
        return whole(client.mesh.status(), ATTENTION, SHARDS, REDUNDANCY)
    except Exception:  # the controller itself is away
        return False


def until_whole(client: Client) -> bool:
    """Waits; whether it came about in time."""
    deadline = time.monotonic() + GIVE_UP_S
    while not is_whole(client):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)
    return True


def run(folder: Path, seconds: float, seed: int, faults: list[str]) -> dict[str, Any]:
    """Faults at random for some seconds; see the module's text."""
    rng = random.Random(seed)
    done: Counter[str] = Counter()
    with disturbed_mesh(folder) as (url, prompts, alone), Client(base_url=url, timeout=5, max_retries=0) as client:
        judge = Judge(alone)
        traffic = Traffic(url, MODEL, prompts, judge, STREAMS)
        traffic.start()
        time.sleep(WARM_S)
        before = holdings()
        end = time.monotonic() + seconds
        stuck = 0
        while time.monotonic() < end:
            name = rng.choice(faults)
            print(f"{end - time.monotonic():.0f} s left: {name}", flush=True)
            FAULTS[name](rng.randrange(1 << 16))
            done[name] += 1
            time.sleep(rng.uniform(0.5, 2.0))
            if rng.random() >= AT_ONCE:
                stuck += not until_whole(client)
        stuck += not until_whole(client)
        time.sleep(CALM_S)
        after = holdings()
        traffic.stop()
    return {
        "wrong": judge.wrong,
        "lost": len(judge.failed),
        "near_ties": judge.near_ties,
        "compared_tokens": judge.compared,
        "requests": traffic.answered,
        "faults": dict(done),
        "not_whole_again": stuck,
        "before": asdict(before),
        "after": asdict(after),
        "errors": sorted(set(judge.failed))[:5],
    }


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long faults are brought about (default 10)")
    parser.add_argument("--quick", action="store_true", help="three minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' order")
    options = parser.parse_args()
    engine_environment(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        folder = write_family("qwen3_moe", Path(scratch) / MODEL)
        result = run(folder, 180 if options.quick else options.minutes * 60, options.seed, list(FAULTS))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
