"""Break-even: whether fetching a prefix is quicker than computing it, by what both took lately."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

_WEIGHT = 0.3
"""Of the newest measurement in a running mean."""
_HICCUP = 8
"""How many times longer than blocks took lately the first one of a fetch may take."""


@dataclass(slots=True)
class _Point:
    tokens: float
    seconds: float


class TimeByLength:
    """How long something takes by its length in tokens: running means in classes of doubling length."""

    def __init__(self) -> None:
        self._points: dict[int, _Point] = {}

    def add(self, tokens: int, seconds: float) -> None:
        """A measurement."""
        point = self._points.setdefault(tokens.bit_length(), _Point(tokens, seconds))
        point.tokens += _WEIGHT * (tokens - point.tokens)
        point.seconds += _WEIGHT * (seconds - point.seconds)

    def put(self, tokens: int, seconds: float) -> None:
        """A measurement beside which those before it count for nothing."""
        self._points[tokens.bit_length()] = _Point(tokens, seconds)

    def expected_s(self, tokens: int) -> float | None:
        """Seconds for that length; None before the first measurement.

        Linear between the means of two classes; in proportion above the longest; as long as the shortest below it,
        which is too long and so on the safe side for a latency.
        """
        points = [self._points[size] for size in sorted(self._points)]
        if not points:
            return None
        above = bisect_left([point.tokens for point in points], tokens)
        if above == 0:
            return points[0].seconds
        low = points[above - 1]
        if above == len(points):
            return low.seconds * tokens / low.tokens
        high = points[above]
        return low.seconds + (high.seconds - low.seconds) * (tokens - low.tokens) / (high.tokens - low.tokens)


@dataclass(slots=True)
class BreakEvenGate:
    """Pure: `now` is the caller's clock in seconds. Not safe for concurrent use.

    As long as either side wasn't measured the answer is yes. After a no, one fetch for each class of length is let
    through every `probe_interval_s`; what it takes replaces what was known, so that a store that got faster is used
    again at once. So does a fetch that was given up: the next request need not pay for it too.
    """

    probe_interval_s: float = 30.0
    _fetch: TimeByLength = field(default_factory=TimeByLength)
    _compute: TimeByLength = field(default_factory=TimeByLength)
    _probe_at: dict[int, float] = field(default_factory=dict)

    def fetched(self, tokens: int, seconds: float) -> None:
        """A prefix of that length was fetched."""
        if tokens.bit_length() in self._probe_at:
            self._fetch.put(tokens, seconds)
        else:
            self._fetch.add(tokens, seconds)

    def gave_up(self, tokens: int, seconds: float) -> None:
        """Fetching a prefix of that length was given up; it would have taken so long at least."""
        self._fetch.put(tokens, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """A prompt of that length was computed: from its turn to its first token."""
        self._compute.add(tokens, seconds)

    def worthwhile(self, tokens: int, now: float) -> bool:
        """Whether to fetch a prefix of that length."""
        fetch, compute = self._fetch.expected_s(tokens), self._compute.expected_s(tokens)
        size = tokens.bit_length()
        if fetch is None or compute is None or fetch <= compute:
            self._probe_at.pop(size, None)
            return True
        if now >= self._probe_at.setdefault(size, now + self.probe_interval_s):
            self._probe_at[size] = now + self.probe_interval_s
            return True
        return False

    def budget_s(self, tokens: int) -> float | None:
        """After how long a fetch of that length isn't worthwhile any more; None if that isn't known."""
        return self._compute.expected_s(tokens)

    def first_block_s(self, tokens: int, blocks: int, whole_s: float, least_s: float) -> float:
        """How long the first of a fetch's blocks may take before the rest isn't asked for.

        Its part of `whole_s`, what the whole fetch may take, and where fetches were measured at most 8 times what a
        block took lately; but never less than `least_s`, unless the whole fetch may not take that.
        """
        part_s = whole_s / blocks
        if (known_s := self._fetch.expected_s(tokens)) is not None:
            part_s = min(part_s, _HICCUP * known_s / blocks)
        return max(part_s, min(whole_s, least_s))
