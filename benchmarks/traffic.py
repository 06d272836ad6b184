"""Constant traffic on a served mesh, every answer compared, and every pause between two tokens kept.

For benchmarks that break things: they ask afterwards what failed, what was said wrongly, and how long a stream stood
still.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.bare import Answer
from benchmarks.parity import LOGPROB_TOLERANCE
from expertmesh import AsyncClient


@dataclass
class Judge:
    """Compares answers under load with those to the same prompts alone and unloaded."""

    reference: Sequence[Answer]
    failed: list[str] = field(default_factory=list)
    """Words of each request that ended with an error."""
    wrong: int = 0
    """Tokens that are another than they should be and no near tie, that are missing or too many."""
    near_ties: int = 0
    compared: int = 0

    def take(self, at: int, tokens: Sequence[int]) -> None:
        """Compares one answer; at: which prompt it is to. After a near tie the rest has another prompt."""
        right = self.reference[at]
        self.wrong += abs(len(tokens) - len(right.tokens))
        for i, (said, expected) in enumerate(zip(tokens, right.tokens, strict=False)):
            self.compared += 1
            if said != expected:
                token, logprob = right.runner_up[i]
                tie = token == said and abs(right.logprobs[i] - logprob) < LOGPROB_TOLERANCE
                self.near_ties += tie
                self.wrong += not tie
                return


@dataclass(frozen=True, slots=True)
class Gap:
    """A pause between two tokens of a stream, or before its first."""

    end: float
    """`time.monotonic()`"""
    seconds: float
    first: bool


class Traffic:
    """Streams of requests from a thread of its own, one after the other on each, from `start` to `stop`."""

    def __init__(self, url: str, model: str, prompts: Sequence[Sequence[int]], judge: Judge, streams: int) -> None:
        self.gaps: list[Gap] = []
        self.answered = 0
        self.judge = judge
        self._url, self._model, self._prompts, self._streams = url, model, prompts, streams
        self._over = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="traffic", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Lets the streams finish their requests."""
        self._over = True
        self._thread.join()

    def worst_gap_s(self, since: float, until: float) -> float:
        """The longest pause that touches an interval of `time.monotonic()` and is over."""
        found = [gap.seconds for gap in self.gaps if gap.end >= since and gap.end - gap.seconds <= until]
        return max(found, default=0.0)

    def usual_gap_s(self, since: float, until: float) -> float:
        """The median of the longest pause of each second: what a stream stands still for without any fault."""
        by_second: dict[int, float] = {}
        for gap in self.gaps:
            if since <= gap.end <= until:
                by_second[int(gap.end)] = max(gap.seconds, by_second.get(int(gap.end), 0.0))
        return statistics.median(by_second.values()) if by_second else 0.0

    async def _run(self) -> None:
        async with AsyncClient(base_url=self._url, timeout=300, max_retries=0) as client:
            await asyncio.gather(*(self._stream(client, i) for i in range(self._streams)))

    async def _stream(self, client: AsyncClient, first: int) -> None:
        turn = first
        while not self._over:
            at = turn % len(self._prompts)
            turn += self._streams
            try:
                self.judge.take(at, await self._request(client, at))
                self.answered += 1
            except Exception as error:  # whatever it was: it is a request that failed
                self.judge.failed.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)

    async def _request(self, client: AsyncClient, at: int) -> list[int]:
        tokens: list[int] = []
        last, first = time.monotonic(), True
        stream = await client.completions.create(
            model=self._model,
            prompt=list(self._prompts[at]),
            max_tokens=len(self.judge.reference[at].tokens),
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        async for chunk in stream:
            if not chunk.choices:
                continue
            now = time.monotonic()
            self.gaps.append(Gap(now, now - last, first))
            last, first = now, False
            tokens += getattr(chunk.choices[0], "token_ids", None) or []
        return tokens


def whole(status: Any, attention: int, shards: int, redundancy: int) -> bool:
    """Whether a mesh has everything that it should have; status: `client.mesh.status()`."""
    return (
        sum(replica.ready for replica in status.attention) == attention
        and sum(shard.ready for shard in status.shards) == shards
        and status.placement.redundancy >= redundancy
    )
