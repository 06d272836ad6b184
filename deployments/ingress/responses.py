"""What vLLM's OpenAI layer leaves out of its answers: the status of a stream that failed before it began, and when to
try again.

vLLM says 200 before a streaming request has its first token, and an error can then only be an event in the stream.
Here the head of an event stream waits for its first event; if that is an error, the answer is that error, as a client
that did not ask for a stream would get it.
"""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertmesh.deployments.ingress.deadline import current_call

_RETRY_AFTER_S = {HTTPStatus.TOO_MANY_REQUESTS: "1", HTTPStatus.SERVICE_UNAVAILABLE: "2"}
_ERROR_EVENT = b'data: {"error":'


class HonestResponses:
    """ASGI middleware. Adds Retry-After to answers 429 and 503, and gives streams that fail at once a status."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] == "http":
            send = _Answer(scope, receive, send).send
        await self._app(scope, receive, send)


class _Answer:
    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._head: Message | None = None
        """Of an event stream that has no event yet."""
        self._replaced = False

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            _say_when(message)
            if Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream"):
                self._head = message
                return
        elif self._head is not None:
            if not message.get("body") and message.get("more_body"):
                return
            head, self._head = self._head, None
            if (error := _error_in(message.get("body", b""))) is not None:
                self._replaced = True
                await JSONResponse({"error": error}, error["code"])(self._scope, self._receive, self._send_refusal)
                return
            await self._send(head)
        await self._send(message)

    async def _send_refusal(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            _say_when(message)
        await self._send(message)


def _error_in(event: bytes) -> dict[str, Any] | None:
    """OpenAI's error object, where the first event of a stream is one with an HTTP status."""
    if not event.startswith(_ERROR_EVENT):
        return None
    first, _, _ = event.removeprefix(b"data: ").partition(b"\n\n")
    error: dict[str, Any] = json.loads(first)["error"]
    return error if error.get("code") in set(HTTPStatus) else None


def _say_when(start: Message) -> None:
    headers = MutableHeaders(raw=start["headers"])
    if (seconds := _RETRY_AFTER_S.get(start["status"])) is not None:
        call = current_call.get()
        if call is not None and call.retry_after_s is not None:
            seconds = str(math.ceil(call.retry_after_s))
        headers.setdefault("retry-after", seconds)
