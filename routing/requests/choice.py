"""The state that a request's replica is chosen from. It ranks; whoever asks sends, queues and retries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from expertmesh.routing.requests.cost import CostModel
from expertmesh.routing.requests.events import BlockHash, EventBatch, Lapsed, Offloaded, Stored
from expertmesh.routing.requests.prefix_index import PrefixIndex
from expertmesh.routing.requests.store_content import StoreContent

_REMEMBERED = 256
"""Prompts over which their mean length is taken, roughly."""


@dataclass(frozen=True, slots=True)
class Rank:
    """A replica as a candidate for a request."""

    replica: str
    score: float
    """In blocks to compute; less is better."""
    held: int
    """Leading blocks of the prompt that it will not have to compute or fetch."""


@dataclass(slots=True)
class _Replica:
    turn: int = 0
    """When it was routed to, counted in requests to any replica; 0 before the first one."""
    requests: set[str] = field(default_factory=set)
    waiting: dict[str, float] = field(default_factory=dict)
    """Work of each request without a first token."""
    ends: dict[BlockHash, set[str]] = field(default_factory=dict)
    """The waiting requests by the last block of their prompts."""
    queued: float = 0.0
    """Sum of `waiting`."""
    reported: int = 0
    sequence: int | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    replica: str
    blocks: tuple[BlockHash, ...]


class ReplicaChoice:
    """Ranks replicas for a request by backlog and by the blocks that each would have to compute or fetch.

    Life of a request: `rank`, then `routed` to one of the ranked, `first_token`, `finished`. A replica that says that
    it stored the last block of a prompt has computed it, which is as good as a call of `first_token`. The ranking
    depends on the calls so far and on nothing else. Not safe for concurrent use: one event loop owns it.

    A replica whose events were lost (`lose`, or a gap in the sequence of its batches) is ranked by load only, as if
    it held nothing; what it stores from then on counts again.
    """

    def __init__(self, costs: CostModel | None = None) -> None:
        """costs: None takes CostModel's, in proportion to the prompts that are routed."""
        self._costs = costs or CostModel()
        self._adapts = costs is None
        self._prompts = 0
        self._mean_blocks = 0.0
        self._index = PrefixIndex()
        self._store = StoreContent()
        self._replicas: dict[str, _Replica] = {}
        self._requests: dict[str, _Request] = {}
        self._turns = 0

    def add(self, replica: str) -> None:
        """A replica that takes requests from now on. Raises ValueError if it is there already."""
        self._index.add(replica)
        self._replicas[replica] = _Replica()

    def remove(self, replica: str) -> None:
        """A replica that is gone, with its requests. Raises KeyError if it isn't there."""
        for request in self._replicas.pop(replica).requests:
            del self._requests[request]
        self._index.remove(replica)

    def observe(self, replica: str, requests: int) -> None:
        """How many requests the replica says are in flight; more than our own where other routers send there too."""
        self._replicas[replica].reported = requests

    def apply(self, replica: str, batch: EventBatch) -> None:
        """Follows a batch of a replica's KV events; a batch that was seen already changes nothing."""
        state = self._replicas[replica]
        if state.sequence is not None and batch.sequence <= state.sequence:
            return
        if state.sequence is not None and batch.sequence > state.sequence + 1:
            self._index.lose(replica)
        state.sequence = batch.sequence
        for event in batch.events:
            match event:
                case Offloaded(blocks):
                    self._store.add(blocks)
                case Lapsed(blocks):
                    self._store.discard(blocks)
                case _:
                    self._index.apply(replica, event)
            if state.ends and isinstance(event, Stored):
                for block in event.blocks:
                    for request in tuple(state.ends.get(block, ())):
                        self.first_token(request)

    def lose(self, replica: str) -> None:
        """The replica's event stream is broken. Its next batch may have any sequence number."""
        self._index.lose(replica)
        self._replicas[replica].sequence = None

    def rank(self, blocks: Sequence[BlockHash]) -> tuple[Rank, ...]:
        """All replicas, the best first, for a prompt of these blocks.

        Replicas with equal scores come in the order of the blocks that they hold, fewest first, then of the time since
        they got a request, longest first.
        """
        costs, held, stored = self._costs, self._index.match(blocks), self._store.leading(blocks)
        ranked = []
        for name, state in self._replicas.items():
            work = costs.work(len(blocks), held[name], stored)
            score = costs.score(max(len(state.requests), state.reported), state.queued, work)
            ranked.append((score, self._index.size(name), state.turn, Rank(name, score, held[name])))
        ranked.sort(key=lambda entry: entry[:3])
        return tuple(rank for *_, rank in ranked)

    def routed(self, request: str, replica: str, blocks: Sequence[BlockHash]) -> None:
        """The request went to that replica, with blocks as ranked. Raises ValueError if it is known already."""
        if request in self._requests:
            raise ValueError(f"request {request!r} is routed already")
        held, stored = self._index.match(blocks)[replica], self._store.leading(blocks)
        work = self._costs.work(len(blocks), held, stored)
        state = self._replicas[replica]
        self._turns += 1
        state.turn = self._turns
        state.requests.add(request)
        state.waiting[request] = work
        state.queued += work
        if blocks:
            self._learn(len(blocks))
            state.ends.setdefault(blocks[-1], set()).add(request)
        self._requests[request] = _Request(replica, tuple(blocks))
        self._index.expect(replica, blocks)

    def first_token(self, request: str) -> None:
        """The request's prompt is computed. Nothing happens for a request that isn't known (any more)."""
        known = self._requests.get(request)
        state = None if known is None else self._replicas[known.replica]
        if known is None or state is None or request not in state.waiting:
            return
        work = state.waiting.pop(request)
        state.queued = state.queued - work if state.waiting else 0.0  # 0: rounding errors must not add up
        if known.blocks:
            ends = state.ends[known.blocks[-1]]
            ends.discard(request)
            if not ends:
                del state.ends[known.blocks[-1]]

    def finished(self, request: str) -> None:
        """The request is over, whatever way. Nothing happens for a request that isn't known (any more)."""
        self.first_token(request)
        known = self._requests.pop(request, None)
        if known is not None:
            self._replicas[known.replica].requests.discard(request)
            self._index.unexpect(known.replica, known.blocks)

    def _learn(self, blocks: int) -> None:
        self._prompts = min(self._prompts + 1, _REMEMBERED)
        self._mean_blocks += (blocks - self._mean_blocks) / self._prompts
        if self._adapts:
            self._costs = CostModel.for_prompts_of(self._mean_blocks)
