"""What does following the load give, when traffic heats a few experts and then others?

    python -m benchmarks.hotspot [--quick] [--pair-us 500]

Two whole meshes run side by side (HTTP, Ray Serve, one attention replica, four shards, redundancy 1 and spare slots):
one re-places experts, the other keeps its first placement; both have the same slots. Prompts of mix A, and then of
mix B, are drawn from a few token ids each, which heats a few experts of every layer. The two are driven in turn: mix B
before the re-placement, while it goes on, and after it. Balancedness is counted, not predicted: mean over the layers of
(mean over shards / maximum) of the pairs that each shard computed. Every answer is compared with the one that the
static mesh gave to the same prompt alone and unloaded; a token that differs must be a near tie there. The shards share
two cores, which an even load doesn't make quicker, so each takes `--pair-us` for a (token, expert) pair, as if it had
a device of that speed (benchmarks.devices); 0 leaves that away.

The slow shard: four shards as processes, redundancy 2, and two dispatchers on the same steps in turn, one with the
cost model (`live_cost`) and one without (`least_loaded`); one shard waits after each batch for as long as it computed.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bare import ShardHost, Worker, engine_environment
from benchmarks.checkpoints import write_medium_moe
from benchmarks.devices import Slowed, pace_shards
from benchmarks.served import served_answers
from benchmarks.timing import free_port
from benchmarks.traffic import Judge

SHARDS, SPARE_SLOTS = 4, 2
LAYERS, EXPERTS, TOP_K, HIDDEN = 6, 32, 4, 768
VOCABULARY = 2048
MIX_TOKENS = 2
"""Token ids of which the prompts of a mix are made."""
PROMPTS, PROMPT_TOKENS, TOKENS, STREAMS = 12, 48, 24, 6
MODEL = "hot"
SLOW_STEPS, QUICK_SLOW_STEPS = 400, 150
SLOW_TOKENS = 64


def mix(seed: int) -> list[list[int]]:
    """Prompts of a few token ids."""
    rng = random.Random(seed)
    tokens = rng.sample(range(10, VOCABULARY - 1), MIX_TOKENS)
    return [[rng.choice(tokens) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]


# -- the served meshes --------------------------------------------------------------------------------------------


class Served:
    """A whole mesh in a process; to be run by a Worker."""

    def __init__(self, folder: Path, rebalance: bool, pair_us: float) -> None:
        engine_environment(1)
        if pair_us:
            pace_shards(pair_us)
        from expertmesh.deployments.local import LocalMesh
        from expertmesh.platform.config import load_config

        settings = {
            "model": {"source": str(folder), "served_name": MODEL, "dtype": "float32"},
            "ingress": {"port": free_port()},
            "attention": {"kv_cache_gib": 0.5, "max_num_seqs": 16, "prefix_caching": False},
            "experts": {
                "shards": SHARDS,
                "spare_slots": SPARE_SLOTS + (not rebalance),  # one more stays empty there
            },
            "routing": {"rebalance": {"enabled": rebalance, "interval_s": 2, "half_life_s": 8}},
        }
        self._mesh = LocalMesh(load_config(settings)).start()

    def answers(self, prompts: list[list[int]]) -> list[Any]:
        """To each prompt alone, as benchmarks.bare.Answer."""
        return [served_answers(self._mesh.url, MODEL, [prompt], TOKENS)[0] for prompt in prompts]

    def drive(self, prompts: list[list[int]], seconds: float) -> dict[str, Any]:
        """Streams of requests for some seconds, prompts in turn: tokens a second, answers, pairs by layer and shard."""
        return asyncio.run(self._drive(prompts, seconds))

    async def _drive(self, prompts: list[list[int]], seconds: float) -> dict[str, Any]:
        from expertmesh import AsyncClient

        answers: list[tuple[int, tuple[int, ...]]] = []
        failed: list[str] = []
        async with AsyncClient(base_url=self._mesh.url, timeout=300, max_retries=0) as client:
            before = await _pairs(client)
            begin = time.perf_counter()
            end = begin + seconds

            async def stream(first: int) -> None:
                turn = first
                while time.perf_counter() < end:
                    at = turn % len(prompts)
                    turn += STREAMS
                    try:
                        answer = await client.completions.create(
                            model=MODEL,
                            prompt=prompts[at],
                            max_tokens=TOKENS,
                            temperature=0,
                            extra_body={"ignore_eos": True, "return_token_ids": True},
                        )
                    except Exception as error:  # counted, and no failure is allowed
                        failed.append(repr(error))
                        continue
                    answers.append((at, tuple(answer.choices[0].token_ids)))  # type: ignore[attr-defined]

            await asyncio.gather(*(stream(i) for i in range(STREAMS)))
            took = time.perf_counter() - begin
            await asyncio.sleep(1.5)  # two heartbeats bring the counters
            pairs = (await _pairs(client)) - before
        return {
            "tokens_per_s": sum(len(tokens) for _, tokens in answers) / took,
            "answers": answers,
            "failed": failed,
            "pairs": pairs.tolist(),
        }

    def freeze(self, frozen: bool) -> None:
        """Stops re-placement, or starts it again."""
        from expertmesh import Client

        with Client(base_url=self._mesh.url) as client:
            client.mesh.freeze(frozen)

    def moves(self) -> tuple[int, int]:
        """Moves under way, moves done."""
        from expertmesh import Client

        with Client(base_url=self._mesh.url) as client:
            placement = client.mesh.placement()
        return len(placement.running), len([move for move in placement.ended if "(done)" in move])

    def close(self) -> None:
        """Ends the mesh."""
        self._mesh.close()


async def _pairs(client: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Pairs computed: [layers, shards]."""
    shards = (await client.mesh.raw("status"))["shards"]
    layers = sorted({int(layer) for shard in shards for layer in shard.get("layer_pairs", {})})
    counts = [[shard.get("layer_pairs", {}).get(str(layer), 0) for shard in shards] for layer in layers]
    return np.array(counts or np.zeros((LAYERS, SHARDS)), dtype=np.int64)


