"""From the config to a vLLM engine core, and its outputs split by request."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from expertmesh.platform.config import MeshConfig
from expertmesh.routing.vllm_plugin import CPU_EXECUTOR, LOAD_FORMAT, MeshSettings


def engine_arguments(config: MeshConfig, folder: Path, mesh: MeshSettings | None) -> dict[str, Any]:
    """vLLM's engine arguments for this config; `mesh` None serves the experts in the engine itself."""
    attention = config.attention
    arguments: dict[str, Any] = {
        "model": str(folder),
        "served_model_name": config.model.name,
        "dtype": config.model.engine_dtype,
        "max_model_len": config.model.max_model_len,
        "enforce_eager": not attention.compile,
        "max_num_seqs": attention.max_num_seqs,
        "max_num_batched_tokens": attention.max_num_batched_tokens,
        "enable_prefix_caching": attention.prefix_caching,
        "disable_log_stats": True,
    }
    kv_cache_gib = attention.kv_cache_gib
    if kv_cache_gib is None and current_platform.is_cpu():
        kv_cache_gib = 1.0
    if kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    if current_platform.is_cpu():
        arguments["distributed_executor_backend"] = CPU_EXECUTOR
    if mesh is not None:
        arguments["load_format"] = LOAD_FORMAT
        arguments["additional_config"] = mesh.to_additional_config()
    return {**arguments, **attention.engine_args}


class Engine:
    """A vLLM engine core in a process of its own: requests in, their outputs out, no text anywhere."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Starts the process and waits until it serves (25 to 60 s on CPU): not for an event loop's thread."""
        self.config: VllmConfig = AsyncEngineArgs(**arguments).create_engine_config()
        self._core: Any = EngineCoreClient.make_async_mp_client(
            self.config, Executor.get_class(self.config), log_stats=False
        )
        self._streams: dict[str, asyncio.Queue[EngineCoreOutput | BaseException]] = {}
        self._pump: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    @property
    def running(self) -> int:
        """Requests that are not finished."""
        return len(self._streams)

    @property
    def pids(self) -> list[int]:
        """The engine's processes."""
        return [process.pid for process in self._core.resources.engine_manager.processes]

    def check(self) -> None:
        """Raises EngineDeadError if the engine's process is gone."""
        if self._failure is not None or self._core.resources.engine_dead:
            raise EngineDeadError from self._failure

    async def generate(self, request: EngineCoreRequest) -> AsyncIterator[list[EngineCoreOutput]]:
        """The outputs of one request, those that wait together in one list; aborts it if the caller stops early.

        Raises EngineDeadError if the engine dies on the way.
        """
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._distribute())
        self.check()
        request = copy.copy(request)
        stream = self._streams[request.request_id] = asyncio.Queue()
        finished = False
        try:
            await self._core.add_request_async(request)
            while not finished:
                outputs = [await stream.get()]
                while not stream.empty():
                    outputs.append(stream.get_nowait())
                ready: list[EngineCoreOutput] = []
                for output in outputs:
                    if isinstance(output, BaseException):
                        raise EngineDeadError from output
                    ready.append(output)
                    finished = finished or output.finish_reason is not None
                yield ready
        finally:
            self._streams.pop(request.request_id, None)
            if not finished and self._failure is None:
                await self._core.abort_requests_async([request.request_id])

    async def _distribute(self) -> None:
        try:
            while True:
                for output in (await self._core.get_output_async()).outputs:
                    if (stream := self._streams.get(output.request_id)) is not None:
                        stream.put_nowait(output)
        except Exception as error:  # any end of the engine is told to every stream
            self._failure = error
            for stream in self._streams.values():
                stream.put_nowait(error)

    def shutdown(self) -> None:
        """Ends the engine's processes."""
        if self._pump is not None:
            self._pump.cancel()
        self._core.shutdown()
