"""The ingress' outermost layer: each request's id, and the server span of those that are traced.

Plain ASGI, so that streams pass through untouched. It lies around the walls: a request that is refused has an id and
a span as well.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, format_trace_id
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertmesh.deployments.tracing.context import REQUEST_ID, TRACE_HEADERS, remote_context, sane_request_id
from expertmesh.platform.logs import RequestIds, current_request

_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/responses": "chat"}


class RequestFront:
    """Gives requests their ids and spans."""

    def __init__(
        self,
        app: ASGIApp,
        tracer: trace.Tracer | None,
        model: str,
        is_traced: Callable[[str], bool],
        routes: Callable[[], frozenset[str]],
    ) -> None:
        """tracer: None makes no spans; is_traced: whether requests for a path are; routes: the paths that there are,
        the only ones that spans name: what else a client may ask for is its own text."""
        self._app = app
        self._tracer = tracer
        self._model = model
        self._is_traced = is_traced
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        asked = headers.get(REQUEST_ID)
        request_id = sane_request_id(asked)
        if request_id != asked:
            headers[REQUEST_ID] = request_id  # vLLM names its requests by it
            send = _saying(request_id, send)  # what a client asked for Serve's proxy says itself
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._tracer is None or not self._is_traced(path):
            await self._with_id(RequestIds(request_id), scope, receive, send)
            return
        await self._traced(self._tracer, request_id, path, scope, receive, send)

    async def _with_id(self, ids: RequestIds, scope: Scope, receive: Receive, send: Send) -> None:
        token = current_request.set(ids)
        try:
            await self._app(scope, receive, send)
        finally:
            current_request.reset(token)

    async def _traced(
        self, tracer: trace.Tracer, request_id: str, path: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        parent = remote_context(Headers(scope=scope))
        # vLLM would warn that its own tracing, which is not used here, is off.
        scope = {**scope, "headers": [h for h in scope["headers"] if h[0].decode("latin-1") not in TRACE_HEADERS]}
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        route = path if path in self._routes() else None
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "url.scheme": scope.get("scheme", "http"),
            "expertmesh.request.id": request_id,
        }
        if route is not None:
            attributes |= {"http.route": route, "url.path": route}
        if route in _OPERATIONS:
            attributes |= {
                "gen_ai.operation.name": _OPERATIONS[route],
                "gen_ai.provider.name": "expertmesh",
                "gen_ai.request.model": self._model,
            }
        with tracer.start_as_current_span(
            method if route is None else f"{method} {route}",
            parent,
            SpanKind.SERVER,
            attributes,
            record_exception=False,  # its words may be anything
            set_status_on_exception=False,
        ) as span:
            ids = RequestIds(request_id, format_trace_id(span.get_span_context().trace_id))
            answer = _Answer(span, send)
            try:
                await self._with_id(ids, scope, receive, answer.send)
            except Exception as error:
                if not answer.began:  # the application's own handler is further out, and answers so
                    span.set_attribute("http.response.status_code", 500)
                fail(span, type(error).__name__)
                raise


class _Answer:
    """Notes the status of an answer in its span."""

    def __init__(self, span: Span, send: Send) -> None:
        self._span, self._send = span, send
        self.began = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.began = True
            status = message["status"]
            self._span.set_attribute("http.response.status_code", status)
            if status >= 500:
                fail(self._span, str(status))
        await self._send(message)


def fail(span: Span, kind: str) -> None:
    """Marks a span as failed. kind: an exception's class or a status, never its words."""
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def _saying(request_id: str, send: Send) -> Send:
    async def say(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)[REQUEST_ID] = request_id
        await send(message)

    return say
