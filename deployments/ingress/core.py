"""The engine core that vLLM's front end talks to: requests go to attention replicas, their outputs come back.

A replica that dies takes no request with it: the core keeps each request and the tokens it has had, and lets another
replica go on from there (continuation.py). Text, stop strings and log-probabilities are made on this side of it and
notice nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from opentelemetry.trace import Tracer
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest

from expertmesh.deployments.ingress.attempt import Attempt, NotTaken, ReplicaLost
from expertmesh.deployments.ingress.backlog import Backlog
from expertmesh.deployments.ingress.calls import Call
from expertmesh.deployments.ingress.continuation import Engines, Unseen, Way, continued, way_of
from expertmesh.deployments.ingress.deadline import left_s
from expertmesh.deployments.ingress.search import Patience, Search
from expertmesh.deployments.telemetry.ingress import IngressMetrics, RequestMeter
from expertmesh.deployments.tracing.request import Untraced, trace_of

log = logging.getLogger("expertmesh.ingress")

OnFailure = Callable[[str, Exception], None]


class RemoteCore:
    """Implements what AsyncLLM asks of an engine core client, over calls of attention replicas."""

    def __init__(
        self,
        call: Call,
        patience: Patience,
        engines: Engines,
        metrics: IngressMetrics | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """call: asks an attention replica; metrics: None records nothing; tracer: None traces no request."""
        self._call = call
        self._patience = patience
        self._engines = engines
        self.metrics = IngressMetrics() if metrics is None else metrics
        self._tracer = tracer
        self._outputs: asyncio.Queue[list[EngineCoreOutput]] = asyncio.Queue()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._on_failure: OnFailure | None = None
        self.backlog = Backlog(time.monotonic)
        """Of the requests that came here."""
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
        """The next outputs of any requests: all that wait."""
        outputs = await self._outputs.get()
        while not self._outputs.empty():
            outputs += self._outputs.get_nowait()
        return EngineCoreOutputs(outputs=outputs)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Starts a request; its outputs come by `get_output_async`, and end when the time of its client's is up."""
        self._tasks[request.request_id] = asyncio.create_task(self._run(request, left_s()))

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

    async def _run(self, request: EngineCoreRequest, within_s: float | None) -> None:
        failure: Exception | None = None
        ending: BaseException | None = None
        meter = self.metrics.request()
        try:
            async with asyncio.timeout(within_s) as timeout:
                await self._deliver(request, meter)
        except TimeoutError as error:
            failure = error
            if timeout.expired():
                failure = GracefulHTTPError("the time that the client gave is up", HTTPStatus.GATEWAY_TIMEOUT)
        except GracefulHTTPError as error:
            log.warning("request %s: %s", request.request_id, error)
            failure = error
        except Exception as error:
            log.exception("request %s failed", request.request_id)
            failure = error
        except asyncio.CancelledError as cancelled:
            ending = cancelled
            raise
        finally:
            meter.ended(ending or failure)
            self._tasks.pop(request.request_id, None)
        if failure is not None and self._on_failure is not None:
            self._on_failure(request.request_id, failure)

    async def _deliver(self, request: EngineCoreRequest, meter: RequestMeter) -> None:
        """Puts what comes of a request where `get_output_async` finds it. Raises as `_serve`."""
        waits = True
        self.backlog.arrived()

        def deliver(outputs: list[EngineCoreOutput]) -> None:
            nonlocal waits
            meter.tokens(sum(len(output.new_token_ids) for output in outputs))
            self._outputs.put_nowait(outputs)
            if waits:
                waits = False
                self.backlog.served()

        try:
            with trace_of(self._tracer, request) as trace:
                await self._serve(request, deliver, meter, trace)
        finally:
            if waits:
                self.backlog.left()

    async def _serve(
        self,
        request: EngineCoreRequest,
        deliver: Callable[[list[EngineCoreOutput]], None],
        meter: RequestMeter,
        trace: Untraced,
    ) -> None:
        """Delivers each of the request's outputs once, whichever replicas they come from.

        Raises GracefulHTTPError if it finds no replica or can't go on at another one, Diverged, and what a replica
        raised about the request itself.
        """
        known: list[int] = []
        way = Way.RESUBMIT if request.sampling_params is None else way_of(request, self._engines)
        search = Search(self._patience, time.monotonic)
        unseen = Unseen(())

        def take(outputs: list[EngineCoreOutput]) -> None:
            search.taken()
            meter.picked_up()
            trace.taken()
            if not (fresh := unseen.of(outputs)):
                return
            for output in fresh:
                output.request_id = request.request_id
                known.extend(output.new_token_ids)
            search.progressed()
            trace.got(fresh)
            deliver(fresh)

        number = 0
        while True:
            this = continued(request, known, way)
            this.request_id = f"{request.request_id}-{number}"  # its replica may still hold the attempt before
            number += 1
            trace.calls(this, len(known))
            unseen = Unseen(known if way is Way.REGENERATE else ())
            try:
                await Attempt(take).run(self._call, this, search.left_s, self._patience.inactivity_s)
                return
            except ReplicaLost as loss:
                log.warning("request %s lost its replica after %d tokens: %s", request.request_id, len(known), loss)
                meter.lost(way if known else "restart")
                if known and way is Way.NONE:
                    raise GracefulHTTPError(
                        "the replica that ran this request was lost, and the engines' settings don't let another one "
                        "go on with this kind of sampling; send it again",
                        HTTPStatus.SERVICE_UNAVAILABLE,
                    ) from loss
                trace.lost(loss)
                search.lost(loss)
            except NotTaken as refusal:
                trace.refused(refusal)
                await asyncio.sleep(search.refused(refusal))
