"""What share of monolithic vLLM's throughput does the mesh keep on the same cores?

    python -m benchmarks.tax [--quick] [--redundancy R]

A model of about 250 M parameters (hidden 768, 8 layers, 32 experts, top-4, float32) is written and served by a
monolithic engine with 2 threads and by a mesh on the same 2 cores: an attention engine with one thread and two shards
with one thread each, which never compute at the same time as the attention does. Batches of 1, 8 and 32 prompts of 32
tokens, 64 tokens out, alternating, after a warm-up. Engines and shards are the product's own without Ray and HTTP
around them (benchmarks.bare): this is the price of dispatching, not of serving. Our engines run the model in the engine
core's process (routing.vllm_plugin.CPU_EXECUTOR) and vLLM's own do not; a third side is monolithic vLLM with that, too,
so that what it gives is not taken for the mesh's. Last line: one JSON object; `ratio` is over vLLM as it comes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.bare import EngineHost, Worker, bare_mesh, engine_arguments
from benchmarks.checkpoints import write_medium_moe
from benchmarks.parity import prompts_for
from benchmarks.timing import alternating, median_ratio
from expertmesh.routing.vllm_plugin import CPU_EXECUTOR

BATCHES = (1, 8, 32)
PROMPT_TOKENS, TOKENS = 32, 64
VOCABULARY = 8192
MONOLITHIC_THREADS = 2


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 5")
    parser.add_argument("--redundancy", type=int, default=1, help="copies of each expert (default 1)")
    options = parser.parse_args()
    rounds = 3 if options.quick else 5
    with tempfile.TemporaryDirectory(prefix="tax-") as scratch:
        folder = write_medium_moe(Path(scratch) / "model", vocab=VOCABULARY)
        arguments = engine_arguments(folder)
        with (
            bare_mesh(folder, 2, options.redundancy) as (mesh, hosts),
            Worker(EngineHost, arguments, MONOLITHIC_THREADS) as mono,
            Worker(
                EngineHost, {**arguments, "distributed_executor_backend": CPU_EXECUTOR}, MONOLITHIC_THREADS
            ) as same_executor,
            Worker(EngineHost, {**arguments, **mesh.engine_arguments()}, 1) as engine,
        ):
            sides = {"mono": mono, "mono_same_executor": same_executor, "mesh": engine}
            ratio, same, rates = {}, {}, {}
            for batch in BATCHES:
                prompts = [(p * PROMPT_TOKENS)[:PROMPT_TOKENS] for p in prompts_for(VOCABULARY, batch)]

                def rate(worker: Worker, prompts: list[list[int]] = prompts) -> float:
                    answers = worker.ask("generate", prompts, TOKENS, False)
                    return len(prompts) * TOKENS / float(answers[0].seconds)

                for worker in sides.values():
                    rate(worker)
                measured = alternating(
                    {side: lambda worker=worker: rate(worker) for side, worker in sides.items()},  # type: ignore[misc]
                    rounds,
                )
                ratio[str(batch)] = median_ratio(measured["mesh"], measured["mono"])
                same[str(batch)] = median_ratio(measured["mesh"], measured["mono_same_executor"])
                rates[str(batch)] = {side: round(statistics.median(values), 1) for side, values in measured.items()}
                print(f"batch {batch}: {rates[str(batch)]} tokens/s, ratio {ratio[str(batch)]}", flush=True)
            shards = [host.ask("stats")[0] for host in hosts]
    print(json.dumps({"ratio": ratio, "ratio_same_executor": same, "tokens_per_s": rates, "shards": shards}))


if __name__ == "__main__":
    main()
