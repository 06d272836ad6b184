"""From the config to a vLLM engine core, and its outputs split by request."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm import AsyncEngineArgs
from vllm.config import KVTransferConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import SchedulerStats

from expertmesh.deployments.attention.known_faults import refuse_known_faults
from expertmesh.deployments.attention.known_tokens import let_force
from expertmesh.deployments.attention.tally import Serving, Tally
from expertmesh.errors import Unavailable
from expertmesh.kv_store.tier.connector import refuse_unsafe
from expertmesh.platform.config import MeshConfig
from expertmesh.routing.vllm_plugin import CPU_EXECUTOR, CPU_WORKER, LOAD_FORMAT, SCHEDULER, MeshSettings


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
        arguments["worker_cls"] = CPU_WORKER
    if mesh is not None:
        arguments["load_format"] = LOAD_FORMAT
        arguments["scheduler_cls"] = SCHEDULER
        arguments["additional_config"] = mesh.to_additional_config()
    return {**arguments, **attention.engine_args}


Take = Callable[[list[EngineCoreOutput]], None]
"""Gets outputs of one request."""

_SIGNS_OF_LIFE = 4
"""In the time after which silence is taken for death."""
_OF_LATE_S, _FIRST_TOKENS = 30.0, 256
"""What times to first token are kept for."""


class _Running:
    """A request that the engine has."""

    def __init__(self, take: Take, serving: Serving, first_tokens: deque[tuple[float, float]]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.finished = False
        """By the engine."""
        self._take = take
        self._serving = serving
        self._first_tokens = first_tokens
        self._begin = time.monotonic()
        self._has_token = False

    def got(self, output: EngineCoreOutput) -> None:
        """One of its outputs."""
        if self.ended.done():
            return
        self._serving.take(output)
        if output.new_token_ids and not self._has_token:
            self._has_token = True
            now = time.monotonic()
            self._first_tokens.append((now, now - self._begin))
        self.finished = output.finish_reason is not None
        try:
            self._take([output])
        except Exception as error:  # the one who asked wants no more
            self._end(error)
        else:
            if self.finished:
                self.ended.set_result(None)

    def died(self, error: Exception) -> None:
        """The engine is gone."""
        if not self.ended.done():
            dead = EngineDeadError()
            dead.__cause__ = error
            self._end(dead)

    def _end(self, error: Exception) -> None:
        self.ended.set_exception(error)
        self.ended.exception()  # is seen, even if nobody waits any more


class Engine:
    """A vLLM engine core in a process of its own: requests in, their outputs out, no text anywhere."""

    def __init__(
        self,
        arguments: dict[str, Any],
        inactivity_s: float,
        watch: Callable[[EngineCoreOutput], None] = lambda output: None,
    ) -> None:
        """Starts the process and waits until it serves (25 to 60 s on CPU): not for an event loop's thread.

        inactivity_s: an engine that has requests and no output for any of them for this long is taken for dead; watch:
        sees every output, and does not raise.
        """
        if (transfer := arguments.get("kv_transfer_config")) is not None:
            arguments = {**arguments, "kv_transfer_config": KVTransferConfig(**transfer)}
        self.config: VllmConfig = AsyncEngineArgs(**arguments).create_engine_config()
        refuse_known_faults(self.config)
        if transfer is not None:
            refuse_unsafe(self.config)
        let_force(self.config)
        self._inactivity_s = inactivity_s
        self._watch = watch
        self._core: Any = EngineCoreClient.make_async_mp_client(
            self.config,
            Executor.get_class(self.config),
            log_stats=True,  # its scheduler says what waits and how full its cache is
        )
        self._running: dict[str, _Running] = {}
        self._pump: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._scheduler: SchedulerStats | None = None
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=_FIRST_TOKENS)
        """When requests of late got their first token, and how long they had waited for it."""
        self.tally = Tally()
        """What it has served."""
        self._outputs = 0
        """Taken from the engine so far, for any request."""
        self._quiet_since = 0.0
        """Since when it has had requests and given no output."""
        self._hangs = False
        """A request gave up after `inactivity_s` without any output."""

    @property
    def running(self) -> int:
        """Requests that are not finished."""
        return len(self._running)

    @property
    def load(self) -> dict[str, float]:
        """What autoscaling goes by: `waiting` requests, `kv_use` (part of the KV cache, 0 to 1), and `ttft_s`, the mean
        time to first token of late, where there was any."""
        now, scheduler = time.monotonic(), self._scheduler if self._running else None
        signals = {
            "waiting": scheduler.num_waiting_reqs if scheduler is not None else 0,
            "kv_use": scheduler.kv_cache_usage if scheduler is not None else 0.0,
        }
        late = [seconds for at, seconds in self._first_tokens if now - at <= _OF_LATE_S]
        return {**signals, "ttft_s": sum(late) / len(late)} if late else signals

    @property
    def pids(self) -> list[int]:
        """The engine's processes."""
        return [process.pid for process in self._core.resources.engine_manager.processes]

    @property
    def _quiet_s(self) -> float:
        return time.monotonic() - self._quiet_since

    def check(self) -> None:
        """Raises Unavailable if the engine's process is gone or hangs."""
        if self._failure is not None or self._core.resources.engine_dead:
            raise Unavailable("the engine of this attention replica is gone") from self._failure
        if self._hangs or (self._running and self._quiet_s >= self._inactivity_s):
            raise Unavailable(f"the engine of this attention replica gave no output for {self._inactivity_s:g} s")

    async def run(self, request: EngineCoreRequest, take: Take) -> None:
        """Has the engine work on one request; returns when it is finished, and aborts it if the caller stops early.

        take: gets the request's outputs as they come. Empty lists are signs of life: the first says that the engine
        has the request, others that it works for others while this one waits. What it raises ends the request, and is
        raised here. Raises Unavailable if the engine is gone before that, and EngineDeadError if it dies on the way.
        """
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._distribute())
        self.check()
        request = copy.copy(request)
        if not self._running:
            self._quiet_since = time.monotonic()
        running = self._running[request.request_id] = _Running(take, Serving(self.tally), self._first_tokens)
        outputs_before = self._outputs
        try:
            await self._core.add_request_async(request)
            take([])
            while not running.ended.done():
                await asyncio.wait({running.ended}, timeout=self._inactivity_s / _SIGNS_OF_LIFE)
                if not running.ended.done() and self._outputs > outputs_before:
                    outputs_before = self._outputs
                    take([])
            running.ended.result()
        finally:
            self._running.pop(request.request_id, None)
            finished = running.finished
            self._hangs = self._hangs or (not finished and self._quiet_s >= self._inactivity_s)
            if not finished and self._failure is None:
                await self._core.abort_requests_async([request.request_id])

    async def _distribute(self) -> None:
        try:
            while True:
                outputs = await self._core.get_output_async()
                self._scheduler = outputs.scheduler_stats or self._scheduler
                if outputs.outputs:
                    self._outputs += len(outputs.outputs)
                    self._quiet_since = time.monotonic()
                    self._hangs = False
                for output in outputs.outputs:
                    self._watch(output)
                    if (running := self._running.get(output.request_id)) is not None:
                        running.got(output)
        except Exception as error:  # any end of the engine is told to every request
            self._failure = error
            for running in self._running.values():
                running.died(error)

    def kill(self) -> None:
        """Ends the engine's processes at once, those that are stopped or hang included."""
        for process in self._core.resources.engine_manager.processes:
            process.kill()

    def shutdown(self) -> None:
        """Ends the engine's processes."""
        if self._pump is not None:
            self._pump.cancel()
        self._core.shutdown()
