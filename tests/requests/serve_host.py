"""Real Serve replicas without engines behind our router, in a process with a Ray of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from expertmesh.platform.config import load_config

T = TypeVar("T")

BLOCK = 16
ROOM = 3
"""Requests that a replica takes at once."""


class Gate:
    """A Ray actor: requests wait here until the test lets them go; replicas hear here what the test wants of them."""

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Event] = {}

    async def wait(self, name: str) -> None:
        """Until somebody opens it."""
        await self._open.setdefault(name, asyncio.Event()).wait()

    async def open(self, name: str) -> None:
        """Lets all go that wait for it, now or later."""
        self._open.setdefault(name, asyncio.Event()).set()


class Replica:
    """Stands for an attention replica: stores a prompt's blocks at once and says so as vLLM does, then waits."""

    async def __init__(self, mesh: dict[str, Any], folder: str) -> None:  # type: ignore[misc]  # Serve awaits it
        from expertmesh.deployments.requests.feed import KVEventFeed
        from expertmesh.deployments.runtime import mesh_secret
        from expertmesh.deployments.source import addresses_for
        from tests.requests.publishing import Publisher, stored

        config = load_config(mesh)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._feed = KVEventFeed(Path(tempfile.mkdtemp(dir=folder)))
        self._publisher = Publisher(self._feed.engine_arguments["kv_events_config"])
        while not self._feed._mirror.held:  # ZeroMQ drops what is published before the feed is connected
            self._publisher.publish(stored(range(BLOCK)))
            await asyncio.sleep(0.01)
        self._feed.serve(self._id, mesh_secret(config), addresses_for(config, f"kv-events-{self._id}"), BLOCK)
        self._gate = ray.get_actor("gate")
        self._ending = asyncio.get_running_loop().create_task(self._end_feed())

    def record_replica_metadata(self) -> dict[str, Any]:
        """As an attention replica's."""
        from expertmesh.deployments.requests.settings import metadata_of
        from expertmesh.deployments.runtime import node_id
        from expertmesh.deployments.source import Source

        return metadata_of(Source(node_id(), self._feed.addresses))

    async def _end_feed(self) -> None:
        await self._gate.wait.remote(f"end feed of {self._id}")
        self._feed.close()

    async def generate(self, request: Any) -> Any:
        """Yields this replica's id and process, and once more when the gate of the request's name is open."""
        from tests.requests.publishing import stored

        self._publisher.publish(stored(request.prompt_token_ids))
        yield self._id, os.getpid()
        await self._gate.wait.remote(request.request_id)
        yield self._id, os.getpid()


class ServeHost:
    """To be run by a benchmarks.bare.Worker."""

    def __init__(self, replicas: int, secret_file: str) -> None:
        config = load_config({"attention": {"replicas": 2}, "routing": {"secret_file": secret_file}})
        self._mesh = config.model_dump(mode="json")
        self._folder = tempfile.mkdtemp(prefix="xm-")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            _temp_dir=self._folder,
            logging_level="warning",
            log_to_driver=False,
        )
        self._gate: Any = ray.remote(num_cpus=0, max_concurrency=1000)(Gate).options(name="gate").remote()  # type: ignore[attr-defined]
        self._threads = ThreadPoolExecutor(64)
        self._choices: dict[str, Any] = {}
        self._sent: dict[str, tuple[Future[tuple[str, int]], Future[tuple[str, int]]]] = {}
        options: dict[str, Any] = {
            "request_router_class": "expertmesh.deployments.requests.router.PrefixRouter",
            "request_router_kwargs": {"mesh": self._mesh},
        }
        app = serve.deployment(
            name="attention",
            num_replicas=replicas,
            max_ongoing_requests=ROOM,
            ray_actor_options={"num_cpus": 0},
            health_check_period_s=1.0,
            graceful_shutdown_timeout_s=1.0,
            request_router_config=RequestRouterConfig(**options),
        )(Replica).bind(self._mesh, self._folder)
        handle: Any = serve.run(app, name="app", route_prefix=None)
        self._generate = handle.options(method_name="generate", stream=True)

    def send(self, name: str, tokens: range) -> None:
        """Sends a request; it ends when the gate of its name is opened."""
        from tests.requests.publishing import request

        stream = self._generate.remote(request(tokens, name))
        first: Future[tuple[str, int]] = self._threads.submit(next, stream)
        self._sent[name] = first, self._threads.submit(lambda: (first.result(), next(stream))[1])

    def held(self, tokens: range) -> dict[str, int]:
        """Leading blocks of a prompt that each replica holds, as this process' router knows."""

        from tests.requests.publishing import request

        async def ask(router: Any) -> dict[str, int]:
            ranking = router._ranking
            return {rank.replica: rank.held for rank in ranking.rank(ranking.blocks(request(tokens)), {})}

        return self._of_router(ask)

    def in_flight(self) -> int:
        """Requests that this process' router takes to be at replicas: ends are told after answers."""

        async def ask(router: Any) -> int:
            return sum(router.replica_queue_len_cache.get(replica) or 0 for replica in router._replicas)

        return self._of_router(ask)

    def _of_router(self, ask: Callable[[Any], Coroutine[None, None, T]]) -> T:
        router = self._generate._router._asyncio_router
        return asyncio.run_coroutine_threadsafe(ask(router.request_router), router._event_loop).result(60)

    def where(self, name: str, timeout_s: float) -> tuple[str, int] | None:
        """Replica and process that the request is at; None if it is at none in that time."""
        try:
            return self._sent[name][0].result(timeout_s)
        except TimeoutError:
            return None

    def end(self, *names: str) -> list[tuple[str, int]]:
        """Lets the requests go and waits for their ends."""
        for name in names:
            self.open(name)
        return [self._sent.pop(name)[1].result(120) for name in names]

    def watch(self, name: str) -> None:
        """Has the router tell what it decides about the request of this name."""
        from expertmesh.deployments.requests import watched

        self._choices[name] = watched.watch(name)

    def choice(self, name: str) -> tuple[str, int, int, int]:
        """What it told: replica, blocks of the prompt, those that it expects to hit, number of candidates."""
        from expertmesh.deployments.requests import watched

        watched.unwatch(name)
        choice = self._choices.pop(name)
        return choice.replica, choice.blocks, choice.expected_hit_blocks, len(choice.ranks)

    def open(self, name: str) -> None:
        """Opens a gate."""
        ray.get(self._gate.open.remote(name))

    def close(self) -> None:
        """Ends this Ray."""
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
