"""Samples of what dispatches took, from the engine's process to its replica, which makes trace spans of them.

They travel as JSON over a unix socket in the mailbox that keeps message boundaries. What the replica is too slow to
take is dropped: the socket's buffer is the bound, and the engine never waits. An engine that is not traced has none of
this, its dispatcher is the plain one.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from expertmesh.routing import native
from expertmesh.routing.dispatch.copies import LayerCopies
from expertmesh.routing.dispatch.dispatcher import Dispatcher, Frame, _Step
from expertmesh.routing.placement import RoutingTable
from expertmesh.routing.wire import HEADER_BYTES
from expertmesh.routing.wire.frame import PAIR_BYTES

MAX_SAMPLES = 64
"""Of one request: layers of steps, with a span for each shard that was asked."""
MAX_BYTES = 1 << 16
"""Of a sample as JSON; a larger one is dropped."""
_LINKS = 32
_REMEMBERED = 4096

_STATES = {
    native.ANSWERED: "answered",
    native.REFUSED: "refused",
    native.BROKEN: "broken",
    native.OVERDUE: "overdue",
}


@dataclass(frozen=True, slots=True)
class FrameSample:
    """A frame to a shard, and its answer."""

    shard: str
    state: str
    """`answered`, or why it was not: `refused`, `broken`, `overdue`."""
    retry: int
    """How often this layer had been sent before in this step."""
    begin_ns: int
    end_ns: int
    """Since the epoch. All frames of a layer are sent together and waited for together."""
    rows: int
    pairs: int
    sent_bytes: int
    computed_us: int
    waited_us: int
    """As the shard says: microseconds of computing, and of waiting for its turn; 0 without an answer."""


@dataclass(frozen=True, slots=True)
class DispatchSample:
    """One layer of one step."""

    layer: int
    parent: str
    """`traceparent` of the request that the sample is counted for."""
    links: tuple[str, ...]
    """Those of the step's other traced requests, some of them if there are many."""
    frames: tuple[FrameSample, ...]

    def to_json(self) -> bytes:
        """For `of_json`."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def of_json(cls, text: bytes) -> DispatchSample:
        """Raises ValueError, TypeError or KeyError for anything else than `to_json` writes."""
        values = json.loads(text)
        values["links"] = tuple(values["links"])
        values["frames"] = tuple(FrameSample(**frame) for frame in values["frames"])
        return cls(**values)


class Sampler:
    """Decides which layers of the steps of traced requests are sampled, and passes the samples on."""

    def __init__(self, path: Path, share: float, draw: Callable[[], float] = random.random) -> None:
        """path: the replica's socket; share: part of the layers, 0 to 1; draw: a number in [0, 1) for each layer."""
        self._path = str(path)
        self._share = share
        self._draw = draw
        self._socket: socket.socket | None = None
        self._requests: Sequence[str] = ()
        self._taken: dict[str, int] = {}

    def step(self, requests: Sequence[str]) -> None:
        """A step begins that computes tokens of these traced requests, named by their `traceparent`."""
        self._requests = requests
        if len(self._taken) > _REMEMBERED:
            self._taken = {name: self._taken[name] for name in requests if name in self._taken}

    def choose(self) -> str | None:
        """The request that the next layer's sample is for, that with the fewest so far; None: no sample."""
        if not self._requests or self._draw() >= self._share:
            return None
        request = min(self._requests, key=lambda name: self._taken.get(name, 0))
        taken = self._taken.get(request, 0)
        if taken >= MAX_SAMPLES:
            return None
        self._taken[request] = taken + 1
        return request

    def pass_on(self, layer: int, parent: str, frames: Sequence[FrameSample]) -> None:
        """Sends a sample, or drops it."""
        links = tuple(name for name in self._requests if name != parent)[:_LINKS]
        message = DispatchSample(layer, parent, links, tuple(frames)).to_json()
        if len(message) > MAX_BYTES:
            return
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self._socket.setblocking(False)
                self._socket.connect(self._path)
            self._socket.send(message)
        except BlockingIOError:  # the replica is behind
            pass
        except OSError:  # it is about to end, or was not there in time
            self.close()

    def close(self) -> None:
        """Closes the socket."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None


class SampledDispatcher(Dispatcher):
    """A dispatcher that tells a sampler about some of its layers."""

    def __init__(self, *arguments: Any, sampler: Sampler) -> None:
        """arguments: a Dispatcher's."""
        super().__init__(*arguments)
        self._sampler = sampler
        self._frames: list[FrameSample] | None = None
        """Of the layer at hand; None where it is no sample."""
        self._rounds = 0

    def __call__(self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """As Dispatcher's."""
        request = self._sampler.choose()
        if request is None:
            return super().__call__(layer, x, weights, ids)
        self._frames, self._rounds = [], 0
        try:
            return super().__call__(layer, x, weights, ids)
        finally:
            frames, self._frames = self._frames, None
            if frames:
                self._sampler.pass_on(layer, request, frames)

    def _exchange(self, step: _Step, table: RoutingTable, copies: LayerCopies, frames: list[Frame]) -> bool:
        if self._frames is None:
            return super()._exchange(step, table, copies, frames)
        begin_ns = time.time_ns()
        done = super()._exchange(step, table, copies, frames)
        end_ns = time.time_ns()
        row_bytes = step.x.shape[1] * step.x.element_size()
        for position, stream in frames:
            pairs = len(self._packer.positions(position)) // 8
            answered = stream.state == native.ANSWERED
            self._frames.append(
                FrameSample(
                    shard=table.targets[position].shard,
                    state=_STATES.get(stream.state, "overdue"),
                    retry=self._rounds,
                    begin_ns=begin_ns,
                    end_ns=end_ns,
                    rows=stream.rows,
                    pairs=pairs,
                    sent_bytes=HEADER_BYTES + stream.rows * row_bytes + pairs * PAIR_BYTES,
                    computed_us=stream.computed_us if answered else 0,
                    waited_us=stream.waited_us if answered else 0,
                )
            )
        self._rounds += 1
        return done
