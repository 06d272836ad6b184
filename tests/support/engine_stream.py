"""An engine's outputs for one request as an async generator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any


async def stream_of(engine: Any, request: Any) -> AsyncGenerator[list[Any]]:
    """What Engine.run gives, list by list. A caller that stops early cancels it."""
    outputs: asyncio.Queue[list[Any] | None] = asyncio.Queue()
    running = asyncio.ensure_future(engine.run(request, outputs.put_nowait))
    running.add_done_callback(lambda _: outputs.put_nowait(None))
    try:
        while (given := await outputs.get()) is not None:
            yield given
        await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
