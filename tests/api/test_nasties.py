"""What people think of: every answer is right, and comes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.api.judge import fault
from tests.api.nasties import Nasty, nasties

if TYPE_CHECKING:
    from fastapi import FastAPI

MODEL = "qwen3_moe"
MOST_CHARACTERS = 256 << 10
"""Of a grammar, as in deployments/ingress/grammars.py."""
TIMEOUT_S = 60
_BY_PATH = {
    path: list(group)
    for path, group in groupby(sorted(nasties(MODEL), key=lambda nasty: nasty.path), key=lambda nasty: nasty.path)
}
_SERVED = [path for path, group in _BY_PATH.items() if len(group) > 7]


def faults(http: httpx.Client, asked: list[Nasty]) -> dict[str, str]:
    """What is wrong with the answers, by name."""
    found = {}
    for nasty in asked:
        headers = [(name, value.encode("latin-1")) for name, value in nasty.headers.items()]
        answer = http.request(nasty.method, nasty.path, content=nasty.body, headers=headers)
        body = b"" if nasty.method == "HEAD" else answer.content
        if nasty.method != "HEAD" and (
            wrong := fault(answer.status_code, answer.headers.get("content-type", ""), body)
        ):
            found[nasty.name] = wrong
    return found


@pytest.fixture
def http(front: tuple[str, FastAPI]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=front[0], timeout=TIMEOUT_S) as http:
        yield http


@pytest.mark.parametrize("path", _SERVED)
def test_no_request_makes_the_server_fail(http: httpx.Client, path: str) -> None:
    assert faults(http, _BY_PATH[path]) == {}


def test_what_is_not_served_says_so_in_openais_shape(http: httpx.Client) -> None:
    rest = [nasty for path, group in _BY_PATH.items() if path not in _SERVED for nasty in group]
    assert faults(http, rest) == {}
    answer = http.post("/v1/embeddings", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)


def test_templates_come_from_the_model_only(http: httpx.Client) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    for where in ({"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}):
        answer = http.post("/v1/chat/completions", json=chat | where)
        assert answer.status_code == 400, where
        assert "trust" in answer.json()["error"]["message"]


def test_a_long_message_costs_no_more_than_it_is_long(http: httpx.Client) -> None:
    """Its cost was the square of its length: one half as long kept the server busy for eight minutes."""
    answer = http.post("/v1/completions", json={"model": "/a" * 1_000_000, "prompt": "hello"})
    assert answer.status_code == 404
    assert len(answer.content) < 10_000


@pytest.mark.parametrize(
    "wanted",
    [
        {"regex": "a" * 300_000},
        {"choice": ["a" * 1000] * 300},
        {"json": {"enum": ["a" * 1000] * 300}},
        {"grammar": "root ::= " + '"a" ' * 70_000},
    ],
)
def test_grammars_have_a_largest_size(http: httpx.Client, wanted: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 1, "structured_outputs": wanted}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "structured_outputs"
    assert str(MOST_CHARACTERS) in answer.json()["error"]["message"]
