"""What does a death cost, under running streams?

    python -m benchmarks.failover [--quick] [--faults expert_kill,controller_kill]

A whole mesh (Ray Serve, HTTP; two attention replicas, three shards with redundancy 2, an embedded KV store) serves 8
streams. Each fault is brought about again and again on real processes: `kill -9` and SIGSTOP of a shard, `kill -9` of
an attention replica with its engine, of the controller, of the KV server, and SIGSTOP of that; SIGSTOP of Serve's own
controller; and `kill -9` of the only ingress replica, whose streams end with it. Every answer is compared
with the one to the same prompt alone; a token that is missing, doubled or another is wrong unless it is a near tie.
`added_ms` is the longest pause of any stream that touches the second after a fault, less what the longest pause of a
second is without one; `later_ms` the same for the time until the mesh has everything again, in which a replacement
starts on the same two cores; `recovered_s` is that time. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bare import Answer, engine_environment
from benchmarks.checkpoints import write_family
from benchmarks.parity import prompts_for, vocabulary_of
from benchmarks.served import served_answers
from benchmarks.timing import free_port
from benchmarks.traffic import Judge, Traffic, whole
from expertmesh import Client

MODEL = "tiny"
ATTENTION, SHARDS, REDUNDANCY = 2, 3, 2
STREAMS, PROMPTS, TOKENS = 8, 24, 96
KILLS, QUICK_KILLS = 10, 2
SETTLE_S = 2.0
"""Undisturbed time before each fault, to know what is usual."""
MOMENT_S = 1.0
"""Pauses that begin so soon after a fault are its own."""
HANG_S = 12.0
"""How long a stopped process stays so, if nobody replaces it."""
GIVE_UP_S = 180.0


def replicas(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas on this machine, of the mesh that this process started."""
    return sorted(_named(f"ServeReplica:expertmesh:{deployment}"), key=lambda process: process.pid)


def _named(words: str) -> list[psutil.Process]:
    """Processes that this one started, and theirs, whose command line has these words."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with still_there():
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextmanager
def still_there() -> Iterator[None]:
    """A process that ended while it was looked at is none."""
    try:
        yield
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return


def kv_servers() -> list[psutil.Process]:
    """The embedded KV servers of this mesh."""
    return _named("valkey-server")


def serve_controllers() -> list[psutil.Process]:
    """Serve's controller of this mesh."""
    return _named("ray::ServeController")


def victim(processes: Callable[[], list[psutil.Process]], turn: int) -> psutil.Process:
    """One of the processes, another one each time; waits until there is one."""
    deadline = time.monotonic() + GIVE_UP_S
    while not (found := processes()):
        if time.monotonic() > deadline:
            raise RuntimeError("what was killed did not come back")
        time.sleep(0.1)
    return found[turn % len(found)]


def kill(processes: Callable[[], list[psutil.Process]]) -> Callable[[int], None]:
    """A fault: SIGKILL of one of the processes, another one each time."""

    def fault(turn: int) -> None:
        victim(processes, turn).kill()

    return fault


def hang(processes: Callable[[], list[psutil.Process]]) -> Callable[[int], None]:
    """A fault: SIGSTOP of one of the processes; it goes on after a while if it is still there."""

    def fault(turn: int) -> None:
        stopped = victim(processes, turn)
        stopped.suspend()

        def go_on() -> None:
            with still_there():
                os.kill(stopped.pid, signal.SIGCONT)

        timer = threading.Timer(HANG_S, go_on)
        timer.daemon = True
        timer.start()

    return fault


FAULTS: dict[str, Callable[[int], None]] = {
    "expert_kill": kill(lambda: replicas("experts")),
    "expert_hang": hang(lambda: replicas("experts")),
    "attention_kill": kill(lambda: replicas("attention")),
    "controller_kill": kill(lambda: replicas("controller")),
    "kv_kill": kill(kv_servers),
    "kv_hang": hang(kv_servers),
    "serve_hang": hang(serve_controllers),
}
"""Of these no request may notice more than a pause."""
ALL_FAULTS = {**FAULTS, "ingress_kill": kill(lambda: replicas("ingress"))}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one fault cost, in seconds; see the module's text."""

    added: float
    later: float
    recovered: float


