"""Membership and placement as a state machine: no Ray, no clock of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertmesh.deployments.messages import AttentionReport, JoinRequest, Lease, Orders, ShardReport
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
    held: IntArray | None = None
    """[layers, slots] what it says that it serves."""
    failure: str = ""
    """Why it could not load what it is ordered to hold now."""
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class AttentionMember:
    """An attention replica and its last report."""

    report: AttentionReport
    seen: float


class Membership:
    """Leases the placement's shards to processes and publishes who serves.

    The epoch grows whenever what is served changes, and is always above any that a member has seen.
    """

    def __init__(
        self, layers: tuple[int, ...], num_experts: int, slots: IntArray, timeout_s: float, clock: Clock
    ) -> None:
        """slots: [shards, layers, slots] what each shard is to hold. `expire` drops members not heard of for
        `timeout_s`."""
        self.layers = layers
        self.num_experts = num_experts
        self.slots = slots.copy()
        self.withdrawn = np.zeros(slots.shape, dtype=bool)
        """Slots that shards still hold and that are served no more."""
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
            if request.held is not None and request.held.shape == self.slots[index].shape:
                # The controller was away: what the shard serves is the placement, not what a fresh start would lease.
                self.slots[index] = request.held
                self.withdrawn[index] = False
            member = self.shards[request.shard] = ShardMember(request.shard, request.node, index, self._clock())
        member.seen = self._clock()
        return Lease(member.index, self.slots[member.index].copy(), self.epoch)

    def heartbeat(self, report: ShardReport) -> bool:
        """Takes a shard's report; False if it holds no lease and must join (again)."""
        member = self.shards.get(report.shard)
        if member is None:
            return False
        member.seen = self._clock()
        member.stats = report.stats
        ordered = self.slots[member.index]
        member.failure = report.failure if report.failed is not None and np.array_equal(report.failed, ordered) else ""
        served = self._served(member)
        member.target, member.held = report.target, report.held
        if not np.array_equal(served, self._served(member)):
            self.epoch += 1
        return True

    def orders(self, shard: str) -> Orders:
        """What a shard with a lease is to hold from now on. Raises KeyError for one without."""
        member = self.shards[shard]
        ordered = self.slots[member.index]
        as_ordered = member.held is None or np.array_equal(member.held, ordered)
        return Orders(self.epoch, None if as_ordered else ordered.copy())

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

    # -- placement ----------------------------------------------------------------------------------------------

    def withdraw(self, index: int, layer: int, slot: int) -> None:
        """Takes a copy out of the routing table; the shard holds it on for those who still go by an older one."""
        self.withdrawn[index, layer, slot] = True
        self.epoch += 1

    def free(self, index: int, layer: int, slot: int) -> None:
        """Orders a slot to be emptied."""
        served = index in self.serving() and not self.withdrawn[index, layer, slot]
        self.slots[index, layer, slot] = -1
        self.withdrawn[index, layer, slot] = False
        if served:
            self.epoch += 1

    def serving(self) -> dict[int, ShardMember]:
        """The shards that serve now, by their index in `slots`."""
        return {m.index: m for m in self.shards.values() if m.target is not None}

    def copies(self, layer: int, expert: int) -> int:
        """Number of shards that serve an expert now; layer: its position in `layers`."""
        return sum(expert in self._served(member)[layer] for member in self.serving().values())

    def table(self) -> RoutingTable:
        """The routing table of the shards that serve now."""
        serving = self.serving()
        slots = np.full_like(self.slots, -1)
        for index, member in serving.items():
            slots[index] = self._served(member)
        ready = {index: m.target for index, m in serving.items() if m.target is not None}
        return build_table(self.epoch, self.layers, self.num_experts, slots, ready)

    def loads(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens dispatched to each expert since the controller started: [layers, experts]."""
        total = self._retired_loads.copy()
        for loads in self._away.values():
            total += loads
        for member in self.attention.values():
            if member.report.loads is not None:
                total += member.report.loads
        return total

    def _served(self, member: ShardMember) -> IntArray:
        """[layers, slots] what of its lease a shard serves: what it has loaded and has not been withdrawn."""
        ordered: IntArray = self.slots[member.index]
        if member.target is None or member.held is None:
            return np.full_like(ordered, -1)
        return np.where((member.held == ordered) & ~self.withdrawn[member.index], ordered, np.int32(-1))

    def _exceed(self, seen: int) -> None:
        """Goes above an epoch that a controller before this one gave out: its table of that epoch was another."""
        if seen > self.epoch:
            self.epoch = seen + 1
