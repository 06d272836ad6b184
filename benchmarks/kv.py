"""What is a block in the KV store worth, and what does a store in trouble cost?

    python -m benchmarks.kv [--quick] [--model FOLDER]

Two engines of the demo model (or of any checkpoint) over one Valkey on a unix socket, and a third one without a store,
never more than two at one time. Time to first token of prompts of 256, 1024 and 4096 tokens and a little more:
`recompute` by the engine without a store, `local` by the engine that has just computed it, `store` by another engine
that never saw it. Then, with prompts of 1024 tokens in turn on the engine without a store and on one whose server hangs
(SIGSTOP), is killed, answers at a quarter of the break-even rate, or holds damage in one of five values:
`added_ms_before_open` is the time that the first request takes longer than without a store, `ratio_after_open` the
median of the later ones over those without. `wrong_tokens` are compared with the engine without a store. The client
moves batches of 8 MiB over one connection; the raw socket moves the same bytes and looks at none.

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.kv_client import measure
from benchmarks.kv_engine import Engines, Reply
from benchmarks.kv_server import BenchServer, SlowProxy
from expertmesh.kv_store import StoreSettings
from expertmesh.platform.checkpoints import open_checkpoint
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import load_config

LENGTHS = (256, 1024, 4096)
FAULT_LENGTH = 1024
SUFFIX, TOKENS = 24, 16
BLOCK = 128
WARM_UP = 300
MAX_LENGTH = 4608
DAMAGED = 5
"""One value of so many is damaged."""
SLOWER = 4
"""Than break-even, by which the throttled server is."""
PATIENCE_S = 120.0

Prompt = list[int]


@dataclass
class Tally:
    """What was wrong, over all phases."""

    wrong_tokens: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    expected: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    """Tokens of the engine without a store, by prompt."""

    def check(self, prompt: Prompt, reply: Reply) -> None:
        """Counts a reply of an engine with a store."""
        self.failed += reply.finish != "length"
        known = self.expected[tuple(prompt)][: len(reply.tokens)]
        self.wrong_tokens += sum(a != b for a, b in zip(known, reply.tokens, strict=True))


class Bench:
    """The engines of a run, and prompts that nobody saw before."""

    def __init__(self, folder: Path, scratch: Path, tally: Tally) -> None:
        self._folder = folder
        self._scratch = scratch
        self._draw = random.Random(7)
        self._vocabulary = int(open_checkpoint(folder).config["vocab_size"])
        self._engines = 0
        self.tally = tally

    def engine(self, server: StoreSettings | None) -> Engines:
        """A warm engine, over a store or without one."""
        self._engines += 1
        scratch = self._scratch / f"engine-{self._engines}"
        scratch.mkdir()
        engines = Engines(scratch, core_apart=True)
        engines.start(self._folder, server, host_bytes=1 << 30, max_model_len=MAX_LENGTH, enable_prefix_caching=True)
        for _ in range(2):
            engines.reply(self.prompt(WARM_UP), 2)
        return engines

    def prompt(self, length: int) -> Prompt:
        """Random tokens; the first `length` are what may be shared."""
        return [self._draw.randrange(100, self._vocabulary) for _ in range(length + SUFFIX)]

    def recompute(self, engine: Engines, prompt: Prompt) -> float:
        """Milliseconds to the first token without a store; remembers what the tokens are."""
        first = engine.reply(prompt, 1)
        assert first.cached == 0
        self.tally.expected[tuple(prompt)] = engine.reply(prompt, TOKENS).tokens
        return first.seconds * 1e3

    def first_token(self, engine: Engines, prompt: Prompt) -> Reply:
        """An engine with a store, whose further tokens are compared too."""
        return self.checked(engine, prompt, engine.reply(prompt, 1))

    def checked(self, engine: Engines, prompt: Prompt, first: Reply) -> Reply:
        """That reply, compared as are further tokens."""
        self.tally.check(prompt, first)
        self.tally.check(prompt, engine.reply(prompt, TOKENS))
        return first


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.05)


def written(engine: Engines, server: BenchServer, blocks: int) -> None:
    """Waits until so many blocks are in the store."""
    wait(lambda: server.blocks() >= blocks, f"{server.blocks()} of {blocks} blocks are in the store")


def hits(bench: Bench, server: BenchServer, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds to the first token by length: recompute, local, store."""
    prompts = {length: [bench.prompt(length) for _ in range(rounds)] for length in LENGTHS}
    took: dict[int, dict[str, list[float]]] = {
        length: {"recompute": [], "local": [], "store": []} for length in LENGTHS
    }
    with bench.engine(None) as plain:
        for length, asked in prompts.items():
            took[length]["recompute"] = [bench.recompute(plain, prompt) for prompt in asked]
    with bench.engine(server.settings) as writer, bench.engine(server.settings) as reader:
        for length, asked in prompts.items():
            for prompt in asked:
                blocks = server.blocks()
                bench.first_token(writer, prompt)
                local = writer.reply(prompt[:length] + bench.prompt(0), 1)
                assert local.cached == length
                took[length]["local"].append(local.seconds * 1e3)
                written(writer, server, blocks + length // BLOCK)
                reply = bench.first_token(reader, prompt)
                bench.tally.prompt_tokens += len(prompt)
                bench.tally.cached_tokens += reply.cached
                took[length]["store"].append(reply.seconds * 1e3)
    return {
        str(length): {kind: round(statistics.median(values), 1) for kind, values in kinds.items()}
        for length, kinds in took.items()
    }


def faults(bench: Bench, server: BenchServer, proxy: SlowProxy, rounds: int) -> dict[str, dict[str, float]]:
    """What each fault costs; the engine's own caches are emptied before each request."""
    with bench.engine(None) as plain, bench.engine(server.settings_by(proxy)) as engine:

        def stored_prompts() -> list[Prompt]:
            prompts = [bench.prompt(FAULT_LENGTH) for _ in range(rounds + 1)]
            for prompt in prompts:
                blocks = server.blocks()
                engine.reply(prompt, 1)
                written(engine, server, blocks + FAULT_LENGTH // BLOCK)
            engine.forget()
            return prompts

        def new_prompts() -> list[Prompt]:
            return [bench.prompt(FAULT_LENGTH) for _ in range(rounds + 1)]

        def cost(prompts: Sequence[Prompt]) -> dict[str, float]:
            added, ratios = [], []
            for turn, prompt in enumerate(prompts):
                early = engine.reply(prompt, 1) if turn % 2 else None  # so that neither always comes first
                without = bench.recompute(plain, prompt)
                first = bench.first_token(engine, prompt) if early is None else bench.checked(engine, prompt, early)
                with_store = first.seconds * 1e3
                added.append(with_store - without)
                ratios.append(with_store / without)
            return {
                "added_ms_before_open": round(added[0], 1),
                "ratio_after_open": round(statistics.median(ratios[1:]), 3),
            }

        def healthy() -> bool:
            return engine.breakers() == ["closed"]

        result: dict[str, dict[str, float]] = {}
        cost(new_prompts())  # so that the engine knows what computing takes
        prompts = stored_prompts()
        damaged = server.damage(DAMAGED)
        result["corrupt"] = {**cost(prompts), "damaged_values": damaged}

        prompts = stored_prompts()
        server.pause()
        result["hang"] = cost(prompts)
        server.resume()
        wait(healthy, "the breaker closes")

        prompts = stored_prompts()
        with server.client() as client:
            (size,) = {client.strlen(key) for key in list(client.scan_iter(count=512))[:1]}
        seconds = bench.recompute(plain, bench.prompt(FAULT_LENGTH)) / 1e3
        proxy.bytes_per_s = FAULT_LENGTH // BLOCK * size / seconds / SLOWER
        result["throttle"] = cost(prompts)
        proxy.bytes_per_s = None

        server.kill()
        result["kill"] = cost(new_prompts())
        result["counts"] = {name: float(count) for name, count in engine.counts().items()}
    return result


def main() -> None:
    """Prints a line a phase, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--model", help="checkpoint folder; by default the demo's")
    options = parser.parse_args()
    rounds = 2 if options.quick else 5
    folder = model_folder(load_config(options.model).model)
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="xm-kv-") as name:
        scratch = Path(name)
        bench = Bench(folder, scratch, tally)
        with BenchServer(scratch) as server:
            ratios, rates = measure(server, 20 * rounds)
            print(f"GB/s: {json.dumps(rates)}", flush=True)
            ttft = hits(bench, server, rounds)
            print(f"ttft ms: {json.dumps(ttft)}", flush=True)
            with SlowProxy(scratch / "proxy", server.settings) as proxy:
                trouble = faults(bench, server, proxy, rounds)
        counts = trouble.pop("counts")
    result: dict[str, Any] = {
        "ttft_ms": ttft,
        "hit_ratio": round(tally.cached_tokens / tally.prompt_tokens, 3),
        "faults": trouble,
        "fault_counts": counts,
        "wrong_tokens": tally.wrong_tokens,
        "failed": tally.failed,
        "client_vs_raw": {size: round(ratio, 2) for size, ratio in ratios.items()},
        "client_gb_s": {size: {who: round(rate, 2) for who, rate in by.items()} for size, by in rates.items()},
        "redis_py_parser": "hiredis" if find_spec("hiredis") else "python",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
