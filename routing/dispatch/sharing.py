"""The policies: how a layer's tokens are shared out over the copies of its experts, step after step.

A policy only says how many tokens each copy takes; `LayerSplit` does the sums, `ShardCost` knows what shards cost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from expertmesh.errors import ConfigError
from expertmesh.routing.dispatch.copies import LayerCopies
from expertmesh.routing.dispatch.cost import ShardCost
from expertmesh.routing.dispatch.split import EXPERT_COST_ROWS, Counts, LayerSplit, Mask
from expertmesh.routing.placement import RoutingTable

_SPLITS_A_LAYER = 4
"""Sets of shards for which a layer's split is kept: all of them, and some with one that failed."""
_SECONDS_A_US = 1e-6


class Timed(Protocol):
    """An answer's times."""

    @property
    def computed_us(self) -> int:
        """Microseconds that the shard computed for the frame."""

    @property
    def waited_us(self) -> int:
        """Microseconds that the frame waited there."""


class Policy(ABC):
    """Shares tokens out over copies. One a dispatcher, told of each new table before it is asked about it."""

    def __init__(self) -> None:
        self._splits: dict[tuple[int, bytes], LayerSplit] = {}
        self._kept = 0
        self._targets: tuple[str, ...] | None = None

    def use(self, table: RoutingTable) -> None:
        """Forgets what was worked out for another table; what is known of shards only if these are others now."""
        self._splits.clear()
        self._kept = _SPLITS_A_LAYER * len(table.layers)
        targets = tuple(target.shard for target in table.targets)
        if targets != self._targets:
            self._targets = targets
            self._meet(len(targets))

    def shares(self, layer: LayerCopies, counts: Counts, up: Mask) -> Counts:
        """Tokens for each copy of each expert: [E, C] int64; a row adds up to its count, or to 0 if no copy is up.

        counts: tokens of each expert [E]; up: targets that may be asked [S].
        """
        key = (layer.index, up.tobytes())
        split = self._splits.get(key)
        if split is None:
            if len(self._splits) >= self._kept:
                self._splits.clear()
            split = self._splits[key] = LayerSplit(layer.copies, up)
        return self._divide(split, counts)

    @abstractmethod
    def observe(self, layer: LayerCopies, shares: Counts, answered: Mapping[int, Timed]) -> None:
        """Learns from what the answers, by target, say about frames that carried `shares`."""

    @abstractmethod
    def _meet(self, shards: int) -> None:
        """Begins anew with so many shards."""

    @abstractmethod
    def _divide(self, split: LayerSplit, counts: Counts) -> Counts:
        """As `shares`."""


class LeastLoaded(Policy):
    """Each step by itself: every shard counts the same and has nothing else to do."""

    def observe(self, layer: LayerCopies, shares: Counts, answered: Mapping[int, Timed]) -> None:
        """Nothing to learn."""

    def _meet(self, shards: int) -> None:
        self._seconds_a_row, self._waiting_s = np.ones(shards), np.zeros(shards)

    def _divide(self, split: LayerSplit, counts: Counts) -> Counts:
        return split(counts, self._seconds_a_row, self._waiting_s)


class LiveCost(Policy):
    """By what a row costs on each shard now and how long frames wait there, as their answers say."""

    def observe(self, layer: LayerCopies, shares: Counts, answered: Mapping[int, Timed]) -> None:
        """Takes the layer in as one step of the cost model."""
        shards = self._shards
        opened = shares > 0
        sent = np.bincount(layer.copies[opened], shares[opened] + float(EXPERT_COST_ROWS), minlength=shards)
        rows, computed_s, waited_s = np.zeros((3, shards))
        for target, times in answered.items():
            rows[target] = sent[target]
            computed_s[target] = times.computed_us * _SECONDS_A_US
            waited_s[target] = times.waited_us * _SECONDS_A_US
        self._cost.observe(rows, computed_s, waited_s)

    def _meet(self, shards: int) -> None:
        self._shards = shards
        self._cost = ShardCost(shards)

    def _divide(self, split: LayerSplit, counts: Counts) -> Counts:
        return split(counts, self._cost.seconds_a_row, self._cost.queue_s)


POLICIES: dict[str, type[Policy]] = {"live_cost": LiveCost, "least_loaded": LeastLoaded}


def create_policy(name: str) -> Policy:
    """A new policy of that name. Raises ConfigError for an unknown one."""
    try:
        return POLICIES[name]()
    except KeyError:
        raise ConfigError(f"routing.policy: {name!r} is not one of {', '.join(POLICIES)}") from None
