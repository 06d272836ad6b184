"""Does anything get lost or left behind while everything that can fail does?

    python -m benchmarks.chaos [--minutes 10] [--quick] [--seed 0] [--faults expert_kill,cut]

The mesh of benchmarks.failover under the same constant traffic, and one fault after the other in random order: kills
and hangs of shards, attention replicas, controllers and KV server, a link to the shards that is cut and joined again,
and changes of scale. The next comes when the mesh is whole again, or at once after it one time in four. At the end the
mesh is left alone, and its open files, shared memory, sockets and resident memory are compared with those at the
beginning. Last line: one JSON object.

For the cuts it runs in a network namespace of its own, which takes root; without that there are none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from expertmesh.errors import ExpertMeshError

AT_ONCE = 0.25
"""How often a fault follows before the last one is mended."""
WARM_S, CALM_S = 15.0, 15.0
CUT_S = (0.2, 3.0)
"""How long a link is cut, at least and at most."""
_APART = "EXPERTMESH_CHAOS_APART"
_LINK = "10.213.9.1"
"""Where the shards listen in that namespace. Without the address packets to it vanish, and nobody is told."""
_ADDRESS = ("ip", "addr")
KINDS = (*FAULTS, "scale_attention", "scale_experts", "cut")
"""What there is to choose from; without a network namespace no cuts."""


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


def cut(turn: int) -> None:
    """A fault: nothing passes between the attention replicas and any shard for a while."""
    _link("del")
    time.sleep(random.Random(turn).uniform(*CUT_S))
    _link("add")


def _link(action: str) -> None:
    subprocess.run([*_ADDRESS, action, f"{_LINK}/32", "dev", "lo"], check=True)


def scaled(client: Client, deployment: str, usual: int) -> Callable[[int], None]:
    """A fault that is none: one replica more, and when it serves, the usual number again."""

    def serving() -> int:
        status = client.mesh.status()
        members = status.attention if deployment == "attention" else status.shards
        return sum(member.ready for member in members)

    def fault(turn: int) -> None:
        for number in (usual + 1, usual):
            deadline = time.monotonic() + GIVE_UP_S
            asked = False
            while True:
                with contextlib.suppress(ExpertMeshError):  # the controller is away
                    asked = asked or client.mesh.scale(**{deployment: number}) is not None
                    if asked and serving() == number:
                        break
                if time.monotonic() > deadline:
                    raise RuntimeError(f"there are not {number} of {deployment} within {GIVE_UP_S:g} s")
                time.sleep(0.25)

    return fault


def run(folder: Path, seconds: float, seed: int, names: Sequence[str]) -> dict[str, Any]:
    """Faults at random for some seconds; see the module's text."""
    cuts = _APART in os.environ
    routing = {"transport": "tcp", "bind_host": _LINK} if cuts else {}
    with (
        disturbed_mesh(folder, routing=routing) as (url, prompts, alone),
        Client(base_url=url, timeout=5, max_retries=0) as client,
    ):
        known = {
            **FAULTS,
            "scale_attention": scaled(client, "attention", ATTENTION),
            "scale_experts": scaled(client, "experts", SHARDS),
            "cut": cut,
        }
        faults = {name: known[name] for name in names if cuts or name != "cut"}
        judge = Judge(alone)
        traffic = Traffic(url, MODEL, prompts, judge, STREAMS)
        traffic.start()
        time.sleep(WARM_S)
        before = holdings()
        done, stuck = disturb(client, faults, seconds, random.Random(seed))
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


def disturb(
    client: Client, faults: Mapping[str, Callable[[int], None]], seconds: float, rng: random.Random
) -> tuple[Counter[str], int]:
    """One fault after the other: how often each, and how often the mesh did not become whole again in time."""
    done: Counter[str] = Counter()
    stuck = 0
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        rarest = min(done[name] for name in faults)
        name = rng.choice([name for name in faults if done[name] == rarest])
        print(f"{left:.0f} s left: {name}", flush=True)
        faults[name](rng.randrange(1 << 16))
        done[name] += 1
        time.sleep(rng.uniform(0.5, 2.0))
        if rng.random() >= AT_ONCE:
            stuck += not until_whole(client)
    return done, stuck + (not until_whole(client))


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long faults are brought about (default 10)")
    parser.add_argument("--quick", action="store_true", help="three minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' order")
    parser.add_argument("--faults", default=",".join(KINDS), help="which, with commas between (default: all)")
    options = parser.parse_args()
    names = options.faults.split(",")
    if unknown := set(names) - set(KINDS):
        parser.error(f"unknown faults {sorted(unknown)}; there are {', '.join(KINDS)}")
    go_apart()
    engine_environment(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        folder = write_family("qwen3_moe", Path(scratch) / MODEL)
        result = run(folder, 180 if options.quick else options.minutes * 60, options.seed, names)
    print(json.dumps(result))


def go_apart() -> None:
    """Begins again in a network namespace of its own, if that can be made."""
    if _APART in os.environ:
        for command in (("ip", "link", "set", "lo", "up"), (*_ADDRESS, "add", f"{_LINK}/32", "dev", "lo")):
            subprocess.run(command, check=True)
        return
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode == 0:
        os.environ[_APART] = "1"
        os.execvp("unshare", ["unshare", "--net", sys.executable, "-m", "benchmarks.chaos", *sys.argv[1:]])
    print("no network namespace can be made here: no cuts", flush=True)


if __name__ == "__main__":
    main()
