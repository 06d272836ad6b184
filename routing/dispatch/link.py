"""One authenticated connection to a shard, with at most one frame in flight; `native.exchange` moves the bytes."""

from __future__ import annotations

import math
import os
import socket

from expertmesh.errors import WireError
from expertmesh.routing import native
from expertmesh.routing.wire import Limits, parse_header


class Link:
    """A connection to a shard."""

    def __init__(self, sock: socket.socket, shard: str, limits: Limits, renew_at: float = math.inf) -> None:
        self.sock = sock
        self.shard = shard
        self.stream = native.ClientStream(sock.fileno(), limits.max_rows, limits.max_bytes, limits.max_pairs_per_row)
        self.renew_at = renew_at
        """`time.monotonic()` from which on another connection is opened in the place of this one."""
        self._limits = limits

    def refusal(self) -> str:
        """The shard's words, where it refused the frame."""
        return f"shard {self.shard}: {self.stream.message.decode(errors='replace')}"

    def failure(self) -> str:
        """Why the connection broke, where it did."""
        error = self.stream.error
        if error > 0:
            return f"shard {self.shard} is gone: {os.strerror(error)}"
        if error == 0:
            return f"shard {self.shard} closed the connection"
        try:
            said = parse_header(self.stream.bad_header, self._limits)
        except WireError as malformed:
            return f"shard {self.shard} broke the protocol: {malformed}"
        return f"shard {self.shard} answered with {said}"

    def close(self) -> None:
        """Closes the socket."""
        self.stream.close()
        self.sock.close()
