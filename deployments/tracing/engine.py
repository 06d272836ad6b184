"""An attention replica's spans: `engine` for each traced request, and `dispatch` for samples of its engine's frames."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanKind
from vllm.tracing import SpanAttributes
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreRequest

from expertmesh.deployments.tracing.context import headers_of, remote_context
from expertmesh.deployments.tracing.front import fail
from expertmesh.routing.dispatch import DispatchSample, FrameSample
from expertmesh.routing.dispatch.samples import MAX_BYTES

log = logging.getLogger("expertmesh.tracing")

_S_NS = 1e9
_MAX_EVENTS = 64


class EngineSpan:
    """The time of one request in this replica's engine, with what vLLM's events say about it."""

    def __init__(self, tracer: trace.Tracer, request: EngineCoreRequest, replica: str) -> None:
        """A child of the span that the request's trace headers name."""
        self._span: Span = tracer.start_span(
            "engine",
            remote_context(request.trace_headers or {}),
            SpanKind.SERVER,
            {"expertmesh.replica.id": replica, "expertmesh.sequence.id": request.request_id},
        )
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        """What turns vLLM's clock, monotonic and the same in all processes of a machine, into time."""
        self._begin = time.monotonic()
        self._queued = self._scheduled = self._first = self._last = 0.0
        self._tokens = self._events = 0
        self._is_over = False

    @property
    def headers(self) -> dict[str, str] | None:
        """The engine's trace headers; None if the request turned out not to be traced."""
        return headers_of(self._span.get_span_context()) if self._span.is_recording() else None

    def got(self, outputs: Sequence[EngineCoreOutput]) -> None:
        """Notes what the engine said."""
        for output in outputs:
            for event in output.events or ():
                self._saw(event.type, event.timestamp)
            if output.new_token_ids:
                self._last = time.monotonic()
                if not self._first:
                    self._first = self._last
                    self._span.add_event("first token", timestamp=self._time_ns(self._first))
                self._tokens += len(output.new_token_ids)
            if output.finish_reason is not None:
                self._is_over = True
                self._span.set_attribute("gen_ai.response.finish_reasons", [str(output.finish_reason)])

    def end(self, error: BaseException | None) -> None:
        """The request is over: finished, stopped by its caller, or failed."""
        seconds = {
            SpanAttributes.GEN_AI_LATENCY_TIME_TO_FIRST_TOKEN: (self._begin, self._first),
            SpanAttributes.GEN_AI_LATENCY_TIME_IN_QUEUE: (self._queued, self._scheduled),
            SpanAttributes.GEN_AI_LATENCY_TIME_IN_MODEL_PREFILL: (self._scheduled, self._first),
            SpanAttributes.GEN_AI_LATENCY_TIME_IN_MODEL_DECODE: (self._first, self._last),
        }
        for name, (begin, end) in seconds.items():
            if begin and end:
                self._span.set_attribute(name, end - begin)
        self._span.set_attribute("gen_ai.usage.output_tokens", self._tokens)
        if isinstance(error, Exception):
            fail(self._span, type(error).__name__)
        elif not self._is_over:
            self._span.set_attribute("expertmesh.stopped", True)
        self._span.end()

    def _saw(self, kind: EngineCoreEventType, at: float) -> None:
        if kind == EngineCoreEventType.QUEUED:
            self._queued = self._queued or at
        elif kind == EngineCoreEventType.SCHEDULED:
            self._scheduled = self._scheduled or at
        self._events += 1
        if self._events <= _MAX_EVENTS:
            self._span.add_event(kind.name.lower(), timestamp=self._time_ns(at))

    def _time_ns(self, at: float) -> int:
        return self._epoch_ns + int(at * _S_NS)


class DispatchSpans:
    """Takes samples from the engine's process and makes spans of them."""

    def __init__(self, path: Path, tracer: trace.Tracer, replica: str) -> None:
        """Listens at `path`, from before the engine starts. Raises OSError if it can't."""
        self._tracer = tracer
        self._replica = replica
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.setblocking(False)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to take samples, on the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def close(self) -> None:
        """Stops."""
        if self._task is not None:
            self._task.cancel()
        self._listener.close()

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            engine, _ = await loop.sock_accept(self._listener)
            with contextlib.closing(engine):
                while message := await loop.sock_recv(engine, MAX_BYTES):
                    try:
                        self._made(DispatchSample.of_json(message))
                    except (ValueError, TypeError, KeyError) as error:
                        log.warning("a sample of a dispatch can't be read: %r", error)

    def _made(self, sample: DispatchSample) -> None:
        parent = remote_context({"traceparent": sample.parent})
        others = [trace.get_current_span(remote_context({"traceparent": name})) for name in sample.links]
        links = [Link(span.get_span_context(), {"expertmesh.link": "same step"}) for span in others]
        for frame in sample.frames:
            span = self._tracer.start_span(
                "dispatch",
                parent,
                SpanKind.CLIENT,
                {**_attributes(frame), "expertmesh.layer": sample.layer, "expertmesh.replica.id": self._replica},
                links,
                frame.begin_ns,
            )
            if frame.state != "answered":
                fail(span, frame.state)
            span.end(frame.end_ns)


def _attributes(frame: FrameSample) -> dict[str, str | int]:
    return {
        "expertmesh.shard.id": frame.shard,
        "expertmesh.dispatch.rows": frame.rows,
        "expertmesh.dispatch.pairs": frame.pairs,
        "expertmesh.dispatch.sent_bytes": frame.sent_bytes,
        "expertmesh.dispatch.computed_us": frame.computed_us,
        "expertmesh.dispatch.waited_us": frame.waited_us,
        "expertmesh.dispatch.retry": frame.retry,
    }
