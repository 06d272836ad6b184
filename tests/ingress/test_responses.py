"""The heads of answers: a status for streams that fail at once, and when to try again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse

from expertmesh.deployments.ingress.responses import HonestResponses

ERROR = b'data: {"error": {"message": "busy", "type": "t", "param": null, "code": %d}}\n\n'
TOKEN, DONE = b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"


async def streamed(*chunks: bytes, media_type: str = "text/event-stream") -> httpx.Response:
    """What a client gets of a response with these chunks."""

    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    return await answered(StreamingResponse(body(), media_type=media_type))


async def answered(response: Any) -> httpx.Response:
    app = FastAPI()
    app.add_middleware(HonestResponses)
    app.add_api_route("/", lambda: response)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        return await client.get("/")


@pytest.mark.parametrize("chunks", [(TOKEN, DONE), (TOKEN, ERROR % 503, DONE), (b"", TOKEN), ()])
async def test_streams_that_began_are_left_alone(chunks: Iterable[bytes]) -> None:
    answer = await streamed(*chunks)
    assert answer.status_code == 200
    assert answer.content == b"".join(chunks)
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize(("code", "waits"), [(429, True), (503, True), (500, False), (400, False)])
async def test_a_stream_that_fails_at_once_has_a_status(code: int, waits: bool) -> None:
    answer = await streamed(ERROR % code, DONE)
    assert answer.status_code == code
    assert answer.json() == {"error": {"message": "busy", "type": "t", "param": None, "code": code}}
    assert ("retry-after" in answer.headers) == waits


async def test_what_only_looks_like_an_error_is_passed_on() -> None:
    assert (await streamed(ERROR % 7, DONE)).content == ERROR % 7 + DONE
    assert (await streamed(ERROR % 503, media_type="text/plain")).content == ERROR % 503


@pytest.mark.parametrize(("given", "wanted"), [({}, "2"), ({"Retry-After": "30"}, "30")])
async def test_refusals_say_when_to_come_back(given: dict[str, str], wanted: str) -> None:
    answer = await answered(JSONResponse({}, 503, given))
    assert answer.headers.get_list("retry-after") == [wanted]
