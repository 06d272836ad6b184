"""A placement from known loads, for a start: every expert `redundancy` times, hot ones more often, loads level.

Glossary: *extra* copies are those beyond the redundancy; *heat* is the load of an expert over its copies; *room* is how
many slots of a shard are empty.

Worked number: loads 60, 20, 10, 10 on two shards with three slots each and redundancy 1. Two extra copies: the first
goes to expert 0 (60 a copy), the second to expert 1 (20 a copy; expert 0 is on both shards by then). 0 and 1 go on
both, 2 and 3 on one each: 30 + 10 + 10 = 50 on either.
"""

from __future__ import annotations

from heapq import heapify, heapreplace
from typing import Any

import numpy as np

from expertmesh.routing.placement.moves import applied
from expertmesh.routing.placement.rebalance import Limits, plan
from expertmesh.routing.placement.static import IntArray

Floats = np.ndarray[Any, np.dtype[np.float64]]

_POLISH = Limits(steps=8, least_gain=0.0005)
"""Nothing is loaded yet, so a move costs nothing."""


def loaded_slots(loads: Floats, shards: int, slots: int, redundancy: int, rates: Floats | None = None) -> IntArray:
    """Expert id in each slot: [shards, layers, slots], -1 where a slot stays empty.

    loads: [layers, experts], any unit; rates: speeds of the shards [shards], > 0, any unit, equal if None. Every expert
    is on at least `redundancy` distinct shards and on none twice. Raises ValueError unless 1 <= redundancy <= shards
    and the slots hold every expert that often.
    """
    layers, experts = loads.shape
    if not 1 <= redundancy <= shards:
        raise ValueError(f"redundancy {redundancy}; allowed: 1 to {shards}, the number of shards")
    if shards * min(slots, experts) < experts * redundancy:
        raise ValueError(f"{shards} x {slots} slots; {experts} experts x redundancy {redundancy} don't fit")
    speeds = np.ones(shards) if rates is None else rates
    placed = np.full((shards, layers, slots), -1, dtype=np.int32)
    for layer in range(layers):
        copies = _copies(loads[layer], shards * slots, shards, redundancy)
        for shard, held in enumerate(_packed(loads[layer], copies, slots, (1.0 / speeds).tolist())):
            placed[shard, layer, : len(held)] = held
    everyone = np.ones(shards, dtype=bool)
    return applied(placed, plan(placed, loads, redundancy=redundancy, rates=speeds, ready=everyone, limits=_POLISH))


def _copies(loads: Floats, slots: int, shards: int, redundancy: int) -> list[int]:
    """Copies of each expert [E]: extra ones go to the greatest heat, one at a time, at most one copy a shard."""
    copies = [redundancy] * len(loads)
    heat = [(-float(load) / redundancy, expert) for expert, load in enumerate(loads)]
    heapify(heat)
    for _ in range(min(slots, shards * len(loads)) - redundancy * len(loads)):
        while copies[heat[0][1]] == shards:
            heapreplace(heat, (1.0, heat[0][1]))  # never again: a positive entry sorts last
        expert = heat[0][1]
        copies[expert] += 1
        heapreplace(heat, (-float(loads[expert]) / copies[expert], expert))
    return copies


def _packed(loads: Floats, copies: list[int], slots: int, seconds: list[float]) -> list[list[int]]:
    """Experts of each shard: hottest first, each copy to the shard with least to do that has room and lacks it.

    With n experts left, shards with room for n or more go first, so that no room is left on fewer shards than the last
    expert has copies: such a shard gets every expert from then on, or more shards than that are like it.
    """
    held: list[list[int]] = [[] for _ in seconds]
    times = [0.0] * len(seconds)
    order = sorted(range(len(copies)), key=lambda expert: (-loads[expert] / copies[expert], expert))
    for nth, expert in enumerate(order):
        left = len(order) - nth
        room = [slots - len(mine) for mine in held]
        shards = sorted((s for s, free in enumerate(room) if free), key=lambda s: (room[s] < left, times[s], s))
        for shard in shards[: copies[expert]]:
            held[shard].append(expert)
            times[shard] += float(loads[expert]) / copies[expert] * seconds[shard]
    return held
