"""A client of a shard: frames in, answers out, never blocking; `native.ServerStream` moves the bytes."""

from __future__ import annotations

import socket

import torch

from expertmesh.errors import WireError
from expertmesh.routing import native
from expertmesh.routing.wire import HEADER_BYTES, Kind, Limits, dtype_code, parse_dispatch, parse_header
from expertmesh.routing.wire.frame import DispatchBody, dispatch_views

_MAX_UNSENT_BYTES = 1 << 30
_CACHED_SHAPES = 256


class Connection:
    """A client that sends rows of one width and dtype. Any WireError means that it must be closed."""

    def __init__(self, sock: socket.socket, width: int, dtype: torch.dtype, limits: Limits) -> None:
        self.sock = sock
        self.stream = native.ServerStream(
            sock.fileno(), dtype_code(dtype), width, limits.max_rows, limits.max_bytes, limits.max_pairs_per_row
        )
        """Knows layer, rows and pairs of the frame at hand."""
        self.arrived_ns = 0
        """When the frame at hand came, and `answered_ns` when the last one was computed, by the owner's clock, who sets
        both."""
        self.answered_ns = 0
        self.body: DispatchBody
        """The frame at hand: views that are valid until the next call of `receive`."""
        self._width = width
        self._row_bytes = width * dtype.itemsize
        self._dtype = dtype
        self._limits = limits
        self._buffer: bytearray | None = None
        self._bodies: dict[tuple[int, int], DispatchBody] = {}

    def receive(self) -> bool:
        """Reads what is there; whether a whole frame is at hand. Raises WireError."""
        try:
            whole = self.stream.receive()
        except OSError as error:
            raise WireError(f"client is gone: {error}") from error
        if whole:
            self.body = self._views()
        elif whole is None:
            raise WireError(self._why_refused())
        return bool(whole)

    def answer(self, y: torch.Tensor, at: int, epoch: int, computed_us: int, waited_us: int) -> None:
        """Answers the frame at hand with its rows of y, which begin at row `at`.

        y: [N, H], contiguous, in the frame's dtype. Raises WireError if the client is gone or never reads.
        """
        try:
            self.stream.answer(y, y.data_ptr() + at * self._row_bytes, epoch, computed_us, waited_us)
        except OSError as error:
            raise WireError(f"client is gone: {error}") from error
        if self.stream.unsent > _MAX_UNSENT_BYTES:
            raise WireError("client does not read its answers")

    def refuse(self, code: int, message: str, epoch: int) -> None:
        """Answers the frame at hand with an error. Raises WireError if the client is gone."""
        try:
            self.stream.refuse(code, message.encode(errors="replace"), epoch)
        except OSError as error:
            raise WireError(f"client is gone: {error}") from error

    def flush(self) -> None:
        """Writes more of the answers that wait. Raises WireError if the client is gone."""
        try:
            self.stream.flush()
        except OSError as error:
            raise WireError(f"client is gone: {error}") from error

    def close(self) -> None:
        """Closes the socket and drops what it was to send."""
        self.stream.close()
        self.sock.close()

    def _views(self) -> DispatchBody:
        stream = self.stream
        if stream.buffer is not self._buffer or len(self._bodies) > _CACHED_SHAPES:
            self._buffer = stream.buffer
            self._bodies.clear()
        shape = (stream.rows, stream.pairs)
        body = self._bodies.get(shape)
        if body is None:
            body = dispatch_views(self._buffer, self._dtype, shape[0], self._width, shape[1], HEADER_BYTES)
            self._bodies[shape] = body
        return body

    def _why_refused(self) -> str:
        """What the specification says about the bytes that are no frame for this side."""
        received = bytearray(self.stream.received)
        try:
            header = parse_header(received, self._limits)
            if header.kind is not Kind.DISPATCH:
                return f"client sent a frame of kind {header.kind.name}"
            if header.width != self._width or header.dtype != dtype_code(self._dtype):
                return (
                    f"frame of width {header.width}, dtype code {header.dtype}; "
                    f"this shard serves width {self._width} in {self._dtype}"
                )
            parse_dispatch(header, memoryview(received)[HEADER_BYTES:])
        except WireError as error:
            return str(error)
        raise AssertionError("the extension refused a frame that the specification allows")
