"""How much time a client gives its request, and when one that is refused may come again.

`X-Request-Timeout: SECONDS` counts from the request's arrival to its last token. A request that would not have its
first token in time is refused at once; one whose time is up ends, at its replica too, so that the shards compute
nothing for it from the next step on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from expertmesh.deployments.ingress.errors import refusal

HEADER = "X-Request-Timeout"
LONGEST_S = 7 * 86400.0


@dataclass(slots=True)
class Call:
    """One HTTP request. An object and no plain values: the tasks that answer it have copies of its context."""

    deadline: float | None = None
    """By the clock of the loop that serves it (`time.monotonic`); None: there is none."""
    retry_after_s: float | None = None
    """Set where it is refused because there is too much to do."""


current_call: ContextVar[Call | None] = ContextVar("call", default=None)
"""The request at hand."""


def left_s(clock: Callable[[], float] = time.monotonic) -> float | None:
    """Seconds that the request at hand has left; None if it has no deadline."""
    call = current_call.get()
    return None if call is None or call.deadline is None else call.deadline - clock()


def timeout_of(text: str) -> float:
    """The header's seconds. Raises ValueError with what is allowed."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_S:
        raise ValueError(f"{HEADER}: {text[:40]!r}; allowed: seconds, more than 0 and at most {LONGEST_S:.0f}")
    return seconds


class Deadlines:
    """ASGI middleware: gives each request its `Call`; 400 if the header makes no sense."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = Call()
        if (text := Headers(scope=scope).get(HEADER)) is not None:
            try:
                call.deadline = time.monotonic() + timeout_of(text)
            except ValueError as error:
                await refusal(400, str(error))(scope, receive, send)
                return
        before = current_call.set(call)
        try:
            await self._app(scope, receive, send)
        finally:
            current_call.reset(before)
