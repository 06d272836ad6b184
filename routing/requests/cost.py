"""What a request costs at a replica, in blocks to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from expertmesh.errors import ConfigError

_REQUEST_PER_PROMPT = 1 / 8
"""`request_blocks` over the mean length of prompts."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """score = backlog_weight * backlog + cost of the request's own blocks.

    The backlog is what keeps a replica from starting at once:

        backlog = request_blocks * requests in flight + queued_block * blocks that these have yet to compute

    Waiting behind n blocks takes as long as computing n, yet the weights are below that on purpose: a prefix that is
    computed a second time delays everybody behind it and takes room in a second cache, so a move has to gain several
    times what it costs. That requests count alike, and their blocks little, makes a hot prefix spread: its requests are
    many, and short.

    A worked number: replica A holds 30 of a request's 40 blocks and has 4 requests in flight with 50 blocks to compute;
    B holds none and is idle. A costs 0.5 * (3 * 4 + 0.1 * 50) + 10 = 18.5, B costs 40: A takes it. With 20 requests of
    12 blocks A would cost 0.5 * (3 * 20 + 0.1 * 240) + 10 = 52: B takes it, and holds the prefix too from then on.

    The weights come from `benchmarks.prefix_routing` with 8 replicas, on Mooncake's synthetic trace and on traces of
    conversations, documents and tools, whose prompts have 18 to 31 blocks on average; from 2 to 4 a request and from 0
    to 0.2 a block the results change little. Where prompts are shorter, or blocks larger, a request is less of a
    backlog: `for_prompts_of` keeps the proportion.
    """

    backlog_weight: float = 0.5
    request_blocks: float = 3.0
    queued_block: float = 0.1
    store_block: float = 0.5
    """Fetching a block from the KV store, relative to computing it: from 0, as good as a hit, to 1, no gain."""

    @classmethod
    def for_prompts_of(cls, blocks: float) -> Self:
        """The weights where prompts have that many blocks on average; a request counts an eighth of a prompt."""
        return cls(request_blocks=blocks * _REQUEST_PER_PROMPT)

    def __post_init__(self) -> None:
        """Raises ConfigError for a weight that would turn the order around."""
        for name in ("backlog_weight", "request_blocks", "queued_block"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: {getattr(self, name)} must not be negative")
        if not 0 <= self.store_block <= 1:
            raise ConfigError(f"store_block: {self.store_block} is not from 0 to 1")

    def work(self, blocks: int, held: int, stored: int) -> float:
        """What a prompt of `blocks` costs where its first `held` are cached and the store has its first `stored`."""
        fetched = max(stored - held, 0)
        return self.store_block * fetched + (blocks - held - fetched)

    def score(self, requests: int, queued: float, work: float) -> float:
        """The score of a replica with that many requests in flight and blocks to compute; the least is the best."""
        return self.backlog_weight * (self.request_blocks * requests + self.queued_block * queued) + work
