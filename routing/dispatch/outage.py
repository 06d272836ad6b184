"""Experts that no shard serves, and what becomes of the tokens that need them.

A step waits for a missing expert up to a deadline. From then on it is given up: tokens that need it fail at once,
alone, and the engine goes on with the rest, until a table brings the expert back.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from expertmesh.routing.placement import RoutingTable

Rows = np.ndarray[Any, np.dtype[np.int64]]


class FailedRows:
    """Which rows of the step at hand have no right output, in the process that runs the model.

    The dispatcher adds, layer by layer; whoever ends the step takes.
    """

    def __init__(self) -> None:
        self._rows: set[int] = set()
        self._why = ""

    def add(self, rows: Rows, why: str) -> None:
        """rows: positions in the step's [T, H]."""
        self._rows.update(rows.tolist())
        self._why = why

    def take(self) -> tuple[list[int], str]:
        """Rows, ascending, and the last reason; none are left."""
        rows, self._rows = sorted(self._rows), set()
        return rows, self._why

    def __len__(self) -> int:
        return len(self._rows)


class Outage:
    """The experts that were given up."""

    def __init__(self) -> None:
        self._experts: dict[int, set[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._experts)

    def give_up(self, layer: int, experts: Rows) -> None:
        """From now on nobody waits for these."""
        self._experts.setdefault(layer, set()).update(experts.tolist())

    def among(self, layer: int, experts: Rows) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of the experts [P] were given up: [P]."""
        return np.isin(experts, list(self._experts.get(layer, ())))

    def served(self, layer: int, experts: Rows) -> None:
        """Takes back experts that have just answered."""
        if (given_up := self._experts.get(layer)) is not None:
            self._keep(layer, given_up.difference(experts.tolist()))

    def heal(self, table: RoutingTable) -> None:
        """Takes back the experts that the table has a shard for."""
        for layer, experts in list(self._experts.items()):
            held = (table.copies[table.layer_index[layer]] >= 0).any(axis=1)
            self._keep(layer, {expert for expert in experts if not held[expert]})

    def _keep(self, layer: int, experts: set[int]) -> None:
        if experts:
            self._experts[layer] = experts
        else:
            del self._experts[layer]
