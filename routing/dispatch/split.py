"""How many of each expert's tokens go to each of its copies, for one layer of one step.

Glossary: a shard *finishes* when it has done what waits there already and its part of this step; *opening* an expert on
a shard costs that shard some rows beside the tokens (the expert's weights are read once); *pouring* an expert divides
its tokens so that its copies finish together, as water fills a vessel where it is lowest (`placement/pouring.py`).

Worked number: two shards, 1 s a row, 8 rows to open an expert, nothing waits. Expert 0 (20 tokens) has its only copy on
shard 0, which so finishes at 28. Expert 1 (60 tokens) has a copy on both: opened, they stand at 36 and 8, the level
is (60 + 36 + 8) / 2 = 52, shard 0 takes 16 tokens, shard 1 takes 44, and both finish at 52. Whole on one shard, as
greedy would have it, it ends at 68.

What concerns every expert is vectorised. The rest is sequential and over the few experts that have a choice, and
there plain numbers are several times as fast as an array call each.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from expertmesh.routing.placement.pouring import Pouring
from expertmesh.routing.placement.static import IntArray

Counts = np.ndarray[Any, np.dtype[np.int64]]
Seconds = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

EXPERT_COST_ROWS = 8
"""What an expert costs beside its tokens, in token rows: its weights are read once whatever the batch. Measured with
vLLM's CPU kernel in float32, where reading 12 bytes takes about as long as 8 to 10 rows of arithmetic on them."""


class LayerSplit:
    """Splits tokens over the copies of one layer that are up. Made once for a table's layer and a set of shards."""

    def __init__(self, copies: IntArray, up: Mask) -> None:
        """copies: position of the shard of each copy [E, C] int32, no shard twice in a row, -1 pads; up: shards that
        may be used [S]."""
        self._shape = copies.shape
        self._up = up.copy()
        alive = np.append(up, False)[copies]
        choices = np.count_nonzero(alive, axis=1)
        self._fixed = (choices == 1).nonzero()[0]
        """Experts with one copy, [F], and the column and shard of that."""
        self._column = alive[self._fixed].argmax(axis=1)
        self._shard = copies[self._fixed, self._column]
        self._free = (choices > 1).nonzero()[0]
        """Experts with a choice [M], and for each the shards of its copies, turned by the expert's id, and their places
        in the flattened result."""
        self._choices = choices[self._free]
        self._shards: list[list[int]] = []
        self._places: list[list[int]] = []
        for expert in self._free.tolist():
            columns = alive[expert].nonzero()[0]
            columns = np.roll(columns, -(expert % len(columns)))
            self._shards.append(copies[expert, columns].tolist())
            self._places.append((expert * copies.shape[1] + columns).tolist())

    def __call__(
        self, counts: Counts, seconds_a_row: Seconds, waiting_s: Seconds, opening_rows: float = EXPERT_COST_ROWS
    ) -> Counts:
        """Tokens for each copy of each expert, so that the last shard to finish finishes early: [E, C] int64.

        counts: tokens of each expert [E] int64. seconds_a_row: what a row costs on each shard now [S], > 0 and finite
        where it is up; waiting_s: work that waits there already [S]; any one unit does for both. opening_rows: rows
        that an expert costs on a shard beside its tokens.

        A row of the result adds up to the expert's count, or to 0 if none of its copies is up. Greedy least-loaded
        (each expert whole) and water-filling are both computed, and the one whose last shard finishes first is
        returned, at a tie the one with less work; water-filling is left out where greedy can't be beaten. An expert
        is opened on a further shard only for as many tokens as that costs rows. Equal shards are taken in turn, by
        expert id: the result is reproducible and no copy stays cold.
        """
        shares = np.zeros(self._shape, dtype=np.int64)
        fixed = counts[self._fixed]
        shares[self._fixed, self._column] = fixed
        free = counts[self._free]
        if not free.any():
            return shares
        rows = np.bincount(self._shard, fixed + opening_rows * (fixed > 0), minlength=len(self._up))
        times = np.where(self._up, waiting_s + rows * seconds_a_row, 0.0).tolist()
        order = np.argsort(-free / self._choices, kind="stable")[: np.count_nonzero(free)].tolist()
        tokens = free.tolist()
        pouring = Pouring(
            [tokens[i] for i in order], [self._shards[i] for i in order], seconds_a_row.tolist(), opening_rows
        )
        parts = pouring.better(times, self._up.tolist())
        places: list[int] = []
        for i in order:
            places += self._places[i]
        shares.put(places, [tokens for part in parts for tokens in part])
        return shares
