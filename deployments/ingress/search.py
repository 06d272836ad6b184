"""How long and how often a request looks for a replica: pure bookkeeping, the clock is the caller's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError

from expertmesh.deployments.ingress.attempt import NotTaken, QueuesFull, ReplicaLost

MAX_DEATHS = 3
"""A request that loses this many replicas without a new token in between may be what kills them."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long requests wait, in seconds."""

    replica_s: float
    """For a replica that takes them: at the start, and again each time that they lost theirs."""
    inactivity_s: float
    """For a sign of life of the replica that runs them."""


class Search:
    """One request's search for replicas, from its first attempt to its last."""

    def __init__(self, patience: Patience, clock: Callable[[], float]) -> None:
        self._patience = patience
        self._clock = clock
        self._since = clock()
        self._refusals = self._deaths = 0
        self._was_taken = False

    @property
    def left_s(self) -> float:
        """Time that is left to find a replica; 0 when there is none."""
        return max(0.0, self._since + self._patience.replica_s - self._clock())

    def taken(self) -> None:
        """A replica has taken the request."""
        self._was_taken = True
        self._refusals = 0

    def progressed(self) -> None:
        """The request got a new token."""
        self._deaths = 0

    def lost(self, error: ReplicaLost) -> None:
        """The replica that ran it is gone: the search begins anew. GracefulHTTPError if that happens too often."""
        self._deaths += 1
        self._since = self._clock()
        if self._deaths == MAX_DEATHS:
            raise GracefulHTTPError(
                f"{MAX_DEATHS} attention replicas in a row were lost while they ran this request; the last: {error}",
                HTTPStatus.INTERNAL_SERVER_ERROR,
            ) from error

    def refused(self, error: NotTaken) -> float:
        """No replica took it: seconds to wait before the next attempt.

        Raises GracefulHTTPError: 429 if the queues are full and the request has not begun anywhere, 503 if its time is
        up.
        """
        if isinstance(error, QueuesFull) and not self._was_taken:
            raise GracefulHTTPError("as many requests as may are waiting; try again", HTTPStatus.TOO_MANY_REQUESTS)
        pause_s: float = min(_FIRST_PAUSE_S * 2.0 ** min(self._refusals, 10), _LONGEST_PAUSE_S)
        self._refusals += 1
        if pause_s >= self.left_s:
            raise GracefulHTTPError(
                f"no attention replica took the request in {self._patience.replica_s:g} s: {error}",
                HTTPStatus.SERVICE_UNAVAILABLE,
            ) from error
        return pause_s
