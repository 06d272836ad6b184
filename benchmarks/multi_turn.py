"""What share of prompts do conversations find cached, by how their requests are routed?

    python -m benchmarks.multi_turn [--quick]

Two live attention replicas (a tiny model with its experts in the engine, the whole application around it) and
conversations that go on at the same time: all share a system prompt of 256 tokens, and each turn sends everything said
so far and some 60 to 160 new tokens. The KV cache of a replica holds about three quarters of what all conversations
have said in the end. The policies take turns on the same replicas, each time with conversations that nobody has seen:

* `ours`: the mesh's request router. `least_loaded`: Ray Serve's own. `random`: any replica.

Last line: one JSON object. `hit`: cached prompt tokens / all prompt tokens, as the engines report them in `usage`;
`ideal`: the same of one endless cache with blocks of 128 tokens that never waits for anything; `of_ideal`: median over
the rounds of their ratio; `ttft_ms`: median time until the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.checkpoints import write_family
from benchmarks.timing import alternating
from expertmesh import AsyncClient
from expertmesh.platform.config import load_config

POLICIES = ("ours", "least_loaded", "random")
ROUTER = "benchmarks.multi_turn_router.SwitchingRouter"
BLOCK = 128
SYSTEM_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 2 * BLOCK, (60, 160), 16
TOKENS_PER_GIB = (1 << 30) // (3 * 2 * 2 * 32 * 4)
"""Layers, keys and values, heads, width, float32: of benchmarks.checkpoints' qwen3_moe."""
THINK_S = 0.5
"""Between an answer and the next turn, at most."""


@dataclass
class Round:
    """What the conversations of one round saw."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    ideal_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    """Prefixes of whole blocks that were computed."""

    def sent(self, prompt: list[int]) -> None:
        """Counts what an endless cache would find of a prompt that is sent now."""
        self.prompt_tokens += len(prompt)
        for prefix in _prefixes(prompt[:-1]):
            if prefix not in self.seen:
                break
            self.ideal_tokens += BLOCK
        self.seen.update(_prefixes(prompt))

    def answered(self, prompt: list[int], answer: list[int]) -> None:
        """An answer is there: what was computed for it may be found, too, all but its last token."""
        self.seen.update(_prefixes(prompt + answer[:-1]))


def _prefixes(tokens: list[int]) -> list[int]:
    return [hash(tuple(tokens[:end])) for end in range(BLOCK, len(tokens) + 1, BLOCK)]


async def _turn(client: AsyncClient, name: str, prompt: list[int], into: Round) -> list[int]:
    """Sends a prompt; the answer's tokens."""
    into.sent(prompt)
    begin = time.perf_counter()
    stream: Any = await client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Request-Id": name},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    answer: list[int] = []
    async for chunk in stream:
        for choice in chunk.choices:
            if not answer:
                into.ttft_s.append(time.perf_counter() - begin)
            answer += choice.token_ids or []
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            into.cached_tokens += 0 if details is None else details.cached_tokens or 0
    into.answered(prompt, answer)
    return answer


async def _conversation(
    client: AsyncClient, name: str, system: list[int], turns: int, rng: random.Random, into: Round
) -> None:
    said = list(system)
    for turn in range(turns):
        await asyncio.sleep(rng.uniform(0, THINK_S))
        said += rng.choices(range(10, 300), k=rng.randint(*TURN_TOKENS))
        said += await _turn(client, f"{name}-{turn}", said, into)


async def _round(url: str, policy: str, conversations: int, turns: int, seed: str) -> Round:
    rng, result = random.Random(f"{seed} {policy}"), Round()
    system = rng.choices(range(10, 300), k=SYSTEM_TOKENS)
    async with AsyncClient(base_url=url, timeout=300, max_retries=0) as client:
        talks = [
            _conversation(client, f"{policy}-{seed}-{i}", system, turns, random.Random(rng.random()), result)
            for i in range(conversations)
        ]
        await asyncio.gather(*talks)
    return result


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 round of 12 conversations instead of 5 of 24")
    parser.add_argument("--port", type=int, default=8123, help="of the HTTP server (default 8123)")
    options = parser.parse_args()
    conversations, turns, rounds = (12, 6, 1) if options.quick else (24, 9, 5)
    said = conversations * turns * (sum(TURN_TOKENS) // 2 + ANSWER_TOKENS) + SYSTEM_TOKENS

    from ray.serve.config import RequestRouterConfig

    from expertmesh.deployments.local import LocalMesh

    with tempfile.TemporaryDirectory(prefix="multi-turn-") as scratch:
        folder = write_family("qwen3_moe", Path(scratch) / "tiny")
        config = load_config(
            {
                "model": {"source": str(folder), "served_name": "tiny", "dtype": "float32"},
                "experts": {"mode": "colocated"},
                "attention": {"replicas": 2, "kv_cache_gib": 0.75 * said / TOKENS_PER_GIB},
                "ingress": {"port": options.port},
            }
        )
        router: dict[str, Any] = {
            "request_router_class": ROUTER,
            "request_router_kwargs": {"mesh": config.model_dump(mode="json")},
        }
        chosen = {"request_router_config": RequestRouterConfig(**router)}
        with patch("expertmesh.deployments.builder.router_options", lambda _: chosen), LocalMesh(config) as mesh:
            results: dict[str, list[Round]] = {policy: [] for policy in POLICIES}

            def measure(policy: str) -> float:
                seed = str(len(results[policy]))
                result = asyncio.run(_round(mesh.url, policy, conversations, turns, seed))
                results[policy].append(result)
                share = result.cached_tokens / result.ideal_tokens
                print(f"{policy}: {share:.3f} of the ideal, {result.prompt_tokens} tokens", flush=True)
                return share

            asyncio.run(_round(mesh.url, "warm-up", 4, 2, "0"))
            shares = alternating({policy: lambda policy=policy: measure(policy) for policy in POLICIES}, rounds)  # type: ignore[misc]

    def hit(policy: str, name: str) -> float:
        tokens = sum(getattr(result, name) for result in results[policy])
        return round(tokens / sum(result.prompt_tokens for result in results[policy]), 4)

    ttft = {p: statistics.median(t for result in results[p] for t in result.ttft_s) for p in POLICIES}
    summary = {
        "hit": {policy: hit(policy, "cached_tokens") for policy in POLICIES},
        "ideal": {policy: hit(policy, "ideal_tokens") for policy in POLICIES},
        "of_ideal": {policy: round(statistics.median(shares[policy]), 3) for policy in POLICIES},
        "ttft_ms": {policy: round(1000 * seconds, 1) for policy, seconds in ttft.items()},
        "conversations": conversations,
        "rounds": rounds,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
