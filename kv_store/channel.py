"""Bulk GET and SET over one connected socket: values go straight between the socket and the caller's memory.

RESP2, pipelined. A value is a list of buffers (scatter and gather), so that a header can stand beside a block of KV
cache without both being copied together. Deadlines are readings of `time.monotonic`.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence

from expertmesh.kv_store.errors import StoreClosed, StoreError, StoreRefused, StoreTimeout

Buffers = Sequence[memoryview]
"""Flat memoryviews of bytes (format B) that make up one value, in order."""

Reply = int | None | StoreError
"""Of a GET: the value's length, and None if there is none. Of a SET: the length written. Else what went wrong."""

_LINE_BYTES = 4096
"""Read ahead of a value's first byte; this much of a value is copied once more at most."""
_WINDOW_BYTES = 8 << 20
"""Values that the server may have to hold ready for us."""
_MAX_PARTS = 64
_TIMEVAL = struct.Struct("@ll")
_LEAST_S = 1e-5
"""Less than this is no time: to the kernel 0 is no limit."""
_MAX_STRAY_BYTES = 64 << 20
"""A value of an unexpected size is read and thrown away up to this, so that the connection can go on."""


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def _length(buffers: Buffers) -> int:
    return sum(map(len, buffers))


class Channel:
    """A socket that speaks RESP. Not for concurrent use; after any exception the connection is of no use any more.

    Each call ends by its deadline, whatever the server does: StoreTimeout, or StoreClosed if the server hangs up.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._plain = not isinstance(sock, ssl.SSLSocket)
        if self._plain:
            sock.setblocking(True)
        self._buffer = bytearray(_LINE_BYTES)
        self._view = memoryview(self._buffer)
        self._low = self._high = 0
        self._deadline = 0.0
        self._progress = False

    def get(self, items: Sequence[tuple[bytes, Buffers]], deadline: float) -> list[Reply]:
        """Reads values into the buffers of (key, buffers).

        A value's length is that of its buffers or it isn't read: the reply tells what the length was. Buffers of other
        keys than those whose reply is their length may hold anything afterwards.
        """
        self._begin(deadline)
        replies: list[Reply] = []
        asked = outstanding = 0
        sizes = [_length(buffers) for _, buffers in items]
        for (_, buffers), size in zip(items, sizes, strict=True):
            if outstanding <= _WINDOW_BYTES // 2:
                first = asked
                while asked < len(items) and (outstanding < _WINDOW_BYTES or asked == len(replies)):
                    outstanding += sizes[asked]
                    asked += 1
                if asked > first:
                    self._send([memoryview(b"".join(_command(b"GET", key) for key, _ in items[first:asked]))])
            replies.append(self._value(buffers, size))
            outstanding -= size
        return replies

    def set(self, items: Sequence[tuple[bytes, Buffers]], ttl_s: int, deadline: float) -> list[Reply]:
        """Writes the buffers of (key, buffers) as values that the server forgets after `ttl_s` seconds."""
        self._begin(deadline)
        self._send(list(self._set_parts(items, ttl_s)))
        replies: list[Reply] = []
        for _, buffers in items:
            line = self._line()
            replies.append(_length(buffers) if line == b"+OK" else self._refusal(line))
        return replies

    def exists(self, keys: Sequence[bytes], deadline: float) -> list[Reply]:
        """1 for each key that is there, else None."""
        self._begin(deadline)
        self._send([memoryview(b"".join(_command(b"EXISTS", key) for key in keys))])
        replies: list[Reply] = []
        for _ in keys:
            line = self._line()
            replies.append(1 if line == b":1" else None if line == b":0" else self._refusal(line))
        return replies

    def ping(self, deadline: float) -> None:
        """Whether the server answers. Raises StoreRefused if its answer is an error, LOADING for one."""
        self._begin(deadline)
        self._send([memoryview(_command(b"PING"))])
        line = self._line()
        if line != b"+PONG":
            raise self._refusal(line)

    def _begin(self, deadline: float) -> None:
        self._deadline = deadline
        self._progress = False

    @staticmethod
    def _set_parts(items: Sequence[tuple[bytes, Buffers]], ttl_s: int) -> Iterator[memoryview]:
        end = b""
        expiry = b"\r\n" + _command(b"EX", b"%d" % ttl_s).partition(b"\r\n")[2]
        for key, buffers in items:
            head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, _length(buffers))
            yield memoryview(end + head)
            yield from buffers
            end = expiry
        yield memoryview(end)

    def _value(self, buffers: Buffers, size: int) -> Reply:
        line = self._line()
        if line == b"$-1":
            return None
        if line[:1] != b"$" or not line[1:].isdigit():
            return self._refusal(line)
        length = int(line[1:])
        if length == size:
            for buffer in buffers:
                self._read(buffer)
        elif length <= _MAX_STRAY_BYTES:
            self._read(memoryview(bytearray(length)))
        else:
            raise StoreClosed(f"a value of {length} bytes where {size} were expected")
        end = bytearray(2)
        self._read(memoryview(end))
        if end != b"\r\n":
            raise StoreClosed("the server's reply is not RESP")
        return length

    @staticmethod
    def _refusal(line: bytes) -> StoreRefused:
        if line[:1] != b"-":
            raise StoreClosed("the server's reply is not the one to the command: the connection is out of step")
        return StoreRefused(line[1:].decode("utf-8", "replace"))

    def _line(self) -> bytes:
        """The next line of the replies, without its end."""
        searched = self._low
        while (end := self._buffer.find(b"\n", searched, self._high)) < 0:
            if self._high - self._low == _LINE_BYTES:
                raise StoreClosed(f"a reply's line is longer than {_LINE_BYTES} bytes")
            if self._low:
                left = self._high - self._low
                self._buffer[:left] = self._buffer[self._low : self._high]
                self._low, self._high = 0, left
            searched = self._high
            self._high += self._receive(self._view[self._high :])
        line = bytes(self._view[self._low : end - 1])
        self._low = end + 1
        return line

    def _read(self, target: memoryview) -> None:
        """Fills the target."""
        got = min(self._high - self._low, len(target))
        target[:got] = self._view[self._low : self._low + got]
        self._low += got
        while got < len(target):
            got += self._receive(target[got:], socket.MSG_WAITALL if self._plain else 0)

    def _receive(self, target: memoryview, flags: int = 0) -> int:
        self._limit(socket.SO_RCVTIMEO)
        try:
            got = self._sock.recv_into(target, 0, flags)
        except (TimeoutError, BlockingIOError):
            raise self._late() from None
        except OSError as error:
            raise StoreClosed(f"the connection broke: {error}") from error
        if not got:
            raise StoreClosed("the server closed the connection")
        self._progress = True
        return got

    def _send(self, parts: list[memoryview]) -> None:
        first = 0
        while first < len(parts):
            self._limit(socket.SO_SNDTIMEO)
            try:
                if self._plain:  # TLS has no gathering write
                    sent = self._sock.sendmsg(parts[first : first + _MAX_PARTS])
                else:
                    sent = self._sock.send(parts[first])
            except (TimeoutError, BlockingIOError):
                raise self._late() from None
            except OSError as error:
                raise StoreClosed(f"the connection broke: {error}") from error
            while first < len(parts) and sent >= len(parts[first]):
                sent -= len(parts[first])
                first += 1
            if sent:
                parts[first] = parts[first][sent:]

    def _limit(self, option: int) -> None:
        """Bounds the next call. The kernel keeps the time: Python's own timeout costs two more calls each time."""
        left = self._deadline - time.monotonic()
        if left < _LEAST_S:
            raise self._late()
        if self._plain:
            self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(left), int(left % 1 * 1e6)))
        else:
            self._sock.settimeout(left)

    def _late(self) -> StoreTimeout:
        return StoreTimeout("the server did not answer in time", self._progress)
