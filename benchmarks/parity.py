"""Does the mesh say what monolithic vLLM says, token by token, for every family of models?

    python -m benchmarks.parity [--quick] [--families A,B]

For each MoE family a tiny random checkpoint is written; a monolithic engine and an attention engine answer the same
prompts greedily. The attention engine is served by 2 shards, then, without a restart, by 3 shards with redundancy 2,
then by 2 shards of which one holds two experts swapped: that run is the negative control and must be caught. The demo
model is compared the same way. Dense families go through the whole application with `experts.mode: colocated`.

A token that differs is a near tie if the monolithic engine gives both candidates nearly the same log-probability;
the rest of that answer is not compared. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.bare import Answer, BareMesh, EngineHost, ShardHost, Worker, engine_arguments
from benchmarks.checkpoints import FAMILIES, write_family, write_swapped_experts
from benchmarks.served import served_answers
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import load_config

PROMPTS, TOKENS = 8, 32
PORT = 18100
LOGPROB_TOLERANCE = 1e-3
"""Largest difference of a chosen token's log-probability, and largest gap of a near tie."""
DENSE = ("gemma3", "olmo2")
MOE = tuple(name for name in FAMILIES if name not in DENSE)
QUICK = ("gpt_oss", "deepseek_v3", "demo", "gemma3")


def compare(reference: Sequence[Answer], other: Sequence[Answer]) -> dict[str, Any]:
    """Counts of tokens: identical, near ties, different; largest difference of log-probabilities before any of them."""
    result: dict[str, Any] = {"identical": 0, "near_ties": 0, "different": 0, "skipped": 0, "max_logprob_diff": 0.0}
    for ours, theirs in zip(reference, other, strict=True):
        for i, (a, b) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
            if a == b:
                result["identical"] += 1
                gap = abs(ours.logprobs[i] - theirs.logprobs[i])
                result["max_logprob_diff"] = max(result["max_logprob_diff"], gap)
                continue
            token, logprob = ours.runner_up[i]
            tie = token == b and abs(ours.logprobs[i] - logprob) < LOGPROB_TOLERANCE
            result["near_ties" if tie else "different"] += 1
            result["skipped"] += len(ours.tokens) - i - 1
            break
    return result


def prompts_for(vocabulary: int, count: int = PROMPTS, seed: int = 0) -> list[list[int]]:
    """Prompts of 5 to 60 token ids, the same on every machine."""
    rng = random.Random(seed)
    return [[rng.randrange(10, vocabulary - 1) for _ in range(rng.randint(5, 60))] for _ in range(count)]


def moe_family(name: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """Compares one family; see the module's text."""
    prompts = prompts_for(vocabulary_of(folder))
    with ExitStack() as stack:
        mesh = BareMesh(folder, scratch)
        stack.callback(mesh.mailbox.close)
        mono = stack.enter_context(Worker(EngineHost, engine_arguments(folder), 1))
        engine = stack.enter_context(Worker(EngineHost, {**engine_arguments(folder), **mesh.engine_arguments()}, 1))
        hosts = [stack.enter_context(Worker(ShardHost, mesh.secret, "float32", 1)) for _ in range(3)]
        swapped = write_swapped_experts(folder, scratch / "swapped", mesh.layers[0], 0, 1)
        two, three = mesh.even_slots(2, 1), mesh.even_slots(3, 2)
        for i, host in enumerate(hosts):
            host.post("load", folder, three[i])
            if i < 2:
                host.post("load", folder, two[i])
        targets3, targets2 = [], []
        for i, host in enumerate(hosts):
            targets3.append(host.take())
            if i < 2:
                targets2.append(host.take())
        mesh.publish(two, targets2)
        mono.post("generate", prompts, TOKENS)
        engine.post("generate", prompts, TOKENS)
        reference = mono.take()
        results = {"2 shards": compare(reference, engine.take())}
        mesh.publish(three, targets3)
        results["3 shards, redundancy 2"] = compare(reference, engine.ask("generate", prompts, TOKENS))
        mesh.publish(two, [hosts[0].ask("load", swapped, two[0], folder), targets2[1]])
        control = compare(reference, engine.ask("generate", prompts, TOKENS))
        caught = control["different"] > 0 or control["max_logprob_diff"] > LOGPROB_TOLERANCE
        return {"meshes": results, "control": control, "control_caught": caught}


def dense_family(folder: Path) -> dict[str, Any]:
    """Compares a dense model served colocated, over HTTP, with a monolithic engine."""
    from expertmesh.deployments.local import LocalMesh

    prompts = prompts_for(vocabulary_of(folder))
    with Worker(EngineHost, engine_arguments(folder), 1) as mono:
        mono.post("generate", prompts, TOKENS)
        model = {"source": str(folder), "dtype": "float32"}  # vLLM's auto would make bfloat16 of it
        settings = {"model": model, "experts": {"mode": "colocated"}, "ingress": {"port": PORT}}
        with LocalMesh(load_config(settings)) as mesh:
            answers = served_answers(mesh.url, mesh.config.model.name, prompts, TOKENS)
        return {"meshes": {"colocated": compare(mono.take(), answers)}}


def vocabulary_of(folder: Path) -> int:
    """Number of tokens of a checkpoint's vocabulary."""
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def main() -> None:
    """Runs the comparison and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four families instead of all")
    parser.add_argument("--families", help=f"comma-separated, of {', '.join((*MOE, 'demo', *DENSE))}")
    options = parser.parse_args()
    chosen = options.families.split(",") if options.families else QUICK if options.quick else (*MOE, "demo", *DENSE)
    families: dict[str, Any] = {}
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="parity-") as folder:
            scratch = Path(folder)
            source = model_folder(load_config("demo").model) if name == "demo" else write_family(name, scratch / name)
            families[name] = dense_family(source) if name in DENSE else moe_family(name, source, scratch)
        print(f"{name}: {json.dumps(families[name])}", flush=True)
    print(json.dumps(summary(families)))


def summary(families: dict[str, Any]) -> dict[str, Any]:
    """The figures over all families."""
    runs = [run for family in families.values() for run in family["meshes"].values()]
    return {
        "identical": sum(run["identical"] for run in runs),
        "near_ties": sum(run["near_ties"] for run in runs),
        "different": sum(run["different"] for run in runs),
        "total": sum(run["identical"] + run["near_ties"] + run["different"] for run in runs),
        "max_logprob_diff": max(run["max_logprob_diff"] for run in runs),
        "control_caught": all(family.get("control_caught", True) for family in families.values()),
        "families": families,
    }


if __name__ == "__main__":
    main()
