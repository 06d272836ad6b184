"""One question through the mesh, and what it took."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from expertmesh import Client

MAX_TOKENS = 96

console = Console()


def ask_and_show(url: str, model: str, prompt: str) -> None:
    """Streams the answer to stdout, then tokens/s and the experts' loads by shard. Raises what the SDK raises."""
    from expertmesh import Client

    with Client(base_url=url) as client:
        before = client.mesh.loads()
        console.print(f"[bold]{prompt}[/]\n")
        begin = time.perf_counter()
        first = 0.0
        tokens = 0
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter()
                print(chunk.choices[0].delta.content, end="", flush=True)
        end = time.perf_counter()
        print("\n")
        rate = (tokens - 1) / (end - first) if tokens > 1 else 0.0
        console.print(f"{tokens} tokens, first after {first - begin:.2f} s, then {rate:.1f} tokens/s\n")
        console.print(_loads_by_shard(client, before.tokens))


def _loads_by_shard(client: Client, before: list[list[int]]) -> Table:
    """Tokens that each shard's experts took since `before`, and the hottest of them."""
    status, placement = client.mesh.status(), client.mesh.placement()
    now = _settled(client)
    table = Table("shard", "experts", "tokens x experts", "share", "hottest expert", title="who computed it")
    tokens = [[b - a for a, b in zip(old, new, strict=True)] for old, new in zip(before, now, strict=True)]
    total = sum(map(sum, tokens)) or 1
    copies: dict[tuple[int, int], int] = {}
    for slots in placement.slots:
        for layer, held in enumerate(slots):
            for expert in held:
                copies[layer, expert] = copies.get((layer, expert), 0) + 1
    for shard in status.shards:
        mine = [(layer, e) for layer, slots in enumerate(placement.slots[shard.index]) for e in slots if e >= 0]
        taken = sum(tokens[layer][e] / copies[layer, e] for layer, e in mine)
        layer, expert = max(mine, key=lambda where: tokens[where[0]][where[1]])
        hottest = f"layer {placement.layers[layer]}, expert {expert}: {tokens[layer][expert]}"
        table.add_row(shard.shard, str(len(mine)), f"{taken:.0f}", f"{taken / total:.0%}", hottest)
    return table


def _settled(client: Client) -> list[list[int]]:
    """The loads once two readings agree: replicas report them a few times a second."""
    last = client.mesh.loads().tokens
    for _ in range(20):
        time.sleep(0.3)
        now = client.mesh.loads().tokens
        if now == last:
            return now
        last = now
    return last
