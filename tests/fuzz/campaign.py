"""Inputs from inputs: what reaches an edge, or a number of times at an edge, that none has reached is kept and mutated.

The counts' classes (1, 2, 3, 4-7, 8-15, 16-31, 32-127, more) are those that AFL made common.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Counts = np.ndarray[Any, np.dtype[np.uint8]]
Run = Callable[[bytes], None]

MAX_INPUT_BYTES = 1 << 14
_MAX_CORPUS = 20_000
_MOST_CHANGES = 5
_NUMBERS = (0, 1, 2, 3, 7, 8, 16, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 4097, 2**15, 2**16, 2**31, 2**32, 2**63)

_CLASSES = np.zeros(256, dtype=np.uint8)
for _bit, (_low, _high) in enumerate([(1, 1), (2, 2), (3, 3), (4, 7), (8, 15), (16, 31), (32, 127), (128, 255)]):
    _CLASSES[_low : _high + 1] = 1 << _bit


def mutated(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """`data` with a few changes; `other` is an input to take pieces from."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, _MOST_CHANGES)):
        at = dice.randrange(len(changed)) if changed else 0
        length = min(dice.choice((1, 2, 4, 8, 12, 48, 200)), len(changed) - at)
        match dice.randrange(8):
            case 0 if changed:
                changed[at] ^= 1 << dice.randrange(8)
            case 1 if changed:
                changed[at] = dice.randrange(256)
            case 2 | 3:
                size = dice.choice((1, 2, 4, 8))
                number = (dice.choice(_NUMBERS) + dice.choice((0, 0, 1, -1))) % 256**size
                changed[at : at + size] = number.to_bytes(size, "little")
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = changed[at : at + length]
            case 6 if other:
                begin = dice.randrange(len(other))
                piece = other[begin : begin + dice.choice((1, 4, 48, 200, MAX_INPUT_BYTES))]
                changed[at : at + (len(piece) if dice.random() < 0.5 else 0)] = piece
            case _:
                changed[at:at] = dice.randbytes(dice.choice((1, 4, 48)))
    return bytes(changed[:MAX_INPUT_BYTES])


@dataclass
class Campaign:
    """Runs inputs and keeps the interesting ones. Without `counts` nothing tells which are, and seeds are mutated."""

    run: Run
    dice: random.Random
    counts: Counts | None = None
    inputs: int = 0
    corpus: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seen = np.zeros(0 if self.counts is None else self.counts.size, dtype=np.uint8)

    @property
    def edges(self) -> int:
        """Places of the map that were reached."""
        return int(np.count_nonzero(self._seen))

    def start(self, seeds: Sequence[bytes]) -> None:
        """Runs the seeds and keeps them all."""
        for seed in seeds:
            self._try(seed)
            self.corpus.append(seed)

    def step(self) -> None:
        """Runs one more input. Raises what the target raises."""
        data = mutated(self._pick(), self._pick(), self.dice)
        if self._try(data) and len(self.corpus) < _MAX_CORPUS:
            self.corpus.append(data)

    def _pick(self) -> bytes:
        if self.dice.random() < 0.5:  # the newest lead further
            return self.dice.choice(self.corpus[-32:])
        return self.dice.choice(self.corpus)

    def _try(self, data: bytes) -> bool:
        """Whether it reached something new."""
        self.inputs += 1
        if self.counts is None:
            self.run(data)
            return False
        self.counts.fill(0)
        self.run(data)
        reached = _CLASSES[self.counts]
        new = bool(np.any(reached & ~self._seen))
        if new:
            self._seen |= reached
        return new
