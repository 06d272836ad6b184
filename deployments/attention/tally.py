"""What an engine has served, as counters that only grow: whoever reads them twice knows what came between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from vllm.v1.engine import EngineCoreOutput


@dataclass(slots=True)
class Tally:
    """Since the engine started. Intervals are between outputs as they leave the engine, not as clients see them."""

    requests: int = 0
    """That got their first token."""
    prompt_tokens: int = 0
    """Of these."""
    cached_tokens: int = 0
    """Prompt tokens that were in the engine's own KV cache."""
    fetched_tokens: int = 0
    """Prompt tokens whose KV came from the store."""
    tokens: int = 0
    """Generated."""
    ttft_s: float = 0.0
    """Times to first token, added up over `requests`."""
    intervals: int = 0
    """Tokens after the first."""
    itl_s: float = 0.0
    """Times between tokens, added up over `intervals`."""

    def as_dict(self) -> dict[str, float]:
        """For a report."""
        return asdict(self)


class Serving:
    """One request's part in a tally."""

    def __init__(self, tally: Tally, clock: Callable[[], float] = time.monotonic) -> None:
        self._tally = tally
        self._clock = clock
        self._last = clock()
        self._begun = False

    def take(self, output: EngineCoreOutput) -> None:
        """Counts one of the request's outputs, now."""
        if not output.new_token_ids:
            return
        now, tally, tokens = self._clock(), self._tally, len(output.new_token_ids)
        waited, self._last = now - self._last, now
        tally.tokens += tokens
        if self._begun:
            tally.itl_s += waited
            tally.intervals += tokens
            return
        self._begun = True
        tally.requests += 1
        tally.ttft_s += waited
        if (prefill := output.prefill_stats) is not None:
            tally.prompt_tokens += prefill.num_prompt_tokens
            tally.cached_tokens += prefill.num_local_cached_tokens
            tally.fetched_tokens += prefill.num_external_cached_tokens
