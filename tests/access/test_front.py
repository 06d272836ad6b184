"""vLLM's own OpenAI layer behind the walls, down to the engine's request; only the replica behind it is scripted."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from expertmesh.platform.config import load_config
from tests.access.test_keys import make, write
from tests.access.test_walls import served
from tests.support.calls import calls_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray uses pydantic in a way that pydantic gives up
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

    from expertmesh.deployments.ingress.app import openai_app
    from expertmesh.deployments.ingress.continuation import Engines
    from expertmesh.deployments.ingress.search import Patience
    from expertmesh.deployments.ingress.tenant import TenantCore, salt_for

MODEL = "qwen3_moe"
_MADE = [make("a", tenant="blue"), make("b", tenant="blue"), make("c", tenant="red")]
_KEYS = [token for token, _ in _MADE]


class Replica:
    """In place of a Serve handle: notes each request and answers it with one token."""

    def __init__(self) -> None:
        self.requests: list[EngineCoreRequest] = []

    def remote(self, request: EngineCoreRequest) -> Stream:
        """As a handle's."""
        self.requests.append(request)
        return Stream(request)

    def salts(self) -> list[str | None]:
        """Of the requests since the last call."""
        salts = [request.cache_salt for request in self.requests]
        self.requests.clear()
        return salts


class Stream:
    """The outputs of one request."""

    def __init__(self, request: EngineCoreRequest) -> None:
        finished = EngineCoreOutput(request.request_id, new_token_ids=[5], finish_reason=FinishReason.LENGTH)
        self._left: list[list[EngineCoreOutput]] = [[finished], []]

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[EngineCoreOutput]:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


@pytest.fixture(scope="module")
def front(family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Replica]]:
    """The ingress' application behind its walls, and the replica that it asks."""
    folder = family(MODEL)
    path = write(tmp_path_factory.mktemp("keys") / "keys.json", *(key for _, key in _MADE))
    config = load_config({"model": str(folder), "ingress": {"keys_file": str(path)}})
    replica = Replica()

    async def healthy() -> bool:
        return True

    core = TenantCore(calls_of(replica.remote), Patience(20, 20), Engines(True, stateful_processors=False))
    with served(asyncio.run(openai_app(config, folder, core, healthy))) as url:
        yield url, replica


def ask(url: str, token: str, **options: Any) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0, timeout=60) as client:
        client.completions.create(model=MODEL, prompt="hello", max_tokens=1, **options)


def chat(url: str, token: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0, timeout=60) as client:
        messages: Any = [{"role": "user", "content": "hello"}]
        for chunk in client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1, stream=True):
            assert chunk.id


def test_requests_of_a_tenant_share_a_salt_and_no_other_tenant_has_it(front: tuple[str, Replica]) -> None:
    (url, replica), (one, two, other) = front, _KEYS
    for token in (one, two, other):
        ask(url, token)
    assert replica.salts() == [salt_for("blue", None), salt_for("blue", None), salt_for("red", None)]


def test_a_salt_that_the_client_asks_for_divides_its_tenants_cache(front: tuple[str, Replica]) -> None:
    (url, replica), (one, _, other) = front, _KEYS
    for token, asked in ((one, "x"), (other, "x"), (other, salt_for("blue", None))):
        ask(url, token, extra_body={"cache_salt": asked})
    salts = replica.salts()
    assert salts[:2] == [salt_for("blue", "x"), salt_for("red", "x")]
    assert salt_for("blue", None) not in salts, "one tenant took another's salt"


def test_every_way_to_ask_has_it(front: tuple[str, Replica]) -> None:
    (url, replica), (one, _, _) = front, _KEYS
    ask(url, one, n=3)
    assert replica.salts() == [salt_for("blue", None)] * 3
    chat(url, one)
    assert replica.salts() == [salt_for("blue", None)]


_SAID: dict[str, Any] = {"type": "message", "role": "assistant", "id": "1", "status": "completed"}
UNREADABLE = [{**_SAID, "content": []}, {**_SAID, "content": [{"type": "refusal", "refusal": "no"}]}]
"""Inputs that pydantic takes and the renderer does not."""


@pytest.mark.parametrize("message", UNREADABLE)
def test_messages_that_vllm_trips_over_are_the_senders_mistake(
    front: tuple[str, Replica], message: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    url, replica = front
    sent = {"Authorization": f"Bearer {_KEYS[0]}"}
    with caplog.at_level(logging.INFO, "expertmesh.ingress"):
        answer = httpx.post(f"{url}/v1/responses", json={"model": MODEL, "input": [message]}, headers=sent, timeout=60)
    assert answer.status_code == 400, answer.text
    assert "is not understood" in answer.json()["error"]["message"]
    assert "a request can't be rendered" in caplog.messages
    assert not replica.requests


def test_routes_of_what_is_not_served_are_not_there(front: tuple[str, Replica]) -> None:
    url, _ = front
    sent = {"Authorization": f"Bearer {_KEYS[0]}"}
    for path in ("/v1/systemone", "/inference/v1/generate", "/scale_elastic_ep", "/metrics", "/load"):
        assert httpx.post(f"{url}{path}", json={}, headers=sent).status_code == 404, path
