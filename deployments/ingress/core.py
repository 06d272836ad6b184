"""The engine core that vLLM's front end talks to: requests go to attention replicas, their outputs come back.

A replica that dies takes no request with it: the core keeps each request and the tokens it has had, and lets another
replica go on from there (continuation.py). Text, stop strings and log-probabilities are made on this side of it and
notice nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from ray.serve.handle import DeploymentHandle
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest

from expertmesh.deployments.ingress.attempt import NotTaken, ReplicaLost, attempt
from expertmesh.deployments.ingress.continuation import Engines, Unseen, Way, continued, way_of
from expertmesh.deployments.ingress.search import Patience, Search

log = logging.getLogger("expertmesh.ingress")

OnFailure = Callable[[str, Exception], None]


class RemoteCore:
    """Implements what AsyncLLM asks of an engine core client, over a Serve handle."""

    def __init__(self, attention: DeploymentHandle[Any], patience: Patience, engines: Engines) -> None:
        self._generate = attention.options(method_name="generate", stream=True)
        self._patience = patience
        self._engines = engines
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._on_failure: OnFailure | None = None
        self.resources = SimpleNamespace(engine_dead=False)

    @property
    def running(self) -> int:
        """Requests that are not finished."""
        return len(self._tasks)

    def tell_failures_to(self, on_failure: OnFailure) -> None:
        """`on_failure` gets the id of each request that can't be finished, and the error for its client."""
        self._on_failure = on_failure

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
        """Stops requests, at their replicas too; does nothing for those that are finished."""
        self.abort(request_ids)

    def abort(self, request_ids: list[str]) -> None:
        """`abort_requests_async`, without waiting for anything."""
        for request_id in request_ids:
            if (task := self._tasks.pop(request_id, None)) is not None:
                task.cancel()

    def get_kv_event_sources(self) -> dict[str, Any]:
        """None on this side: replicas keep their own."""
        return {}

    def shutdown(self, timeout: float | None = None) -> None:
        """Stops every request."""
        self.abort(list(self._tasks))

    async def _run(self, request: EngineCoreRequest) -> None:
        failure: Exception | None = None
        try:
            async for outputs in self._outputs_of(request):
                self._outputs.put_nowait(EngineCoreOutputs(outputs=outputs))
        except GracefulHTTPError as error:
            log.warning("request %s: %s", request.request_id, error)
            failure = error
        except Exception as error:
            log.exception("request %s failed", request.request_id)
            failure = error
        finally:
            self._tasks.pop(request.request_id, None)
        if failure is not None and self._on_failure is not None:
            self._on_failure(request.request_id, failure)

    async def _outputs_of(self, request: EngineCoreRequest) -> AsyncGenerator[list[EngineCoreOutput], None]:
        """Each of the request's outputs once, whichever replicas they come from.

        Raises GracefulHTTPError if it finds no replica or can't go on at another one, Diverged, and what a replica
        raised about the request itself.
        """
        known: list[int] = []
        way = Way.RESUBMIT if request.sampling_params is None else way_of(request, self._engines)
        search = Search(self._patience, time.monotonic)
        number = 0
        while True:
            this = continued(request, known, way)
            this.request_id = f"{request.request_id}-{number}"  # its replica may still hold the attempt before
            number += 1
            unseen = Unseen(known if way is Way.REGENERATE else ())
            try:
                async with aclosing(
                    attempt(self._generate, this, search.left_s, self._patience.inactivity_s)
                ) as stream:
                    async for outputs in stream:
                        search.taken()
                        if not (fresh := unseen.of(outputs)):
                            continue
                        for output in fresh:
                            output.request_id = request.request_id
                            known.extend(output.new_token_ids)
                        search.progressed()
                        yield fresh
                return
            except ReplicaLost as loss:
                log.warning("request %s lost its replica after %d tokens: %s", request.request_id, len(known), loss)
                if known and way is Way.NONE:
                    raise GracefulHTTPError(
                        "the replica that ran this request was lost, and the engines' settings don't let another one "
                        "go on with this kind of sampling; send it again",
                        HTTPStatus.SERVICE_UNAVAILABLE,
                    ) from loss
                search.lost(loss)
            except NotTaken as refusal:
                await asyncio.sleep(search.refused(refusal))
