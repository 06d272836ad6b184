"""One layer's placement while changes to it are tried: who holds what, and how its tokens are then split.

Glossary: a *surplus* slot is one that can be given away: empty, a second copy on the same shard, or a copy of an expert
that has more than `redundancy`; *peak* is the time of the busiest shard, *smooth peak* the 12-norm of all times, close
to the peak, but also lower when one of several equally busy shards is relieved.

Worked number: times 10, 10, 4 have peak 10 and smooth peak 10 x 2^(1/12) = 10.6; relieving one of the two (10, 7, 7)
leaves the peak at 10 and lowers the smooth peak to 10.02.

Loads are scaled to whole tokens and split as a dispatcher does (`pouring.py`), so that what is predicted here is what
dispatch reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertmesh.routing.placement.balance import layer_balancedness
from expertmesh.routing.placement.pouring import Parts, Pouring
from expertmesh.routing.placement.static import IntArray

Floats = np.ndarray[Any, np.dtype[np.float64]]

_TOKENS = 1_000_000
"""What the loads of a layer are scaled to."""
_NORM = 12
_VISITS = 400
"""Copies poured anew for one prediction: a plan may take longer than a dispatch."""


@dataclass(frozen=True, slots=True)
class Change:
    """One slot gets another expert."""

    shard: int
    slot: int
    dropped: int
    """-1 if the slot was empty."""
    added: int


@dataclass(frozen=True, slots=True)
class Trial:
    """Changes and what they would lead to."""

    changes: tuple[Change, ...]
    holders: dict[int, list[int]]
    """Shards of the experts that they concern, afterwards."""
    parts: dict[int, list[int]]
    """The tokens of experts by shard, as in `holders`, where they changed."""
    times: list[float]
    smooth_peak: float


class LayerState:
    """Slots of one layer and the split of its loads over them."""

    def __init__(self, slots: IntArray, loads: Floats, seconds: Sequence[float], ready: Sequence[bool]) -> None:
        """slots: [S, P] expert ids, -1 for none; what shards that aren't ready hold is left out. loads: [E], any unit;
        seconds: what one unit of load costs by shard [S], > 0."""
        self.slots: list[list[int]] = slots.tolist()
        self.ready = [shard for shard, is_ready in enumerate(ready) if is_ready]
        unit = float(loads.sum()) / _TOKENS or 1.0
        self.tokens: list[int] = np.rint(loads / unit).astype(np.int64).tolist()
        self.seconds_a_token = [each * unit for each in seconds]
        self._up = list(ready)
        self.holders: list[list[int]] = [[] for _ in self.tokens]
        for shard in self.ready:
            for expert in sorted(set(self.slots[shard]) - {-1}):
                self.holders[expert].append(shard)
        self._pouring = Pouring([], [], self.seconds_a_token, 0.0)
        self._split()

    @property
    def peak(self) -> float:
        """Time of the busiest shard, in the unit of loads x seconds."""
        return max(self.times)

    def balancedness(self) -> float:
        """Of the ready shards."""
        times = np.array([self.times[shard] for shard in self.ready])
        return float(layer_balancedness(times, 1 / np.array([self.seconds_a_token[shard] for shard in self.ready])))

    def part(self, expert: int, shard: int) -> int:
        """Tokens of an expert that a shard which holds it gets."""
        return self.parts[expert][self.holders[expert].index(shard)]

    def surplus(self, shard: int, redundancy: int, may_fill: bool) -> list[int]:
        """Slots of a shard that can be given away, those whose loss costs least first.

        may_fill: whether an empty one counts.
        """
        found: list[tuple[int, int]] = []
        row = self.slots[shard]
        for slot, expert in enumerate(row):
            if expert < 0:
                if may_fill:
                    found.append((-1, slot))
            elif row.index(expert) < slot:
                found.append((-1, slot))
            elif len(self.holders[expert]) > redundancy:
                found.append((self.part(expert, shard), slot))
        return [slot for _, slot in sorted(found)]

    def tried(self, changes: tuple[Change, ...]) -> Trial:
        """What changes lead to if only the experts concerned are poured anew."""
        concerned = {expert for change in changes for expert in (change.dropped, change.added) if expert >= 0}
        held = {(change.shard, change.slot): change.added for change in changes}
        holders: dict[int, list[int]] = {}
        times = self.times.copy()
        for expert in concerned:
            shards = set(self.holders[expert])
            for change in changes:
                row = self.slots[change.shard]
                has = any(held.get((change.shard, slot), now) == expert for slot, now in enumerate(row))
                (shards.add if has else shards.discard)(change.shard)
            holders[expert] = sorted(shards)
            for shard, tokens in zip(self.holders[expert], self.parts[expert], strict=True):
                times[shard] -= self.seconds_a_token[shard] * tokens
        parts: dict[int, list[int]] = {}
        for expert in sorted(concerned, key=lambda each: (-self.tokens[each], each)):
            parts[expert] = self._pouring.pour(self.tokens[expert], holders[expert], times)
        return Trial(changes, holders, parts, times, _smooth(times))

    def settled(self, trial: Trial) -> Trial:
        """The trial with all experts poured anew until that gains nothing."""
        experts, pouring, parts = self._movable(trial.holders, trial.parts)
        bound = sum(self.tokens) / sum(1 / self.seconds_a_token[shard] for shard in self.ready)
        settled, times = pouring.settled(parts, trial.times, bound, _VISITS)
        changed = trial.parts | dict(zip(experts, settled, strict=True))
        return Trial(trial.changes, trial.holders, changed, times, _smooth(times))

    def apply(self, trial: Trial) -> None:
        """Makes the trial's changes."""
        for change in trial.changes:
            self.slots[change.shard][change.slot] = change.added
        for expert, shards in trial.holders.items():
            self.holders[expert] = shards
        for expert, part in trial.parts.items():
            self.parts[expert] = part
        self.times = trial.times

    @property
    def smooth_peak(self) -> float:
        """12-norm of the times."""
        return _smooth(self.times)

    def _split(self) -> None:
        """Splits all tokens as they are held now."""
        self.times = [0.0] * len(self.seconds_a_token)
        self.parts: Parts = [[0] * len(shards) for shards in self.holders]
        for expert, shards in enumerate(self.holders):
            if len(shards) == 1:
                self.parts[expert] = self._pouring.pour(self.tokens[expert], shards, self.times)
        experts, pouring, _ = self._movable({}, {})
        bound = pouring.bound(self.times, self._up)
        parts, self.times = pouring.settled(*pouring.poured(self.times), bound, _VISITS)
        for expert, part in zip(experts, parts, strict=True):
            self.parts[expert] = part

    def _movable(self, holders: dict[int, list[int]], parts: dict[int, list[int]]) -> tuple[list[int], Pouring, Parts]:
        """The experts with a choice, in the order of pouring, as they are or as the arguments have it."""
        shards = [holders.get(expert, now) for expert, now in enumerate(self.holders)]
        experts = [expert for expert, tokens in enumerate(self.tokens) if tokens and len(shards[expert]) > 1]
        experts.sort(key=lambda expert: -self.tokens[expert] / len(shards[expert]))
        pouring = Pouring([self.tokens[e] for e in experts], [shards[e] for e in experts], self.seconds_a_token, 0.0)
        return experts, pouring, [parts.get(expert, self.parts[expert]) for expert in experts]


def _smooth(times: list[float]) -> float:
    top = max(times)
    return top * float(sum((time / top) ** _NORM for time in times)) ** (1 / _NORM) if top > 0 else 0.0
