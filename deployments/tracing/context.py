"""What travels with a request from the ingress to its engine: whose child its spans are, and its id.

vLLM's engine requests have a field for trace headers. An attention replica takes the request's id out of it, and passes
the rest on to its engine for requests that are traced only.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from expertmesh.platform.logs import RequestIds

REQUEST_ID = "x-request-id"
TRACE_HEADERS = ("traceparent", "tracestate")
_SANE = re.compile(r"[!-~]{1,128}")
"""Printable ASCII without blanks."""
_W3C = TraceContextTextMapPropagator()


def sane_request_id(asked: str | None) -> str:
    """The id that a client asks for, or one made here if it asks for none or for one that has no place in a log."""
    if asked is not None and _SANE.fullmatch(asked):
        return asked
    return uuid.uuid4().hex


def remote_context(headers: Mapping[str, str]) -> Context:
    """The span that W3C headers name, as a parent; an empty context where they name none or are wrong."""
    return _W3C.extract(headers, Context())


def headers_of(context: trace.SpanContext) -> dict[str, str]:
    """W3C headers that name a span."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(trace.NonRecordingSpan(context), Context()))
    return carrier


def request_ids(headers: Mapping[str, str] | None) -> RequestIds | None:
    """What log lines say about a request with these trace headers; None if it brought no id."""
    if not headers or REQUEST_ID not in headers:
        return None
    span = trace.get_current_span(remote_context(headers)).get_span_context()
    return RequestIds(headers[REQUEST_ID], format_trace_id(span.trace_id) if span.is_valid else "")
