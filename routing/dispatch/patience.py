"""How long a frame may take before its pairs are asked elsewhere.

A frame is overdue after a multiple of what frames of its size took lately on its shard, and never before a floor that
a busy machine's hiccups stay below. Sizes are rows, by powers of two: what a frame costs is neither constant nor
proportional to its rows (opening an expert costs as much as several of them).

Worked number: frames of 64 to 127 rows took 3 ms at most lately; with a multiple of 8 and a floor of 150 ms such a
frame is overdue after 150 ms, one of a prefill that takes 40 ms after 320 ms.
"""

from __future__ import annotations

_FADE = 0.95
"""What is left of the slowest time, beside a faster one, after each frame of the size."""
_SIZES = 64


class ServiceTimes:
    """What frames took on each shard lately, waiting there included."""

    def __init__(self) -> None:
        self._slowest_s: dict[str, list[float]] = {}

    def observe(self, shard: str, rows: int, seconds: float) -> None:
        """Takes in an answered frame."""
        slowest = self._slowest_s.get(shard)
        if slowest is None:
            slowest = self._slowest_s[shard] = [0.0] * _SIZES
        size = rows.bit_length()
        slowest[size] = max(seconds, _FADE * slowest[size] + (1 - _FADE) * seconds)

    def expected_s(self, shard: str, rows: int) -> float | None:
        """Seconds that a frame takes at most by what is known; None if nothing is.

        Of a size that the shard had no frame of, the nearest smaller one says at least this much: twice a size. Of a
        shard that had none at all, the others say it.
        """
        if shard in self._slowest_s:
            return _at_size(self._slowest_s[shard], rows)
        others = [_at_size(slowest, rows) for slowest in self._slowest_s.values()]
        return max((seconds for seconds in others if seconds is not None), default=None)

    def keep(self, shards: set[str]) -> None:
        """Forgets every other shard."""
        for shard in self._slowest_s.keys() - shards:
            del self._slowest_s[shard]


def _at_size(slowest: list[float], rows: int) -> float | None:
    size = rows.bit_length()
    for smaller in range(size, -1, -1):
        if slowest[smaller] > 0:
            return slowest[smaller] * float(1 << (size - smaller))
    return next((seconds for seconds in slowest[size:] if seconds > 0), None)
