"""What computing prompts takes, by the scheduler's steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class _Prompt:
    left: int
    computed: int = 0
    seconds: float = 0.0


class PromptTimer:
    """Pure: `now` is the caller's clock in seconds. Not safe for concurrent use.

    A step's time is shared out by tokens among the requests that it computes. It lasts from when it was scheduled, or
    from the end of the step before it where that is later, until its output is there: steps may be scheduled ahead.
    """

    def __init__(self) -> None:
        self._prompts: dict[str, _Prompt] = {}
        self._steps: deque[tuple[float, Mapping[str, int]]] = deque()
        self._free_at = float("-inf")

    def scheduled(self, prompts: Mapping[str, int], tokens: Mapping[str, int], now: float) -> None:
        """A step begins that computes `tokens` of each request.

        prompts: of requests that are scheduled for the first time, how many tokens of the prompt are to be computed.
        """
        self._prompts.update((request, _Prompt(left)) for request, left in prompts.items() if left > 0)
        self._steps.append((now, tokens))

    def done(self, now: float) -> list[tuple[int, float]]:
        """The oldest step is done. (tokens, seconds) of each prompt that was computed to its end with it."""
        if not self._steps:
            return []
        begin, tokens = self._steps.popleft()
        took_s = now - max(begin, self._free_at)
        self._free_at = now
        total = sum(tokens.values())
        complete = []
        for request, count in tokens.items():
            if (prompt := self._prompts.get(request)) is None:
                continue
            prompt.computed += count
            prompt.seconds += took_s * count / total
            prompt.left -= count
            if prompt.left <= 0:
                complete.append((prompt.computed, prompt.seconds))
                del self._prompts[request]
        return complete

    def forget(self, request: str) -> None:
        """A request ended, wherever it was."""
        self._prompts.pop(request, None)
