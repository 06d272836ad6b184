"""The table that a dispatcher reads: for each logical expert, the shards that can compute it now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from expertmesh.errors import WireError
from expertmesh.routing.placement.static import IntArray


@dataclass(frozen=True, slots=True)
class Target:
    """A shard as dispatchers see it."""

    shard: str
    """The shard's id, new with each process."""
    node: str
    """Id of the node that it runs on."""
    addresses: tuple[str, ...]
    """Where it listens, as `str(Address)`; unix addresses work on its node only."""


@dataclass(frozen=True)
class RoutingTable:
    """One epoch of the placement, restricted to shards that serve.

    copies: [layers, experts, C] int32, positions in `targets`; -1 pads experts with fewer than C copies.
    """

    epoch: int
    layers: tuple[int, ...]
    targets: tuple[Target, ...]
    copies: IntArray

    @cached_property
    def layer_index(self) -> dict[int, int]:
        """Position of a layer number in the first axis of `copies`."""
        return {layer: i for i, layer in enumerate(self.layers)}

    @property
    def num_experts(self) -> int:
        """Experts a layer."""
        return int(self.copies.shape[1])

    @cached_property
    def missing(self) -> int:
        """How many logical experts no shard serves."""
        return int((self.copies < 0).all(axis=2).sum()) if self.copies.size else len(self.layers) * self.num_experts

    @property
    def redundancy(self) -> int:
        """Least number of shards that serve any logical expert now."""
        return int((self.copies >= 0).sum(axis=2).min()) if self.copies.size else 0

    def to_json(self) -> str:
        """The table as one line of JSON, for `from_json`."""
        return json.dumps(
            {
                "epoch": self.epoch,
                "layers": self.layers,
                "targets": [asdict(t) for t in self.targets],
                "shape": self.copies.shape,
                "copies": self.copies.ravel().tolist(),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> RoutingTable:
        """Reads what `to_json` wrote. Raises WireError if it isn't that."""
        try:
            data: dict[str, Any] = json.loads(text)
            targets = tuple(Target(t["shard"], t["node"], tuple(t["addresses"])) for t in data["targets"])
            copies = np.array(data["copies"], dtype=np.int32).reshape(data["shape"])
            table = cls(int(data["epoch"]), tuple(int(i) for i in data["layers"]), targets, copies)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise WireError(f"not a routing table: {error!r}") from error
        if copies.ndim != 3 or len(table.layers) != copies.shape[0]:
            raise WireError(f"routing table of shape {copies.shape} for {len(table.layers)} layers")
        if (copies >= len(targets)).any() or (copies < -1).any():
            raise WireError(f"routing table with copies outside -1 to {len(targets) - 1}, its targets")
        return table


def build_table(
    epoch: int, layers: tuple[int, ...], num_experts: int, slots: IntArray, ready: Mapping[int, Target]
) -> RoutingTable:
    """The table of the shards that are ready.

    slots: [shards, layers, slots] expert ids or -1 (`even_slots`); ready: index of a shard in `slots` -> who serves it.
    Copies of an expert are listed in the order of the shards' indices.
    """
    targets = tuple(ready[index] for index in sorted(ready))
    held = np.zeros((len(targets), len(layers), num_experts), dtype=bool)
    for position, index in enumerate(sorted(ready)):
        layer, slot = np.nonzero(slots[index] >= 0)
        held[position, layer, slots[index][layer, slot]] = True
    counts = held.sum(axis=0)  # [layers, experts]
    width = max(1, int(counts.max(initial=0)))
    copies = np.full((len(layers), num_experts, width), -1, dtype=np.int32)
    layer, expert, target = np.nonzero(held.transpose(1, 2, 0))
    nth = (np.cumsum(held, axis=0) - 1)[target, layer, expert]
    copies[layer, expert, nth] = target
    return RoutingTable(epoch, layers, targets, copies)
