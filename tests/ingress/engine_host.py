"""One real engine, asked as an attention replica's ingress asks it; to be run by a benchmarks.bare.Worker."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bare import engine_environment
from tests.support.engine_stream import stream_of

INACTIVITY_S = 6.0
CHUNK_TOKENS = 64
"""Prompts longer than this are computed in chunks."""


@dataclass(frozen=True, slots=True)
class Said:
    """What came out of the engine for one request."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    stop_reason: int | str | None


class EngineHost:
    """An engine of this project on a tiny model, and the part of the ingress that makes requests for it."""

    def __init__(self, folder: Path) -> None:
        engine_environment(1)
        from vllm.renderers import renderer_from_config
        from vllm.v1.engine.input_processor import InputProcessor

        from expertmesh.deployments.attention.engine import Engine, engine_arguments
        from expertmesh.deployments.ingress.app import front_arguments, front_config
        from expertmesh.platform.config import load_config

        attention = {"kv_cache_gib": 0.25, "max_num_batched_tokens": CHUNK_TOKENS}
        config = load_config({"model": folder, "experts": {"mode": "colocated"}, "attention": attention})
        front = front_config(front_arguments(config, folder))
        self._runner = asyncio.Runner()
        self._inputs = InputProcessor(front, renderer_from_config(front))
        self._engine = Engine(engine_arguments(config, folder, None), INACTIVITY_S)
        self._requests = 0

    def say(self, prompt: Sequence[int], params: dict[str, Any], known: Sequence[int], way: str) -> Said:
        """The whole answer without `known`, else what comes after these tokens if it goes on in this way."""
        return self._runner.run(self._say(prompt, params, known, way))

    def way(self, prompt: Sequence[int], params: dict[str, Any]) -> str:
        """How the ingress would let this request go on."""
        from expertmesh.deployments.ingress.continuation import Engines, way_of

        return way_of(self._request(prompt, params), Engines())

    def hang(self, prompt: Sequence[int]) -> tuple[str, str]:
        """Stops the engine's processes under a request: what `check` says while that waits, and once it has left.

        The engine is killed then, and gone when this returns.
        """
        return self._runner.run(self._hang(prompt))

    async def _hang(self, prompt: Sequence[int]) -> tuple[str, str]:
        for pid in self._engine.pids:
            os.kill(pid, signal.SIGSTOP)
        stream = stream_of(self._engine, self._request(prompt, {"max_tokens": 5}))
        assert await anext(stream) == []
        waiting = asyncio.ensure_future(anext(stream))
        while not (said := self._complaint()):
            assert not waiting.done()
            await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        said_later = self._complaint()
        engine = [child for child in multiprocessing.active_children() if child.pid in self._engine.pids]
        self._engine.kill()
        for process in engine:
            await asyncio.to_thread(process.join)  # a signal is sent at once; a process with gigabytes takes its time
        return said, said_later

    def _complaint(self) -> str:
        from expertmesh.errors import Unavailable

        try:
            self._engine.check()
        except Unavailable as error:
            return str(error)
        return ""

    def load(self) -> dict[str, float]:
        """What autoscaling would go by now."""
        return self._engine.load

    def load_while_it_answers(self, prompt: Sequence[int]) -> dict[str, float]:
        """The same, in the middle of an answer."""
        return self._runner.run(self._load_while_it_answers(prompt))

    async def _load_while_it_answers(self, prompt: Sequence[int]) -> dict[str, float]:
        stream = stream_of(self._engine, self._request(prompt, {"max_tokens": 20, "ignore_eos": True}))
        tokens = 0
        load: dict[str, float] = {}
        async for outputs in stream:
            tokens += sum(len(output.new_token_ids) for output in outputs)
            if tokens >= 2 and not load:
                load = self._engine.load
        return load

    def pids(self) -> list[int]:
        """The engine's processes."""
        return self._engine.pids

    async def _say(self, prompt: Sequence[int], params: dict[str, Any], known: Sequence[int], way: str) -> Said:
        from expertmesh.deployments.ingress.continuation import Unseen, Way, continued

        request = continued(self._request(prompt, params), known, Way(way))
        unseen = Unseen(known if way == Way.REGENERATE else ())
        new = [output async for outputs in stream_of(self._engine, request) for output in unseen.of(outputs)]
        logprobs = [float(o.new_logprobs.logprobs[0][0]) for o in new if o.new_logprobs is not None]
        tokens = [token for output in new for token in output.new_token_ids]
        return Said(tuple(tokens), tuple(logprobs), str(new[-1].finish_reason), new[-1].stop_reason)

    def _request(self, prompt: Sequence[int], params: dict[str, Any]) -> Any:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import StructuredOutputsParams

        params = dict(params)
        if (grammar := params.pop("structured_outputs", None)) is not None:
            params["structured_outputs"] = StructuredOutputsParams(**grammar)
        self._requests += 1
        return self._inputs.process_inputs(
            f"r{self._requests}", TokensPrompt(prompt_token_ids=list(prompt)), SamplingParams(**params), ("generate",)
        )

    def close(self) -> None:
        """Ends the engine."""
        self._engine.shutdown()
        self._runner.close()
