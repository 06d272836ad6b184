"""Loads of experts from windows of counts, and whether a new window is a shift of traffic or noise.

Glossary: a *window* is the tokens counted for each (layer, expert) over some seconds; a *load* is rows a second,
decayed: a window that is one half-life old counts half; the *distance* of two windows of a layer is the total variation
of their shares of tokens, half the sum over experts of |p - q|, 0 for the same mix and 1 for no expert in common.

Two samples of one mix differ too. A share p seen in n tokens has variance p (1 - p) / n, so p - q is close to normal
with variance p (1 - p) (1/n + 1/m), and the mean of |N(0, s^2)| is s sqrt(2 / pi) (the half-normal distribution;
Leone, Nelson, Nottingham, "The folded normal distribution", Technometrics 3, 1961). The *noise* of a distance is half
the sum of these over the experts, with p the share in both windows together. m is the decayed window's effective
sample size, (sum of w n)^2 / (sum of w^2 n) over its windows of n tokens with weight w (Kish, "Survey Sampling",
1965). The tokens of one request resemble each other, so real noise is larger: a distance counts as a shift from
`times` the noise on.

Worked number: two experts, 300 and 100 tokens before, 60 and 40 now: shares 0.75 and 0.6, distance 0.15. Together
0.72: s = sqrt(0.72 x 0.28 x (1/400 + 1/100)) = 0.050, noise 2 x 0.050 x 0.798 / 2 = 0.040. The distance is 3.7 times
the noise: a shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Any

import numpy as np

Counts = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

_LEAST_DISTANCE = 0.05
"""A smaller distance is no shift however surely it is one: no placement would be worth changing for it."""


@dataclass(frozen=True, slots=True)
class Shift:
    """How a window differs from what came before, by layer."""

    distance: Floats
    """[layers], 0 to 1; 0 where either side has no token."""
    noise: Floats
    """[layers], the distance to expect of the same mix."""

    def found(self, times: float = 3.0) -> Mask:
        """Layers whose traffic shifted: [layers]."""
        return (self.distance > times * self.noise) & (self.distance > _LEAST_DISTANCE)


@dataclass(frozen=True, slots=True)
class Loads:
    """Decayed counts of tokens. Immutable; `after` makes the next."""

    tokens: Floats
    """[layers, experts], decayed."""
    seconds: float
    """Decayed in the same way."""
    squares: Floats
    """[layers], sum over windows of weight^2 x tokens, for the effective sample size."""

    @classmethod
    def none(cls, layers: int, experts: int) -> Loads:
        """Before the first window."""
        return cls(np.zeros((layers, experts)), 0.0, np.zeros(layers))

    def after(self, window: Counts, seconds: float, half_life_s: float) -> Loads:
        """With one more window of tokens [layers, experts], `seconds` long.

        Raises ValueError for a window of another shape or with negative counts, or unless both times are positive.
        """
        if window.shape != self.tokens.shape or (window < 0).any():
            raise ValueError(
                f"a window of shape {window.shape}; allowed: counts of shape {self.tokens.shape}, none negative"
            )
        if not seconds > 0 or not half_life_s > 0:
            raise ValueError(f"a window of {seconds} s with a half-life of {half_life_s} s; both must be positive")
        keep = 0.5 ** (seconds / half_life_s)
        return Loads(
            keep * self.tokens + window, keep * self.seconds + seconds, keep**2 * self.squares + window.sum(axis=1)
        )

    @property
    def rows_a_second(self) -> Floats:
        """[layers, experts]; zeros before the first window."""
        return self.tokens / self.seconds if self.seconds else self.tokens

    def shift(self, window: Counts) -> Shift:
        """How a new window [layers, experts] differs from these loads. Call it before `after`."""
        before, now = self.tokens.sum(axis=1), window.sum(axis=1).astype(np.float64)
        size = np.divide(before**2, self.squares, out=np.zeros_like(before), where=self.squares > 0)
        known = (before > 0) & (now > 0)
        p = _shares(self.tokens, before)
        q = _shares(window.astype(np.float64), now)
        total = np.where(known, size + now, 1.0)
        together = (p * size[:, None] + q * now[:, None]) / total[:, None]
        inverse = np.where(known, 1 / np.where(known, size, 1.0) + 1 / np.where(known, now, 1.0), 0.0)
        deviation = np.sqrt(together * (1 - together) * inverse[:, None])
        distance = np.where(known, np.abs(p - q).sum(axis=1) / 2, 0.0)
        return Shift(distance, deviation.sum(axis=1) * np.sqrt(2 / pi) / 2)


def _shares(tokens: Floats, total: Floats) -> Floats:
    """Share of each expert: [layers, experts]; 0 in a layer without tokens."""
    shares: Floats = tokens / np.where(total > 0, total, 1.0)[:, None]
    return shares
