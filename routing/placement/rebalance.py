"""Incremental re-placement: a few slots at a time, where it pays.

Glossary: *moves* and *steps* are those of `moves.py`. A step changes at most one slot of a shard and layer and at most
two of a layer: copies added where *surplus* ones (`layer.py`) make room, or two experts of the busiest and another
shard swapped.

Does a move pay? The peak of a layer is the busy time of its busiest shard, in seconds of work a second (rows a second
over rows a second). A step that lowers it from b to a wins h (b - a) seconds within the horizon of h seconds, and a
move costs expert bytes / bandwidth seconds, or what the loads' noise makes doubtful if that is more: n moves pay if

    h (b - a) > n max(bytes / bandwidth, least gain x h x mean busy time).

Of the steps that a layer could go, as many are taken as have the largest (left side - right side); so a step that wins
nothing by itself is only taken if it makes the next one pay.

Worked number: three shards of rate 100 rows a second; busy 0.9, 0.5, 0.4, mean 0.6. A copy of the hot expert on the
third makes it 0.65, 0.5, 0.65: within 300 s that wins 75 s. At 20 MB an expert and 1 GB/s it costs 0.02 s; a least
gain of 0.002 asks for 0.36 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from expertmesh.routing.placement.layer import Change, LayerState, Trial
from expertmesh.routing.placement.moves import Bytes, Move, fillable
from expertmesh.routing.placement.static import IntArray

Floats = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

_HOT_SHARDS, _HOT_EXPERTS, _COLD_SHARDS, _VICTIMS = 2, 3, 4, 2
"""How far the search looks: experts on the busiest shards, to the idlest shards, into their cheapest slots."""
_FINALISTS = 3
"""Candidates that are predicted in full."""
_PROGRESS = 1e-4
"""A change that lowers the smooth peak by less, relatively, leads nowhere."""
_CHANGES = 2
"""Slots of a layer that a step may change."""
_LOOKAHEAD = 4
"""Steps to look ahead at least."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan may do."""

    steps: int = 1
    moves_a_step: int | None = None
    """Over all layers; None for as many as pay."""
    expert_bytes: int = 1
    bytes_a_second: float = inf
    """At which weights are loaded."""
    horizon_s: float = 300.0
    """How long the loads are expected to stay like this."""
    least_gain: float = 0.002
    """Part of the mean busy time by which a move must lower the peak."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What one layer changes in one step, and its balancedness before and after."""

    changes: tuple[Change, ...]
    before: float
    after: float


@dataclass(slots=True)
class _Path:
    """The steps that one layer goes."""

    layer: int
    steps: list[_Step]
    gain: float
    """Seconds a second that all its steps win, net, for each move."""


def plan(
    slots: IntArray,
    loads: Floats,
    *,
    redundancy: int,
    rates: Floats,
    ready: Mask,
    free_bytes: Bytes | None = None,
    limits: Limits = Limits(),
) -> list[Move]:
    """The moves that pay, in the order of their steps; none if nothing does.

    slots: [S, L, P] expert ids, -1 for none. loads: [L, E] rows a second; for loads in another unit set no bandwidth.
    rates: rows a second of each shard [S], > 0; relative ones with relative loads. ready: shards that may be used
    [S]. free_bytes: bytes beside what is held, by shard [S], for slots that are empty; None for no limit.

    No expert's copies on ready shards fall below `redundancy` (they stay as they are where they are fewer: `repair`),
    no shard gets an expert twice, and a shard that isn't ready is not touched.
    """
    room = fillable(free_bytes, limits.expert_bytes, len(slots))
    seconds, up = (1.0 / rates).tolist(), ready.tolist()
    paths = []
    if ready.any():
        for layer in range(slots.shape[1]):
            state = LayerState(slots[:, layer], loads[layer], seconds, up)
            even = float(loads[layer].sum() / rates[ready].sum())
            cost = max(limits.expert_bytes / limits.bytes_a_second / limits.horizon_s, limits.least_gain * even)
            path = _path(layer, state, redundancy, room, max(limits.steps, _LOOKAHEAD), cost)
            for step in path.steps:
                for change in step.changes:
                    room[change.shard] -= change.dropped < 0
            if path.steps:
                paths.append(path)
    return _scheduled(paths, limits)


