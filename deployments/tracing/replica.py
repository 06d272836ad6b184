"""What an attention replica does about traces and logs of its requests."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from expertmesh.deployments.tracing.context import request_ids
from expertmesh.deployments.tracing.engine import DispatchSpans, EngineSpan
from expertmesh.deployments.tracing.tracer import Tracing
from expertmesh.platform.config import MeshConfig
from expertmesh.platform.logs import Origin, current_request
from expertmesh.routing.dispatch import Mailbox
from expertmesh.routing.vllm_plugin.settings import TRACEPARENT

log = logging.getLogger("expertmesh.attention")


class ReplicaTracing:
    """Owns the replica's tracer, where there is one, and the socket that its engine sends samples to."""

    def __init__(self, origin: Origin, tracing: Tracing | None, dispatch_sample: float, mailbox: Mailbox) -> None:
        self._origin = origin
        self._tracing = tracing
        self.dispatch_sample = None if tracing is None else dispatch_sample
        """For the engine's MeshSettings."""
        self._dispatches: DispatchSpans | None = None
        if tracing is not None and dispatch_sample > 0:
            self._dispatches = DispatchSpans(mailbox.samples_path, tracing.tracer, origin.replica)
            self._dispatches.start()

    @classmethod
    def of(cls, config: MeshConfig, origin: Origin, mailbox: Mailbox) -> Self:
        """As the configuration has it; to be called on the replica's event loop, before the engine starts."""
        telemetry = config.telemetry
        tracing = None if telemetry.traces_endpoint is None else Tracing(telemetry, origin)
        return cls(origin, tracing, telemetry.dispatch_sample, mailbox)

    def request(self, request: EngineCoreRequest) -> ReplicaRequest:
        """For the time of a request, whose trace headers become those for the engine."""
        ids = request_ids(request.trace_headers)
        if ids is not None:
            current_request.set(ids)  # for the rest of its task, which is Serve's own for it
        span = None
        if self._tracing is not None and request.trace_headers and TRACEPARENT in request.trace_headers:
            span = EngineSpan(self._tracing.tracer, request, self._origin.replica)
        request.trace_headers = None if span is None else span.headers
        return ReplicaRequest(request, span)

    def close(self) -> None:
        """Sends what waits, for two seconds at most."""
        if self._dispatches is not None:
            self._dispatches.close()
        if self._tracing is not None:
            self._tracing.close()


class ReplicaRequest:
    """A context manager around a request's time in the replica."""

    def __init__(self, request: EngineCoreRequest, span: EngineSpan | None) -> None:
        self._name = request.request_id
        self._span = span

    def __enter__(self) -> Self:
        log.debug("request %s begins", self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        log.debug("request %s ends: %s", self._name, "finished" if kind is None else kind.__name__)
        if self._span is not None:
            self._span.end(error)

    def got(self, outputs: list[EngineCoreOutput]) -> None:
        """Outputs of the engine, in turn."""
        if self._span is not None:
            self._span.got(outputs)
