"""A request that there is no room for is refused before its body is read."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError

from expertmesh.deployments.ingress.admission import Admission
from expertmesh.deployments.ingress.deadline import Deadlines, current_call
from expertmesh.deployments.ingress.responses import HonestResponses

COMPLETIONS = "/v1/completions"


async def inner(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


def refuse(status: HTTPStatus) -> Any:
    def check() -> None:
        call = current_call.get()
        assert call is not None
        call.retry_after_s = 6.2
        raise GracefulHTTPError("too much to do; try again", status)

    return check


async def ask(check: Any, method: str = "POST", path: str = COMPLETIONS) -> tuple[int, dict[bytes, bytes], bytes]:
    async def receive() -> Message:
        raise AssertionError("the body was asked for")

    sent: list[Any] = []

    async def send(message: Message) -> None:
        sent.append(message)

    app = Deadlines(HonestResponses(Admission(inner, check)))
    await app({"type": "http", "method": method, "path": path, "headers": []}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message["body"] for message in sent[1:])


@pytest.mark.parametrize("status", [HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.GATEWAY_TIMEOUT])
async def test_what_there_is_no_room_for_is_refused_unread(status: HTTPStatus) -> None:
    answered, headers, body = await ask(refuse(status))
    assert answered == status
    assert b"too much to do" in body
    assert (headers.get(b"retry-after") == b"7") == (status == HTTPStatus.TOO_MANY_REQUESTS)


@pytest.mark.parametrize(("method", "path"), [("GET", COMPLETIONS), ("POST", "/tokenize"), ("GET", "/mesh/status")])
async def test_what_takes_no_engine_goes_in(method: str, path: str) -> None:
    assert (await ask(refuse(HTTPStatus.TOO_MANY_REQUESTS), method, path))[0] == 200


async def test_what_there_is_room_for_goes_in() -> None:
    assert (await ask(lambda: None))[2] == b"in"
