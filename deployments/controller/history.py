"""What the mesh did over the last minutes, and what each member does now. No Ray, no clock of its own.

Members report counters that only grow. A sample takes what they grew by since the one before, over the time between the
two *reports*, so that it doesn't matter when reports come.

Worked number: a shard reports busy_s 10.0 at 50.0 s and 11.5 at 52.0 s: it was busy for 0.75 of the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from expertmesh.deployments.controller.membership import Membership

INTERVAL_S = 2.0
_KEPT = 300
"""Samples: 10 minutes."""
_HALF_LIFE_S = 6.0
"""Of an expert's rows a second: a spike is seen at the next look and forgotten in half a minute."""

Floats = np.ndarray[Any, np.dtype[np.float64]]
_COUNTERS = ("requests", "prompt_tokens", "cached_tokens", "fetched_tokens", "tokens", "ttft_s", "intervals", "itl_s")


@dataclass(frozen=True, slots=True)
class Sample:
    """The mesh over one interval; a mean is None where there was nothing to take it of."""

    at: float
    """Its end, seconds since 1970."""
    attention: int
    """Replicas that are ready."""
    shards: int
    """That serve."""
    running: int
    """Requests in the engines."""
    waiting: int
    """Of these, waiting."""
    requests_s: float
    """First tokens a second."""
    tokens_s: float
    """Generated tokens a second."""
    prompt_tokens_s: float
    kv_hits: float | None
    """Part of the prompt tokens that were not computed: cached by the engine, or fetched from the KV store."""
    kv_fetched: float | None
    """The part that was fetched."""
    kv_use: float
    """Part of the KV cache in use, mean over the replicas."""
    ttft_s: float | None
    """Mean time to first token, as the engines see it."""
    itl_s: float | None
    """Mean time between two tokens of a request, as the engines see it."""
    rows_s: float
    """(token, expert) pairs that the shards computed, a second."""
    busy: float
    """Part of the time that the shards' kernels ran, mean over the shards."""
    balancedness: float | None
    """Mean shard load over the greatest, mean over the layers."""


@dataclass(slots=True)
class _Reading:
    """A member's counters as of its report."""

    seen: float
    stats: Mapping[str, Any]
    rates: dict[str, float]
    """What each counter grew by a second, up to this report."""


