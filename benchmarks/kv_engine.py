"""Engines over the KV store, for its benchmark and its tests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.bare import Worker, engine_arguments, engine_environment
from expertmesh.kv_store import StoreLimits, StoreSettings
from expertmesh.kv_store.tier import TierSettings
from expertmesh.kv_store.tier import engine_arguments as tier_arguments
from expertmesh.routing.vllm_plugin import CPU_EXECUTOR

SECRET = "of the engines that share blocks"
WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class Reply:
    """What an engine said to one prompt."""

    tokens: tuple[int, ...]
    cached: int
    """Tokens of the prompt that were not computed."""
    seconds: float
    """From sending it until its last token."""
    finish: str | None


class KVEngineHost:
    """One engine after the other in a process; to be run by a Worker.

    core_apart: the engine core has a process of its own, as when it serves. Together with it, one engine after the
    first starts in a few seconds.
    """

    def __init__(self, threads: int, core_apart: bool) -> None:
        engine_environment(threads)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(core_apart))
        self._llm: Any = None

    def start(self, arguments: dict[str, Any]) -> None:
        """Starts an engine; one that runs is ended."""
        from vllm import LLM

        self.close()
        self._llm = LLM(distributed_executor_backend=CPU_EXECUTOR, **arguments)

    def reply(self, prompt: Sequence[int], max_tokens: int, salt: str | None = None) -> Reply:
        """The greedy answer of exactly `max_tokens` tokens; `salt` is the tenant."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        request: dict[str, Any] = {"prompt_token_ids": list(prompt)}
        if salt is not None:
            request["cache_salt"] = salt
        begin = time.perf_counter()
        (output,) = self._llm.generate([request], sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        answer = output.outputs[0]
        return Reply(tuple(answer.token_ids), output.num_cached_tokens or 0, seconds, answer.finish_reason)

    def forget(self) -> bool:
        """Empties the engine's own caches, so that only the store is left."""
        return bool(self._llm.reset_prefix_cache(reset_connector=True))

    def close(self) -> None:
        """Ends the engine."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        cleanup_dist_env_and_memory()


class Engines:
    """A process that runs one engine after the other. Use as a context manager."""

    def __init__(self, scratch: Path, core_apart: bool = False, threads: int = 1) -> None:
        self._scratch = scratch
        self._worker = Worker(KVEngineHost, threads, core_apart)
        self._started = 0
        self._report_file = scratch

    def start(
        self,
        folder: Path,
        server: StoreSettings | None = None,
        *,
        limits: StoreLimits | None = None,
        weights: str = WEIGHTS,
        host_bytes: int = 128 << 20,
        **changes: Any,
    ) -> None:
        """Ends the engine that runs and starts one of this model, over a store unless `server` is None.

        changes: to the engine's arguments.
        """
        self._started += 1
        arguments = engine_arguments(folder, **{"enable_prefix_caching": server is not None, **changes})
        if server is not None:
            self._report_file = self._scratch / f"{self._started}.json"
            settings_file = self._scratch / f"{self._started}.settings"
            TierSettings(server, limits or StoreLimits(), SECRET, weights, self._report_file).save(settings_file)
            arguments |= tier_arguments(settings_file, host_bytes)
        self._worker.ask("start", arguments)

    def reply(self, prompt: Sequence[int], max_tokens: int, salt: str | None = None) -> Reply:
        """See KVEngineHost."""
        answer: Reply = self._worker.ask("reply", prompt, max_tokens, salt)
        return answer

    def forget(self) -> None:
        """See KVEngineHost."""
        assert self._worker.ask("forget")

    def counts(self) -> dict[str, int]:
        """What the store did so far, as of half a second ago; BlockStore.counts."""
        return dict(self._report().get("counts", {}))

    def breakers(self) -> list[str]:
        """The states of the servers' circuit breakers, as of half a second ago."""
        return [server["state"] for server in self._report().get("servers", [])]

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _report(self) -> dict[str, Any]:
        return dict(json.loads(self._report_file.read_text())) if self._report_file.is_file() else {}
