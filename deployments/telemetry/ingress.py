"""What an ingress records: how requests end, and the times that clients see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError

from expertmesh.deployments.ingress.access_rules import PUBLIC, path_of
from expertmesh.deployments.telemetry.recorder import Recorder, SilentRecorder
from expertmesh.platform.metrics import catalogue as series

_ROUTES = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_OUTCOMES: dict[int, str] = {
    HTTPStatus.TOO_MANY_REQUESTS: "limited",
    HTTPStatus.SERVICE_UNAVAILABLE: "unavailable",
    HTTPStatus.GATEWAY_TIMEOUT: "late",
}
_MAX_ITL_A_SECOND = 100
"""Ray's agent handles a histogram's observations one by one."""


class IngressMetrics:
    """Records for one ingress replica. Used by one thread."""

    def __init__(
        self, recorder: Recorder | None = None, replica: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        """recorder: None records nothing; clock: in seconds."""
        self.recorder = SilentRecorder() if recorder is None else recorder
        self.replica = replica
        self.clock = clock
        self.tokens = 0
        """Generated so far: counted here, since Ray's counter costs microseconds for each."""
        self._itl_second = self._itl_observed = 0

    def request(self) -> RequestMeter:
        """A generation begins."""
        return RequestMeter(self)

    def ended(self, error: BaseException | None) -> None:
        """A generation ended; error: why it did not end well."""
        if error is None:
            outcome = "ok"
        elif isinstance(error, asyncio.CancelledError):
            outcome = "cancelled"
        elif isinstance(error, GracefulHTTPError):
            outcome = _OUTCOMES.get(error.http_status, "failed")
        else:
            outcome = "failed"
        self.recorder.count(series.SEQUENCES, outcome=outcome)

    def answered(self, route: str, status: int | None) -> None:
        """An HTTP request ended; status: None if the client left before the end."""
        if status is None:
            outcome = "cancelled"
        elif status < HTTPStatus.BAD_REQUEST:
            outcome = "ok"
        else:
            outcome = _OUTCOMES.get(status, "invalid" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "failed")
        self.recorder.count(series.REQUESTS, route=route, outcome=outcome)

    def publish(self, in_progress: int) -> None:
        """Sets the gauge of generations under way, and counts on to the tokens so far."""
        self.recorder.set(series.IN_PROGRESS, in_progress, replica=self.replica)
        self.recorder.count_to(series.GENERATED_TOKENS, self.tokens)

    def between_tokens(self, seconds: float, now: float) -> None:
        """Observes an inter-token latency, unless there were many in this second."""
        if int(now) != self._itl_second:
            self._itl_second, self._itl_observed = int(now), 0
        if self._itl_observed < _MAX_ITL_A_SECOND:
            self._itl_observed += 1
            self.recorder.observe(series.ITL, seconds)


class RequestMeter:
    """Follows one generation from its arrival to its end."""

    def __init__(self, metrics: IngressMetrics) -> None:
        self._metrics = metrics
        self._began = metrics.clock()
        self._picked_up = False
        self._last: float | None = None
        """When the newest token came."""

    def picked_up(self) -> None:
        """A replica has taken it; only the first time counts."""
        if not self._picked_up:
            self._picked_up = True
            self._metrics.recorder.observe(series.PICKUP, self._metrics.clock() - self._began)

    def tokens(self, count: int) -> None:
        """So many tokens came together."""
        if not count:
            return
        now, last = self._metrics.clock(), self._last
        self._last = now
        self._metrics.tokens += count
        if last is None:
            self._metrics.recorder.observe(series.TTFT, now - self._began)
        else:
            self._metrics.between_tokens((now - last) / count, now)

    def lost(self, way: str) -> None:
        """Its replica was lost; way: how it goes on (`Way`, or `restart`)."""
        self._metrics.recorder.count(series.REQUEST_FAILOVERS, way=way)

    def ended(self, error: BaseException | None) -> None:
        """It ended; error: why it did not end well."""
        self._metrics.ended(error)
        if self._last is not None:
            self._metrics.recorder.observe(series.DURATION, self._metrics.clock() - self._began)


class OutcomeMiddleware:
    """ASGI middleware around all others: counts how each HTTP request for inference ended."""

    def __init__(self, app: ASGIApp, metrics: IngressMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        route = _route_of(scope)
        if route is None:
            await self._app(scope, receive, send)
            return
        status: int | None = None
        complete = False

        async def watched(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            if not complete:
                status, complete = HTTPStatus.INTERNAL_SERVER_ERROR, True
            raise
        finally:
            self._metrics.answered(route, status if complete else None)


def _route_of(scope: Scope) -> str | None:
    """None for what is no inference."""
    if scope["type"] != "http":
        return None
    path = path_of(scope)
    if path in PUBLIC or path == "/mesh" or path.startswith("/mesh/"):
        return None
    return _ROUTES.get(path, "other")
