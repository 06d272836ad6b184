"""Calls that end in this process instead of at a replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from expertmesh.deployments.ingress.calls import Call, Cancel
from expertmesh.deployments.tokens.inbox import Sink


def calls_of(answer: Callable[[EngineCoreRequest], AsyncIterator[list[EngineCoreOutput]]]) -> Call:
    """Calls whose outputs are those of `answer`, and that fail as it does."""

    def call(request: EngineCoreRequest, sink: Sink) -> Cancel:
        async def run() -> None:
            try:
                async for outputs in answer(request):
                    sink.took(outputs)
                    if any(output.finish_reason is not None for output in outputs):
                        break
                    await asyncio.sleep(0)
            except Exception as error:  # as Serve tells it
                sink.ended(error)
            else:
                sink.ended(None)

        return asyncio.get_running_loop().create_task(run()).cancel

    return call
