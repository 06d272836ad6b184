"""What each shard costs now, from what its answers said: seconds a row, and seconds of queue.

Glossary: *rows* are the (token, expert) pairs that a shard computed, the opening of an expert counted in rows as in
`split.py`; *kernel time* is what the shard computed for an answer, *queue time* what a frame waited there before; a
step's *weight* is how much it is evidence for: its rows for the one, 1 for the other.

With w the weights remembered and T their seconds, each step makes w' = d w + r and T' = d T + t, where d =
1/2^(1/half-life) forgets; the estimate is (T + p m) / (w + p): a ratio of decayed sums, so that a step of 3 rows
counts for less than one of 300, drawn towards the median m of the shards by a prior of p = 0.05 x the mean of w. A
shard that gets no rows says nothing: its w fades to less than p, the others' cost takes over, and so it is tried
again.

Worked number: half-life 4 steps, three shards sent 100 rows a step at 1, 1 and 2 ms a row. Each w tends to 100 / (1 -
0.841) = 629 rows, so p = 31: the third is estimated at (629 x 2 + 31 x 1) / 660 = 1.95 ms. Sent nothing for 24 steps
it remembers 629 / 64 = 10 rows, p is 21, and the estimate (10 x 2 + 21 x 1) / 31 = 1.32 ms.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Vector = np.ndarray[Any, np.dtype[np.float64]]

_PRIOR = 0.05
"""What the other shards' cost weighs, as a part of the mean weight."""


class ShardCost:
    """Decayed estimates for S shards, by their position in the table. No clock inside: a step is one `observe`."""

    def __init__(self, shards: int, half_life_steps: float = 4.0) -> None:
        """half_life_steps: after how many steps an observation counts half. Raises ValueError unless positive."""
        if not half_life_steps > 0:
            raise ValueError(f"half-life of {half_life_steps} steps; must be positive")
        self._decay = 0.5 ** (1.0 / half_life_steps)
        self._rows = np.zeros(shards)
        self._kernel_s = np.zeros(shards)
        self._answers = np.zeros(shards)
        self._queue_s = np.zeros(shards)

    def observe(self, rows: Vector, kernel_s: Vector, queue_s: Vector) -> None:
        """Takes in one step: rows computed, seconds of kernel time, seconds waited in the queue, each [S].

        A shard with 0 rows was not asked; its times are ignored. Raises ValueError for a value that is negative or not
        finite, and changes nothing then.
        """
        if not all(bool((np.isfinite(values) & (values >= 0)).all()) for values in (rows, kernel_s, queue_s)):
            raise ValueError("rows and times of an observation must be finite and not negative")
        asked = rows > 0
        self._rows = self._decay * self._rows + rows
        self._kernel_s = self._decay * self._kernel_s + kernel_s * asked
        self._answers = self._decay * self._answers + asked
        self._queue_s = self._decay * self._queue_s + queue_s * asked

    @property
    def seconds_a_row(self) -> Vector:
        """[S], positive; 1.0 for each as long as no kernel time was measured (equal shards)."""
        estimate = _drawn_to_median(self._kernel_s, self._rows)
        return estimate if (estimate > 0).all() else np.ones(len(estimate))

    @property
    def queue_s(self) -> Vector:
        """Seconds that a frame waits before it is computed: [S]; 0.0 as long as nothing was measured."""
        return _drawn_to_median(self._queue_s, self._answers)


def _drawn_to_median(seconds: Vector, weight: Vector) -> Vector:
    """(T + p m) / (w + p) of each shard: [S]; 0.0 if none has any weight."""
    known = weight > 0
    if not known.any():
        return np.zeros(len(weight))
    # The median over shards, not the mean over rows: a slow shard with most of the rows must not pass for normal.
    median = float(np.median(seconds[known] / weight[known]))
    prior = _PRIOR * float(weight.mean())
    drawn: Vector = (seconds + prior * median) / (weight + prior)
    return drawn
