"""How even the work of shards is.

Glossary: a shard's *time* is its work over its speed (rows over rows a second; with equal speeds the rows themselves
do); *balancedness* of a layer is (mean shard load) / (max shard load), of a model the mean of that over its layers.

Worked number: four equal shards with 10, 20, 30 and 20 rows have a mean of 20 and a maximum of 30: balancedness 0.67,
so the layer takes 1.5 times as long as it could. If the third is twice as fast, the times are 10, 20, 15 and 20, the
80 rows could be done in 80 / (1 + 1 + 2 + 1) = 16, and balancedness is 16 / 20 = 0.8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]


def layer_balancedness(times: Floats, rates: Floats | None = None) -> Floats:
    """Balancedness of each layer: [...], 1.0 where nothing is done.

    times: [..., S], only of shards that may be used; rates: their speeds [S], any unit; equal if None. With unequal
    speeds the mean is the time that the same work takes if all shards finish together: sum(rate x time) / sum(rate).
    """
    mean = np.average(times, axis=-1, weights=rates)
    most = times.max(axis=-1)
    even: Floats = np.divide(mean, most, out=np.ones_like(mean), where=most > 0)
    return even


def balancedness(times: Floats, rates: Floats | None = None) -> float:
    """Mean over the layers of `layer_balancedness`; times: [layers, S]."""
    return float(layer_balancedness(times, rates).mean())
