"""Three ways to the same engine: called in its process, vLLM's own API server, and the mesh's ingress."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from benchmarks.bare import engine_environment
from benchmarks.http_load import Run, closed_loop, over_http
from benchmarks.timing import free_port
from expertmesh.platform.config import MeshConfig, load_config

MODEL = "gateway"
_START_S = 300.0


def mesh_config(folder: Path, port: int, telemetry: Mapping[str, Any], proxy: str = "serve") -> MeshConfig:
    """One colocated replica, so that the engine is vLLM's own and what is before it is all that differs."""
    return load_config(
        {
            "model": {"source": str(folder), "served_name": MODEL, "dtype": "float32", "max_model_len": 512},
            "ingress": {"port": port, "proxy": proxy},
            "attention": {"kv_cache_gib": 0.25, "max_num_seqs": 64, "prefix_caching": False},
            "experts": {"mode": "colocated"},
            "telemetry": dict(telemetry),
        }
    )


def _engine_arguments(folder: Path) -> dict[str, Any]:
    """The very arguments of the mesh's engine."""
    from expertmesh.deployments.attention.engine import engine_arguments

    return engine_arguments(mesh_config(folder, 8000, {}), folder, None)


class MeshSide:
    """The whole application; to be run by a Worker."""

    def __init__(self, folder: Path, telemetry: Mapping[str, Any], proxy: str) -> None:
        engine_environment(1)
        from expertmesh.deployments.local import LocalMesh

        self._mesh = LocalMesh(mesh_config(folder, free_port(), telemetry, proxy)).start()

    def url(self) -> str:
        """Where it answers."""
        return self._mesh.url

    def close(self) -> None:
        """Ends it."""
        self._mesh.close()


class DirectSide:
    """vLLM's AsyncLLM, called in its own process; to be run by a Worker."""

    def __init__(self, folder: Path) -> None:
        engine_environment(1)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._runner = asyncio.Runner()
        arguments = AsyncEngineArgs(**_engine_arguments(folder))

        async def start() -> Any:
            return AsyncLLM.from_engine_args(arguments)

        self._engine = self._runner.run(start())
        self._requests = 0

    def drive(self, prompts: Sequence[Sequence[int]], clients: int, tokens: int, stream: bool, seconds: float) -> Run:
        """As benchmarks.http_load.over_http."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=kind)

        async def ask(prompt: Sequence[int]) -> tuple[float, float]:
            self._requests += 1
            first = last = 0.0
            async for _ in self._engine.generate(
                {"prompt_token_ids": list(prompt)}, params.clone(), f"r{self._requests}"
            ):
                last = time.perf_counter()
                first = first or last
            return first, last

        return self._runner.run(closed_loop(ask, prompts, clients, tokens, seconds))

    def close(self) -> None:
        """Ends the engine."""
        self._engine.shutdown()
        self._runner.close()


class VllmServer:
    """vLLM's own API server with the mesh's engine arguments, in a process."""

    def __init__(self, folder: Path, log: Path) -> None:
        """Starts it; `wait` returns when it serves. log: file for what it says."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        flags = ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
        for name, value in _engine_arguments(folder).items():
            flags += _flag(name, value)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                       "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
                       "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> Self:
        """Raises RuntimeError with the end of its log if it does not come."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError(f"vLLM's server did not start: {self._log.read_text()[-3000:]}")

    def drive(self, prompts: Sequence[Sequence[int]], clients: int, tokens: int, stream: bool, seconds: float) -> Run:
        """As benchmarks.http_load.over_http."""
        return over_http(self.url, MODEL, prompts, clients, tokens, stream, seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]
