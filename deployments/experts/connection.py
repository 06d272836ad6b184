"""A client of a shard: bytes in, bytes out, never blocking."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from itertools import islice

from expertmesh.errors import WireError
from expertmesh.routing.wire import HEADER_BYTES, Header, Limits, parse_header
from expertmesh.routing.wire.frame import Buffer

_MAX_UNSENT_BYTES = 1 << 30
_MAX_BUFFERS = 64
"""Handed to the kernel at once: it takes no more than 1,024."""


class Connection:
    """A client: bytes in, bytes out."""

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        self.sock = sock
        self.outbox: deque[memoryview] = deque()
        self._limits = limits
        self._buffer = bytearray(1 << 20)
        self._view = memoryview(self._buffer)
        self._have = 0
        self._used = 0

    def receive(self) -> tuple[Header, memoryview] | None:
        """The next whole frame, or None. Its body is a view: valid until the next call. Raises WireError."""
        if self._used:
            rest = self._have - self._used
            self._buffer[:rest] = self._buffer[self._used : self._have]
            self._have, self._used = rest, 0
        header = self._header()
        if header is None or self._have < HEADER_BYTES + header.body_bytes:
            self._read(len(self._buffer) if header is None else HEADER_BYTES + header.body_bytes)
            header = self._header()
        if header is None or self._have < HEADER_BYTES + header.body_bytes:
            return None
        self._used = HEADER_BYTES + header.body_bytes
        return header, self._view[HEADER_BYTES : self._used]

    @property
    def has_input(self) -> bool:
        """Whether bytes beyond the last frame have been read already."""
        return self._have > self._used

    def _header(self) -> Header | None:
        return parse_header(self._view[:HEADER_BYTES], self._limits) if self._have >= HEADER_BYTES else None

    def _read(self, want: int) -> None:
        if want > len(self._buffer):
            grown = bytearray(want)
            grown[: self._have] = self._view[: self._have]
            self._buffer, self._view = grown, memoryview(grown)
        try:
            got = self.sock.recv_into(self._view[self._have :])
        except BlockingIOError:
            return
        except OSError as error:
            raise WireError(f"client is gone: {error}") from error
        if got == 0:
            raise WireError("client closed the connection")
        self._have += got

    def send(self, parts: Sequence[Buffer]) -> None:
        """Queues a frame and writes what the socket takes. Raises WireError if the client is gone or never reads."""
        self.outbox.extend(memoryview(part).cast("B") for part in parts)
        self.flush()
        if sum(map(len, self.outbox)) > _MAX_UNSENT_BYTES:
            raise WireError("client does not read its answers")

    def flush(self) -> None:
        """Writes more of the queued bytes."""
        try:
            while self.outbox:
                sent = self.sock.sendmsg(list(islice(self.outbox, _MAX_BUFFERS)))
                while self.outbox and sent >= len(self.outbox[0]):
                    sent -= len(self.outbox.popleft())
                if self.outbox and sent:
                    self.outbox[0] = self.outbox[0][sent:]
        except BlockingIOError:
            return
        except OSError as error:
            raise WireError(f"client is gone: {error}") from error
