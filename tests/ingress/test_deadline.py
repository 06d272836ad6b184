"""The header that says how much time a request has."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from expertmesh.deployments.ingress.deadline import HEADER, LONGEST_S, Deadlines, current_call, left_s, timeout_of
from expertmesh.deployments.ingress.responses import HonestResponses


async def ask(**headers: str) -> httpx.Response:
    app = FastAPI()
    app.add_middleware(HonestResponses)
    app.add_middleware(Deadlines)

    @app.get("/left")
    async def left() -> float | None:
        return left_s()

    @app.get("/full")
    async def full() -> JSONResponse:
        call = current_call.get()
        assert call is not None
        call.retry_after_s = 6.2
        return JSONResponse({}, 429)

    path = headers.pop("path", "/left")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        return await client.get(path, headers=headers)


async def test_a_request_without_it_has_all_the_time() -> None:
    assert (await ask()).json() is None
    assert left_s() is None, "nor has what is no request"


async def test_what_is_left_is_known_everywhere() -> None:
    assert 0 < (await ask(**{HEADER: "12.5"})).json() <= 12.5


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf", "1e9", "", "1,5", "9" * 500])
async def test_what_is_no_time_is_refused(text: str) -> None:
    answer = await ask(**{HEADER: text})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == 400
    assert error["message"].startswith(HEADER)
    assert "allowed: seconds" in error["message"]
    assert len(error["message"]) < 200


def test_a_week_is_the_most() -> None:
    assert timeout_of(str(LONGEST_S)) == LONGEST_S


async def test_a_refusal_says_when_to_come_again() -> None:
    answer = await ask(path="/full")
    assert answer.headers["retry-after"] == "7"