class History:
    """Keeps samples, and the rates that the last one was made of."""

    def __init__(self, layers: int, experts: int, clock: Callable[[], float], kept: int = _KEPT) -> None:
        """clock: seconds since 1970; kept: how many samples."""
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=kept)
        self._attention: dict[str, _Reading] = {}
        self._shards: dict[str, _Reading] = {}
        self._layers: dict[str, _Reading] = {}
        self._tokens: np.ndarray[Any, np.dtype[np.int64]] | None = None
        self._at = 0.0
        self.rows_a_second: Floats = np.zeros((layers, experts))
        """[layers, experts] (token, expert) pairs dispatched of late, decayed."""

    def take(self, members: Membership, now: float) -> Sample:
        """Adds a sample; now: seconds on a clock that never goes back."""
        ready = {r: m for r, m in members.attention.items() if m.report.ready}
        serving = {m.shard: m for m in members.serving().values()}
        self._attention = _read(
            self._attention, {r: (m.seen, m.report.stats.get("served", {})) for r, m in ready.items()}
        )
        self._shards = _read(
            self._shards, {s: (m.seen, {n: m.stats.get(n, 0) for n in ("busy_s", "pairs")}) for s, m in serving.items()}
        )
        self._layers = _read(self._layers, {s: (m.seen, m.stats.get("layer_pairs", {})) for s, m in serving.items()})
        self._heat(members.loads(), now)
        grown = {name: _sum(self._attention, name) for name in _COUNTERS}
        loads = [m.report.stats.get("load", {}) for m in ready.values()]
        sample = Sample(
            at=round(self._clock(), 3),
            attention=len(ready),
            shards=len(serving),
            running=sum(m.report.running for m in ready.values()),
            waiting=sum(load.get("waiting", 0) for load in loads),
            requests_s=round(grown["requests"], 3),
            tokens_s=round(grown["tokens"], 2),
            prompt_tokens_s=round(grown["prompt_tokens"], 2),
            kv_hits=_ratio(grown["cached_tokens"] + grown["fetched_tokens"], grown["prompt_tokens"]),
            kv_fetched=_ratio(grown["fetched_tokens"], grown["prompt_tokens"]),
            kv_use=round(_mean([load.get("kv_use", 0.0) for load in loads]), 4),
            ttft_s=_ratio(grown["ttft_s"], grown["requests"]),
            itl_s=_ratio(grown["itl_s"], grown["intervals"]),
            rows_s=round(_sum(self._shards, "pairs"), 1),
            busy=round(_mean([r.rates.get("busy_s", 0.0) for r in self._shards.values()]), 4),
            balancedness=_balancedness([r.rates for r in self._layers.values()]),
        )
        self._samples.append(sample)
        return sample

    def since(self, at: float) -> dict[str, Any]:
        """The samples that ended after `at`, the oldest first, and what each member does now; for JSON."""
        shards = {
            s: {"busy": r.rates.get("busy_s", 0.0), "rows_s": r.rates.get("pairs", 0.0)}
            for s, r in self._shards.items()
        }
        attention = {
            r: {
                "tokens_s": reading.rates.get("tokens", 0.0),
                "kv_hits": _ratio(
                    reading.rates.get("cached_tokens", 0.0) + reading.rates.get("fetched_tokens", 0.0),
                    reading.rates.get("prompt_tokens", 0.0),
                ),
                "itl_s": _ratio(reading.rates.get("itl_s", 0.0), reading.rates.get("intervals", 0.0)),
            }
            for r, reading in self._attention.items()
        }
        return {
            "interval_s": INTERVAL_S,
            "samples": [asdict(sample) for sample in self._samples if sample.at > at],
            "shards": shards,
            "attention": attention,
        }

    def _heat(self, tokens: np.ndarray[Any, np.dtype[np.int64]], now: float) -> None:
        """Decays each expert's rate towards what it was since the last sample."""
        seconds = now - self._at
        if self._tokens is not None and seconds > 0:
            kept = 0.5 ** (seconds / _HALF_LIFE_S)
            window = np.maximum(tokens - self._tokens, 0) / seconds
            self.rows_a_second = kept * self.rows_a_second + (1 - kept) * window
        self._tokens, self._at = tokens, now


def _read(
    before: Mapping[str, _Reading], members: Mapping[str, tuple[float, Mapping[str, Any]]]
) -> dict[str, _Reading]:
    """Readings of the members that are there now; one whose report is the same as before keeps its rates.

    A member's first report has no rates: its counters may be from before this controller's time.
    """
    readings = {}
    for member, (seen, stats) in members.items():
        last = before.get(member)
        if last is None:
            readings[member] = _Reading(seen, stats, {})
        elif seen <= last.seen:
            readings[member] = last
        else:
            grown = {name: max(value - last.stats.get(name, 0), 0) for name, value in stats.items()}
            rates = {name: round(value / (seen - last.seen), 4) for name, value in grown.items()}
            readings[member] = _Reading(seen, stats, rates)
    return readings


def _sum(readings: Mapping[str, _Reading], name: str) -> float:
    return float(sum(reading.rates.get(name, 0.0) for reading in readings.values()))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole > 0 else None


def _balancedness(loads: list[Mapping[str, float]]) -> float | None:
    """Of [shards] mappings from layer to load; over the layers that had any."""
    layers = {layer for load in loads for layer in load}
    by_layer = ([load.get(layer, 0.0) for load in loads] for layer in layers)
    parts = [_mean(shards) / max(shards) for shards in by_layer if max(shards) > 0]
    return round(_mean(parts), 4) if parts else None
