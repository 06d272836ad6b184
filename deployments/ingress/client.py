"""vLLM's AsyncLLM without an engine: rendering, validation, detokenising and log-probabilities stay vLLM's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.renderers import renderer_from_config
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor

from expertmesh.deployments.ingress.core import RemoteCore


class MeshEngineClient(AsyncLLM):
    """What vLLM's OpenAI layer calls. `healthy` tells whether the mesh can answer."""

    def __init__(self, config: VllmConfig, core: RemoteCore, healthy: Callable[[], Awaitable[bool]]) -> None:
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
