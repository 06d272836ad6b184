"""Calls of attention replicas: Serve chooses the replica and carries the request, the inbox gets its outputs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from ray.serve.handle import DeploymentHandle, DeploymentResponse
from vllm.v1.engine import EngineCoreRequest

from expertmesh.deployments.tokens.inbox import Inbox, Sink
from expertmesh.deployments.tokens.link import LinkLost

Cancel = Callable[[], object]
"""Ends a call, at the replica too. Its sink hears no more."""

Call = Callable[[EngineCoreRequest, Sink], Cancel]
"""Sends a request to an attention replica. The sink's first outputs say that one took it, and may be none; it ends with
what the call fails with."""

_LATE_S = 5.0
"""Outputs may come later than the news that all are sent; where the connection broke in between they never do."""


class AttentionCalls:
    """Calls of the attention deployment whose outputs come to an inbox."""

    def __init__(self, attention: DeploymentHandle[Any], inbox: Inbox) -> None:
        self._generate = attention.options(method_name="generate")
        self._inbox = inbox

    def __call__(self, request: EngineCoreRequest, sink: Sink) -> Cancel:
        """As Call."""
        response = cast("DeploymentResponse[None]", self._generate.remote(request, self._inbox.source))
        self._inbox.expect(request.request_id, sink)  # what comes is read in a later turn of this loop
        watching = asyncio.get_running_loop().create_task(self._watch(request.request_id, response))

        def cancel() -> None:
            self._inbox.forget(request.request_id)
            watching.cancel()
            response.cancel()

        return cancel

    async def _watch(self, request_id: str, response: DeploymentResponse[None]) -> None:
        """Ends the request's outputs if the call fails, or if nothing more can come."""
        try:
            await response
        except Exception as error:  # whatever Serve, Ray or the replica raises
            self._inbox.end(request_id, error)
            return
        if self._inbox.expects(request_id):
            late = LinkLost(f"its replica has sent all, but it did not come in {_LATE_S:g} s")
            asyncio.get_running_loop().call_later(_LATE_S, self._inbox.end, request_id, late)
