"""The ingress' own application on loopback: vLLM's OpenAI layer, our walls and admin routes, a real controller.

Only the engine is left out: what answers in its place says a few tokens at once, with all that was asked for beside
them, so that nothing but the front decides what comes of a request.
"""

from __future__ import annotations

import asyncio
import pickle
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from expertmesh.platform.config import load_config
from tests.support.calls import calls_of
from tests.support.key_values import Memory
from tests.support.serving import served

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray uses pydantic in a way that pydantic gives up
    import torch
    from fastapi import FastAPI
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

    from expertmesh.deployments.controller.controller import Controller
    from expertmesh.deployments.ingress.admin import admin_routes
    from expertmesh.deployments.ingress.app import openai_app
    from expertmesh.deployments.ingress.continuation import Engines
    from expertmesh.deployments.ingress.search import Patience
    from expertmesh.deployments.ingress.tenant import TenantCore

MODEL = "qwen3_moe"
VOCABULARY = 384
_SAYS = (40, 77, 301, 12)


class Engine:
    """In place of the attention deployment's handle."""

    def __init__(self) -> None:
        self.requests = 0

    def remote(self, request: EngineCoreRequest) -> Answer:
        """As a handle's: the request crosses a process boundary, so it has to survive pickling."""
        self.requests += 1
        return Answer(pickle.loads(pickle.dumps(request)))


class Answer:
    """The outputs of one request, as AttentionReplica.generate streams them."""

    def __init__(self, request: EngineCoreRequest) -> None:
        self._outputs = _outputs(request)

    def __aiter__(self) -> AsyncIterator[list[EngineCoreOutput]]:
        return self

    async def __anext__(self) -> list[EngineCoreOutput]:
        return await anext(self._outputs)


async def _outputs(request: EngineCoreRequest) -> AsyncIterator[list[EngineCoreOutput]]:
    yield []
    params = request.sampling_params
    assert params is not None
    assert params.max_tokens is not None
    said = _SAYS[: params.max_tokens]
    for i, token in enumerate(said):
        output = EngineCoreOutput(request.request_id, [token])
        if params.logprobs is not None:
            output.new_logprobs = _logprobs(token, params.logprobs)
        if i == 0 and params.prompt_logprobs is not None:
            output.new_prompt_logprobs_tensors = _prompt_logprobs(
                request.prompt_token_ids or [], params.prompt_logprobs
            )
        if i == len(said) - 1:
            output.finish_reason = FinishReason.LENGTH
        yield [output]


def _logprobs(token: int, count: int) -> LogprobsLists:
    columns = _columns(count)
    ids = np.array([[token, *range(columns - 1)]], dtype=np.int32)
    return LogprobsLists(ids, np.full((1, columns), -1.5, dtype=np.float32), np.array([1], dtype=np.int32))


def _prompt_logprobs(prompt: list[int], count: int) -> LogprobsTensors:
    rows, columns = max(0, len(prompt) - 1), _columns(count)
    ids = torch.zeros((rows, columns), dtype=torch.int32)
    ids[:, 0] = torch.tensor(prompt[1:], dtype=torch.int32)
    return LogprobsTensors(ids, torch.full((rows, columns), -1.5), torch.ones(rows, dtype=torch.int32))


def _columns(count: int) -> int:
    return 1 + (VOCABULARY if count == -1 else count)


class Handle:
    """In place of the controller's: calls its methods here."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def __getattr__(self, method: str) -> Any:
        return _Method(getattr(self._controller, method))


class _Method:
    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> Any:
        """As a handle's."""
        return self._method(*pickle.loads(pickle.dumps(arguments)))


@contextmanager
def served_front(folder: Path) -> Iterator[tuple[str, FastAPI]]:
    """Its URL, and the application."""
    config = load_config({"model": str(folder), "experts": {"shards": 2}})
    controller = Controller(config, Memory())

    async def healthy() -> bool:
        return True

    async def build() -> FastAPI:
        core = TenantCore(calls_of(Engine().remote), Patience(20, 20), Engines(True, stateful_processors=False))
        app = await openai_app(config, folder, core, healthy)
        app.include_router(admin_routes(Handle(controller)))  # type: ignore[arg-type]
        return app

    app = asyncio.run(build())
    with served(app) as url:
        yield url, app
