"""A routing table as the dispatcher uses it: the copies of one layer at a time, and whether there is a choice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from expertmesh.routing.placement import RoutingTable
from expertmesh.routing.placement.static import IntArray


@dataclass(frozen=True, slots=True)
class LayerCopies:
    """The copies of a layer's experts."""

    index: int
    """Position of the layer in the table."""
    copies: IntArray
    """Positions of targets, [E, C] int32, contiguous; -1 pads. C is 1 where no expert has a second copy."""
    has_choice: bool
    """Whether any expert has a second copy."""


@dataclass(frozen=True)
class TableCopies:
    """A table and what is worked out from it once."""

    table: RoutingTable

    @cached_property
    def layers(self) -> dict[int, LayerCopies]:
        """By the model's layer number."""
        return {layer: _layer_copies(index, self.table.copies[index]) for index, layer in enumerate(self.table.layers)}


def _layer_copies(index: int, copies: IntArray) -> LayerCopies:
    has_choice = bool((np.count_nonzero(copies >= 0, axis=1) > 1).any())
    kept = copies if has_choice else copies.max(axis=1, keepdims=True)
    return LayerCopies(index, np.ascontiguousarray(kept, dtype=np.int32), has_choice)
