"""A real engine and its KV event feed, in a process of their own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.bare import engine_environment
from tests.support.engine_stream import stream_of


class EventsHost:
    """To be run by a benchmarks.bare.Worker."""

    def __init__(self, folder: Path, kv_cache_gib: float, store_url: str = "off") -> None:
        engine_environment(1)
        from expertmesh.deployments.attention.engine import Engine, engine_arguments
        from expertmesh.deployments.requests.feed import KVEventFeed
        from expertmesh.kv_store.configured import tier_arguments
        from expertmesh.platform.config import load_config

        config = load_config(
            {
                "model": {"source": str(folder), "max_model_len": 1024},
                "experts": {"mode": "colocated"},
                "attention": {"kv_cache_gib": kv_cache_gib},
                "kv_store": {"url": store_url},
            }
        )
        self._scratch = TemporaryDirectory(prefix="xm-")
        self._loop = asyncio.new_event_loop()

        async def start() -> tuple[KVEventFeed, Engine]:
            feed = KVEventFeed(Path(self._scratch.name))
            arguments = {**engine_arguments(config, folder, None), **feed.engine_arguments}
            if store_url != "off":
                arguments |= tier_arguments(config, b"secret of the cluster", "revision", Path(self._scratch.name))
            return feed, await asyncio.to_thread(Engine, arguments, 300.0)

        self._feed, self._engine = self._loop.run_until_complete(start())

    def block_tokens(self) -> int:
        """The engine's block size, as a replica tells it to routers."""
        return int(self._engine.config.cache_config.block_size)

    def run(self, tokens: list[int], salt: str | None = None) -> int:
        """Computes a prompt and one token. How many tokens the engine found in its cache."""

        async def run() -> int:
            from tests.requests.publishing import request

            cached = 0
            async for outputs in stream_of(self._engine, request(tokens, f"r{id(tokens)}", salt)):
                for output in outputs:
                    cached += output.prefill_stats.num_cached_tokens if output.prefill_stats is not None else 0
            return cached

        return self._loop.run_until_complete(run())

    def blocks(self, tokens: list[int], salt: str | None = None) -> tuple[int, ...]:
        """What the router makes of the prompt."""
        from expertmesh.deployments.requests.hashes import PromptHasher
        from tests.requests.publishing import request

        return PromptHasher(self.block_tokens())(request(tokens, salt=salt))

    def held(self, wanted: tuple[int, ...] = ()) -> set[int]:
        """The blocks that the feed says are cached, once `wanted` are among them."""

        async def held() -> set[int]:
            async with asyncio.timeout(120):
                while not set(wanted) <= self._feed._mirror.held:
                    await asyncio.sleep(0.01)
            return set(self._feed._mirror.held)

        return self._loop.run_until_complete(held())

    def in_store(self) -> set[int]:
        """The blocks that the feed says are in the KV store."""
        self._loop.run_until_complete(asyncio.sleep(0.01))  # the feed follows meanwhile
        return set(self._feed._mirror._store)

    def close(self) -> None:
        """Ends the engine."""

        async def close() -> Any:
            self._feed.close()
            self._engine.shutdown()

        self._loop.run_until_complete(close())
        self._loop.close()
        self._scratch.cleanup()
