"""What the KV store holds, as far as replicas have seen it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from expertmesh.routing.requests.events import BlockHash

_MAX_BLOCKS = 1 << 17


class StoreContent:
    """Blocks that the store had when it was last heard of them. The newest are kept, so that memory is bounded.

    Blocks also leave a store unseen, by age or for want of room: this is a guess for routing, never a promise.
    """

    def __init__(self, max_blocks: int = _MAX_BLOCKS) -> None:
        self._blocks: OrderedDict[BlockHash, None] = OrderedDict()
        self._max_blocks = max_blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[BlockHash]:
        return iter(self._blocks)

    def add(self, blocks: Iterable[BlockHash]) -> list[BlockHash]:
        """The store has these; which of them are news."""
        news = []
        for block in blocks:
            if block not in self._blocks:
                news.append(block)
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)
        return news

    def discard(self, blocks: Iterable[BlockHash]) -> list[BlockHash]:
        """The store has not; which of them are news."""
        news = [block for block in blocks if block in self._blocks]
        for block in news:
            del self._blocks[block]
        return news

    def leading(self, blocks: Sequence[BlockHash]) -> int:
        """How many of a prompt's leading blocks it has."""
        return next((i for i, block in enumerate(blocks) if block not in self._blocks), len(blocks))
