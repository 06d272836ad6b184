"""What sends spans: over gRPC to a real server, and its ids, samples and complaints."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from expertmesh.deployments.tracing.context import headers_of, remote_context, request_ids
from expertmesh.deployments.tracing.ids import promised, promised_id
from expertmesh.deployments.tracing.tracer import QuietExporter, Tracing
from expertmesh.platform.config.sections import TelemetryConfig
from expertmesh.platform.logs import Origin, RequestIds

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class GrpcCollector(TraceServiceServicer):
    """Keeps names and ids of spans, and what was sent along."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str]] = []
        self.metadata: dict[str, Any] = {}

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:  # noqa: N802
        """As the service says."""
        scopes = [scope for resource in request.resource_spans for scope in resource.scope_spans]
        self.spans += [(span.name, span.span_id.hex()) for scope in scopes for span in scope.spans]
        self.metadata = dict(context.invocation_metadata())
        return ExportTraceServiceResponse()


def test_spans_go_over_grpc_and_a_promised_id_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-collector-key=secret")
    server, kept = grpc.server(ThreadPoolExecutor(2)), GrpcCollector()
    add_TraceServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    tracing = Tracing(TelemetryConfig(traces_endpoint=f"grpc://127.0.0.1:{port}"), Origin("ingress", "r"))
    mine = promised_id()
    with promised(mine):
        tracing.tracer.start_span("promised").end()
    tracing.tracer.start_span("any").end()
    tracing.close()
    server.stop(None).wait()
    assert [name for name, _ in kept.spans] == ["promised", "any"]
    assert int(kept.spans[0][1], 16) == mine
    assert int(kept.spans[1][1], 16) not in (0, mine)
    assert kept.metadata["x-collector-key"] == "secret"


@pytest.mark.parametrize(("share", "sampled"), [(0.0, False), (1.0, True)])
def test_a_callers_flag_goes_before_the_configured_share(share: float, sampled: bool) -> None:
    tracing = Tracing(TelemetryConfig(traces_endpoint="http://127.0.0.1:9", traces_sample=share), Origin())
    asked = remote_context({"traceparent": TRACEPARENT})
    refused = remote_context({"traceparent": f"{TRACEPARENT[:-2]}00"})
    start = tracing.tracer.start_span
    assert [start("x").is_recording(), start("x", asked).is_recording(), start("x", refused).is_recording()] == [
        sampled,
        True,
        False,
    ]
    tracing.close()


def test_headers_name_a_span_there_and_back() -> None:
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}
    span = trace.get_current_span(remote_context(headers)).get_span_context()
    assert headers_of(span) == headers
    assert request_ids({**headers, "x-request-id": "a"}) == RequestIds("a", TRACEPARENT.split("-")[1])
    assert request_ids({"x-request-id": "a"}) == RequestIds("a")
    assert request_ids(headers) is None
    assert request_ids(None) is None


class Broken(SpanExporter):
    """Fails, one way or the other."""

    def __init__(self) -> None:
        self.calls = 0

    def export(self, spans: Any) -> SpanExportResult:
        """As the SDK says."""
        self.calls += 1
        if self.calls % 2:
            raise RuntimeError("the collector's own words")
        return SpanExportResult.FAILURE


def test_lost_spans_are_told_of_once_a_minute_in_numbers(caplog: pytest.LogCaptureFixture) -> None:
    now = 1000.0
    exporter = QuietExporter(Broken(), "http://there:1", lambda: now)
    spans = [ReadableSpan(name="a"), ReadableSpan(name="b")]
    with caplog.at_level(logging.DEBUG, "expertmesh.tracing"):
        for _ in range(3):
            assert exporter.export(spans) is SpanExportResult.FAILURE
        now += 60.0
        exporter.export(spans)
    told = "spans did not reach the collector at http://there:1"
    assert caplog.messages == [f"2 {told}", f"6 {told}"]
