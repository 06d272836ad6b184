"""Which replica holds which blocks.

A set of replicas is an integer with one bit a replica, so that a prompt is looked up at all replicas in one walk over
its blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from expertmesh.routing.requests.events import BlockHash, Cleared, Removed, Stored


class PrefixIndex:
    """Blocks by replica: those that a replica's events told of, and those that requests under way will leave there.

    Neither `match` nor `size` changes anything. Memory grows with the blocks that replicas hold.
    """

    def __init__(self) -> None:
        self._bits: dict[str, int] = {}
        self._held: dict[BlockHash, int] = {}
        self._sizes: Counter[str] = Counter()
        self._expected: dict[BlockHash, Counter[int]] = {}
        self._known = 0

    def add(self, replica: str) -> None:
        """A replica with an empty cache. Raises ValueError if it is there already."""
        if replica in self._bits:
            raise ValueError(f"replica {replica!r} is in the index already")
        used = sum(self._bits.values())
        self._bits[replica] = ~used & (used + 1)  # the lowest bit that is free
        self._known |= self._bits[replica]

    def remove(self, replica: str) -> None:
        """Forgets a replica and all its blocks. Takes time in proportion to the whole index."""
        self._forget(replica)
        bit = self._bits.pop(replica)
        self._known &= ~bit
        for block in [block for block, counts in self._expected.items() if bit in counts]:
            del self._expected[block][bit]
            if not self._expected[block]:
                del self._expected[block]
        del self._sizes[replica]

    def apply(self, replica: str, event: Stored | Removed | Cleared) -> None:
        """Follows one event of a replica. Storing a known block or removing an unknown one changes nothing."""
        bit = self._bits[replica]
        self._known |= bit
        match event:
            case Stored(blocks):
                for block in blocks:
                    mask = self._held.get(block, 0)
                    if not mask & bit:
                        self._held[block] = mask | bit
                        self._sizes[replica] += bit not in self._expected.get(block, ())
            case Removed(blocks):
                for block in blocks:
                    self._drop(replica, block, bit)
            case Cleared():
                self._forget(replica)

    def lose(self, replica: str) -> None:
        """What the replica holds is no longer known: it matches nothing until its next event."""
        self._forget(replica)
        self._known &= ~self._bits[replica]

    def expect(self, replica: str, blocks: Iterable[BlockHash]) -> None:
        """A request that went to the replica will leave these blocks there; undone by `unexpect` with the same ones."""
        bit = self._bits[replica]
        for block in blocks:
            counts = self._expected.setdefault(block, Counter())
            self._sizes[replica] += not counts[bit] and not self._held.get(block, 0) & bit
            counts[bit] += 1

    def unexpect(self, replica: str, blocks: Iterable[BlockHash]) -> None:
        """The request is over: what it left there is told by events."""
        bit = self._bits[replica]
        for block in blocks:
            counts = self._expected[block]
            counts[bit] -= 1
            if not counts[bit]:
                self._sizes[replica] -= not self._held.get(block, 0) & bit
                del counts[bit]
                if not counts:
                    del self._expected[block]

    def match(self, blocks: Sequence[BlockHash]) -> dict[str, int]:
        """How many of the prompt's leading blocks each replica holds or will hold before it comes to the prompt."""
        lengths = dict.fromkeys(self._bits.values(), 0)
        alive = self._known
        for position, block in enumerate(blocks):
            mask = self._held.get(block, 0)
            for bit in self._expected.get(block, ()):
                mask |= bit
            for bit in _bits_of(alive & ~mask):
                lengths[bit] = position
            alive &= mask
            if not alive:
                break
        for bit in _bits_of(alive):
            lengths[bit] = len(blocks)
        return {replica: lengths[bit] for replica, bit in self._bits.items()}

    def size(self, replica: str) -> int:
        """How many blocks the replica holds or will hold, as far as is known."""
        return self._sizes[replica]

    def _drop(self, replica: str, block: BlockHash, bit: int) -> None:
        mask = self._held.get(block, 0)
        if mask & bit:
            self._sizes[replica] -= bit not in self._expected.get(block, ())
            if mask == bit:
                del self._held[block]
            else:
                self._held[block] = mask & ~bit

    def _forget(self, replica: str) -> None:
        bit = self._bits[replica]
        for block in [block for block, mask in self._held.items() if mask & bit]:
            self._drop(replica, block, bit)


def _bits_of(mask: int) -> Iterator[int]:
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
