"""A request's spans in the ingress: `route` for each search of a replica, `attention` for each replica that took it.

Both are children of the span that is current when the request begins. The replica makes its spans children of
`attention`, whose id it is told before it begins: ids are drawn here, not by the SDK.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanContext, SpanKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from expertmesh.deployments.requests.watched import Choice, unwatch, watch
from expertmesh.deployments.tracing.context import REQUEST_ID, headers_of
from expertmesh.deployments.tracing.front import fail
from expertmesh.deployments.tracing.ids import promised, promised_id
from expertmesh.platform.logs import current_request

_MAX_REFUSALS = 16
"""Of which a `route` span has an event each."""


class Untraced:
    """What a request that is not traced has in place of a RequestTrace: nothing happens."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """The request is over."""

    def calls(self, attempt: EngineCoreRequest, known: int) -> None:
        """A replica is about to be asked; sets the attempt's trace headers. known: tokens that it goes on after."""
        attempt.trace_headers = _with_request_id({}) or None

    def refused(self, error: Exception) -> None:
        """None took it, so far."""

    def taken(self) -> None:
        """A replica has it, or gave another sign of life."""

    def got(self, outputs: Sequence[EngineCoreOutput]) -> None:
        """Outputs that the client has not had before."""

    def lost(self, error: Exception) -> None:
        """Its replica is gone."""


class RequestTrace(Untraced):
    """The spans of one request. A context manager; as a task is cancelled or fails, so end the spans that are open."""

    def __init__(self, tracer: trace.Tracer, request: EngineCoreRequest) -> None:
        self._tracer = tracer
        self._request = request
        self._parent = trace.get_current_span().get_span_context()
        self._route: Span | None = None
        self._attention: Span | None = None
        self._before: SpanContext | None = None
        """Of the last `attention` span, which ended with its replica."""
        self._choice = Choice()
        self._watched = ""
        self._promised = 0
        self._called_ns = 0
        self._searches = self._refusals = 0
        self._known = self._tokens = 0
        self._finish = ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Ends the spans. A request that was stopped (its client left, or vLLM found a stop string) did not fail."""
        failure = kind.__name__ if kind is not None and issubclass(kind, Exception) else None
        unwatch(self._watched)
        for span in (self._route, self._attention):
            if span is not None and kind is not None and failure is None:
                span.set_attribute("expertmesh.stopped", True)
        self._end_route(failure)
        self._end_attention(failure)

    def calls(self, attempt: EngineCoreRequest, known: int) -> None:
        """Begins a `route` span where the request has no replica."""
        self._called_ns, self._known = time.time_ns(), known
        if self._route is None:
            self._searches += 1
            self._refusals = 0
            self._route = self._span("route", self._called_ns)
        unwatch(self._watched)
        self._watched = attempt.request_id
        self._choice = watch(attempt.request_id)
        self._promised = promised_id()
        begins = SpanContext(
            self._parent.trace_id, self._promised, False, self._parent.trace_flags, self._parent.trace_state
        )
        attempt.trace_headers = _with_request_id(headers_of(begins))

    def refused(self, error: Exception) -> None:
        """Notes it in the `route` span."""
        self._refusals += 1
        if self._route is not None and self._refusals <= _MAX_REFUSALS:
            self._route.add_event("refused", {"error.type": type(error).__name__})

    def taken(self) -> None:
        """Ends `route`, and begins `attention` where the router has chosen."""
        if self._route is None:
            return
        chosen_ns = self._choice.at_ns
        attributes: dict[str, Any] = {"expertmesh.attempt": self._searches, "expertmesh.tokens.known": self._known}
        if chosen_ns:
            replica = {"expertmesh.replica.id": self._choice.replica}
            attributes |= replica
            self._route.set_attributes(
                {
                    **replica,
                    "expertmesh.route.candidates": len(self._choice.ranks),
                    "expertmesh.route.prompt_blocks": self._choice.blocks,
                    "expertmesh.route.expected_hit_blocks": self._choice.expected_hit_blocks,
                }
            )
        self._end_route(None, chosen_ns)
        with promised(self._promised):
            self._attention = self._span("attention", chosen_ns or self._called_ns, attributes)
        self._tokens, self._finish = 0, ""

    def got(self, outputs: Sequence[EngineCoreOutput]) -> None:
        """Counts tokens."""
        for output in outputs:
            if not self._tokens and output.new_token_ids and self._attention is not None:
                self._attention.add_event("first token")
            self._tokens += len(output.new_token_ids)
            if output.finish_reason is not None:
                self._finish = str(output.finish_reason)

    def lost(self, error: Exception) -> None:
        """Ends `attention` with an error; the next one is linked to it."""
        if self._attention is not None:
            self._before = self._attention.get_span_context()
        self._end_attention(type(error).__name__)

    def _span(self, name: str, start_ns: int, attributes: dict[str, Any] | None = None) -> Span:
        return self._tracer.start_span(
            name,
            trace.set_span_in_context(trace.NonRecordingSpan(self._parent)),
            SpanKind.CLIENT if name == "attention" else SpanKind.INTERNAL,
            {"expertmesh.sequence.id": self._request.request_id, **(attributes or {})},
            [] if self._before is None else [Link(self._before, {"expertmesh.link": "goes on after"})],
            start_ns,
        )

    def _end_route(self, failure: str | None, end_ns: int = 0) -> None:
        if self._route is not None:
            self._route.set_attribute("expertmesh.route.refusals", self._refusals)
            if failure is not None:
                fail(self._route, failure)
            self._route.end(end_ns or time.time_ns())
            self._route = None

    def _end_attention(self, failure: str | None) -> None:
        if self._attention is None:
            return
        prompt = self._request.prompt_token_ids
        self._attention.set_attributes(
            {
                "gen_ai.usage.input_tokens": 0 if prompt is None else len(prompt),
                "gen_ai.usage.output_tokens": self._tokens,
            }
        )
        if self._finish:
            self._attention.set_attribute("gen_ai.response.finish_reasons", [self._finish])
        if failure is not None:
            fail(self._attention, failure)
        self._attention.end()
        self._attention = None


def trace_of(tracer: trace.Tracer | None, request: EngineCoreRequest) -> Untraced:
    """For a request that begins now: traced if the current span is."""
    if tracer is None or not trace.get_current_span().is_recording():
        return Untraced()
    return RequestTrace(tracer, request)


def _with_request_id(headers: dict[str, str]) -> dict[str, str]:
    ids = current_request.get()
    return headers if ids is None else {**headers, REQUEST_ID: ids.request_id}
