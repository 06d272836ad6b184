"""Which copy of an expert takes its tokens: pure functions of the step's counts and the table."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np

from expertmesh.errors import ConfigError
from expertmesh.routing.placement.static import IntArray

Policy = Callable[[np.ndarray[Any, np.dtype[np.int64]], IntArray, np.ndarray[Any, np.dtype[np.bool_]]], IntArray]
"""(counts [E], copies [E, C], up [S]) -> the target that takes each expert's tokens [E]; -1: not needed or none up."""

EXPERT_COST_ROWS = 8
"""What an expert costs beside its tokens, in token rows: its weights are read once whatever the batch. Measured with
vLLM's CPU kernel in float32, where reading 12 bytes takes about as long as 8 to 10 rows of arithmetic on them."""


def least_loaded(
    counts: np.ndarray[Any, np.dtype[np.int64]], copies: IntArray, up: np.ndarray[Any, np.dtype[np.bool_]]
) -> IntArray:
    """Each expert, largest first, goes whole to the copy whose shard has least to do in this step.

    counts: tokens of each expert [E]; copies: targets of each expert [E, C], -1 pads; up: targets that answer [S].
    Equal shards are taken in turn, by expert id, so that the choice is reproducible and no copy stays cold.
    Returns the chosen target of each expert [E]; -1 where it has no token or no copy is up.
    """
    if not len(up):  # a table without a shard
        return np.full(len(counts), -1, dtype=np.int32)
    if copies.shape[1] == 1:
        chosen = copies[:, 0].copy()
        chosen[(counts == 0) | (chosen < 0) | ~up[chosen]] = -1
        return chosen
    chosen = np.full(len(counts), -1, dtype=np.int32)
    active = np.flatnonzero(counts)
    order = active[np.argsort(-counts[active], kind="stable")]
    load = [0.0 if answers else inf for answers in up.tolist()]
    load.append(inf)  # what the padding -1 finds
    picks: list[int] = []
    for expert, count, targets in zip(order.tolist(), counts[order].tolist(), copies[order].tolist(), strict=True):
        turn = expert % len(targets)
        best, least = -1, inf
        for target in targets[turn:] + targets[:turn] if turn else targets:
            if load[target] < least:
                best, least = target, load[target]
        load[best] = least + count + EXPERT_COST_ROWS
        picks.append(best)
    chosen[order] = picks
    return chosen


POLICIES: dict[str, Policy] = {"least_loaded": least_loaded}


def create_policy(name: str) -> Policy:
    """The policy of that name. Raises ConfigError for an unknown one."""
    try:
        return POLICIES[name]
    except KeyError:
        raise ConfigError(f"routing.policy: {name!r} is not one of {', '.join(POLICIES)}") from None
