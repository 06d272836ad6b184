"""What an attention replica records: its engine, its dispatches, its use of the KV store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput

from expertmesh.deployments.telemetry.recorder import Recorder
from expertmesh.platform.metrics import catalogue as series

_NS = 1e-9


class AttentionMetrics:
    """Records for one attention replica. Used by one thread."""

    def __init__(self, recorder: Recorder, replica: str) -> None:
        self._recorder = recorder
        self._replica = replica

    def take(self, output: EngineCoreOutput) -> None:
        """Looks at an output of the engine: when its request waited, and what of its prompt was cached."""
        if output.events:
            self._take_events(output.events)
        if (prefill := output.prefill_stats) is not None:
            for source, tokens in (
                ("computed", prefill.num_computed_tokens),
                ("local", prefill.num_local_cached_tokens),
                ("store", prefill.num_external_cached_tokens),
            ):
                if tokens > 0:
                    self._recorder.count(series.PROMPT_TOKENS, tokens, source=source)

    def _take_events(self, events: Iterable[EngineCoreEvent]) -> None:
        queued: float | None = None
        for event in events:
            if event.type == EngineCoreEventType.QUEUED:
                queued = event.timestamp
            elif event.type == EngineCoreEventType.SCHEDULED and queued is not None:
                self._recorder.observe(series.QUEUE, event.timestamp - queued)
                queued = None
            elif event.type == EngineCoreEventType.PREEMPTED:
                self._recorder.count(series.PREEMPTIONS)

    def engine(self, running: int, load: Mapping[str, float]) -> None:
        """Sets what the engine says of itself now (`Engine.load`)."""
        self._recorder.set(series.RUNNING, running, replica=self._replica)
        self._recorder.set(series.WAITING, load["waiting"], replica=self._replica)
        self._recorder.set(series.KV_USE, load["kv_use"], replica=self._replica)

    def dispatch(self, counts: Mapping[str, int], pairs: int, epoch: int) -> None:
        """Counts on to `LoadCounters.as_dict()`; pairs: the sum of its tokens; epoch: of the table that it goes by."""
        record = self._recorder
        record.set(series.TABLE_EPOCH, epoch, replica=self._replica)
        record.count_to(series.DISPATCHES, counts["dispatches"])
        record.count_to(series.DISPATCH_PAIRS, pairs)
        record.count_to(series.DISPATCH_FRAMES, counts["frames"])
        record.count_to(series.DISPATCH_RETRIES, counts["retries"])
        record.count_to(series.DISPATCH_WAITS, counts["waits"])
        for part in ("route", "exchange", "combine"):
            record.count_to(series.DISPATCH_SECONDS, counts[f"{part}_ns"] * _NS, part=part)
        for part in ("queue", "compute"):
            record.count_to(series.DISPATCH_SHARD_SECONDS, counts[f"{part}_ns"] * _NS, part=part)
        for direction in ("sent", "received"):
            record.count_to(series.DISPATCH_BYTES, counts[f"bytes_{direction}"], direction=direction)
        for why in ("refused", "broken", "overdue"):
            record.count_to(series.DISPATCH_FAILOVERS, counts[why], why=why)

    def kv_store(self, report: Mapping[str, Any]) -> None:
        """Counts on to the KV tier's report: `counts` (`BlockStore.counts`) and `servers` (`NodeHealth`)."""
        record, counts = self._recorder, Counter(report["counts"])
        record.count_to(series.KV_LOOKUPS, counts["found"], result="found")
        record.count_to(series.KV_LOOKUPS, counts["looked_up"] - counts["found"], result="missing")
        for result in ("sound", "missing", "truncated", "foreign", "corrupt"):
            record.count_to(series.KV_LOADS, counts[f"load_{result}"], result=result)
        for result in ("stored", "present", "dropped"):
            record.count_to(series.KV_WRITES, counts[result], result=result)
        for direction in ("loaded", "stored"):
            record.count_to(series.KV_BYTES, counts[f"{direction}_bytes"], direction=direction)
        for why in ("skipped", "timed_out", "refused", "broken"):
            record.count_to(series.KV_ERRORS, counts[why], why=why)
        record.count_to(series.KV_GATE, counts["admitted"], decision="fetch")
        record.count_to(series.KV_GATE, counts["gated"], decision="compute")
        states = Counter(server["state"] for server in report["servers"])
        for state in ("closed", "half_open", "open"):
            record.set(series.KV_SERVERS, states[state], replica=self._replica, breaker=state)
        record.count_to(series.KV_OPENINGS, sum(server["opened"] for server in report["servers"]))
