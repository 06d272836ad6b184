"""What to load where after shards are gone, so that every expert has its redundancy again.

Glossary: an expert is *endangered* while fewer than `redundancy` ready shards hold it, the more so the fewer; *surplus*
slots (`layer.py`) are empty or hold what can be spared.

Worked number: four shards with two slots each hold experts 0 0 1 1 2 2 3 3 by twos (redundancy 2: shard 0 has 0 and 2,
shard 1 has 0 and 3, shard 2 has 1 and 2, shard 3 has 1 and 3). Shard 0 dies: experts 0 and 2 have one copy. Nothing of
what is left is surplus, so nothing can be done; with a third slot a shard, 0 goes to shard 2 or 3 and 2 to another,
the hotter of the two first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertmesh.routing.placement.layer import Change, LayerState
from expertmesh.routing.placement.moves import Bytes, Move, fillable
from expertmesh.routing.placement.static import IntArray

Floats = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True)
class Repair:
    """What can be done, and what can't."""

    moves: list[Move]
    """In the order of their steps, and within a step the most endangered expert first."""
    unplaced: list[tuple[int, int]]
    """(layer, expert) once for each copy that is wanting and for which there is no slot."""


def repair(
    slots: IntArray,
    loads: Floats,
    *,
    redundancy: int,
    rates: Floats,
    ready: Mask,
    free_bytes: Bytes | None = None,
    expert_bytes: int = 1,
) -> Repair:
    """The moves that bring every expert to `redundancy` ready shards, or to all of them where there are fewer.

    Arguments as for `plan`. No expert that has its redundancy loses it, no shard gets an expert twice, a step changes
    at most one slot of a shard and layer, and a shard that isn't ready is not touched.
    """
    wanted = min(redundancy, int(ready.sum()))
    room = fillable(free_bytes, expert_bytes, len(slots))
    seconds, up = (1.0 / rates).tolist(), ready.tolist()
    layers: dict[int, _Layer] = {}
    moves: list[Move] = []
    unplaced: list[tuple[int, int]] = []
    for layer, expert in _endangered(slots[ready], loads, wanted):
        if layer not in layers:
            layers[layer] = _Layer(layer, LayerState(slots[:, layer], loads[layer], seconds, up), wanted, room)
        made = layers[layer].add(expert)
        moves += made
        if not made:
            unplaced.append((layer, expert))
    return Repair(sorted(moves, key=lambda move: move.step), unplaced)


def _endangered(slots: IntArray, loads: Floats, wanted: int) -> list[tuple[int, int]]:
    """(layer, expert) for each copy that is wanting: those with fewest copies first, then the hotter.

    slots: [ready shards, L, P].
    """
    layers, experts = loads.shape
    held = np.zeros((len(slots), layers, experts), dtype=bool)
    shard, layer, slot = np.nonzero(slots >= 0)
    held[shard, layer, slots[shard, layer, slot]] = True
    copies = held.sum(axis=0)
    total = np.maximum(loads.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    found = [
        (has, -float(loads[layer, expert] / total[layer, 0]), int(layer), int(expert))
        for layer, expert in np.argwhere(copies < wanted).tolist()
        for has in range(int(copies[layer, expert]), wanted)
    ]
    return [(layer, expert) for _, _, layer, expert in sorted(found)]


class _Layer:
    """A layer under repair."""

    def __init__(self, layer: int, state: LayerState, redundancy: int, room: list[float]) -> None:
        """room: empty slots that may be filled, by shard; shared by all layers and counted down."""
        self._layer = layer
        self._state = state
        self._redundancy = redundancy
        self._room = room
        self._changes: Counter[int] = Counter()
        """So far, by shard: the step of the next one."""

    def add(self, expert: int) -> list[Move]:
        """One more copy of an expert; the moves for it, none if there is no slot."""
        return self._into_surplus(expert) or self._by_way_of_holder(expert)

    def _into_surplus(self, expert: int) -> list[Move]:
        """An empty slot, else a surplus one: on the shard that can do it soonest, of those the idlest."""
        state = self._state
        found = []
        for shard in state.ready:
            if shard not in state.holders[expert] and (slots := self._surplus(shard)):
                filled = state.slots[shard][slots[0]] >= 0
                found.append((filled, self._changes[shard], state.times[shard], shard, slots[0]))
        if not found:
            return []
        *_, shard, slot = min(found)
        return [self._move(shard, slot, expert, 0)]

    def _by_way_of_holder(self, expert: int) -> list[Move]:
        """All surplus slots are on shards that have the expert: another expert goes there and makes room elsewhere."""
        state = self._state
        for giver in state.holders[expert]:
            for slot in self._surplus(giver)[:1]:
                for taker in state.ready:
                    if taker in state.holders[expert]:
                        continue
                    for place, other in enumerate(state.slots[taker]):
                        spared = other >= 0 and len(state.holders[other]) >= self._redundancy
                        if spared and giver not in state.holders[other]:
                            first = self._move(giver, slot, other, 0)
                            return [first, self._move(taker, place, expert, first.step + 1)]
        return []

    def _surplus(self, shard: int) -> list[int]:
        return self._state.surplus(shard, self._redundancy, self._room[shard] > 0)

    def _move(self, shard: int, slot: int, expert: int, earliest: int) -> Move:
        state = self._state
        dropped = state.slots[shard][slot]
        before = state.balancedness()
        state.apply(state.tried((Change(shard, slot, dropped, expert),)))
        self._room[shard] -= dropped < 0
        step = max(self._changes[shard], earliest)
        self._changes[shard] = step + 1
        return Move(step, self._layer, shard, slot, dropped, expert, before, state.balancedness())
