"""The engine core that vLLM's front end talks to: requests go to attention replicas, their outputs come back."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError

log = logging.getLogger("expertmesh.ingress")

_MAX_ATTEMPTS = 3


class ReplicaDied(Exception):
    """The replica that ran a request is gone, or its engine is."""


class RemoteCore:
    """Implements what AsyncLLM asks of an engine core client, over a Serve handle."""

    def __init__(self, attention: DeploymentHandle[Any], inactivity_timeout_s: float) -> None:
        self._generate = attention.options(method_name="generate", stream=True)
        self._inactivity_timeout_s = inactivity_timeout_s
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.resources = SimpleNamespace(engine_dead=False)

    @property
    def running(self) -> int:
        """Requests that are not finished."""
        return len(self._tasks)

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        """Text generation."""
        return ("generate",)

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next outputs of any request."""
        return await self._outputs.get()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Starts a request; its outputs come by `get_output_async`."""
        self._tasks[request.request_id] = asyncio.create_task(self._run(request))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Stops requests; does nothing for those that are finished."""
        for request_id in request_ids:
            if (task := self._tasks.pop(request_id, None)) is not None:
                task.cancel()

    def get_kv_event_sources(self) -> dict[str, Any]:
        """None on this side: replicas keep their own."""
        return {}

    def shutdown(self, timeout: float | None = None) -> None:
        """Stops every request."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    async def _run(self, request: EngineCoreRequest) -> None:
        """One request until its end. A replica that dies before its first token costs another attempt."""
        request_id = request.request_id
        try:
            for attempt in range(_MAX_ATTEMPTS):
                started = False
                try:
                    async for outputs in self._stream(request, attempt):
                        started = started or any(output.new_token_ids for output in outputs)
                        self._outputs.put_nowait(EngineCoreOutputs(outputs=outputs))
                    return
                except ReplicaDied as death:
                    log.warning("request %s, attempt %d: %s", request_id, attempt + 1, death)
                    if started:
                        break
            self._fail(request_id)
        except Exception:
            log.exception("request %s failed", request_id)
            self._fail(request_id)
        finally:
            self._tasks.pop(request_id, None)

    async def _stream(self, request: EngineCoreRequest, attempt: int) -> AsyncIterator[list[EngineCoreOutput]]:
        """The outputs of one attempt, under the request's own id. Raises ReplicaDied if it ends without a finish."""
        attempted = copy.copy(request)
        attempted.request_id = f"{request.request_id}-{attempt}"
        stream = cast("DeploymentResponseGenerator[Any]", self._generate.remote(attempted))
        finished = False
        try:
            while not finished:
                try:
                    outputs = await asyncio.wait_for(anext(stream), self._inactivity_timeout_s)
                except (StopAsyncIteration, TimeoutError) as end:
                    raise ReplicaDied(
                        f"no output for {self._inactivity_timeout_s:g} s"
                        if isinstance(end, TimeoutError)
                        else "stream ended early"
                    ) from None
                except Exception as error:
                    if _is_death(error):
                        raise ReplicaDied(repr(error)) from error
                    raise
                for output in outputs:
                    if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                        raise ReplicaDied(f"engine ended the request with {output.finish_reason}")
                    output.request_id = request.request_id
                    finished = finished or output.finish_reason is not None
                yield outputs
        finally:
            if not finished:
                with contextlib.suppress(Exception):  # nothing to cancel if it never started
                    stream.cancel()

    def _fail(self, request_id: str) -> None:
        output = EngineCoreOutput(request_id=request_id, new_token_ids=[], finish_reason=FinishReason.ERROR)
        self._outputs.put_nowait(EngineCoreOutputs(outputs=[output]))


def _is_death(error: Exception) -> bool:
    if isinstance(error, RayActorError | DeploymentUnavailableError | BackPressureError):
        return True
    return isinstance(error, EngineDeadError) or (
        isinstance(error, RayTaskError) and isinstance(error.cause, EngineDeadError)
    )
