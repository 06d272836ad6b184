"""When and what to re-place: load windows in, moves out. No Ray, no clock: times are arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertmesh.routing.placement import Limits, Loads, Move, plan, repair
from expertmesh.routing.placement.balance import layer_balancedness
from expertmesh.routing.placement.layer import LayerState
from expertmesh.routing.placement.static import IntArray

Counts = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

_SAME_SPEED = 0.2
"""Shards whose measured speed differs by less, relatively, from the median count as equal: it is noise."""
_LEAST_TOKENS_AN_EXPERT = 8
"""Tokens that a layer must have seen, times its experts, before its loads say anything."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a plan is made for."""

    slots: IntArray
    """[shards, layers, P] without staging slots."""
    loads: Floats
    """[layers, experts] rows a second."""
    rates: Floats
    """[shards] rows a second."""
    ready: np.ndarray[Any, np.dtype[np.bool_]]
    """[shards]"""
    expert_bytes: int
    bytes_a_second: float


class Planner:
    """Keeps decayed loads and knows the rules by which moves pay."""

    def __init__(self, layers: int, experts: int, redundancy: int, half_life_s: float, limits: Limits) -> None:
        self._redundancy = redundancy
        self._half_life_s = half_life_s
        self._limits = limits
        self._seen = np.zeros((layers, experts), dtype=np.int64)
        self._at: float | None = None
        self.loads = Loads.none(layers, experts)
        self.shifted: list[int] = []
        """Layers (positions) in which the last window was no sample of the traffic before."""

    def observe(self, total: Counts, now: float) -> bool:
        """Takes the tokens counted since the start [layers, experts]; whether traffic has shifted.

        Windows without a token say nothing. After a shift what was before is forgotten: half a half-life of the old mix
        would outweigh the first windows of the new one.
        """
        began, self._at = self._at, now
        window = np.maximum(total - self._seen, 0)
        self._seen = total.copy()
        if began is None or now <= began or not window.any():
            return False
        shifted = self.loads.shift(window).found()
        self.shifted = np.flatnonzero(shifted).tolist()
        moved = bool(shifted.mean() >= 0.5)
        if moved:
            self.loads = Loads.none(*self._seen.shape)
        self.loads = self.loads.after(window, now - began, self._half_life_s)
        return moved

    @property
    def informed(self) -> bool:
        """Whether enough was seen to plan by."""
        return bool((self.loads.tokens.sum(axis=1) >= _LEAST_TOKENS_AN_EXPERT * self._seen.shape[1]).all())

    def moves(self, situation: Situation) -> list[Move]:
        """What to do now, in the order of its steps; nothing if nothing pays. CPU work: up to seconds."""
        wanting = repair(
            situation.slots,
            situation.loads,
            redundancy=self._redundancy,
            rates=situation.rates,
            ready=np.ones(len(situation.slots), dtype=bool),
            expert_bytes=situation.expert_bytes,
        )
        if wanting.moves:
            return wanting.moves
        if not self.informed or not situation.ready.all():
            return []
        return plan(
            situation.slots,
            situation.loads,
            redundancy=self._redundancy,
            rates=situation.rates,
            ready=situation.ready,
            limits=Limits(
                self._limits.steps,
                self._limits.moves_a_step,
                situation.expert_bytes,
                situation.bytes_a_second,
                self._limits.horizon_s,
                self._limits.least_gain,
            ),
        )


def without_staging(slots: IntArray) -> IntArray:
    """[shards, layers, P] of [shards, layers, P + 1]: experts first, the empty slots last, one of these left out.

    Raises ValueError if a layer of a shard has no empty slot.
    """
    ordered = np.take_along_axis(slots, np.argsort(slots < 0, axis=2, kind="stable"), axis=2)
    if (ordered[:, :, -1] >= 0).any():
        raise ValueError("a shard has no staging slot left in some layer")
    return ordered[:, :, :-1]


def measured_rates(stats: Mapping[int, Mapping[str, Any]], shards: int) -> Floats:
    """Rows a second of each shard [shards] from its counters `pairs` and `busy_s`; the median where there are none."""
    rates = np.full(shards, np.nan)
    for index, counters in stats.items():
        if counters.get("busy_s", 0) > 0 and counters.get("pairs", 0) > 0:
            rates[index] = counters["pairs"] / counters["busy_s"]
    if np.isnan(rates).all():
        return np.ones(shards)
    median = float(np.nanmedian(rates))
    return np.where(np.isnan(rates) | (np.abs(rates / median - 1) < _SAME_SPEED), median, rates)


def predicted_balancedness(situation: Situation) -> float:
    """Mean over the layers, if dispatch splits the loads as it does; over the shards that are ready."""
    if not situation.ready.any() or not situation.loads.any():
        return 1.0
    seconds, up = (1.0 / situation.rates).tolist(), situation.ready.tolist()
    layers = []
    for layer in range(situation.slots.shape[1]):
        state = LayerState(situation.slots[:, layer], situation.loads[layer], seconds, up)
        times = np.array([state.times[shard] for shard in state.ready])
        layers.append(float(layer_balancedness(times, situation.rates[situation.ready])))
    return float(np.mean(layers))
