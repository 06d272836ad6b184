"""A move of re-placement, and what carrying moves out makes of the slots.

Glossary: a *move* gives one slot of one shard another expert; a *step* is what is carried out together, in the order
add -> publish -> drain -> drop: the new copy is loaded into the staging slot that each shard has beside its P slots in
every layer, so redundancy is never lower on the way.

Worked number: `Move(0, 3, 1, 7, 12, 40, 0.61, 0.74)` reads "step 0: layer 3, shard 1, slot 7: expert 40 in place of
expert 12; balancedness 0.610 -> 0.740".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from expertmesh.routing.placement.static import IntArray

Bytes = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Move:
    """One slot gets another expert; balancedness is that of the layer before and after the layer's whole step."""

    step: int
    layer: int
    shard: int
    slot: int
    dropped: int
    """-1 if the slot was empty."""
    added: int
    """-1 if the slot is emptied."""
    before: float
    after: float

    def __str__(self) -> str:
        instead = f"in place of expert {self.dropped}" if self.dropped >= 0 else "in an empty slot"
        where = f"step {self.step}: layer {self.layer}, shard {self.shard}, slot {self.slot}"
        if self.added < 0:
            return f"{where}: expert {self.dropped} is given up"
        return f"{where}: expert {self.added} {instead}; balancedness {self.before:.3f} -> {self.after:.3f}"


def applied(slots: IntArray, moves: Iterable[Move]) -> IntArray:
    """The slots [S, L, P] after some moves, in their order; the argument is not changed.

    Raises ValueError if a slot doesn't hold what a move drops.
    """
    result = slots.copy()
    for move in moves:
        held = int(result[move.shard, move.layer, move.slot])
        if held != move.dropped:
            raise ValueError(f"the slot holds expert {held}, not {move.dropped}: {move}")
        result[move.shard, move.layer, move.slot] = move.added
    return result


def fillable(free_bytes: Bytes | None, expert_bytes: int, shards: int) -> list[float]:
    """How many empty slots of each shard may be filled: as many experts as its free bytes hold; None for no limit."""
    if free_bytes is None:
        return [inf] * shards
    return [float(free // expert_bytes) for free in free_bytes.tolist()]
