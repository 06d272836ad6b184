"""What others do about skewed experts, from their installed packages: vLLM's EPLB and an exact LP (SciPy, HiGHS).

Only benchmarks and tests import this; the product never does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_array
from vllm.distributed.eplb.policy import DefaultEplbPolicy

from expertmesh.routing.placement.static import IntArray

Floats = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]


def eplb_slots(loads: Floats, shards: int, redundant: int, old: IntArray | None = None) -> IntArray:
    """vLLM's EPLB placement, one group and one node: [shards, layers, slots] expert ids.

    loads: [layers, experts], any unit; redundant: slots a layer beside one for each expert; experts + redundant must
    be a multiple of shards. old: the placement before, [shards, layers, slots], whose slots EPLB keeps where it can.
    EPLB may put an expert twice on a shard.
    """
    layers, experts = loads.shape
    total = experts + redundant
    before = None if old is None else torch.from_numpy(old.transpose(1, 0, 2).reshape(layers, total).astype(np.int64))
    placed = DefaultEplbPolicy.rebalance_experts(torch.from_numpy(loads), total, 1, 1, shards, before)
    return np.ascontiguousarray(placed.numpy().reshape(layers, shards, -1).transpose(1, 0, 2).astype(np.int32))


def round_robin_loads(loads: Floats | Counts, slots: IntArray) -> Floats:
    """Load of each shard if each physical expert gets an equal part of its expert's tokens: [layers, shards].

    loads: [layers, experts]; slots: [shards, layers, slots], -1 for none.
    """
    layers, experts = loads.shape
    row = np.arange(layers)[None, :, None]
    copies = np.zeros((layers, experts))
    held = slots >= 0
    np.add.at(copies, (np.broadcast_to(row, slots.shape)[held], slots[held]), 1.0)
    part = np.divide(loads, copies, out=np.zeros((layers, experts)), where=copies > 0)
    of_slot = np.where(held, part[row, slots], 0.0)
    return of_slot.sum(axis=2).T


def lp_max_load(loads: Floats, copies: IntArray, shards: int) -> float:
    """Least possible maximum load of a shard under fractional splits, by linear programming (HiGHS).

    loads: [E] of one layer; copies: [E, C] shards of each expert, -1 pads. Minimise m subject to: an expert's parts add
    up to its load, a shard's parts to at most m. Raises RuntimeError if HiGHS finds no optimum.
    """
    expert, column = np.nonzero(copies >= 0)
    shard = copies[expert, column]
    parts = len(expert)
    of_expert = csr_array((np.ones(parts), (expert, np.arange(parts))), shape=(len(loads), parts + 1))
    rows, columns = np.append(shard, np.arange(shards)), np.append(np.arange(parts), np.full(shards, parts))
    of_shard = csr_array((np.append(np.ones(parts), -np.ones(shards)), (rows, columns)), shape=(shards, parts + 1))
    result = linprog(
        np.append(np.zeros(parts), 1.0),
        A_ub=of_shard,
        b_ub=np.zeros(shards),
        A_eq=of_expert,
        b_eq=loads,
        method="highs",
    )
    if result.status != 0:
        raise RuntimeError(f"HiGHS: {result.message}")
    return float(result.fun)
