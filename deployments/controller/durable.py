"""What outlives the controller: its term, and the placement that it has decided on.

A *term* is one controller's time in office. Whoever starts takes the next number, which nobody else can have, and gives
out epochs of its term only: `first_epoch(term)` and above. So whatever a controller of an earlier term still says, its
epochs are lower than those that members have seen, and they pass it over; and what it still writes stands under its own
term, which nobody reads any more. It notices when it writes, and ends.

It is kept where Serve keeps its own state, in the key-value store of Ray's head: there with and without a KV store of
ours, and as durable as Serve itself (over the head node's death where Ray's fault tolerance is on). The KV store is a
cache and may forget.

Worked number: the controller of term 3 dies at epoch 3,000,041. The next one takes term 4 and starts at 4,000,000.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from expertmesh.platform.autoscaling.targets import Store
from expertmesh.routing.placement.static import IntArray

EPOCHS_A_TERM = 1_000_000


class Deposed(RuntimeError):
    """Another controller has taken office."""


def first_epoch(term: int) -> int:
    """The lowest epoch that a controller of this term may give out."""
    return term * EPOCHS_A_TERM


@dataclass(frozen=True, slots=True)
class PlacementState:
    """What a controller decided."""

    of: str
    """What it was decided for: another model or other settings make nothing of it."""
    slots: IntArray
    """[shards, layers, slots] expert ids, -1 where a slot is empty."""
    frozen: bool

    def to_bytes(self) -> bytes:
        """For `from_bytes`."""
        return json.dumps(
            {
                "of": self.of,
                "shape": self.slots.shape,
                "slots": self.slots.ravel().tolist(),
                "frozen": self.frozen,
            }
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> PlacementState:
        """Raises ValueError if this is nothing that `to_bytes` made."""
        try:
            told = json.loads(data)
            slots = np.array(told["slots"], dtype=np.int32).reshape(told["shape"])
            return cls(str(told["of"]), slots, bool(told["frozen"]))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a placement: {error!r}") from error


class KeyValues(Store, Protocol):
    """Keys with values that outlive this process."""

    def claim(self, key: str) -> bool:
        """Sets the key if nobody has; whether it was this call."""

    def keys(self, prefix: str) -> list[str]:
        """Those that begin so."""


class RayKeyValues:
    """Ray's own store, on the head node. Blocking: about a millisecond a call."""

    _NAMESPACE = b"expertmesh"

    def get(self, key: str) -> bytes | None:
        """As KeyValues."""
        from ray.experimental import internal_kv

        return internal_kv._internal_kv_get(key, namespace=self._NAMESPACE)

    def put(self, key: str, value: bytes) -> None:
        """As KeyValues."""
        from ray.experimental import internal_kv

        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=self._NAMESPACE)

    def claim(self, key: str) -> bool:
        """As KeyValues."""
        from ray.experimental import internal_kv

        return not internal_kv._internal_kv_put(key, b"", overwrite=False, namespace=self._NAMESPACE)

    def keys(self, prefix: str) -> list[str]:
        """As KeyValues."""
        from ray.experimental import internal_kv

        return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=self._NAMESPACE)]

    def delete(self, key: str) -> None:
        """As KeyValues."""
        from ray.experimental import internal_kv

        internal_kv._internal_kv_del(key, namespace=self._NAMESPACE)


class Office:
    """A controller's term."""

    def __init__(self, store: KeyValues, application: str) -> None:
        """Takes the next term of an application's controllers."""
        self._store = store
        self._prefix = f"controller/{application}"
        before = self._terms()
        self.term = before[-1] if before else 0
        while True:
            self.term += 1
            if store.claim(self._term_key(self.term)):
                break
        self.inherited = self._inherit(before)
        """What the last controller that wrote anything had decided; None if nobody did."""
        if self.inherited is not None:
            self.save(self.inherited)
        for term in before[:-1]:
            store.delete(self._term_key(term))
            store.delete(self._state_key(term))

    def save(self, state: PlacementState) -> None:
        """Writes what was decided. Raises Deposed if there is a later term: nobody will read it."""
        self._store.put(self._state_key(self.term), state.to_bytes())
        self.check()

    def check(self) -> None:
        """Raises Deposed if there is a later term."""
        latest = self._terms()[-1:]
        if latest and latest[0] > self.term:
            raise Deposed(f"a controller of term {latest[0]} has taken over from this one, of term {self.term}")

    def _inherit(self, terms: list[int]) -> PlacementState | None:
        for term in reversed(terms):
            data = self._store.get(self._state_key(term))
            if data is not None:
                return PlacementState.from_bytes(data)
        return None

    def _terms(self) -> list[int]:
        """Ascending."""
        keys = self._store.keys(f"{self._prefix}/term/")
        return sorted(int(key.rpartition("/")[2]) for key in keys)

    def _term_key(self, term: int) -> str:
        return f"{self._prefix}/term/{term}"

    def _state_key(self, term: int) -> str:
        return f"{self._prefix}/state/{term}"
