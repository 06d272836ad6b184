"""Carrying out a re-placement while the mesh serves: add copy, publish, drain, drop copy. No Ray, no clock.

Each shard has a staging slot a layer beside those that it is leased. A move loads its expert there. Once the shard
says that it serves it, the new copy is in the routing table, and the copy that goes may be withdrawn from it as soon
as that leaves the expert its redundancy. When every attention replica goes by the new table the slot is emptied: it is
the next staging slot. A move that only drops a copy begins with the withdrawal. Nothing waits for a move: if a shard
goes away or can't load, its move is abandoned and the rest goes on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

import numpy as np

from expertmesh.deployments.controller.membership import Membership
from expertmesh.routing.placement.moves import Move

log = logging.getLogger("expertmesh.controller")

_REMEMBERED = 200
"""Ended moves that are kept for people to read."""


class State(StrEnum):
    """Where a move stands."""

    LOADING = "loading"
    SERVING = "serving"
    """The new copy is in the routing table; the one that goes still is."""
    DRAINING = "draining"
    EMPTYING = "emptying"
    """The slot that is freed is still held: an order to empty it must not cross one to fill it again."""
    DONE = "done"
    ABANDONED = "abandoned"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self in (State.DONE, State.ABANDONED)


@dataclass(slots=True)
class Running:
    """A move on its way."""

    move: Move
    staging: int
    """Slot that gets the new copy; -1 if the move only drops one."""
    state: State = State.LOADING
    leaving: int = -1
    """Slot that is emptied after the drain."""
    epoch: int = 0
    """Of the first table without that slot."""
    why: str = ""
    """Why it was abandoned."""

    def __str__(self) -> str:
        return f"{self.move} ({self.state}{f': {self.why}' if self.why else ''})"


class Replacement:
    """At most one plan at a time, step by step."""

    def __init__(self, members: Membership, redundancy: int) -> None:
        """redundancy: copies of an expert that a move must leave."""
        self._members = members
        self._redundancy = redundancy
        self._waiting: deque[Sequence[Move]] = deque()
        self.running: list[Running] = []
        self.ended: deque[Running] = deque(maxlen=_REMEMBERED)
        self.counts = {State.DONE: 0, State.ABANDONED: 0}
        """Moves that ended since the start."""
        self.tell: Callable[[Running], None] = lambda running: None
        """Called when a move has begun, and when it has ended."""

    @property
    def busy(self) -> bool:
        """Whether a plan is being carried out."""
        return bool(self.running or self._waiting)

    def start(self, moves: Iterable[Move]) -> None:
        """Begins to carry out a plan; moves are in the order of their steps. Raises ValueError while busy."""
        if self.busy:
            raise ValueError("another plan is being carried out")
        self._waiting.extend(list(step) for _, step in groupby(moves, key=lambda move: move.step))
        self.advance()

    def advance(self) -> None:
        """Goes on as far as members' last reports allow. To be called after every change of them."""
        while True:
            while any(self._advance(running) for running in self.running):
                pass
            for running in self.running:
                if running.state.ended:
                    self.ended.append(running)
                    self.tell(running)
            self.running = [running for running in self.running if not running.state.ended]
            if self.running or not self._waiting:
                return
            self.running = [self._begun(move) for move in self._waiting.popleft()]
            for running in self.running:
                if not running.state.ended:
                    self.tell(running)

    def _begun(self, move: Move) -> Running:
        members = self._members
        row = members.slots[move.shard, move.layer]
        empty = np.flatnonzero(row == -1).tolist()
        taken = {r.staging for r in self.running if (r.move.shard, r.move.layer) == (move.shard, move.layer)}
        free = [slot for slot in empty if slot not in taken]
        lacks = move.dropped >= 0 and move.dropped not in row
        drops = move.added < 0
        if move.shard not in members.serving() or lacks or not (drops or (free and move.added not in row)):
            why = "the placement has changed since it was planned"
            return Running(move, -1, State.ABANDONED, why=why)
        if drops:
            return Running(move, -1, State.SERVING)
        members.slots[move.shard, move.layer, free[0]] = move.added
        log.info("begins: %s", move)
        return Running(move, free[0])

    def _advance(self, running: Running) -> bool:
        """One transition of one move; whether there was one."""
        if running.state.ended:
            return False
        before = running.state
        member = self._members.serving().get(running.move.shard)
        if member is None:
            self._shard_left(running)
        elif running.state is State.LOADING:
            at = (running.move.layer, running.staging)
            if member.held is not None and member.held[at] == running.move.added:
                running.state = State.SERVING
            elif member.failure:
                self._abandon(running, member.failure)
        elif running.state is State.SERVING:
            self._drop(running)
        elif running.state is State.DRAINING:
            if all(m.report.epoch >= running.epoch for m in self._members.attention.values()):
                self._empty(running)
        elif member.held is not None and member.held[running.move.layer, running.leaving] == -1:
            self._end(running)
        return running.state is not before

    def _drop(self, running: Running) -> None:
        move = running.move
        if move.dropped < 0:
            self._end(running)
        elif self._members.copies(move.layer, move.dropped) > self._redundancy:
            self._withdraw(running, self._slot_of(move))
        elif running.staging < 0:
            running.why = f"expert {move.dropped} would have fewer than {self._redundancy} copies"
            self._end(running)
        elif not any(other.state is State.LOADING for other in self.running):
            # What was to take the dropped expert over did not come: the new copy goes again.
            running.why = f"expert {move.dropped} would have fewer than {self._redundancy} copies"
            self._withdraw(running, running.staging)

    def _withdraw(self, running: Running, slot: int) -> None:
        running.state, running.leaving = State.DRAINING, slot
        self._members.withdraw(running.move.shard, running.move.layer, slot)
        running.epoch = self._members.epoch

    def _slot_of(self, move: Move) -> int:
        """Where the shard holds the expert that goes."""
        row = self._members.slots[move.shard, move.layer]
        return int(np.flatnonzero(row == move.dropped)[0])

    def _shard_left(self, running: Running) -> None:
        """Whoever takes its place loads what is leased then."""
        if running.state in (State.LOADING, State.SERVING):
            running.why = "its shard left"
            if running.staging >= 0:
                self._abandon(running, running.why)
        elif running.state is State.DRAINING:
            self._empty(running)
        self._end(running)

    def _abandon(self, running: Running, why: str) -> None:
        running.why, running.leaving = why, running.staging
        self._empty(running)

    def _empty(self, running: Running) -> None:
        self._members.free(running.move.shard, running.move.layer, running.leaving)
        running.state = State.EMPTYING

    def _end(self, running: Running) -> None:
        running.state = State.ABANDONED if running.why else State.DONE
        self.counts[running.state] += 1
        log.log(logging.WARNING if running.why else logging.INFO, "%s", running)
