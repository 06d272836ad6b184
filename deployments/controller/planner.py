"""When and what to re-place: load windows in, moves out. No Ray, no clock: times are arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """[shards, layers, P] without staging slots (`planning_slots`)."""
    loads: Loads
    rates: Floats
    """[shards] rows a second."""
    ready: np.ndarray[Any, np.dtype[np.bool_]]
    """[shards] which may be used."""
    settled: bool
    """Whether experts are where they are to be: nothing is planned while shards come, leave or load."""
    usual: int
    """Experts of a layer that a shard is to hold: where one holds more, no empty slot is filled."""
    expert_bytes: int
    bytes_a_second: float


class Planner:
    """Keeps decayed loads and knows the rules by which moves pay."""

    def __init__(
        self, layers: int, experts: int, redundancy: int, half_life_s: float, limits: Limits, now: float
    ) -> None:
        """now: when counting begins, in seconds, on the clock of all later times."""
        self._redundancy = redundancy
        self._half_life_s = half_life_s
        self._limits = limits
        self._seen = np.zeros((layers, experts), dtype=np.int64)
        self._at = now
        self.loads = Loads.none(layers, experts)
        self.shifted: list[int] = []
        """Layers (positions) in which the last window was no sample of the traffic before."""

    def observe(self, total: Counts, now: float) -> bool:
        """Takes the tokens counted since the start [layers, experts] and begins a new window; whether traffic shifted.

        Windows without a token say nothing. After a shift what was before is forgotten: half a half-life of the old mix
        would outweigh the first windows of the new one.
        """
        window, seconds = self._window(total, now)
        self._seen, self._at = total.copy(), now
        if not window.any():
            return False
        shifted = self.loads.shift(window).found()
        self.shifted = np.flatnonzero(shifted).tolist()
        moved = bool(shifted.mean() >= 0.5)
        before = Loads.none(*total.shape) if moved else self.loads
        self.loads = before.after(window, seconds, self._half_life_s)
        return moved

    def current(self, total: Counts, now: float) -> Loads:
        """The loads with the window that has begun, which goes on."""
        window, seconds = self._window(total, now)
        return self.loads.after(window, seconds, self._half_life_s) if window.any() else self.loads

    def _window(self, total: Counts, now: float) -> tuple[Counts, float]:
        """Tokens of each expert and seconds since the last `observe`; no tokens if no time has passed."""
        seconds = now - self._at
        return np.maximum(total - self._seen, 0) * (seconds > 0), seconds

    def moves(self, situation: Situation) -> list[Move]:
        """What to do now, in the order of its steps; nothing if nothing pays. CPU work: up to seconds."""
        if not (situation.settled and situation.ready.any()):
            return []
        loads = situation.loads.rows_a_second
        crowded = situation.slots.shape[2] > situation.usual
        free_bytes = np.zeros(len(situation.slots), dtype=np.int64) if crowded else None
        wanting = repair(
            situation.slots,
            loads,
            redundancy=self._redundancy,
            rates=situation.rates,
            ready=situation.ready,
            free_bytes=free_bytes,
            expert_bytes=situation.expert_bytes,
        )
        if wanting.moves:
            return wanting.moves
        informed = (situation.loads.tokens.sum(axis=1) >= _LEAST_TOKENS_AN_EXPERT * loads.shape[1]).all()
        if not informed:
            return []
        return plan(
            situation.slots,
            loads,
            redundancy=self._redundancy,
            rates=situation.rates,
            ready=situation.ready,
            free_bytes=free_bytes,
            limits=replace(self._limits, expert_bytes=situation.expert_bytes, bytes_a_second=situation.bytes_a_second),
        )


def planning_slots(slots: IntArray, usual: int, staging: bool) -> IntArray:
    """[shards, layers, P] of [shards, layers, slots]: experts first, then empty slots, of which some are left out.

    P is `usual`, the experts of a layer that a shard is to hold, or more where a shard holds more: what is left out is
    for staging, and for taking over what others held.
    """
    ordered = np.take_along_axis(slots, np.argsort(slots < 0, axis=2, kind="stable"), axis=2)
    held = int((slots >= 0).sum(axis=2).max(initial=0))
    return ordered[:, :, : max(held, min(usual, slots.shape[2] - staging))]


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
    loads = situation.loads.rows_a_second
    if not situation.ready.any() or not loads.any():
        return 1.0
    seconds, up = (1.0 / situation.rates).tolist(), situation.ready.tolist()
    layers = []
    for layer in range(situation.slots.shape[1]):
        state = LayerState(situation.slots[:, layer], loads[layer], seconds, up)
        times = np.array([state.times[shard] for shard in state.ready])
        layers.append(float(layer_balancedness(times, situation.rates[situation.ready])))
    return float(np.mean(layers))
