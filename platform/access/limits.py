"""How much each key may ask for: requests a minute by a token bucket, and requests that run at once.

An ingress replica counts for itself: with several, a key may have as many times its limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from expertmesh.platform.access.records import Key

_BUSY_S = 1.0
"""When to ask again where nobody knows when a request that runs will end."""


class _Meter:
    """What one key has used up."""

    __slots__ = ("_per_minute", "_seen", "_spare", "running")

    def __init__(self, per_minute: int, now: float) -> None:
        self.running = 0
        self._per_minute = per_minute
        self._spare = float(per_minute)
        self._seen = now

    def wait_s(self, per_minute: int, now: float) -> float:
        """Takes a request from the bucket, which refills evenly and holds a minute's worth: 0, or when there is one."""
        if per_minute != self._per_minute:  # the limit was changed: what was used of the old one counts
            self._spare += per_minute - self._per_minute
            self._per_minute = per_minute
        self._spare = min(per_minute, self._spare + (now - self._seen) * per_minute / 60)
        self._seen = now
        if self._spare < 1:
            return (1 - self._spare) * 60 / per_minute
        self._spare -= 1
        return 0.0


class Meters:
    """Counts requests by key. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds that never go back."""
        self._clock = clock
        self._meters: dict[str, _Meter] = {}

    def enter(self, key: Key) -> float:
        """Begins a request: 0, and `leave` must follow; or the seconds after which to ask again, and none was begun."""
        meter = self._meters.get(key.id)
        now = self._clock()
        if meter is None:
            meter = self._meters[key.id] = _Meter(key.requests_per_minute or 0, now)
        if key.concurrent_requests is not None and meter.running >= key.concurrent_requests:
            return _BUSY_S
        if key.requests_per_minute is not None and (wait := meter.wait_s(key.requests_per_minute, now)) > 0:
            return wait
        meter.running += 1
        return 0.0

    def leave(self, key: Key) -> None:
        """Ends a request that was begun."""
        self._meters[key.id].running -= 1

    def running(self, key: Key) -> int:
        """Requests of the key that were begun and not ended."""
        meter = self._meters.get(key.id)
        return 0 if meter is None else meter.running
