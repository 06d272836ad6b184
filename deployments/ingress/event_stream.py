"""GET /mesh/events: the controller's timeline as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response, StreamingResponse
from fastapi.sse import format_sse_event
from ray.serve.handle import DeploymentHandle

from expertmesh.deployments.ingress.admin import away

_HEARTBEAT_S = 5.0
"""A comment comes at least this often, so that both ends notice when the other is gone."""
_FIRST_S = 5.0
"""In which the controller must answer at first."""
_LIFE_S = 300.0
"""A stream ends after this long and is asked for again: by a key that still counts, at an ingress that is to stay."""
_RETRY_MS = 1000
_MOST = 2**53
"""What a page can hold as a number."""

EventId = Annotated[int, Query(ge=0, le=_MOST)]
LastEventId = Annotated[int | None, Header(alias="Last-Event-ID", ge=0, le=_MOST)]


def event_routes(
    controller: DeploymentHandle[Any], heartbeat_s: float = _HEARTBEAT_S, life_s: float = _LIFE_S
) -> APIRouter:
    """/mesh/events; 503 while the controller is away. life_s: how long a stream lasts."""
    router = APIRouter(prefix="/mesh", tags=["mesh"])

    async def ask(after: int, wait_s: float, timeout_s: float) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = await asyncio.wait_for(controller.events.remote(after, wait_s), timeout_s)
        return told

    async def stream(first: list[dict[str, Any]], after: int, follow: bool) -> AsyncIterator[bytes]:
        yield format_sse_event(retry=_RETRY_MS)
        end, told = time.monotonic() + life_s, first
        while True:
            for event in told:
                after = event["id"]
                yield format_sse_event(data_str=json.dumps(event), id=str(after))
            if not told:
                yield format_sse_event(comment="still here")
            if not follow or time.monotonic() > end:
                return
            try:
                told = await ask(after, heartbeat_s, heartbeat_s + _FIRST_S)
            except Exception:  # the controller has gone away: whoever listens comes back
                return

    @router.get("/events", response_class=StreamingResponse, responses={200: {"content": {"text/event-stream": {}}}})
    async def events(after: EventId = 0, last_event_id: LastEventId = None, follow: bool = True) -> Response:
        """What happens, as server-sent events: those with ids above `after` (or the header Last-Event-ID) that are
        kept, then, unless `follow` is false, each as it comes. `data` is JSON: id, at, kind, text, about."""
        known = after if last_event_id is None else last_event_id
        try:
            first = await ask(known, 0.0, _FIRST_S)
        except Exception:
            return away()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream(first, known, follow), media_type="text/event-stream", headers=headers)

    return router
