"""One question through the mesh, and what it took."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from expertmesh.errors import ExpertMeshError
from expertmesh.platform.cli.shared import print_json

if TYPE_CHECKING:
    from expertmesh import Client

MAX_TOKENS = 96

console = Console()


@dataclass(frozen=True, slots=True)
class Share:
    """What one shard's experts computed for the answer."""

    shard: str
    experts: int
    """Of all layers, on this shard."""
    pairs: float
    """(token, expert) pairs; an expert's are split evenly over its copies."""
    share: float
    """Part of all pairs."""
    hottest: tuple[int, int, int]
    """Layer, expert, and its tokens."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question, and what it took."""

    prompt: str
    text: str
    tokens: int
    first_s: float
    """Seconds to the first token."""
    tokens_per_s: float
    """From the first token on."""
    shards: list[Share]


def ask_and_show(url: str, model: str, prompt: str, as_json: bool = False) -> None:
    """Streams the answer to stdout, then tokens/s and the experts' loads by shard; or all of it as JSON.

    Raises ExpertMeshError if the mesh fails to answer.
    """
    from openai import OpenAIError

    from expertmesh import Client

    with Client(base_url=url) as client:
        if not as_json:
            console.print(f"[bold]{prompt}[/]\n")
        try:
            answer = _ask(client, model, prompt, echo=not as_json)
        except OpenAIError as error:
            raise ExpertMeshError(f"the mesh did not answer: {error}") from error
    if as_json:
        print_json(asdict(answer))
        return
    print("\n")
    console.print(
        f"{answer.tokens} tokens, first after {answer.first_s:.2f} s, then {answer.tokens_per_s:.1f} tokens/s\n"
    )
    console.print(_table(answer.shards))


def _ask(client: Client, model: str, prompt: str, echo: bool) -> Answer:
    before = client.mesh.loads().tokens
    begin = time.perf_counter()
    first = 0.0
    tokens = 0
    text = ""
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
            text += chunk.choices[0].delta.content
            if echo:
                print(chunk.choices[0].delta.content, end="", flush=True)
    end = time.perf_counter()
    rate = (tokens - 1) / (end - first) if tokens > 1 else 0.0
    return Answer(prompt, text, tokens, first - begin, rate, _shares(client, before))


def _shares(client: Client, before: list[list[int]]) -> list[Share]:
    """Tokens that each shard's experts took since `before`, and the hottest of them."""
    status, placement = client.mesh.status(), client.mesh.placement()
    now = _settled(client)
    tokens = [[b - a for a, b in zip(old, new, strict=True)] for old, new in zip(before, now, strict=True)]
    total = sum(map(sum, tokens)) or 1
    copies: dict[tuple[int, int], int] = {}
    for slots in placement.slots:
        for layer, held in enumerate(slots):
            for expert in held:
                copies[layer, expert] = copies.get((layer, expert), 0) + 1
    shares = []
    for shard in status.shards:
        mine = [(layer, e) for layer, slots in enumerate(placement.slots[shard.index]) for e in slots if e >= 0]
        taken = sum(tokens[layer][e] / copies[layer, e] for layer, e in mine)
        layer, expert = max(mine, key=lambda where: tokens[where[0]][where[1]])
        hottest = (placement.layers[layer], expert, tokens[layer][expert])
        shares.append(Share(shard.shard, len(mine), taken, taken / total, hottest))
    return shares


def _table(shares: list[Share]) -> Table:
    table = Table("shard", "experts", "tokens x experts", "share", "hottest expert", title="who computed it")
    for row in shares:
        layer, expert, tokens = row.hottest
        hottest = f"layer {layer}, expert {expert}: {tokens}"
        table.add_row(row.shard, str(row.experts), f"{row.pairs:.0f}", f"{row.share:.0%}", hottest)
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
