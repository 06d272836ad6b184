"""One attempt of a request: a call of one attention replica, and what its failures mean."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any, cast

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError

from expertmesh.errors import Unavailable
from expertmesh.routing.vllm_plugin import UNAVAILABLE


class ReplicaLost(Exception):
    """The replica that ran a request is gone, hangs, or gave the request up."""


class NotTaken(Exception):
    """No replica took the request: none is there, or the one that was asked is gone or has no engine any more."""


class QueuesFull(NotTaken):
    """Replicas are there, but have as much to do as they may."""


async def attempt(
    generate: DeploymentHandle[Any], request: EngineCoreRequest, taken_within_s: float, inactivity_s: float
) -> AsyncGenerator[list[EngineCoreOutput], None]:
    """Outputs as they come, first an empty list when a replica has taken the request; ends after a finish.

    taken_within_s: how long the request may wait for a replica; inactivity_s: how long a replica that took it may give
    no sign of life. Raises NotTaken and ReplicaLost; GracefulHTTPError (503) if no shard had the request's experts,
    which no other replica would change; and what the replica raised about the request itself. A caller that stops early
    cancels the call.
    """
    stream = cast("DeploymentResponseGenerator[Any]", generate.remote(request))
    taken = finished = False
    try:
        while not finished:
            try:
                async with asyncio.timeout(inactivity_s if taken else taken_within_s):
                    outputs: list[EngineCoreOutput] = await anext(stream)
            except StopAsyncIteration:
                raise ReplicaLost("its stream ended early") from None
            except TimeoutError:
                if taken:
                    raise ReplicaLost(f"no sign of life for {inactivity_s:g} s") from None
                raise NotTaken("none had room for it in time") from None
            except Exception as error:
                if (meaning := _meaning(error, taken)) is None:
                    raise
                raise meaning from error
            taken = True
            for output in outputs:
                if isinstance(output.stop_reason, str) and output.stop_reason.startswith(UNAVAILABLE):
                    raise GracefulHTTPError(output.stop_reason, HTTPStatus.SERVICE_UNAVAILABLE)
                if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                    raise ReplicaLost(f"its engine ended the request ({output.finish_reason})")
                finished = finished or output.finish_reason is not None
            yield outputs
    finally:
        if not finished:
            with contextlib.suppress(Exception):  # nothing to cancel if it never started
                stream.cancel()


def _meaning(error: Exception, taken: bool) -> NotTaken | ReplicaLost | None:
    """None: the error is about the request itself."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    first_line = (str(cause) or repr(cause)).splitlines()[0]
    if isinstance(cause, BackPressureError):
        return QueuesFull(first_line)
    if isinstance(cause, Unavailable | DeploymentUnavailableError | ReplicaUnavailableError):
        return NotTaken(first_line)
    if isinstance(cause, EngineDeadError) or (isinstance(error, RayError) and not isinstance(error, RayTaskError)):
        return ReplicaLost(first_line) if taken else NotTaken(first_line)
    return None
