"""One attempt of a request: a call of one attention replica, and what its failures mean."""

from __future__ import annotations

import asyncio
import contextlib
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Callable
from http import HTTPStatus

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError

from expertmesh.deployments.ingress.calls import Call
from expertmesh.deployments.tokens.link import LinkLost
from expertmesh.errors import Unavailable
from expertmesh.routing.vllm_plugin import UNAVAILABLE


class ReplicaLost(Exception):
    """The replica that ran a request is gone, hangs, or gave the request up."""


class NotTaken(Exception):
    """No replica took the request: none is there, or the one that was asked is gone or has no engine any more."""


class QueuesFull(NotTaken):
    """Replicas are there, but have as much to do as they may."""


class Attempt:
    """A Sink for a call's outputs."""

    def __init__(self, take: Callable[[list[EngineCoreOutput]], None]) -> None:
        """take: gets the outputs as they come, first those, or none, that say that a replica has taken the request.
        What it raises ends the attempt."""
        loop = asyncio.get_running_loop()
        self._take = take
        self._taken: asyncio.Future[None] = loop.create_future()
        self._outcome: asyncio.Future[None] = loop.create_future()
        self._last = 0.0

    async def run(self, call: Call, request: EngineCoreRequest, taken_within_s: float, inactivity_s: float) -> None:
        """Calls a replica; returns when it has finished the request.

        taken_within_s: how long the request may wait for a replica; inactivity_s: how long a replica that took it may
        give no sign of life. Raises NotTaken and ReplicaLost; GracefulHTTPError (503) if no shard had the request's
        experts, which no other replica would change; and what the replica raised about the request itself, or `take`.
        A caller that stops early cancels the call.
        """
        cancel = call(request, self)
        finished = False
        try:
            await asyncio.wait({self._taken, self._outcome}, timeout=taken_within_s, return_when=FIRST_COMPLETED)
            if not self._taken.done() and not self._outcome.done():
                raise NotTaken("none had room for it in time")
            while not self._outcome.done():
                left_s = self._last + inactivity_s - time.monotonic()
                if left_s <= 0:
                    raise ReplicaLost(f"no sign of life for {inactivity_s:g} s")
                await asyncio.wait({self._outcome}, timeout=left_s)
            self._outcome.result()
            finished = True
        finally:
            if not finished:
                with contextlib.suppress(Exception):  # nothing to cancel if it never started
                    cancel()

    def took(self, outputs: list[EngineCoreOutput]) -> None:
        """As Sink."""
        if self._outcome.done():
            return
        self._last = time.monotonic()
        if not self._taken.done():
            self._taken.set_result(None)
        finished = False
        try:
            for output in outputs:
                if isinstance(output.stop_reason, str) and output.stop_reason.startswith(UNAVAILABLE):
                    raise GracefulHTTPError(output.stop_reason, HTTPStatus.SERVICE_UNAVAILABLE)
                if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                    raise ReplicaLost(f"its engine ended the request ({output.finish_reason})")
                finished = finished or output.finish_reason is not None
            self._take(outputs)
        except Exception as error:  # told to who runs the attempt
            self._fail(error)
        else:
            if finished:
                self._outcome.set_result(None)

    def ended(self, error: BaseException | None) -> None:
        """As Sink."""
        if self._outcome.done():
            return
        if error is None:
            self._fail(ReplicaLost("its stream ended early"))
        elif (meaning := _meaning(error, self._taken.done())) is None:
            self._fail(error)
        else:
            meaning.__cause__ = error
            self._fail(meaning)

    def _fail(self, error: BaseException) -> None:
        self._outcome.set_exception(error)
        self._outcome.exception()  # is seen, even if nobody waits any more


def _meaning(error: BaseException, taken: bool) -> NotTaken | ReplicaLost | None:
    """None: the error is about the request itself."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    first_line = (str(cause) or repr(cause)).splitlines()[0]
    if isinstance(cause, BackPressureError):
        return QueuesFull(first_line)
    if isinstance(cause, LinkLost) and taken:
        return ReplicaLost(first_line)
    if isinstance(cause, Unavailable | DeploymentUnavailableError | ReplicaUnavailableError):
        return NotTaken(first_line)
    if isinstance(cause, EngineDeadError) or (isinstance(error, RayError) and not isinstance(error, RayTaskError)):
        return ReplicaLost(first_line) if taken else NotTaken(first_line)
    return None
