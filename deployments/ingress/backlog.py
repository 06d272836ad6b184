"""How long a request that came now would wait for its first token: arithmetic, the clock is the caller's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_SAMPLES, _LEAST_SAMPLES = 64, 8
_OF_LATE_S = 60.0


class Backlog:
    """Requests between their arrival and their first token, and how fast they go.

    The time between two first tokens is measured only where somebody was waiting all the while: so it is what the
    mesh needs for one request more, however many it computes at once, and not what it is asked for.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.waiting = 0
        """Requests without a token."""
        self._since: float | None = None
        """The last first token, if anybody has waited since."""
        self._intervals: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)
        """When a first token came, and how long after the one before."""

    def arrived(self) -> None:
        """One more request waits."""
        self.waiting += 1

    def served(self) -> None:
        """One of those that wait has its first token."""
        now = self._clock()
        if self._since is not None:
            self._intervals.append((now, now - self._since))
        self.left()
        self._since = now if self.waiting else None

    def left(self) -> None:
        """One of those that wait does so no more."""
        self.waiting -= 1
        if not self.waiting:
            self._since = None

    @property
    def wait_s(self) -> float:
        """Seconds, by what the requests of late needed; 0.0 as long as too little is known, or nobody waits."""
        now = self._clock()
        while self._intervals and now - self._intervals[0][0] > _OF_LATE_S:
            self._intervals.popleft()
        if len(self._intervals) < _LEAST_SAMPLES or not self.waiting:
            return 0.0
        mean_s = sum(seconds for _, seconds in self._intervals) / len(self._intervals)
        return (self.waiting + 1) * mean_s