def one_fault(fault: Callable[[int], None], turn: int, traffic: Traffic, client: Client) -> Cost:
    """Brings a fault about and waits until the mesh is whole again."""
    calm = time.monotonic()
    time.sleep(SETTLE_S)
    begin = time.monotonic()
    fault(turn)
    recovered = time.monotonic()
    seen_broken = False
    while time.monotonic() - begin < GIVE_UP_S:
        try:
            is_whole = whole(client.mesh.status(), ATTENTION, SHARDS, REDUNDANCY)
        except Exception:  # the controller itself is away
            is_whole = False
        seen_broken = seen_broken or not is_whole
        now = time.monotonic()
        if is_whole and (seen_broken or now - begin > HANG_S + 1):
            break
        if not is_whole:
            recovered = now
        time.sleep(0.1)
    time.sleep(SETTLE_S)  # pauses are known when they are over
    usual = traffic.usual_gap_s(calm, begin)
    added = traffic.worst_gap_s(begin, begin + MOMENT_S)
    later = traffic.worst_gap_s(begin + MOMENT_S, max(recovered, begin + MOMENT_S))
    return Cost(max(0.0, added - usual), max(0.0, later - usual), recovered - begin)


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_KILLS} kills of a kind instead of {KILLS}")
    parser.add_argument("--faults", default=",".join(ALL_FAULTS), help="which, with commas between (default: all)")
    options = parser.parse_args()
    names = options.faults.split(",")
    if unknown := set(names) - set(ALL_FAULTS):
        parser.error(f"unknown faults {sorted(unknown)}; there are {', '.join(ALL_FAULTS)}")
    kills = QUICK_KILLS if options.quick else KILLS
    engine_environment(1)
    with tempfile.TemporaryDirectory(prefix="failover-") as scratch:
        folder = write_family("qwen3_moe", Path(scratch) / MODEL)
        result = measure(folder, names, kills)
    print(json.dumps(result))


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and maximum."""
    return {"p50": round(statistics.median(seconds) * 1e3, 1), "max": round(max(seconds) * 1e3, 1)}


@contextmanager
def disturbed_mesh(
    folder: Path, routing: dict[str, Any] | None = None
) -> Iterator[tuple[str, list[list[int]], list[Answer]]]:
    """A whole mesh of a tiny model: its URL, prompts, and what it says to each alone. routing: of its configuration."""
    from expertmesh.deployments.local import LocalMesh
    from expertmesh.platform.config import load_config

    settings = {
        "model": {"source": str(folder), "served_name": MODEL, "dtype": "float32"},
        "ingress": {"port": free_port()},
        # Parts of a CPU, so that there is room for one more of each: the private Ray has as many as the mesh asks for.
        "attention": {"replicas": ATTENTION, "kv_cache_gib": 0.25, "cpus": 0.1},
        "experts": {"shards": SHARDS, "redundancy": REDUNDANCY, "cpus": 0.1},
        "routing": routing or {},
        "kv_store": {"url": "embedded"},
    }
    prompts = prompts_for(vocabulary_of(folder), PROMPTS)
    with LocalMesh(load_config(settings)) as mesh:
        alone = [served_answers(mesh.url, MODEL, [prompt], TOKENS)[0] for prompt in prompts]
        yield mesh.url, prompts, alone


def measure(folder: Path, names: list[str], kills: int) -> dict[str, Any]:
    """Each fault `kills` times; see the module's text."""
    result: dict[str, Any] = {}
    with disturbed_mesh(folder) as (url, prompts, alone), Client(base_url=url, timeout=5, max_retries=0) as client:
        for name in names:
            judge = Judge(alone)
            traffic = Traffic(url, MODEL, prompts, judge, STREAMS)
            traffic.start()
            costs = []
            for turn in range(kills):
                cost = one_fault(ALL_FAULTS[name], turn, traffic, client)
                costs.append(cost)
                said = (
                    f"+{cost.added * 1e3:.0f} ms, later +{cost.later * 1e3:.0f} ms, whole after {cost.recovered:.1f} s"
                )
                print(f"{name} {turn + 1}/{kills}: {said}", flush=True)
            traffic.stop()
            result[name] = {
                "failed": len(judge.failed),
                "wrong_tokens": judge.wrong,
                "near_ties": judge.near_ties,
                "compared_tokens": judge.compared,
                "requests": traffic.answered,
                "added_ms": milliseconds([cost.added for cost in costs]),
                "later_ms": milliseconds([cost.later for cost in costs]),
                "recovered_s": round(statistics.median(cost.recovered for cost in costs), 1),
                "errors": sorted(set(judge.failed))[:3],
            }
            print(f"{name}: {result[name]}", flush=True)
    return result


if __name__ == "__main__":
    main()
