"""Circuit breaker: a server that failed is left alone for a while, then tried by a probe and not by a request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class BreakerState(Enum):
    """closed: all is well; open: nobody asks; half_open: one probe is on its way."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class CircuitBreaker:
    """Pure: `now` is the caller's clock in seconds. Not safe for concurrent use.

    A failure opens it. After `cooldown_s` one probe may go out (half-open): if it succeeds the breaker closes, else it
    stays open for twice as long, and so on up to `longest_cooldown_s`. The cooldown returns to `cooldown_s` when real
    traffic succeeds, so a server that answers probes and nothing else is asked less and less.
    """

    cooldown_s: float = 1.0
    longest_cooldown_s: float = 30.0
    state: BreakerState = BreakerState.CLOSED
    opened: int = 0
    """How often it opened."""
    _next_s: float = 0.0
    _probe_at: float = 0.0

    def allows(self) -> bool:
        """Whether a request may use the server."""
        return self.state is BreakerState.CLOSED

    def failed(self, now: float) -> None:
        """A request or the probe failed."""
        if self.state is BreakerState.OPEN:  # a request that was under way when another one failed
            return
        self._next_s = min(max(2 * self._next_s, self.cooldown_s), self.longest_cooldown_s)
        self._probe_at = now + self._next_s
        self.opened += self.state is BreakerState.CLOSED
        self.state = BreakerState.OPEN

    def succeeded(self) -> None:
        """A request succeeded. Changes nothing unless closed: the request may have been sent before the failure."""
        if self.state is BreakerState.CLOSED:
            self._next_s = 0.0

    def probe(self, now: float) -> bool:
        """Whether to probe now; if so the breaker is half-open until `failed` or `probed`."""
        if self.state is BreakerState.OPEN and now >= self._probe_at:
            self.state = BreakerState.HALF_OPEN
            return True
        return False

    def probed(self) -> None:
        """The probe succeeded."""
        if self.state is BreakerState.HALF_OPEN:
            self.state = BreakerState.CLOSED

    def probe_in_s(self, now: float) -> float | None:
        """Seconds until a probe is due, 0 if it is; None if none will be."""
        return max(self._probe_at - now, 0.0) if self.state is BreakerState.OPEN else None
