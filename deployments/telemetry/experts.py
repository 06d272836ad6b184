"""What an expert shard records."""

from __future__ import annotations

import time
from collections.abc import Callable

from expertmesh.deployments.experts.shard import Shard
from expertmesh.deployments.telemetry.recorder import Recorder
from expertmesh.platform.metrics import catalogue as series


class ShardMetrics:
    """Records for one shard. Used by one thread."""

    def __init__(self, recorder: Recorder, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: in seconds."""
        self._recorder = recorder
        self._clock = clock
        self._before: tuple[float, float, int] | None = None
        """Time, `busy_s` and `pairs` when they were last looked at."""

    def publish(self, shard: Shard) -> None:
        """Counts on to what the shard counts, and sets its gauges."""
        record, stats, name = self._recorder, shard.stats, shard.shard_id
        record.count_to(series.SHARD_FRAMES, stats.frames)
        record.count_to(series.SHARD_BATCHES, stats.batches)
        record.count_to(series.SHARD_PAIRS, stats.pairs)
        record.count_to(series.SHARD_REFUSED, stats.refused)
        record.count_to(series.SHARD_SECONDS, stats.busy_s, part="busy")
        record.count_to(series.SHARD_SECONDS, stats.waited_s, part="waited")
        record.count_to(series.WEIGHT_BYTES, shard.bytes_read, source="read")
        record.count_to(series.WEIGHT_BYTES, shard.bytes_fetched, source="fetched")
        record.count_to(series.LOAD_SECONDS, shard.load_s)
        record.set(series.SHARD_CONNECTIONS, stats.connections, shard=name)
        record.set(series.SHARD_EXPERTS, int((shard.slots >= 0).sum()), shard=name)
        now, before = self._clock(), self._before
        self._before = (now, stats.busy_s, stats.pairs)
        if before is not None and now > before[0]:
            record.set(series.SHARD_BUSY, (stats.busy_s - before[1]) / (now - before[0]), shard=name)
            record.set(series.SHARD_RATE, (stats.pairs - before[2]) / (now - before[0]), shard=name)
