"""What does scaling cost, under running streams?

    python -m benchmarks.elasticity [--quick]

The demo model serves (Ray Serve, HTTP) with one attention replica and two shards while streams run. Then
`mesh.scale(attention=2, experts=4)`, and when everything is in place back to where it began. Every answer is compared
with the one to the same prompt alone; a token that is missing, doubled or another is wrong unless it is a near tie.
`blocked_ms` is the longest time in which no stream got a token, less the same without scaling; `pause_ms` the same of
a single stream: on a machine where replicas share cores, one that starts slows the others down. `serves_s` is the time
until each new shard has computed something, `settled_s` until every copy is where it is to be. `read` is what the new
shards read over all bytes of the checkpoint. `beside` is the same while as many processes as replicas come only import
what a replica imports: what starting processes on the same cores costs, without any scaling.

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from benchmarks.bare import engine_environment
from benchmarks.parity import prompts_for, vocabulary_of
from benchmarks.served import served_answers
from benchmarks.timing import free_port
from benchmarks.traffic import Judge, Traffic
from expertmesh import Client, MeshStatus
from expertmesh.platform.checkpoints import open_checkpoint
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import load_config

BEGIN, SCALED = {"attention": 1, "experts": 2}, {"attention": 2, "experts": 4}
STREAMS, PROMPTS, TOKENS, CALM_S = 6, 24, 96, 20.0
QUICK_STREAMS, QUICK_PROMPTS, QUICK_TOKENS, QUICK_CALM_S = 3, 6, 32, 5.0
GIVE_UP_S = 600.0
IMPORTS = "import ray.serve, vllm.entrypoints.openai.api_server, vllm.v1.engine.async_llm"


def reached(status: MeshStatus, wanted: dict[str, int]) -> bool:
    """Whether just those serve that are wanted, all experts being where they are to be."""
    shards = status.shards
    copies = status.placement.layers * status.placement.experts * status.placement.redundancy
    return (
        sum(replica.ready for replica in status.attention) == len(status.attention) == wanted["attention"]
        and sum(shard.ready and not shard.leaving for shard in shards) == len(shards) == wanted["experts"]
        and sum(shard.experts for shard in shards) == copies
        and status.placement.moves == 0
    )


def scaled(client: Client, wanted: dict[str, int]) -> tuple[MeshStatus, dict[str, float]]:
    """Scales; the mesh when that is done, and how long it took."""
    known = {shard.shard for shard in client.mesh.status().shards}
    begin = time.monotonic()
    client.mesh.scale(**wanted)
    serving: dict[str, float] = {}
    while time.monotonic() - begin < GIVE_UP_S:
        status = client.mesh.status()
        for shard in status.shards:
            if shard.shard not in known and shard.pairs:
                serving.setdefault(shard.shard, time.monotonic() - begin)
        if reached(status, wanted) and len(serving) >= wanted["experts"] - len(known):
            times = {"settled_s": time.monotonic() - begin}
            return status, times | ({"serves_s": max(serving.values())} if serving else {})
        time.sleep(0.1)
    raise RuntimeError(f"the mesh has not become {wanted} within {GIVE_UP_S:g} s: {client.mesh.status()}")


def imported() -> tuple[None, dict[str, float]]:
    """Processes as many as replicas come, which import and end; how long that took."""
    begin = time.monotonic()
    count = sum(SCALED.values()) - sum(BEGIN.values())
    processes = [subprocess.Popen([sys.executable, "-c", IMPORTS], stderr=subprocess.DEVNULL) for _ in range(count)]
    for process in processes:
        process.wait()
    return None, {"settled_s": time.monotonic() - begin}


def blocked_s(traffic: Traffic, since: float, until: float) -> float:
    """The longest time within an interval of `time.monotonic()` in which no stream got a token."""
    ends = [since, *sorted(gap.end for gap in traffic.gaps if since <= gap.end <= until)]
    return max((after - before for before, after in pairwise(ends)), default=0.0)


def phase(act: Callable[[], tuple[Any, dict[str, float]]], traffic: Traffic, calm_s: float) -> dict[str, Any]:
    """One change under traffic, with undisturbed time before and after."""
    calm = time.monotonic()
    time.sleep(calm_s)
    begin = time.monotonic()
    status, times = act()
    time.sleep(calm_s / 2)
    end = time.monotonic()
    blocked = blocked_s(traffic, begin, end) - blocked_s(traffic, calm, begin)
    pause = traffic.worst_gap_s(begin, end) - traffic.usual_gap_s(calm, begin)
    return {
        "blocked_ms": round(max(0.0, blocked) * 1e3),
        "pause_ms": round(max(0.0, pause) * 1e3),
        **{name: round(value, 1) for name, value in times.items()},
        "status": status,
    }


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter streams")
    quick = parser.parse_args().quick
    streams, count, tokens, calm_s = (
        (QUICK_STREAMS, QUICK_PROMPTS, QUICK_TOKENS, QUICK_CALM_S) if quick else (STREAMS, PROMPTS, TOKENS, CALM_S)
    )
    engine_environment(1)
    print(json.dumps(measure(streams, count, tokens, calm_s)))


def measure(streams: int, count: int, tokens: int, calm_s: float) -> dict[str, Any]:
    """Up and down again; see the module's text."""
    from expertmesh.deployments.local import LocalMesh

    config = load_config(
        {
            "model": "demo",
            "ingress": {"port": free_port()},
            "attention": {"replicas": BEGIN["attention"], "kv_cache_gib": 0.5, "cpus": 0.1},
            "experts": {"shards": BEGIN["experts"], "cpus": 0.1},
            "routing": {"unavailable_timeout_s": 240.0, "rebalance": {"interval_s": 100_000.0}},
        }
    )
    folder = model_folder(config.model)
    total = sum(tensor.nbytes for tensor in open_checkpoint(folder).tensors.values())
    prompts = prompts_for(vocabulary_of(folder), count)
    with LocalMesh(config) as mesh, Client(base_url=mesh.url, timeout=30, max_retries=0) as client:
        judge = Judge([served_answers(mesh.url, "demo", [prompt], tokens)[0] for prompt in prompts])
        traffic = Traffic(mesh.url, "demo", prompts, judge, streams)
        traffic.start()
        old = {shard.shard for shard in client.mesh.status().shards}
        up = phase(lambda: scaled(client, SCALED), traffic, calm_s)
        new = [shard for shard in up.pop("status").shards if shard.shard not in old]
        print(f"up: {up}", flush=True)
        down = phase(lambda: scaled(client, BEGIN), traffic, calm_s)
        down.pop("status")
        print(f"down: {down}", flush=True)
        beside = phase(imported, traffic, calm_s)
        beside.pop("status")
        print(f"beside: {beside}", flush=True)
        traffic.stop()
    for words in judge.failed[:5]:
        print(f"failed: {words}", flush=True)
    return {
        "up": {**up, "read": round(sum(shard.bytes_read for shard in new) / total, 4)},
        "down": down,
        "beside": beside,
        "failed": len(judge.failed),
        "wrong_tokens": judge.wrong,
        "near_ties": judge.near_ties,
        "compared_tokens": judge.compared,
        "answered": traffic.answered,
    }


if __name__ == "__main__":
    main()
