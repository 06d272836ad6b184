"""Membership and placement as a state machine: no Ray, no clock of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertmesh.deployments.messages import AttentionReport, JoinRequest, Lease, ShardReport
from expertmesh.routing.placement import RoutingTable, Target, build_table
from expertmesh.routing.placement.static import IntArray

Clock = Callable[[], float]
"""Seconds on a clock that never goes back."""
_MAX_AWAY = 64


@dataclass(slots=True)
class ShardMember:
    """A shard that holds a lease."""

    shard: str
    node: str
    index: int
    seen: float
    target: Target | None = None
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class AttentionMember:
    """An attention replica and its last report."""

    report: AttentionReport
    seen: float


class Membership:
    """Leases the placement's shards to processes and publishes who serves.

    The epoch grows whenever the set of serving shards changes, and is always above any that a member has seen.
    """

    def __init__(
        self, layers: tuple[int, ...], num_experts: int, slots: IntArray, timeout_s: float, clock: Clock
    ) -> None:
        """slots: [shards, layers, slots] (`even_slots`). `expire` drops members not heard of for `timeout_s`."""
        self.layers = layers
        self.num_experts = num_experts
        self.slots = slots
        self.epoch = 0
        self.shards: dict[str, ShardMember] = {}
        self.attention: dict[str, AttentionMember] = {}
        self._timeout_s = timeout_s
        self._clock = clock
        self._retired_loads = np.zeros((len(layers), num_experts), dtype=np.int64)
        self._away: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
        """Loads of attention replicas that were dropped: those that come back report them again."""

    def join(self, request: JoinRequest) -> Lease | None:
        """A lease, the same again for a shard that has one; None while every index is taken."""
        self._exceed(request.seen_epoch)
        member = self.shards.get(request.shard)
        if member is None:
            taken = {m.index for m in self.shards.values()}
            free = [i for i in range(len(self.slots)) if i not in taken]
            if not free or (request.held_index is not None and request.held_index not in free):
                return None
            index = free[0] if request.held_index is None else request.held_index
            member = self.shards[request.shard] = ShardMember(request.shard, request.node, index, self._clock())
        member.seen = self._clock()
        return Lease(member.index, self.slots[member.index], self.epoch)

    def heartbeat(self, report: ShardReport) -> bool:
        """Takes a shard's report; False if it holds no lease and must join (again)."""
        member = self.shards.get(report.shard)
        if member is None:
            return False
        member.seen = self._clock()
        member.stats = report.stats
        if member.target != report.target:
            member.target = report.target
            self.epoch += 1
        return True

    def leave(self, shard: str) -> None:
        """Frees a shard's index; does nothing for one that has none."""
        member = self.shards.pop(shard, None)
        if member is not None and member.target is not None:
            self.epoch += 1

    def report(self, report: AttentionReport) -> None:
        """Takes an attention replica's report."""
        self._exceed(report.epoch)
        self._away.pop(report.replica, None)
        self.attention[report.replica] = AttentionMember(report, self._clock())

    def expire(self) -> list[str]:
        """Drops members that were not heard of in time; their ids."""
        limit = self._clock() - self._timeout_s
        shards = [shard for shard, member in self.shards.items() if member.seen < limit]
        for shard in shards:
            self.leave(shard)
        replicas = [replica for replica, member in self.attention.items() if member.seen < limit]
        for replica in replicas:
            loads = self.attention.pop(replica).report.loads
            if loads is not None:
                self._away[replica] = loads
        while len(self._away) > _MAX_AWAY:  # the longest away do not come back
            self._retired_loads += self._away.pop(next(iter(self._away)))
        return shards + replicas

    def table(self) -> RoutingTable:
        """The routing table of the shards that serve now."""
        ready = {m.index: m.target for m in self.shards.values() if m.target is not None}
        return build_table(self.epoch, self.layers, self.num_experts, self.slots, ready)

    def loads(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens dispatched to each expert since the controller started: [layers, experts]."""
        total = self._retired_loads.copy()
        for loads in self._away.values():
            total += loads
        for member in self.attention.values():
            if member.report.loads is not None:
                total += member.report.loads
        return total

    def _exceed(self, seen: int) -> None:
        """Goes above an epoch that a controller before this one gave out: its table of that epoch was another."""
        if seen > self.epoch:
            self.epoch = seen + 1
