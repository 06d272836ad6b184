"""What deployments say to each other over Ray. Plain frozen values: they are pickled by Ray and by nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertmesh.routing.placement import Target
from expertmesh.routing.placement.static import IntArray


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """A shard asks for experts. One that was leased some before (the controller was away) says which."""

    shard: str
    node: str
    held_index: int | None = None
    held: IntArray | None = None
    """[layers, slots] what it serves."""
    seen_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """Experts for one shard."""

    index: int
    """Which of the placement's shards it is."""
    slots: IntArray
    """[layers, slots] expert ids, -1 where a slot stays empty. At least one of each layer is: the staging slot."""
    epoch: int


@dataclass(frozen=True, slots=True)
class Orders:
    """The controller's answer to a shard's heartbeat."""

    epoch: int
    """Of the routing table now."""
    slots: IntArray | None
    """[layers, slots] what it is to hold; None: what it reported."""
    released: bool = False
    """The shard said that it leaves, and nobody needs it any more."""


@dataclass(frozen=True, slots=True)
class ShardReport:
    """A shard's heartbeat."""

    shard: str
    target: Target | None
    """Where it serves; None while it loads."""
    held: IntArray | None = None
    """[layers, slots] what it serves; None while it loads its first lease."""
    failed: IntArray | None = None
    """[layers, slots] orders that it could not carry out."""
    failure: str = ""
    """Why."""
    stats: dict[str, Any] = field(default_factory=dict)
    """ServerStats, `bytes_read` and `load_s`."""


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """An attention replica's heartbeat."""

    replica: str
    node: str
    ready: bool
    epoch: int
    """Placement epoch that its engine dispatches by."""
    running: int
    """Requests in the engine."""
    loads: np.ndarray[Any, np.dtype[np.int64]] | None
    """[layers, experts] tokens dispatched since it started."""
    stats: dict[str, Any] = field(default_factory=dict)
    """Dispatch counters and what was loaded."""
