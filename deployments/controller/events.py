"""The mesh's timeline: what happened, lately. No Ray, no clock of its own.

An event's id is `first_event(term)` and above, as epochs are (durable.py): ids of a later controller are higher. The
timeline itself is memory and ends with its controller; the next one begins with the event that it took office.

Worked number: term 3 gives out 3,000,000,001, 3,000,000,002, ... A reader that has seen 3,000,000,002 when the
controller dies asks that of term 4 for what came after it, and gets 4,000,000,001.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

EVENTS_A_TERM = 1_000_000_000
_KEPT = 1000
"""Events of late that are kept."""


class Kind(StrEnum):
    """What an event is about."""

    OFFICE = "office"
    """A controller has taken office."""
    SHARD_JOINED = "shard_joined"
    SHARD_SERVING = "shard_serving"
    SHARD_LOST = "shard_lost"
    SHARD_LEAVING = "shard_leaving"
    SHARD_GONE = "shard_gone"
    """It left as it said, or because its process was told to stop."""
    REPLICA_JOINED = "replica_joined"
    REPLICA_READY = "replica_ready"
    REPLICA_LOST = "replica_lost"
    EPOCH = "epoch"
    """A routing table is published."""
    EXPERTS_MISSING = "experts_missing"
    EXPERTS_WHOLE = "experts_whole"
    TAKEOVER = "takeover"
    """Experts of shards that are gone or leave are ordered from others."""
    MOVES_BEGUN = "moves_begun"
    MOVES_DONE = "moves_done"
    MOVES_FAILED = "moves_failed"
    TRAFFIC_SHIFTED = "traffic_shifted"
    SCALE = "scale"
    FREEZE = "freeze"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    id: int
    """Only grows, over controllers too."""
    at: float
    """Seconds since 1970."""
    kind: Kind
    text: str
    """A short sentence for people."""
    about: dict[str, str | int]
    """Ids and numbers concerned: `shard`, `index`, `replica`, `node`, `epoch`, `experts`, `moves`, ..."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"id": self.id, "at": self.at, "kind": str(self.kind), "text": self.text, "about": self.about}


def first_event(term: int) -> int:
    """The id above which a controller of this term numbers its events."""
    return term * EVENTS_A_TERM


class Timeline:
    """The events of one controller's term, the newest of them."""

    def __init__(
        self, term: int, clock: Callable[[], float], ring: Callable[[], None] = lambda: None, kept: int = _KEPT
    ) -> None:
        """clock: seconds since 1970; ring: called after each event; kept: how many."""
        self._next = first_event(term) + 1
        self._clock = clock
        self._ring = ring
        self._events: deque[Event] = deque(maxlen=kept)
        self._at = 0.0

    @property
    def newest(self) -> int:
        """Id of the newest event; that before the term's first if there is none."""
        return self._next - 1

    def add(self, kind: Kind, text: str, **about: str | int) -> Event:
        """Takes an event down; times never go back, whatever the clock does."""
        self._at = max(self._at, round(self._clock(), 3))
        event = Event(self._next, self._at, kind, text, about)
        self._next += 1
        self._events.append(event)
        self._ring()
        return event

    def after(self, known: int) -> list[Event]:
        """The kept events of higher ids, the oldest first; all of them if `known` was given out by another mesh.

        An id that this mesh has yet to give out is another's: one that listened at the same address before.
        """
        if known > self.newest:
            return list(self._events)
        return [event for event in self._events if event.id > known]
