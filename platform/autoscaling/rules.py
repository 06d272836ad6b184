"""When there are to be more or fewer replicas: pure functions of signals, times and what was decided before.

Glossary: the *load* of a deployment is its use over what is aimed at: 1.0 means that the replicas it has are just
right; *hysteresis* is the room between the load that adds and the one that removes; the *cooldown* is the time after a
change in which there is no other.

Worked number: two attention replicas with the KV cache 0.9 full where 0.6 is aimed at have a load of 1.5. If it stays
above 1.1 for `up_after_s` there are to be ceil(2 x 1.5) = 3. With three the same work gives 1.0: nothing changes. When
the work falls to a third the load is 0.33; two replicas would have 0.5, one 1.0. With a room of 0.2 the work has to fit
into 0.8 of what is left: ceil(3 x 0.33 / 0.8) = 2 after `down_after_s`, and one more goes when 2 x 0.4 / 0.8 <= 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

_ADDS = 1.1
"""Load from which on replicas are added."""
_FILLED = 0.8
"""Load that the replicas which are left may have when others are removed."""
_FASTEST = 2
"""Factor by which one decision changes the number at most."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What decisions keep to."""

    least: int
    most: int
    up_after_s: float
    """How long the load must be high."""
    down_after_s: float
    """How long it must be low."""
    cooldown_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What a decision must know of those before, in seconds on the caller's clock."""

    high_since: float | None = None
    low_since: float | None = None
    changed_at: float | None = None


@dataclass(frozen=True, slots=True)
class AttentionSignals:
    """One attention replica, as of its last report; what it does not report is None."""

    running: int
    """Requests in its engine, those that wait among them."""
    waiting: int | None = None
    kv_use: float | None = None
    """Part of the KV cache that is in use, 0 to 1."""
    ttft_s: float | None = None
    """Of the requests of late."""


@dataclass(frozen=True, slots=True)
class AttentionAims:
    """Where attention replicas are just right."""

    running: float
    waiting: float
    kv_use: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class ShardSignals:
    """One expert shard over the last seconds."""

    busy: float
    """Part of the time that it computed, 0 to 1."""
    queueing: float | None = None
    """Seconds that frames waited for each second that they were computed; None if it is not reported."""


@dataclass(frozen=True, slots=True)
class ShardAims:
    """Where expert shards are just right."""

    busy: float
    queueing: float
    balancedness: float
    """What re-placement is expected to reach."""


def attention_parts(replicas: Sequence[AttentionSignals], aims: AttentionAims) -> dict[str, float]:
    """The load of the attention deployment by each of its signals: what their mean gives. 0.0 without replicas."""
    return {
        "running": _mean([r.running for r in replicas]) / aims.running,
        "waiting": _mean([r.waiting for r in replicas]) / aims.waiting,
        "kv_use": _mean([r.kv_use for r in replicas]) / aims.kv_use,
        "ttft": _mean([r.ttft_s for r in replicas]) / aims.ttft_s,
    }


def attention_load(replicas: Sequence[AttentionSignals], aims: AttentionAims) -> float:
    """The load of the attention deployment: the highest of what its replicas' means give. 0.0 without replicas."""
    return max(attention_parts(replicas, aims).values())


def experts_parts(shards: Sequence[ShardSignals], balancedness: float, aims: ShardAims) -> dict[str, float]:
    """The load of the expert deployment by each of its signals. 0.0 without shards.

    The busiest shard sets the pace: its time is the mean over balancedness. Where balancedness is below what is aimed
    at, that is for re-placement to cure and no reason for more shards.
    """
    busy = _mean([shard.busy for shard in shards]) / max(balancedness, aims.balancedness)
    return {"busy": busy / aims.busy, "queueing": _mean([shard.queueing for shard in shards]) / aims.queueing}


def experts_load(shards: Sequence[ShardSignals], balancedness: float, aims: ShardAims) -> float:
    """The load of the expert deployment: the highest of its parts."""
    return max(experts_parts(shards, balancedness, aims).values())


def decided(load: float, replicas: int, ready: int, now: float, memory: Memory, bounds: Bounds) -> tuple[int, Memory]:
    """How many replicas there are to be, and what the next decision must know.

    replicas: how many there are to be now; ready: how many serve. While these differ the load says nothing about the
    number, and nothing but the bounds changes it.
    """
    bounded = min(max(replicas, bounds.least), bounds.most)
    if bounded != replicas:
        return bounded, Memory(changed_at=now)
    if ready != replicas:
        return replicas, Memory(changed_at=memory.changed_at)
    more = min(ceil(replicas * load - 1e-9), _FASTEST * replicas, bounds.most) if load > _ADDS else replicas
    fewer = max(ceil(replicas * load / _FILLED - 1e-9), ceil(replicas / _FASTEST), bounds.least)
    high, low = more > replicas, fewer < replicas
    memory = replace(
        memory,
        high_since=(now if memory.high_since is None else memory.high_since) if high else None,
        low_since=(now if memory.low_since is None else memory.low_since) if low else None,
    )
    if memory.changed_at is not None and now - memory.changed_at < bounds.cooldown_s:
        return replicas, memory
    if memory.high_since is not None and now - memory.high_since >= bounds.up_after_s:
        return more, Memory(changed_at=now)
    if memory.low_since is not None and now - memory.low_since >= bounds.down_after_s:
        return fewer, Memory(changed_at=now)
    return replicas, memory


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
