"""Traces of requests in Mooncake's format: one JSON object a line, one hash a 512-token block of the prompt.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353, 2354]}

A hash stands for the block and all before it, so two prompts share exactly their equal leading hashes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from expertmesh.errors import ConfigError

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request of a trace."""

    arrival_s: float
    blocks: tuple[int, ...]


def read_trace(path: Path) -> list[TracedRequest]:
    """The requests of a file, by arrival. Raises ConfigError that names the line that can't be read."""
    requests = []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                data = json.loads(line)
                blocks = tuple(int(block) for block in data["hash_ids"])
                requests.append(TracedRequest(float(data["timestamp"]) / 1000, blocks))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: not a request in Mooncake's format: {error!r}") from error
    if not requests:
        raise ConfigError(f"{path}: no request")
    return sorted(requests, key=lambda request: request.arrival_s)


def possible_hits(requests: Sequence[TracedRequest]) -> int:
    """Blocks that one endless cache would find: leading blocks that an earlier request had too."""
    seen: set[int] = set()
    hits = 0
    for request in requests:
        for block in request.blocks:
            if block not in seen:
                break
            hits += 1
        seen.update(request.blocks)
    return hits


def _conversations(rng: random.Random, fresh: Iterator[int], duration_s: float) -> Iterator[TracedRequest]:
    """Chats of one service: a system prompt of a block that all share, then turns that each add some blocks."""
    system = (next(fresh),)
    while True:
        time, blocks = rng.uniform(0, duration_s), system + _take(fresh, rng.lognormvariate(2.0, 1.1))
        for _ in range(min(1 + int(rng.expovariate(1 / 2.2)), 40)):
            yield TracedRequest(time, blocks)
            blocks += _take(fresh, rng.lognormvariate(1.2, 1.0))
            time += 5 + rng.expovariate(1 / 60)


def _documents(rng: random.Random, fresh: Iterator[int], duration_s: float) -> Iterator[TracedRequest]:
    """Long documents that a few questions each are asked about; nothing is shared between documents."""
    while True:
        time, document = rng.uniform(0, duration_s), _take(fresh, rng.lognormvariate(2.8, 0.8))
        for _ in range(1 + int(rng.expovariate(1 / 1.8))):
            yield TracedRequest(time, (*document, next(fresh)))
            time += rng.expovariate(1 / 40)


def _tools(rng: random.Random, fresh: Iterator[int], duration_s: float) -> Iterator[TracedRequest]:
    """Agents: thirty sets of instructions, the favourite for a quarter of all requests, each with its own input."""
    instructions = [_take(fresh, rng.uniform(4, 16)) for _ in range(30)]
    popularity = [1 / rank for rank in range(1, 31)]
    while True:
        (prefix,) = rng.choices(instructions, popularity)
        yield TracedRequest(rng.uniform(0, duration_s), prefix + _take(fresh, rng.lognormvariate(1.5, 0.9)))


def _take(fresh: Iterator[int], length: float) -> tuple[int, ...]:
    return tuple(islice(fresh, max(1, int(length))))


KINDS: dict[str, Callable[[random.Random, Iterator[int], float], Iterator[TracedRequest]]] = {
    "conversations": _conversations,
    "documents": _documents,
    "tools": _tools,
}


def synthetic_trace(kind: str, seed: int, requests: int = 6000, duration_s: float = 1800.0) -> list[TracedRequest]:
    """`requests` requests of a kind (a key of KINDS), by arrival; the same for the same arguments."""
    made = KINDS[kind](random.Random(seed), count(), duration_s)
    inside = islice((request for request in made if request.arrival_s <= duration_s), requests)
    return sorted(inside, key=lambda request: request.arrival_s)
