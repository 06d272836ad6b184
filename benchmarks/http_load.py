"""Clients that ask for completions over HTTP, one after the other each, as cheaply as can be: the server is timed.

The cores are shared with the server, so nothing is parsed that isn't needed for the clock.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import aiohttp

Ask = Callable[[Sequence[int]], Awaitable[tuple[float, float]]]
"""Asks for one completion; times of `time.perf_counter()` at its first and its last token."""


@dataclass(frozen=True, slots=True)
class Run:
    """What some clients saw in some seconds."""

    requests_per_s: float
    ttft_s: float
    """Median time to first token; to the whole answer where it is not streamed."""
    itl_s: float
    """Median over the requests of the mean time between two tokens; 0 where they are not streamed."""


async def closed_loop(ask: Ask, prompts: Sequence[Sequence[int]], clients: int, tokens: int, seconds: float) -> Run:
    """`clients` at once, each asking again as soon as it has its answer of `tokens` tokens."""
    ttft: list[float] = []
    itl: list[float] = []
    begin = time.perf_counter()
    end = begin + seconds

    async def client(number: int) -> None:
        turn = number
        while (asked := time.perf_counter()) < end:
            first, last = await ask(prompts[turn % len(prompts)])
            turn += clients
            ttft.append(first - asked)
            itl.append((last - first) / (tokens - 1))

    await asyncio.gather(*(client(number) for number in range(clients)))
    took = time.perf_counter() - begin
    return Run(len(ttft) / took, statistics.median(ttft), statistics.median(itl))


def over_http(
    url: str,
    model: str,
    prompts: Sequence[Sequence[int]],
    clients: int,
    tokens: int,
    stream: bool,
    seconds: float,
    **fields: object,
) -> Run:
    """The same against an OpenAI API. fields: more of the request. Raises RuntimeError for half an answer."""

    async def run() -> Run:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(url, connector=connector) as session:

            async def ask(prompt: Sequence[int]) -> tuple[float, float]:
                body = {
                    "model": model,
                    "prompt": list(prompt),
                    "max_tokens": tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": stream,
                    **fields,
                }
                return await _completion(session, json.dumps(body).encode(), tokens, stream)

            return await closed_loop(ask, prompts, clients, tokens, seconds)

    return asyncio.run(run())


async def _completion(session: aiohttp.ClientSession, body: bytes, tokens: int, stream: bool) -> tuple[float, float]:
    headers = {"Content-Type": "application/json"}
    async with session.post("/v1/completions", data=body, headers=headers) as answer:
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {(await answer.text())[:500]}")
        if not stream:
            text = await answer.read()
            if f'"completion_tokens":{tokens}'.encode() not in text:
                raise RuntimeError(f"not {tokens} tokens: {text[:500]!r}")
            now = time.perf_counter()
            return now, now
        first = last = 0.0
        tail = b""
        async for chunk in answer.content.iter_any():
            last = time.perf_counter()
            first = first or last
            tail = (tail + chunk)[-500:]
        if b"[DONE]" not in tail or b'"error"' in tail:
            raise RuntimeError(f"a stream that ends otherwise: {tail!r}")
        return first, last