def counted_balancedness(pairs: Sequence[Sequence[int]]) -> float:
    """Mean over layers of mean / maximum; pairs: [layers, shards]."""
    counts = np.array(pairs, dtype=np.float64)
    return float((counts.mean(axis=1) / np.maximum(counts.max(axis=1), 1)).mean())


def served_part(folder: Path, pair_us: float, window_s: float, rounds: int) -> dict[str, Any]:
    """The two meshes; see the module's text."""
    with Worker(Served, folder, False, pair_us) as static, Worker(Served, folder, True, pair_us) as ours:
        judges = {seed: Judge(static.ask("answers", mix(seed))) for seed in (1, 2)}

        def driven(side: Worker, seed: int) -> dict[str, Any]:
            window: dict[str, Any] = side.ask("drive", mix(seed), window_s)
            judges[seed].failed += window["failed"]
            for at, tokens in window["answers"]:
                judges[seed].take(at, tokens)
            return window

        def windows(seed: int, count: int) -> dict[str, list[dict[str, Any]]]:
            found: dict[str, list[dict[str, Any]]] = {"static": [], "ours": []}
            for _ in range(count):
                for name, side in (("static", static), ("ours", ours)):
                    window = driven(side, seed)
                    found[name].append(window)
                    shown = f"{window['tokens_per_s']:.1f} tokens/s, {counted_balancedness(window['pairs']):.3f}"
                    print(f"mix {'AB'[seed - 1]} {name}: {shown} balanced", flush=True)
            return found

        def settle(seed: int) -> list[dict[str, Any]]:
            """Drives our mesh until its placement has followed."""
            found = []
            for _ in range(8):
                done = ours.ask("moves")[1]
                found.append(driven(ours, seed))
                running, now = ours.ask("moves")
                print(f"  re-placing: {now - done} moves done, {running} under way", flush=True)
                if not running and now == done:
                    break
            return found

        settle(1)
        after_a = windows(1, 1)
        ours.ask("freeze", True)
        before = windows(2, rounds)
        ours.ask("freeze", False)
        during = settle(2)
        ours.ask("freeze", True)
        after = windows(2, rounds)
        moves = ours.ask("moves")[1]

    def rate(found: Sequence[dict[str, Any]]) -> float:
        return round(statistics.median(window["tokens_per_s"] for window in found), 1)

    def even(found: Sequence[dict[str, Any]]) -> float:
        return round(statistics.median(counted_balancedness(window["pairs"]) for window in found), 3)

    return {
        "failed": sum(len(judge.failed) for judge in judges.values()),
        "wrong_tokens": sum(judge.wrong for judge in judges.values()),
        "near_ties": sum(judge.near_ties for judge in judges.values()),
        "compared_tokens": sum(judge.compared for judge in judges.values()),
        "throughput": {
            "static": rate(after["static"]),
            "ours": rate(after["ours"]),
            "ours_before": rate(before["ours"]),
            "static_before": rate(before["static"]),
            "ours_during": rate(during),
            "mix_a": {"static": rate(after_a["static"]), "ours": rate(after_a["ours"])},
        },
        "balancedness": {
            "before": even(before["ours"]),
            "after": even(after["ours"]),
            "static": even(after["static"]),
            "during": even(during),
        },
        "moves": moves,
    }


# -- the slow shard -----------------------------------------------------------------------------------------------


