"""Membership and placement as a state machine: no Ray, no clock of its own.

An index of the placement is *starting* until somebody has served what it was first leased, *vacant* while it has
experts and nobody holds it, *retired* when nobody holds it and others have its experts. A vacant index goes to the next
shard that joins. Without one, a shard gets a retired index or a new one, and experts that others hold, as long as there
are fewer shards than `wanted`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from expertmesh.deployments.controller.liveness import REMEMBERED_GAPS, Sign, silent
from expertmesh.deployments.messages import AttentionReport, JoinRequest, Lease, Orders, ShardReport
from expertmesh.routing.placement import RoutingTable, Target, build_table, holders, lent, share
from expertmesh.routing.placement.static import IntArray

Clock = Callable[[], float]
"""Seconds on a clock that never goes back."""
_MAX_AWAY = 64
_MAX_INDEX = 4096
"""A shard that resumes an index beyond those that this controller knows may not ask for more than this."""


def _gaps() -> deque[float]:
    return deque(maxlen=REMEMBERED_GAPS)


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
    leaving: bool = False
    """It said that it goes as soon as others have its experts."""
    withdrawn_at: int | None = None
    """Epoch of the first table without it, once others have."""
    gaps: deque[float] = field(default_factory=_gaps)
    """Seconds between its last heartbeats."""
    loads: bool = True
    """Whether it was told to load experts when it was last heard of."""


@dataclass(slots=True)
class AttentionMember:
    """An attention replica and its last report."""

    report: AttentionReport
    seen: float
    gaps: deque[float] = field(default_factory=_gaps)
    """Seconds between its last reports."""


class Membership:
    """Leases the placement's shards to processes and publishes who serves.

    The epoch grows whenever what is served changes, and is always above any that a member has seen.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        num_experts: int,
        slots: IntArray,
        timeout_s: float,
        clock: Clock,
        *,
        redundancy: int = 1,
        spare: int = 0,
        staging: bool = False,
        suspect_s: float | None = None,
        intervals_s: tuple[float, float] | None = None,
    ) -> None:
        """slots: [shards, layers, slots] what each shard is to hold.

        `expire` drops members not heard of for `timeout_s`, and shards not heard of for `suspect_s` (the same unless
        given) to which an attention replica's connection broke. intervals_s: between two heartbeats of a shard, and two
        reports of an attention replica; given these, silence may last longer (`liveness`).
        redundancy, spare and staging: as for `initial_slots`.
        """
        self.layers = layers
        self.num_experts = num_experts
        self.slots = slots.copy()
        self.withdrawn = np.zeros(slots.shape, dtype=bool)
        """Slots that shards still hold and that are served no more."""
        self.epoch = 0
        self.shards: dict[str, ShardMember] = {}
        self.attention: dict[str, AttentionMember] = {}
        self.wanted = len(slots)
        """How many shards there are to be."""
        self.lost = {"attention": 0, "experts": 0}
        """Members not heard of in time, since the start."""
        self.redundancy = redundancy
        self.spare = spare
        self.staging = staging
        self._starting = {index for index, held in enumerate(slots) if (held >= 0).any()}
        self._resumed = False
        self._timeout_s = timeout_s
        self._suspect_s = timeout_s if suspect_s is None else min(suspect_s, timeout_s)
        self._intervals_s = intervals_s
        self._clock = clock
        self._retired_loads = np.zeros((len(layers), num_experts), dtype=np.int64)
        self._dropped: dict[str, int] = {}
        """Indices of shards that were not heard of in time, which may come back."""
        self._away: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
        """Loads of attention replicas that were dropped: those that come back report them again."""

    def join(self, request: JoinRequest) -> Lease | None:
        """A lease, the same again for a shard that has one; None while there are as many shards as wanted."""
        self._exceed(request.seen_epoch)
        member = self.shards.get(request.shard)
        if member is None:
            index = self._index_for(request)
            if index is None:
                return None
            member = self.shards[request.shard] = ShardMember(request.shard, request.node, index, self._clock())
        member.seen = self._clock()
        return Lease(member.index, self._leased(member.index), self.epoch)

    def _index_for(self, request: JoinRequest) -> int | None:
        taken = {m.index for m in self.shards.values()}
        index, serves = request.held_index, request.held is not None and bool((request.held >= 0).any())
        if index is not None and (serves or self._leases(index) or not 0 <= index < len(self.slots)):
            return self._resume(index, request, taken)
        vacant = [i for i in range(len(self.slots)) if i not in taken and self._leases(i)]
        if vacant:
            return vacant[0]
        staying = sum(not m.leaving for m in self.shards.values())
        return self._lend(taken) if staying < self.wanted else None

    def _leases(self, index: int) -> bool:
        """Whether the placement has experts for an index."""
        return 0 <= index < len(self.slots) and bool((self.slots[index] >= 0).any())

    def _resume(self, index: int, request: JoinRequest, taken: set[int]) -> int | None:
        """What the shard serves is the placement if the controller was away, not what a fresh start would lease.

        If the shard was away its lease stands, as long as others don't have all of it.
        """
        held = request.held
        if index in taken or not 0 <= index < (len(self.slots) if held is None else _MAX_INDEX):
            return None
        was_away = self._dropped.pop(request.shard, None) == index and self._leases(index)
        if held is not None and len(held) == len(self.layers) and (held >= 0).any() and not was_away:
            self._add_rows(index + 1)
            self.slots[index] = self._fitted(held)
            self.withdrawn[index] = False
            self._starting.discard(index)
            self._resumed = True
        return index

    def _lend(self, taken: set[int]) -> int:
        """An index for one more shard, with experts that others hold, which give them up once it serves."""
        free = [i for i in range(len(self.slots)) if i not in taken]
        index = free[0] if free else len(self.slots)
        self._add_rows(index + 1)
        usual = self.usual(self.wanted)
        counted = [m.index for m in self.shards.values() if not m.leaving]
        has = holders(np.where(self.withdrawn, np.int32(-1), self.slots)[counted], self.num_experts)
        loads = self.loads().astype(np.float64)
        experts = lent(has, loads, redundancy=self.redundancy, usual=usual)
        self._widen(usual + self.staging)
        self.slots[index] = -1
        self.slots[index, :, :usual] = experts
        self.withdrawn[index] = False
        return index

    def _leased(self, index: int) -> IntArray:
        """[layers, slots] what an index holds, without the slots beyond those that it needs."""
        row = self.slots[index]
        used = int((row >= 0).any(axis=0).nonzero()[0].max(initial=-1)) + 1
        leased: IntArray = row[:, : used + self.staging].copy()
        return leased

    def heartbeat(self, report: ShardReport) -> bool:
        """Takes a shard's report; False if it holds no lease and must join (again)."""
        member = self.shards.get(report.shard)
        if member is None:
            return False
        self._hear(member)
        member.stats = report.stats
        held = None if report.held is None else self._fitted(report.held)
        failed = None if report.failed is None else self._fitted(report.failed)
        ordered = self.slots[member.index]
        member.failure = report.failure if failed is not None and np.array_equal(failed, ordered) else ""
        served = self._served(member)
        member.target, member.held = report.target, held
        if not np.array_equal(served, self._served(member)):
            self.epoch += 1
        if member.target is not None:
            self._starting.discard(member.index)
        return True

    def orders(self, shard: str) -> Orders:
        """What a shard with a lease is to hold from now on. Raises KeyError for one without."""
        member = self.shards[shard]
        ordered = self.slots[member.index]
        as_ordered = member.held is None or np.array_equal(member.held, ordered)
        member.loads = member.held is None or not as_ordered
        return Orders(self.epoch, None if as_ordered else ordered.copy(), self._released(member))

    def leave(self, shard: str) -> None:
        """Frees a shard's index, and retires it if the shard was released; does nothing for one that has none."""
        member = self.shards.pop(shard, None)
        if member is None:
            return
        if member.target is not None:
            self.epoch += 1
        if member.withdrawn_at is not None:
            self.retire(member.index)

    def leaving(self, shard: str) -> None:
        """A shard says that it goes once others have its experts; does nothing for one without a lease."""
        if (member := self.shards.get(shard)) is not None:
            member.leaving = True

    def report(self, report: AttentionReport) -> None:
        """Takes an attention replica's report."""
        self._exceed(report.epoch)
        self._away.pop(report.replica, None)
        member = self.attention.setdefault(report.replica, AttentionMember(report, self._clock()))
        member.report = report
        self._hear(member)

    def _hear(self, member: ShardMember | AttentionMember) -> None:
        now = self._clock()
        member.gaps.append(now - member.seen)
        member.seen = now

    def _signs(self) -> dict[str, Sign]:
        """Of all members."""
        now = self._clock()
        suspected = {shard for member in self.attention.values() for shard in member.report.stats.get("down", ())}
        beats_s, reports_s = self._intervals_s or (inf, inf)
        signs = {name: Sign(now - m.seen, tuple(m.gaps), reports_s) for name, m in self.attention.items()}
        for name, m in self.shards.items():
            loads = self._intervals_s is not None and m.loads
            signs[name] = Sign(now - m.seen, tuple(m.gaps), beats_s, name in suspected, loads)
        return signs

    def expire(self) -> list[str]:
        """Drops members that were not heard of in time; their ids."""
        gone = silent(self._signs(), self._timeout_s, self._suspect_s)
        shards = [name for name in gone if name in self.shards]
        replicas = [name for name in gone if name in self.attention]
        for shard in shards:
            self._dropped[shard] = self.shards[shard].index
            self.leave(shard)
        while len(self._dropped) > _MAX_AWAY:
            del self._dropped[next(iter(self._dropped))]
        for replica in replicas:
            loads = self.attention.pop(replica).report.loads
            if loads is not None:
                self._away[replica] = loads
        self.lost["experts"] += len(shards)
        self.lost["attention"] += len(replicas)
        while len(self._away) > _MAX_AWAY:  # the longest away do not come back
            self._retired_loads += self._away.pop(next(iter(self._away)))
        return shards + replicas

    # -- placement ----------------------------------------------------------------------------------------------

    def usual(self, shards: int | None = None) -> int:
        """Experts of a layer that each shard is to hold, where there are so many; the present ones unless given."""
        shards = len(self.present()) if shards is None else shards
        return share(self.num_experts, shards, self.redundancy, self.spare)

    def present(self) -> dict[int, ShardMember]:
        """The shards that serve and are to stay, by their index in `slots`."""
        return {index: member for index, member in self.serving().items() if not member.leaving}

    @property
    def all_leave(self) -> bool:
        """Whether no shard is to stay, so that none need wait for another."""
        return all(member.leaving for member in self.shards.values())

    @property
    def starting(self) -> frozenset[int]:
        """Indices whose first lease nobody has served yet: their experts are not lost but still to come."""
        return frozenset(self._starting)

    def give_up_starting(self) -> None:
        """Takes indices that nobody resumed for lost, if this controller took over from another. To be called when
        those that serve had time to come back."""
        if self._resumed:
            self._starting &= {m.index for m in self.shards.values()}

    def retire(self, index: int) -> None:
        """Takes an index that nobody holds out of the placement; `join` may use it for one more shard."""
        self.slots[index] = -1
        self.withdrawn[index] = False
        self._starting.discard(index)

    def order(self, index: int, layer: int, expert: int) -> None:
        """Orders a shard to load one more expert, into a slot that is empty; all get one more where it has none.

        A slot that it was ordered to empty and still holds is not empty yet. With staging, one slot stays free.
        """
        member = next(m for m in self.shards.values() if m.index == index)
        empty = self.slots[index, layer] == -1
        free = empty if member.held is None else empty & (member.held[layer] == -1)
        slots = np.flatnonzero(free)
        if len(slots) <= self.staging:
            slots = np.append(slots, self.slots.shape[2])
            self._widen(self.slots.shape[2] + 1)
        self.slots[index, layer, slots[0]] = expert

    def withdraw_shard(self, member: ShardMember) -> None:
        """Takes a shard that leaves out of the routing table."""
        if member.withdrawn_at is None:
            self.epoch += 1
            member.withdrawn_at = self.epoch

    def _released(self, member: ShardMember) -> bool:
        """Whether a shard is out of every table that an attention replica goes by, or no shard is to stay."""
        epoch = member.withdrawn_at
        if epoch is None:
            return False
        return self.all_leave or all(m.report.epoch >= epoch for m in self.attention.values())

    def _fitted(self, held: IntArray) -> IntArray:
        """[layers, slots] with as many slots as all have: those get more where this has more."""
        self._widen(held.shape[1])
        return np.pad(held, ((0, 0), (0, self.slots.shape[2] - held.shape[1])), constant_values=-1)

    def _widen(self, width: int) -> None:
        if (more := width - self.slots.shape[2]) <= 0:
            return
        grow = ((0, 0), (0, 0), (0, more))
        self.slots = np.pad(self.slots, grow, constant_values=-1)
        self.withdrawn = np.pad(self.withdrawn, grow)
        for member in self.shards.values():
            if member.held is not None:
                member.held = np.pad(member.held, grow[1:], constant_values=-1)

    def _add_rows(self, rows: int) -> None:
        if (more := rows - len(self.slots)) > 0:
            grow = ((0, more), (0, 0), (0, 0))
            self.slots = np.pad(self.slots, grow, constant_values=-1)
            self.withdrawn = np.pad(self.withdrawn, grow)

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
        """Number of present shards that serve an expert now; layer: its position in `layers`."""
        return sum(expert in self._served(member)[layer] for member in self.present().values())

    def served(self, index: int) -> IntArray:
        """[layers, slots] expert ids that the shard with this index serves now. Raises KeyError if nobody holds it."""
        members = {m.index: m for m in self.shards.values()}
        return self._served(members[index])

    def table(self) -> RoutingTable:
        """The routing table of the shards that serve now."""
        serving = {index: m for index, m in self.serving().items() if m.withdrawn_at is None}
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
        if member.target is None or member.held is None or member.withdrawn_at is not None:
            return np.full_like(ordered, -1)
        return np.where((member.held == ordered) & ~self.withdrawn[member.index], ordered, np.int32(-1))

    def _exceed(self, seen: int) -> None:
        """Goes above an epoch that a controller before this one gave out: its table of that epoch was another."""
        if seen > self.epoch:
            self.epoch = seen + 1
