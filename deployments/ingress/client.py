"""vLLM's AsyncLLM without an engine: rendering, validation, detokenising and log-probabilities stay vLLM's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from math import inf
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.renderers import renderer_from_config
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from expertmesh.deployments.ingress.core import RemoteCore
from expertmesh.deployments.ingress.deadline import current_call, left_s
from expertmesh.deployments.ingress.grammars import refuse_large_grammars


class MeshEngineClient(AsyncLLM):
    """What vLLM's OpenAI layer calls."""

    def __init__(
        self,
        config: VllmConfig,
        core: RemoteCore,
        healthy: Callable[[], Awaitable[bool]],
        max_requests: int,
        max_wait_s: float,
    ) -> None:
        """healthy: whether the mesh can answer; max_requests: sequences that may be unfinished at once; max_wait_s: how
        long a request may have to wait for its first token."""
        self.vllm_config = config
        self.model_config = config.model_config
        self.scheduler_config = config.scheduler_config
        self.observability_config = config.observability_config
        self.log_requests = self.log_stats = False
        self.admission_stats = None
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self.output_processor = OutputProcessor(self.renderer.tokenizer, log_stats=False)
        self.engine_core = core
        self.logger_manager = self.output_handler = self.profiler = None
        self._client_count = 1
        self._supported_tasks = ("generate",)
        self._profile_session_guard_enabled = self._profile_session_active = False
        self._healthy = healthy
        self._core = core
        self._max_requests = max_requests
        self._max_wait_s = max_wait_s
        core.tell_failures_to(self._end_with)

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *arguments: Any, **options: Any
    ) -> RequestOutputCollector:
        """Starts a request. Raises VLLMValidationError for one that can't be served."""
        refuse_large_grammars(params)
        return await super().add_request(request_id, prompt, params, *arguments, **options)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Raises GracefulHTTPError (429) if `n` more sequences are too many now, or would wait for longer than they may
        or their client's deadline allows, and 504 if that is over; VLLMValidationError if they are too many ever.

        vLLM asks before it starts a response, and once more when the request is about to begin.
        """
        if n > self._max_requests:
            raise VLLMValidationError(
                f"{n} sequences at once; ingress.max_ongoing_requests allows {self._max_requests}",
                parameter="n",
                value=n,
            )
        if self._core.running + n > self._max_requests:
            raise GracefulHTTPError(
                f"{self._core.running} requests are being worked on, and {self._max_requests} may be; try again",
                HTTPStatus.TOO_MANY_REQUESTS,
            )
        left = left_s()
        if left is not None and left <= 0:
            raise GracefulHTTPError("its time was up before it could begin", HTTPStatus.GATEWAY_TIMEOUT)
        within_s = min(self._max_wait_s, inf if left is None else left)
        if (wait_s := self._core.backlog.wait_s) > within_s:
            if (call := current_call.get()) is not None:
                call.retry_after_s = wait_s - within_s
            raise GracefulHTTPError(
                f"a first token would take about {wait_s:.1f} s, {within_s:.1f} s are allowed; try again later",
                HTTPStatus.TOO_MANY_REQUESTS,
            )

    def _end_with(self, request_id: str, error: Exception) -> None:
        """Ends a request with an error; one of several sequences takes its siblings along."""
        state = self.output_processor.request_states.get(request_id)
        if state is None or state.queue is None:  # its client has left meanwhile
            return
        state.queue.put(error)
        whole = request_id if state.parent_req is None else state.parent_req.request_id
        self._core.abort(self.output_processor.abort_requests([whole], internal=True))

    async def check_health(self) -> None:
        """Raises EngineDeadError (503 at /health) if the mesh can't answer."""
        if not await self._healthy():
            raise EngineDeadError

    @property
    def is_running(self) -> bool:
        """Always: replicas come and go behind the core."""
        return True

    @property
    def errored(self) -> bool:
        """Never: an error concerns one request."""
        return False

    async def reset_mm_cache(self) -> None:
        """Forgets multi-modal inputs on this side."""
        self.renderer.clear_mm_cache()

    async def do_log_stats(self) -> None:
        """Statistics come from the replicas."""

    def __del__(self) -> None:
        if (renderer := self.__dict__.get("renderer")) is not None:
            renderer.shutdown()

    async def collective_rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Refused: there is no engine here to run it."""
        raise NotImplementedError("the ingress has no engine; attention replicas are reached through Ray Serve")