def _path(layer: int, state: LayerState, redundancy: int, room: list[float], depth: int, cost: float) -> _Path:
    """The best steps for one layer, as many as pay. Changes `state`, not `room`.

    cost: what a move must win, in the unit of the peak.
    """
    room = room.copy()
    trials: list[_Step] = []
    first, before = state.peak, state.balancedness()
    best, length, moved, moves = 0.0, 0, 0, 1
    for _ in range(depth * _CHANGES):
        trial = _best_trial(state, redundancy, room, cost)
        if trial is None:
            break
        state.apply(trial)
        for change in trial.changes:
            room[change.shard] -= change.dropped < 0
        after = state.balancedness()
        trials.append(_Step(trial.changes, before, after))
        before = after
        moved += len(trial.changes)
        gain = first - state.peak - cost * moved
        if gain > best:
            best, length, moves = gain, len(trials), moved
    return _Path(layer, _joined(trials[:length]), best / moves)


def _joined(trials: list[_Step]) -> list[_Step]:
    """Successive changes together, as long as a step may have so many and each is on another shard."""
    steps: list[_Step] = []
    for trial in trials:
        if steps:
            changes = steps[-1].changes + trial.changes
            if len(changes) <= _CHANGES and len({change.shard for change in changes}) == len(changes):
                steps[-1] = _Step(changes, steps[-1].before, trial.after)
                continue
        steps.append(trial)
    return steps


def _best_trial(state: LayerState, redundancy: int, room: list[float], cost: float) -> Trial | None:
    """The candidate with the lowest smooth peak, a move counting as `cost`; None if none lowers it."""

    def price(trial: Trial) -> float:
        return trial.smooth_peak + cost * len(trial.changes)

    now = state.smooth_peak
    trials = sorted((state.tried(changes) for changes in _candidates(state, redundancy, room)), key=price)
    finalists = sorted((state.settled(trial) for trial in trials[:_FINALISTS]), key=price)
    if not finalists or finalists[0].smooth_peak > now * (1 - _PROGRESS):
        return None
    return finalists[0]


def _candidates(state: LayerState, redundancy: int, room: list[float]) -> Iterator[tuple[Change, ...]]:
    """Copies of hot experts into surplus slots of idle shards, and swaps between the busiest and idle ones."""
    order = sorted(state.ready, key=lambda shard: (state.times[shard], shard))
    hot, cold = order[: -_HOT_SHARDS - 1 : -1], order[:_COLD_SHARDS]
    hottest = [_hottest(state, shard) for shard in hot]
    wanted = dict.fromkeys(expert for experts in hottest for expert in experts)
    for shard in cold:
        if shard == order[-1]:
            continue
        for slot in state.surplus(shard, redundancy, room[shard] > 0)[:_VICTIMS]:
            for expert in wanted:
                if shard not in state.holders[expert]:
                    yield (Change(shard, slot, state.slots[shard][slot], expert),)
        yield from _swaps(state, order[-1], shard, hottest[0])


def _hottest(state: LayerState, shard: int) -> list[int]:
    """Experts that give a shard most of its tokens."""
    parts = [(-state.part(expert, shard), expert) for expert in set(state.slots[shard]) - {-1}]
    return [expert for part, expert in sorted(parts)[:_HOT_EXPERTS] if part]


def _swaps(state: LayerState, busy: int, idle: int, experts: list[int]) -> Iterator[tuple[Change, ...]]:
    """Hot experts of the busy shard against experts of the idle one that are cooler by half of what lies between."""
    seconds = state.seconds_a_token
    half = (state.times[busy] - state.times[idle]) / (seconds[busy] + seconds[idle])
    for expert in experts:
        if idle in state.holders[expert]:
            continue
        slot = state.slots[busy].index(expert)
        target = state.part(expert, busy) - half
        others = [
            (abs(state.part(other, idle) - target), other)
            for other in set(state.slots[idle]) - {-1}
            if busy not in state.holders[other]
        ]
        for _, other in sorted(others)[:_VICTIMS]:
            back = Change(busy, slot, expert, other)
            yield (Change(idle, state.slots[idle].index(other), other, expert), back)


def _scheduled(paths: list[_Path], limits: Limits) -> list[Move]:
    """Moves of all layers by step: where there are more than a step may have, those that pay most go first."""
    waiting = sorted(paths, key=lambda path: (-path.gain, path.layer))
    moves: list[Move] = []
    for number in range(limits.steps):
        left = inf if limits.moves_a_step is None else limits.moves_a_step
        for path in waiting:
            if path.steps and len(path.steps[0].changes) <= left:
                step = path.steps.pop(0)
                left -= len(step.changes)
                for at in step.changes:
                    moves.append(
                        Move(number, path.layer, at.shard, at.slot, at.dropped, at.added, step.before, step.after)
                    )
    return moves