class SlowableShards(ShardHost):
    """A shard that can be told to take its time; to be run by a Worker."""

    def slow_down(self, factor: float) -> None:
        """From now on a batch takes so many times as long as it computes; the processor is free meanwhile."""
        for shard in self._shards:
            shard.server._kernel = Slowed(shard.bank, factor) if factor > 1 else shard.bank


def slow_part(folder: Path, steps: int) -> dict[str, Any]:
    """Share of the tokens that a shard of half speed gets, and the 99th percentile of a layer's time, by policy."""
    engine_environment(1)
    import torch

    from benchmarks.bare import BareMesh
    from expertmesh.routing.dispatch import Dispatcher, DispatchSettings, StaticTable
    from expertmesh.routing.placement import build_table

    torch.set_num_threads(1)
    with ExitStack() as stack:
        mesh = BareMesh(folder, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotspot-"))))
        stack.callback(mesh.mailbox.close)
        hosts = [stack.enter_context(Worker(SlowableShards, mesh.secret, "float32", 1)) for _ in range(SHARDS)]
        slots = mesh.even_slots(SHARDS, 2)
        for host, held in zip(hosts, slots, strict=True):
            host.post("load", folder, held)
        targets = [host.take() for host in hosts]
        table = build_table(1, mesh.layers, mesh.num_experts, slots, dict(enumerate(targets)))
        dispatchers = {}
        for policy in ("live_cost", "least_loaded"):
            settings = DispatchSettings(**{**mesh.settings.dispatch, "policy": policy})
            dispatchers[policy] = Dispatcher(StaticTable(table), mesh.secret, settings)
            stack.callback(dispatchers[policy].close)
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(SLOW_TOKENS, HIDDEN, generator=generator)
        weights = torch.full((SLOW_TOKENS, TOP_K), 1 / TOP_K)
        ids = [
            torch.rand(SLOW_TOKENS, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K].to(torch.int32)
            for _ in range(16)
        ]

        def run(count: int) -> dict[str, tuple[float, list[float]]]:
            """Share of the first shard, and each layer's seconds, by policy: steps in turn."""
            seconds: dict[str, list[float]] = {policy: [] for policy in dispatchers}
            first: dict[str, int] = dict.fromkeys(dispatchers, 0)
            every: dict[str, int] = dict.fromkeys(dispatchers, 0)
            for step in range(count // 20):
                for policy, dispatcher in dispatchers.items():
                    before = [host.ask("stats")[0]["pairs"] for host in hosts]
                    for turn in range(20):
                        layer = mesh.layers[turn % len(mesh.layers)]
                        begin = time.perf_counter()
                        dispatcher(layer, x, weights, ids[(step + turn) % len(ids)])
                        seconds[policy].append(time.perf_counter() - begin)
                    pairs = [host.ask("stats")[0]["pairs"] - b for host, b in zip(hosts, before, strict=True)]
                    first[policy] += pairs[0]
                    every[policy] += sum(pairs)
            return {policy: (first[policy] / every[policy], seconds[policy]) for policy in dispatchers}

        run(100)
        even = run(steps)
        hosts[0].ask("slow_down", 2.0)
        run(100)
        slowed = run(steps)
        hosts[0].ask("slow_down", 1.0)
        run(100)
        again = run(steps)
    p99 = {policy: float(np.percentile(values, 99)) for policy, (_, values) in slowed.items()}
    return {
        "share": round(slowed["live_cost"][0], 3),
        "share_without": round(slowed["least_loaded"][0], 3),
        "share_even": round(even["live_cost"][0], 3),
        "share_recovered": round(again["live_cost"][0], 3),
        "p99_ratio": round(p99["live_cost"] / p99["least_loaded"], 3),
        "p50_ratio": round(statistics.median(slowed["live_cost"][1]) / statistics.median(slowed["least_loaded"][1]), 3),
        "p99_ms": {policy: round(value * 1e3, 3) for policy, value in p99.items()},
    }


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter windows, two rounds instead of three")
    parser.add_argument("--pair-us", type=float, default=500, help="a shard's time for a pair (default 500)")
    parser.add_argument("--part", choices=["served", "slow"], help="only one of the two parts")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="hotspot-") as scratch:
        folder = write_medium_moe(
            Path(scratch) / "model", layers=LAYERS, experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, vocab=VOCABULARY
        )
        if options.part != "served":
            result["slow_shard"] = slow_part(folder, QUICK_SLOW_STEPS if options.quick else SLOW_STEPS)
            print(f"slow shard: {result['slow_shard']}", flush=True)
        if options.part != "slow":
            result = served_part(folder, options.pair_us, *((8.0, 2) if options.quick else (15.0, 3))) | result
    print(json.dumps(result))


if __name__ == "__main__":
    main()
