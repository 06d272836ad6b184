"""Answers of the whole application, over HTTP, in the form that benchmarks compare."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.bare import Answer
from expertmesh import AsyncClient


def served_answers(url: str, model: str, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
    """Greedy answers of exactly `max_tokens` tokens to prompts of token ids, all at once."""
    return asyncio.run(_all(url, model, prompts, max_tokens))


async def _all(url: str, model: str, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
    begin = time.perf_counter()
    async with AsyncClient(base_url=url, timeout=300) as client:
        requests = [
            client.completions.create(
                model=model,
                prompt=list(prompt),
                max_tokens=max_tokens,
                temperature=0,
                logprobs=2,
                extra_body={"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True},
            )
            for prompt in prompts
        ]
        answers = await asyncio.gather(*requests)
    seconds = time.perf_counter() - begin
    return [_answer(answer.choices[0], seconds) for answer in answers]


def _answer(choice: Any, seconds: float) -> Answer:
    tokens = tuple(choice.token_ids)
    runner_up = []
    for token, top in zip(tokens, choice.logprobs.top_logprobs, strict=True):
        by_id = {int(name.removeprefix("token_id:")): value for name, value in top.items()}
        by_id.pop(token, None)
        runner_up.append(max(by_id.items(), key=lambda pair: pair[1], default=(-1, float("-inf"))))
    return Answer(tokens, tuple(choice.logprobs.token_logprobs), tuple(runner_up), choice.finish_reason, seconds)
