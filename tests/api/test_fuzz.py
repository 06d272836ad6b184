"""The campaign in short: it finds nothing in the API, and bugs that are planted. `python -m tests.api.run` is long."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from tests.api.campaign import Campaign, Report
from tests.api.document import slices, whole
from tests.api.judge import fault
from tests.support.serving import served

MODEL = "qwen3_moe"
_LARGE = ("/v1/chat", "/v1/messages", "/v1/responses", "/v1/completions", "/tokenize", "/invocations")
"""Whole requests of these take seconds each to make up: they are asked by slices."""
_EVERY = 3


def campaign(url: str, feed: Callable[[Campaign], None]) -> Report:
    campaign = Campaign(url, start=5)
    try:
        feed(campaign)
    finally:
        campaign.close()
    return campaign.report


def test_nothing_is_found(front: tuple[str, FastAPI]) -> None:
    url, app = front
    document = app.openapi()
    small = {**document, "paths": {p: methods for p, methods in document["paths"].items() if not p.startswith(_LARGE)}}

    def feed(campaign: Campaign) -> None:
        campaign.run([whole(small, MODEL)], 8)
        campaign.run(islice(slices(document, MODEL), 0, None, _EVERY), 2)

    report = campaign(url, feed)
    assert report.findings == []
    assert report.requests > 100
    assert report.statuses[200] > 20, "requests don't get as far as the engine"
    assert report.statuses[400] > 20
    asked = set(report.by_operation)
    assert {"POST /v1/chat/completions", "POST /v1/completions", "GET /mesh/status", "POST /mesh/scale"} <= asked


class Asked(BaseModel):
    """The body of a route with a bug."""

    model: str
    temperature: float


BUGS: dict[str, Callable[[Asked], Any]] = {
    "status 500": lambda asked: JSONResponse({}, 500 if asked.temperature > 100 else 200),
    "without an error object": lambda asked: JSONResponse({}, 400 if asked.temperature > 100 else 200),
    "violates schema": lambda asked: JSONResponse({"a": "x" if asked.temperature > 100 else 1}),
}


class Said(BaseModel):
    """What it says that it answers."""

    a: int = 1


@pytest.mark.parametrize("what", BUGS)
def test_planted_bugs_are_found(what: str) -> None:
    app = FastAPI()

    @app.post("/v1/bug", response_model=Said)
    async def bug(asked: Asked) -> Any:
        return BUGS[what](asked)

    with served(app) as url:
        report = campaign(url, lambda campaign: campaign.run(slices(app.openapi(), MODEL), 40))
    assert any(what in finding["what"] for finding in report.findings), report.findings


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (503, "application/json", b'{"error": {"message": "x", "type": "y", "code": 503}}'),
        (400, "application/json", b'{"detail": "x"}'),
        (400, "application/json", b'{"error": {"message": "", "type": "y", "code": 400}}'),
        (400, "application/json", b'{"error": {"message": "x", "type": "y", "code": 404}}'),
        (418, "application/json", b'{"error": {"message": "x", "type": "y", "code": 418}}'),
        (200, "application/json", b'{"a": NaN}'),
        (200, "text/event-stream", b'data: {"choices": []}\n\ndata: {"error": {"message": "x", "code": 500}}\n\n'),
    ],
)
def test_what_is_a_fault(status: int, kind: str, body: bytes) -> None:
    assert fault(status, kind, body) is not None


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (404, "application/json", b'{"error": {"message": "x", "type": "y", "param": null, "code": 404}}'),
        (400, "application/json", b'{"type": "error", "error": {"message": "x", "type": "y"}}'),
        (200, "application/json", b""),
        (200, "text/event-stream", b'data: {"choices": []}\n\ndata: [DONE]\n\n'),
    ],
)
def test_what_is_none(status: int, kind: str, body: bytes) -> None:
    assert fault(status, kind, body) is None
