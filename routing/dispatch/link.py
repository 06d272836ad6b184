"""One authenticated connection to a shard: frames out, frames in, never blocking."""

from __future__ import annotations

import itertools
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expertmesh.errors import WireError
from expertmesh.routing.wire import (
    DTYPES,
    HEADER_BYTES,
    Header,
    Kind,
    Limits,
    parse_combine,
    parse_error,
    parse_header,
)
from expertmesh.routing.wire.frame import COMBINE_FRAME, COMBINE_PREFIX, Buffer

_INITIAL_BUFFER_BYTES = 1 << 20
_frame_ids = itertools.count(1)


def next_frame_id() -> int:
    """An id that this process never used before."""
    return next(_frame_ids)


@dataclass(slots=True)
class Request:
    """A frame that waits for its answer."""

    frame: int
    pairs: np.ndarray[Any, np.dtype[np.int64]]
    """Positions of its (token, expert) pairs in the flattened [T, k] of the step."""
    token_rows: np.ndarray[Any, np.dtype[np.int64]] | None
    """Which rows of the step's x it holds, in order; None: all of them."""
    rows: int
    body_bytes: int
    """Length of the answer's body."""
    deadline: float
    """`time.monotonic()` at which it is given up."""
    dtype: torch.dtype
    """Of the rows, there and back."""
    prefix: bytes = b""
    """How the header of a right answer begins (wire.frame.combine_prefix)."""


class Refused(Exception):
    """The shard answered a frame with an error: the request and its words."""

    def __init__(self, request: Request, message: str) -> None:
        super().__init__(message)
        self.request = request


class Link:
    """A connection with the frames in flight on it. Any WireError means that it must be closed."""

    def __init__(self, sock: socket.socket, shard: str, limits: Limits) -> None:
        self.sock = sock
        self.shard = shard
        self.waiting: deque[Request] = deque()
        self._limits = limits
        self._outbox: deque[memoryview] = deque()
        self._buffer = bytearray(_INITIAL_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._have = 0

    def fileno(self) -> int:
        """The socket's descriptor, for `poll`."""
        return self.sock.fileno()

    @property
    def has_input(self) -> bool:
        """Whether bytes were read that no call of `receive` has used yet."""
        return bool(self._have)

    @property
    def has_output(self) -> bool:
        """Whether bytes wait until the socket takes more."""
        return bool(self._outbox)

    def send(self, parts: Sequence[Buffer], request: Request) -> None:
        """Queues a frame and writes what the socket takes now. Raises WireError if the peer is gone.

        The parts must stay unchanged until the answer is here or the link is closed.
        """
        self.waiting.append(request)
        if self._outbox:
            self._outbox.extend(memoryview(p).cast("B") for p in parts)
            return
        try:
            sent = self.sock.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise WireError(f"shard {self.shard} is gone: {error}") from error
        for part in parts:
            size = len(part)
            if sent < size:
                self._outbox.append(memoryview(part)[sent:] if sent else memoryview(part))
                sent = 0
            else:
                sent -= size

    def flush(self) -> None:
        """Writes more of the queued bytes. Raises WireError if the peer is gone."""
        try:
            while self._outbox:
                sent = self.sock.send(self._outbox[0])
                if sent < len(self._outbox[0]):
                    self._outbox[0] = self._outbox[0][sent:]
                    return
                self._outbox.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            raise WireError(f"shard {self.shard} is gone: {error}") from error

    def receive(self) -> tuple[Request, torch.Tensor] | None:
        """Reads what is there: an answered request and its y [rows, H], or None if none is complete yet.

        y is a view into the link's buffer: use it before the next call. Answers to requests that are no longer
        waited for are dropped. Raises Refused if the shard answered with an error, WireError if it broke the
        protocol or went away.
        """
        while True:
            want = HEADER_BYTES + (self.waiting[0].body_bytes if self.waiting else 0)
            if self._have < want:
                self._read(want)
            if self._have == want and self._is_expected():
                request = self.waiting.popleft()
                self._have = 0
                y = torch.frombuffer(
                    self._buffer,
                    dtype=request.dtype,
                    count=request.body_bytes // request.dtype.itemsize,
                    offset=HEADER_BYTES,
                )
                return request, y.view(request.rows, -1)
            header = self._next_header(want)
            if header is None:
                return None
            answered = self._take(header)
            if answered is not None or not self._have:
                return answered

    def _is_expected(self) -> bool:
        """Whether the buffer begins with the right answer to the oldest request: nearly always, so it is cheap."""
        if not self.waiting or self._view[:COMBINE_PREFIX] != self.waiting[0].prefix:
            return False
        return int.from_bytes(self._view[COMBINE_FRAME], "little") == self.waiting[0].frame

    def _next_header(self, want: int) -> Header | None:
        """The header of the first frame in the buffer, once the whole frame is there."""
        if self._have < HEADER_BYTES:
            return None
        header = parse_header(self._view[:HEADER_BYTES], self._limits)
        need = HEADER_BYTES + header.body_bytes
        if self._have < need and need > want:
            self._read(need)
        return header if self._have >= need else None

    def _read(self, want: int) -> None:
        if want > len(self._buffer):
            grown = bytearray(max(want, 2 * len(self._buffer)))
            grown[: self._have] = self._view[: self._have]
            self._buffer, self._view = grown, memoryview(grown)
        try:
            got = self.sock.recv_into(self._view[self._have : want])
        except BlockingIOError:
            return
        except OSError as error:
            raise WireError(f"shard {self.shard} is gone: {error}") from error
        if got == 0:
            raise WireError(f"shard {self.shard} closed the connection")
        self._have += got

    def _take(self, header: Header) -> tuple[Request, torch.Tensor] | None:
        need = HEADER_BYTES + header.body_bytes
        body = self._view[HEADER_BYTES:need]
        request = self._matching(header.frame)
        message, y = "", None
        if header.kind is Kind.ERROR:
            message = parse_error(header, body)
        elif request is not None:
            if (
                header.kind is not Kind.COMBINE
                or header.rows != request.rows
                or len(body) != request.body_bytes
                or DTYPES[header.dtype] is not request.dtype
            ):
                raise WireError(f"shard {self.shard} answered frame {header.frame} with {header}")
            y = parse_combine(header, body)
        if request is not None:
            self.waiting.remove(request)
        rest = self._have - need
        if rest:  # the frame was shorter than the awaited one: the next one has begun behind it
            y = None if y is None else y.clone()
            self._buffer[:rest] = self._buffer[need : self._have]
        self._have = rest
        if request is None:
            return None
        if y is None:
            raise Refused(request, message)
        return request, y

    def _matching(self, frame: int) -> Request | None:
        for request in self.waiting:
            if request.frame == frame:
                return request
        return None

    def overdue(self, now: float | None = None) -> bool:
        """Whether the oldest request has passed its deadline."""
        return bool(self.waiting) and self.waiting[0].deadline <= (time.monotonic() if now is None else now)

    def close(self) -> list[Request]:
        """Closes the socket; the requests that were still waiting."""
        self.sock.close()
        lost = list(self.waiting)
        self.waiting.clear()
        return lost
