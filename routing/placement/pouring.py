"""Whole tokens of some experts poured over their copies, so that the last shard to finish finishes early.

Glossary: a shard's *time* is when it has done what it has so far; an expert that is *opened* on a shard costs it
`opening` rows beside its tokens; *pouring* an expert divides its tokens so that the copies opened finish together, at
one *level*, as water fills a vessel where it is lowest; a *part* is the tokens of one expert by copy.

Worked number: 60 tokens over copies on shards that stand at 28 and 0, 1 s a row, 8 rows to open: they start at 36 and
8, the level is (60 + 36 + 8) / 2 = 52, the part is [16, 44].

Pouring an expert anew while the others rest minimises, over that expert's part, the sum over shards of
time before x rows + seconds a row x rows^2 / 2. That sum's minimum over all experts is also the split with the least
maximum (Fujishige, "Lexicographically optimal base of a polymatroid with respect to a weight vector", Mathematics of
Operations Research 5, 1980), so rounds over the experts approach the linear program's optimum without a solver.
"""

from __future__ import annotations

from math import inf

_DISPATCH_VISITS = 80
"""Copies poured anew after which a dispatch begins no further round: it bounds the time of a decision."""
_CLOSE = 1.005
"""A last finish within this factor of what no split can beat is good enough."""
_STALLED = 1.001
"""A round that improves the last finish by less than this factor is the last one."""
_LEVEL = 0.1
"""An expert whose copies differ by less than this part of what is left to win stays as it is."""

Parts = list[list[int]]


class Pouring:
    """Some experts, each with at least two copies, in the order in which they are poured."""

    def __init__(self, counts: list[int], shards: list[list[int]], seconds: list[float], opening: float) -> None:
        """counts: tokens of each expert [M], > 0; shards: those that have a copy, by expert; seconds: what a row costs
        on each shard [S], > 0 where a copy is; opening: rows that an expert costs a shard beside its tokens."""
        self._counts = counts
        self._shards = shards
        self._seconds = seconds
        self._opening = opening

    def better(self, fixed: list[float], up: list[bool]) -> Parts:
        """Greedy least-loaded or water-filling, whichever finishes first, at a tie with less work; the latter is left
        out where greedy can't be beaten. fixed: the shards' times before any of these experts [S]; up: which count."""
        bound = self.bound(fixed, up)
        greedy_times = fixed.copy()
        greedy = self.greedy(greedy_times)
        finish = max(greedy_times)
        if finish <= bound * _CLOSE:
            return greedy
        poured, poured_times = self.settled(*self.poured(fixed), bound, _DISPATCH_VISITS)
        return greedy if (finish, sum(greedy_times)) <= (max(poured_times), sum(poured_times)) else poured

    def greedy(self, times: list[float]) -> Parts:
        """Each expert whole, where it finishes first. Adds its work to `times`."""
        seconds, opening = self._seconds, self._opening
        parts = []
        for count, shards in zip(self._counts, self._shards, strict=True):
            first, chosen = inf, 0
            for place, shard in enumerate(shards):
                finish = times[shard] + seconds[shard] * (count + opening)
                if finish < first:
                    first, chosen = finish, place
            times[shards[chosen]] = first
            part = [0] * len(shards)
            part[chosen] = count
            parts.append(part)
        return parts

    def poured(self, fixed: list[float]) -> tuple[Parts, list[float]]:
        """Each expert poured once, on top of those before it: parts and times. Does not change `fixed`."""
        times = fixed.copy()
        return [
            self.pour(count, shards, times) for count, shards in zip(self._counts, self._shards, strict=True)
        ], times

    def settled(self, parts: Parts, times: list[float], bound: float, visits: int) -> tuple[Parts, list[float]]:
        """Parts and times of the best round of pouring anew, starting from these, which it does not change.

        bound: a time that no split beats; visits: copies poured after which no further round begins.
        """
        finish = last = max(times)
        best, best_times = parts, times
        while finish > bound * _CLOSE and visits > 0:
            times, parts = times.copy(), parts.copy()
            visits -= self._round(parts, times, _LEVEL * (last - bound))
            last, before = max(times), last
            if last < finish:
                finish, best, best_times = last, parts, times
            if last * _STALLED > before:
                break
        return best, best_times

    def bound(self, fixed: list[float], up: list[bool]) -> float:
        """No split finishes earlier: what is fixed on the fullest shard, or all work spread evenly."""
        rows = sum(self._counts) + self._opening * len(self._counts)
        rate = 0.0
        for at, seconds, counts in zip(fixed, self._seconds, up, strict=True):
            if counts:
                rows += at / seconds
                rate += 1.0 / seconds
        return max(rows / rate, *fixed)

    def _round(self, parts: Parts, times: list[float], level: float) -> int:
        """Pours each expert anew whose copies differ by more than `level`; how many copies those have."""
        seconds, opening = self._seconds, self._opening
        visits = 0
        for index, shards in enumerate(self._shards):
            part = parts[index]
            high, low = 0.0, inf
            for shard, tokens in zip(shards, part):  # noqa: B905 (both have the expert's copies, and this is hot)
                at = times[shard]
                if at < low:
                    low = at
                if tokens and at > high:
                    high = at
            if high - low > level:
                visits += len(shards)
                for shard, tokens in zip(shards, part):  # noqa: B905
                    if tokens:
                        times[shard] -= seconds[shard] * (tokens + opening)
                parts[index] = self.pour(self._counts[index], shards, times)
        return visits

    def pour(self, count: int, shards: list[int], times: list[float]) -> list[int]:
        """Whole tokens for each of an expert's copies, so that those opened finish together. Adds them to `times`."""
        seconds, opening = self._seconds, self._opening
        part = self._two(count, shards[0], shards[1], times) if len(shards) == 2 else self._many(count, shards, times)
        for shard, tokens in zip(shards, part):  # noqa: B905
            if tokens:
                times[shard] += seconds[shard] * (tokens + opening)
        return part

    def _two(self, count: int, one: int, two: int, times: list[float]) -> list[int]:
        """`_many` for two copies, the common case."""
        a_row, other_row, opening = self._seconds[one], self._seconds[two], self._opening
        at_one, at_two = times[one] + a_row * opening, times[two] + other_row * opening
        tokens = (count * other_row + at_two - at_one) / (a_row + other_row)
        least = opening if opening > 0.5 else 0.5
        if tokens < least or count - tokens < least:
            return [count, 0] if at_one + a_row * count <= at_two + other_row * count else [0, count]
        whole = int(tokens + 0.5)
        return [whole, count - whole]

    def _many(self, count: int, shards: list[int], times: list[float]) -> list[int]:
        """The level up to which the copies fill, lowest first, and what that makes for each."""
        seconds, opening = self._seconds, self._opening
        starts = [(times[s] + opening * seconds[s], place, seconds[s]) for place, s in enumerate(shards)]
        starts.sort()
        level, used, rate, volume = inf, 0, 0.0, float(count)
        for start, _, a_row in starts:
            if level <= start:
                break
            rate += 1.0 / a_row
            volume += start / a_row
            level = volume / rate
            used += 1
        while used > 1:  # a copy that gets too little stays closed
            start, _, a_row = starts[used - 1]
            if level - start >= opening * a_row:
                break
            used -= 1
            rate -= 1.0 / a_row
            volume -= start / a_row
            level = volume / rate
        part, left = [0] * len(shards), count
        for start, place, a_row in starts[:used]:
            part[place] = tokens = int((level - start) / a_row)
            left -= tokens
        for nth in range(left):  # what rounding down left over: less than a token a copy
            part[starts[nth % used][1]] += 1
        return part
