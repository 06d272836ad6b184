"""The tracer of a process: OpenTelemetry's SDK with a bounded queue, which loses spans rather than hold anything up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from expertmesh.deployments.tracing.ids import GivenIds
from expertmesh.platform.config.sections import TelemetryConfig
from expertmesh.platform.logs import Origin

log = logging.getLogger("expertmesh.tracing")

_TRACES_PATH = "/v1/traces"
_QUEUE = 4096
"""Spans that wait to be sent at most; those that come then replace the oldest."""
_BATCH = 512
_SEND_EVERY_MS = 500
_SEND_TIMEOUT_S = 5.0
_FLUSH_MS = 2000
"""What a process that ends waits for its last spans."""
_COMPLAIN_EVERY_S = 60.0
_MAX_VALUE = 256
"""Length of an attribute's text."""


class Tracing:
    """A process' tracer, and what sends its spans."""

    def __init__(self, config: TelemetryConfig, origin: Origin) -> None:
        """Starts the thread that sends. `config.traces_endpoint` must be set; the collector need not be there."""
        assert config.traces_endpoint is not None
        # The SDK logs each failure and each lost span, some with the collector's words; one line a minute is ours.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        exporter = QuietExporter(span_exporter(config.traces_endpoint), config.traces_endpoint)
        resource = Resource.create(
            {
                "service.name": f"expertmesh-{origin.deployment}" if origin.deployment else "expertmesh",
                "service.namespace": "expertmesh",
                "service.instance.id": origin.replica,
            }
        )
        self._provider = TracerProvider(
            ParentBased(TraceIdRatioBased(config.traces_sample)),
            resource,
            span_limits=SpanLimits(max_attribute_length=_MAX_VALUE),
            id_generator=GivenIds(),
            shutdown_on_exit=False,  # it would wait for as long as the collector takes
        )
        self._processor = BatchSpanProcessor(
            exporter, max_queue_size=_QUEUE, schedule_delay_millis=_SEND_EVERY_MS, max_export_batch_size=_BATCH
        )
        self._provider.add_span_processor(self._processor)
        self.tracer: trace.Tracer = self._provider.get_tracer("expertmesh")

    def close(self) -> None:
        """Sends what waits, for two seconds at most. Spans that end later are lost; may be called again."""
        self._processor._batch_processor.shutdown(_FLUSH_MS)  # its public `shutdown` takes no time limit


class QuietExporter(SpanExporter):
    """Passes spans on, and says at most once a minute that some were lost. Never raises."""

    def __init__(self, exporter: SpanExporter, endpoint: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._clock = clock
        self._lost = 0
        self._said_at: float | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """As the SDK says."""
        try:
            result = self._exporter.export(spans)
        except Exception:  # a collector's odd answer, for which exporters have no words
            result = SpanExportResult.FAILURE
        if result is not SpanExportResult.SUCCESS:
            self._lost += len(spans)
            now = self._clock()
            if self._said_at is None or now - self._said_at >= _COMPLAIN_EVERY_S:
                log.warning("%d spans did not reach the collector at %s", self._lost, self._endpoint)
                self._lost, self._said_at = 0, now
        return result

    def shutdown(self) -> None:
        """As the SDK says."""
        self._exporter.shutdown()


def span_exporter(endpoint: str) -> SpanExporter:
    """What speaks OTLP to `telemetry.traces_endpoint`; headers, certificates and compression come from OpenTelemetry's
    environment variables."""
    url = urlsplit(endpoint)
    if url.scheme in ("grpc", "grpcs"):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc(endpoint=url.netloc, insecure=url.scheme == "grpc", timeout=_SEND_TIMEOUT_S)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

    return Http(
        endpoint=endpoint if url.path.strip("/") else f"{endpoint.rstrip('/')}{_TRACES_PATH}", timeout=_SEND_TIMEOUT_S
    )
