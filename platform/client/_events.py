"""Following the mesh's timeline: what to ask for next and when, without the asking."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator

from openai import AsyncStream, Stream, Timeout
from openai._types import RequestOptions

from expertmesh.errors import ExpertMeshError, Unavailable
from expertmesh.platform.client._models import MeshEvent

SILENCE_S = 30.0
"""A stream without a byte for this long is dead: the mesh says something every 5 s."""
_FIRST_DELAY_S, _MOST_DELAY_S = 0.25, 5.0


class EventStream(Stream[str]):
    """The data of each server-sent event. OpenAI's own stream takes what has none, like a heartbeat, for an event."""

    def __stream__(self) -> Iterator[str]:
        try:
            for event in self._iter_events():
                if event.data:
                    yield event.data
        finally:
            self.response.close()


class AsyncEventStream(AsyncStream[str]):
    """`EventStream` for asyncio."""

    async def __stream__(self) -> AsyncIterator[str]:
        try:
            async for event in self._iter_events():
                if event.data:
                    yield event.data
        finally:
            await self.response.aclose()


class Following:
    """Where a reader of the timeline is: the newest event that it had, and how long the mesh has been away."""

    def __init__(
        self,
        after: int | None,
        patience_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        *,
        follow: bool = True,
    ) -> None:
        """after: id of the newest event that is known; patience_s: how long a mesh that was there may be away;
        follow: whether the mesh is to go on after the events that it has kept."""
        self._follow = follow
        self._after = 0 if after is None else after
        self._patience_s = patience_s
        self._clock = clock
        self._away_since: float | None = None
        self._delay_s = _FIRST_DELAY_S
        self._was_there = False

    def options(self, timeout: float | Timeout | None) -> RequestOptions:
        """Of the next request; timeout: the client's, which counts for connecting only."""
        connect_s = timeout.connect if isinstance(timeout, Timeout) else timeout
        headers = {"Accept": "text/event-stream"}
        limits = Timeout(SILENCE_S, connect=min(SILENCE_S, connect_s or SILENCE_S))
        query = {"after": self._after, "follow": self._follow}
        return {"params": query, "headers": headers, "timeout": limits, "max_retries": 0}

    def answered(self, url: str, content_type: str) -> None:
        """Something answers at `url`. Raises ExpertMeshError if these are no events."""
        if not content_type.startswith("text/event-stream"):
            raise ExpertMeshError(
                f"{url} answered {content_type or 'nothing'} instead of events: no ExpertMesh ingress"
            )
        self._was_there = True
        self._away_since, self._delay_s = None, _FIRST_DELAY_S

    def take(self, event: MeshEvent) -> MeshEvent:
        """An event has come; it will not be asked for again."""
        self._after = event.id
        return event

    def delay_s(self, failure: Unavailable | None) -> float:
        """Seconds to wait before asking again, after a stream that ended, or that failed.

        Raises the failure if the mesh was never there, or is away for longer than patience allows.
        """
        now = self._clock()
        if failure is None:
            return _FIRST_DELAY_S
        if not self._was_there:
            raise failure
        self._away_since = now if self._away_since is None else self._away_since
        if self._patience_s is not None and now - self._away_since >= self._patience_s:
            raise failure
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, _MOST_DELAY_S)
        return delay_s
