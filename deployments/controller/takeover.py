"""Experts change hands when shards die, leave or come. No Ray, no clock.

Whenever an expert is on fewer present shards than redundancy asks for, the others are ordered to load it, all that is
wanting at once and into more slots if need be: nobody waits for a replacement. A shard that leaves counts as gone but
serves on until every expert that it has is served by others, then it is taken out of the routing table, and when every
attention replica goes by that table it is released. Copies beyond the usual number, as there are when a replacement or
one more shard serves, are given up by moves that drop (`Replacement`).
"""

from __future__ import annotations

import logging

import numpy as np

from expertmesh.deployments.controller.membership import Membership
from expertmesh.deployments.controller.replacement import Replacement
from expertmesh.routing.placement import Move, adopted, evened, filled, holders, surplus
from expertmesh.routing.placement.elastic import Floats, Mask

log = logging.getLogger("expertmesh.controller")


class Takeover:
    """Orders what is wanting, releases who leaves, and says what may be given up."""

    def __init__(self, members: Membership, replacement: Replacement, most: int | None = None) -> None:
        """replacement: carries out what is given up; most: experts of a layer that no shard is ever ordered to exceed,
        None for no limit."""
        self._members = members
        self._replacement = replacement
        self._most = members.num_experts if most is None else most
        self._ordered: set[tuple[str, int, int]] = set()
        """(shard id, layer, expert) ordered and not served yet."""
        self._refusing: set[str] = set()
        """Shards that could not load what they were ordered to take over."""
        self.unplaced: list[tuple[int, int]] = []
        """(layer, expert) once for each copy that is wanting and that no shard can take."""
        self.adopted = 0
        """Copies ordered since the start."""
        self._seen: object = None
        self._may_give_up = False

    def advance(self) -> None:
        """Goes on as far as members' last reports allow. To be called after every change of them."""
        state = self._state()
        if state != self._seen:
            self._withdraw_failed()
            self._adopt()
            self._release()
            self._seen = self._state()
            self._may_give_up = True
        if self._may_give_up and not self._replacement.busy:
            self._may_give_up = False
            self._replacement.start(self._given_up())

    def _given_up(self) -> list[Move]:
        """Moves that drop the copies which nobody needs; all in one step."""
        members = self._members
        loads = members.loads().astype(np.float64)
        moves = []
        for shard, layer, expert in surplus(
            self._served(), loads, redundancy=members.redundancy, usual=members.usual()
        ):
            slot = int(np.flatnonzero(members.slots[shard, layer] == expert)[0])
            moves.append(Move(0, layer, shard, slot, expert, -1, 0.0, 0.0))
        return moves

    @property
    def settled(self) -> bool:
        """Whether every shard holds what it is to hold, none is awaited, and no expert is short of copies."""
        members = self._members
        taken = {m.index for m in members.shards.values()}
        vacant = [i for i in range(len(members.slots)) if i not in taken and (members.slots[i] >= 0).any()]
        obeyed = (
            m.held is not None and np.array_equal(m.held, members.slots[m.index]) for m in members.shards.values()
        )
        return not vacant and not members.starting and not self.unplaced and all(obeyed)

    def _state(self) -> object:
        """What decisions depend on."""
        members = self._members
        shards = tuple((m.shard, m.leaving, m.failure, m.target is not None) for m in members.shards.values())
        idle = self.settled and not self._replacement.busy
        return members.epoch, shards, members.starting, members.slots.shape, members.slots.tobytes(), idle

    def _served(self) -> Mask:
        """What present shards serve: [shards, layers, experts]."""
        slots = np.full_like(self._members.slots, -1)
        for index in self._members.present():
            slots[index] = self._members.served(index)
        return holders(slots, self._members.num_experts)

    def _withdraw_failed(self) -> None:
        members = self._members
        for member in members.shards.values():
            held = members.served(member.index)
            mine = {(layer, expert) for shard, layer, expert in self._ordered if shard == member.shard}
            for layer, expert in mine:
                if expert in held[layer]:
                    self._ordered.discard((member.shard, layer, expert))
                elif member.failure:
                    for slot in np.flatnonzero(members.slots[member.index, layer] == expert).tolist():
                        members.free(member.index, layer, slot)
                    self._ordered.discard((member.shard, layer, expert))
                    if member.shard not in self._refusing:
                        log.warning("shard %s can't take over experts: %s", member.shard, member.failure)
                    self._refusing.add(member.shard)
        self._refusing &= set(members.shards)
        self._ordered = {order for order in self._ordered if order[0] in members.shards}

    def _adopt(self) -> None:
        members = self._members
        present = members.present()
        self.unplaced = []
        if not present:
            return
        ordered = holders(members.slots, members.num_experts)
        counts = holders(np.where(members.withdrawn, np.int32(-1), members.slots), members.num_experts)
        counted = np.zeros(len(members.slots), dtype=bool)
        counted[list(set(present) | members.starting)] = True
        able = np.zeros(len(members.slots), dtype=bool)
        able[[index for index, member in present.items() if member.shard not in self._refusing]] = True
        loads = members.loads().astype(np.float64)
        added, self.unplaced = adopted(
            ordered,
            counts & counted[:, None, None],
            loads,
            redundancy=members.redundancy,
            able=able,
            usual=members.usual(),
            most=self._most,
        )
        if not added and self.settled and not self._replacement.busy:
            added = self._even(loads, able)
        for shard, layer, expert in added:
            members.order(shard, layer, expert)
            self._ordered.add((present[shard].shard, layer, expert))
        self.adopted += len(added)
        if added:
            log.warning("%d experts change hands, to %d shards", len(added), len({shard for shard, *_ in added}))
        if self.unplaced:
            log.error("%d copies of experts are wanting, and no shard has room", len(self.unplaced))

    def _even(self, loads: Floats, able: Mask) -> list[tuple[int, int, int]]:
        """Copies to add where nothing is wanting: so that others can give theirs up, or into slots that stay empty."""
        members, has = self._members, self._served()
        usual = members.usual()
        if surplus(has, loads, redundancy=members.redundancy, usual=usual):
            return []
        added = evened(has, loads, able=able, usual=usual)
        if added or not members.spare or len(members.present()) < members.wanted:  # more than is to stay otherwise
            return added
        return filled(has, loads, able=able, usual=usual)

    def _release(self) -> None:
        """Shards that leave, once others serve all that they have, and indices that nobody holds and nobody needs."""
        members = self._members
        staying = sum(not member.leaving for member in members.shards.values())
        enough = self._served().sum(axis=0) >= min(members.redundancy, max(1, staying))
        has = holders(members.slots, members.num_experts)
        held = {m.index: m for m in members.shards.values()}
        for index in range(len(members.slots)):
            covered = bool(enough[has[index]].all())
            member = held.get(index)
            if member is not None and member.leaving and (covered or not staying):
                members.withdraw_shard(member)
            elif member is None and covered and index not in members.starting and has[index].any():
                members.retire(index)
