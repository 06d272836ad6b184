"""Targets of the data plane: the C extension on real sockets, against the specification in wire/frame.py."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from expertmesh.errors import WireError
from expertmesh.routing import native
from expertmesh.routing.wire import HEADER_BYTES, Header, Kind, Limits, combine_parts, error_parts, parse_header
from expertmesh.routing.wire.frame import DTYPES, dispatch_parts, dtype_code, parse_dispatch, parse_error
from tests.fuzz.target import Target

LIMITS = Limits(max_rows=64, max_bytes=1 << 16, max_pairs_per_row=8)
_OF_HEADERS = (LIMITS, Limits(), Limits(2**32 - 1, 2**62 - 1, 2**64 - 1), Limits(2**40, 2**48, 2**33))
_WIDTH, _LAYER, _FRAME = 8, 3, 7
_ROWS = 2
_DTYPE = torch.float32
_LARGE = Limits(max_rows=1 << 15, max_bytes=2 << 20, max_pairs_per_row=8)
"""Beyond a stream's first buffer."""
_FIRST_BUFFER_BYTES = 1 << 20
_TIMEOUT_S = 20.0


def of(limits: Limits) -> tuple[int, int, int]:
    """As the extension takes them."""
    return limits.max_rows, limits.max_bytes, limits.max_pairs_per_row


def _dispatch(rows: int, pairs: int, width: int = _WIDTH, dtype: torch.dtype = _DTYPE, frame: int = _FRAME) -> bytes:
    named = np.arange(pairs, dtype=np.int32)
    x = torch.arange(rows * width).view(rows, width).to(dtype)
    parts = dispatch_parts(x, named, named % rows, named.astype(np.float32), layer=_LAYER, epoch=5, frame=frame)
    return b"".join(bytes(part) for part in parts)


def _combine(rows: int, width: int = _WIDTH, dtype: torch.dtype = _DTYPE, frame: int = _FRAME) -> bytes:
    request = Header(Kind.DISPATCH, dtype_code(dtype), _LAYER, rows, rows, width, 5, frame)
    return b"".join(bytes(part) for part in combine_parts(request, torch.ones(rows, width, dtype=dtype), 6, 10, 20))


def _error(frame: int = _FRAME, message: str = "no such expert") -> bytes:
    request = Header(Kind.DISPATCH, 1, _LAYER, 2, 2, _WIDTH, 5, frame)
    return b"".join(bytes(part) for part in error_parts(request, 1, message, 6))


class Headers(Target):
    """One byte that chooses limits, and a header: the C and the specification take and refuse the same."""

    name = "header"

    def seeds(self) -> list[bytes]:
        """A good header of each kind and dtype."""
        frames = [_error(), *(make(2, dtype=dtype) for dtype in DTYPES.values() for make in (_combine, _both))]
        return [bytes([limits]) + frame[:HEADER_BYTES] for limits in range(len(_OF_HEADERS)) for frame in frames]

    def run(self, data: bytes) -> None:
        """Fails if the two differ in anything."""
        limits = _OF_HEADERS[data[0] % len(_OF_HEADERS)] if data else LIMITS
        raw = data[1 : 1 + HEADER_BYTES]
        parsed = native.parse_header(raw, *of(limits))
        if len(raw) < HEADER_BYTES:
            assert parsed is None, "taken with too few bytes"
            return
        try:
            header = parse_header(raw, limits)
        except WireError:
            assert parsed is None, "taken by the extension only"
            return
        assert header.body_bytes <= max(limits.max_bytes, 4096), "a body beyond the limit"
        times = (header.computed_us, header.waited_us) if header.kind is Kind.COMBINE else (header.budget_ms, 0)
        assert parsed == (*header[:8], *times), f"{parsed} where the specification reads {header}"


def _both(rows: int, dtype: torch.dtype) -> bytes:
    return _dispatch(rows, rows + 1, dtype=dtype)


@dataclass(slots=True)
class _Refused:
    """What stands where a frame should be."""


def _most_held(limits: Limits) -> int:
    """More bytes than this no peer may make a stream hold."""
    return max(_FIRST_BUFFER_BYTES, HEADER_BYTES + limits.max_bytes)


def _frames_of(stream: bytes, limits: Limits) -> Iterator[tuple[Header, bytes] | _Refused]:
    """What a shard of `_WIDTH` and `_DTYPE` must see in a stream; an unfinished frame at its end is not told."""
    at = 0
    while len(stream) - at >= HEADER_BYTES:
        try:
            header = parse_header(stream[at : at + HEADER_BYTES], limits)
        except WireError:
            yield _Refused()
            return
        if header.kind is not Kind.DISPATCH or header.width != _WIDTH or header.dtype != dtype_code(_DTYPE):
            yield _Refused()
            return
        end = at + HEADER_BYTES + header.body_bytes
        if end > len(stream):
            return
        try:
            parse_dispatch(header, memoryview(bytearray(stream[at + HEADER_BYTES : end])))
        except WireError:
            yield _Refused()
            return
        yield header, stream[at:end]
        at = end


class Server(Target):
    """One byte (how the rest arrives; bit 7: limits), and what a client sends to a shard, which answers each frame."""

    name = "server"

    def seeds(self) -> list[bytes]:
        """Frames alone, behind each other, cut off, and of the wrong kind."""
        one, two = _dispatch(1, 1), _dispatch(5, 9, frame=8)
        streams = [one, two, one + two + one, two[:-1], one + two[:60], _dispatch(64, 512), _combine(2), _error()]
        streams += [_dispatch(2, 2, width=4), _dispatch(2, 2, dtype=torch.float16)]
        large = Header(Kind.DISPATCH, 1, _LAYER, 1 << 14, 1 << 14, _WIDTH, 5, _FRAME).pack()
        return [b"\x80" + large, *(bytes([cuts]) + stream for stream in streams for cuts in (0, 1, 3))]

    def run(self, data: bytes) -> None:
        """Fails unless exactly the specified frames come out, and the answers are read back as sent."""
        cuts, stream = (data[0], data[1:]) if data else (0, b"")
        limits = _LARGE if cuts & 0x80 else LIMITS
        expected = _frames_of(stream, limits)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            shard = native.ServerStream(ours.fileno(), dtype_code(_DTYPE), _WIDTH, *of(limits))
            for piece in _pieces(stream, cuts):
                theirs.sendall(piece)
                refused = self._drain(shard, theirs, expected)
                assert len(shard.buffer) <= _most_held(limits), f"{len(shard.buffer)} bytes taken"
                if refused:
                    break
            else:
                assert next(expected, None) is None, "a frame was not found, or not refused"
                theirs.shutdown(socket.SHUT_WR)
                try:
                    assert not shard.receive(), "a frame out of nothing"
                    raise AssertionError("the end was not noticed")
                except ConnectionResetError:
                    pass
            shard.close()

    def _drain(
        self, shard: native.ServerStream, client: socket.socket, expected: Iterator[tuple[Header, bytes] | _Refused]
    ) -> bool:
        """Takes the frames that are there; whether the rest is refused."""
        while True:
            came = shard.receive()
            if came is False:
                return False
            wanted = next(expected, None)
            if came is None:
                assert isinstance(wanted, _Refused), f"refused {wanted}"
                return True
            assert isinstance(wanted, tuple), f"took a frame where {wanted} is"
            header, raw = wanted
            fields = (shard.layer, shard.rows, shard.pairs, shard.frame)
            assert fields == (header.layer, header.rows, header.pairs, header.frame)
            assert shard.buffer[: len(raw)] == raw, "another frame than was sent"
            self._answer(shard, client, header, raw)

    def _answer(self, shard: native.ServerStream, client: socket.socket, header: Header, raw: bytes) -> None:
        if header.pairs % 2:
            shard.refuse(9, b"odd", header.epoch)
            answer = b"".join(bytes(part) for part in error_parts(header, 9, "odd", header.epoch))
        else:
            y = torch.frombuffer(bytearray(raw[HEADER_BYTES:]), dtype=_DTYPE, count=header.rows * header.width)
            shard.answer(y, y.data_ptr(), header.epoch, 11, 12)
            parts = combine_parts(header, y.view(header.rows, header.width), header.epoch, 11, 12)
            answer = b"".join(bytes(part) for part in parts)
        got = b""
        while len(got) < len(answer):
            got += client.recv(len(answer))
        assert got == answer, "the answer is not as specified"


def _pieces(stream: bytes, cuts: int) -> Iterator[bytes]:
    """The stream in up to four pieces, the same for the same `cuts`."""
    places = sorted(random.Random(cuts).randrange(len(stream) + 1) for _ in range(cuts % 4))
    yield from (stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True))


class Client(Target):
    """What a shard answers to two frames that are sent to it one after the other on a connection."""

    name = "client"

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self._x = torch.arange(_ROWS * _WIDTH, dtype=_DTYPE)
        self._ids = torch.tensor([0, 0], dtype=torch.int32)
        self._weights = torch.ones(2)
        self._copies = np.zeros((1, 1), dtype=np.int32)

    def seeds(self) -> list[bytes]:
        """Right answers, refusals, late answers in front of them, and what is no answer."""
        right, then = _combine(_ROWS), _combine(_ROWS, frame=_FRAME + 1)
        late, words = _combine(5, frame=1), _error()
        streams = [
            right + then,
            words + then,
            right + _error(_FRAME + 1),
            late + right + then,
            late,
            right[:-1],
            words[:-1],
        ]
        streams += [_combine(3), _combine(_ROWS, width=4), _combine(_ROWS, dtype=torch.bfloat16), _dispatch(2, 2)]
        return [*streams, _error(message="x" * 4000) + then, _error(1) + late + right + _error(2) + then]

    def run(self, data: bytes) -> None:
        """Fails unless each frame ends as the specification reads the stream, without waiting."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            stream = native.ClientStream(ours.fileno(), *of(LIMITS))
            packer = native.StepPacker(*of(LIMITS))
            at = 0
            for frame in (_FRAME, _FRAME + 1):
                packer.route(
                    self._x.data_ptr(), dtype_code(_DTYPE), _WIDTH, self._ids.data_ptr(), self._weights.data_ptr(),
                    _ROWS, 1, self._copies, None, 1, None,
                )  # fmt: skip
                packer.stage(0, stream, _LAYER, 5, frame, 0)
                native.exchange([(0, stream)], _TIMEOUT_S)
                wanted, at = _answer_in(data, at, frame)
                state = (stream.state, stream.error) if stream.state == native.BROKEN else (stream.state, 0)
                assert state == wanted, f"{state} where {wanted} is right (ANSWERED {native.ANSWERED})"
                assert len(stream.buffer) <= _most_held(LIMITS)
                if stream.state == native.BROKEN:
                    break
                self._check(stream, data, at)
            stream.close()

    def _check(self, stream: native.ClientStream, data: bytes, end: int) -> None:
        if stream.state == native.REFUSED:
            header = parse_header(stream.buffer, LIMITS)
            assert stream.message == data[end - header.rows : end]
            parse_error(header, stream.message)
            return
        size = HEADER_BYTES + _ROWS * _WIDTH * _DTYPE.itemsize
        assert stream.buffer[:size] == data[end - size : end], "another answer than was sent"
        header = parse_header(stream.buffer, LIMITS)
        assert (stream.computed_us, stream.waited_us) == (header.computed_us, header.waited_us)


def _answer_in(data: bytes, at: int, frame: int) -> tuple[tuple[int, int], int]:
    """How a frame ends whose answers begin at `at`: (state, error), and where the next one's begin."""
    gone = (native.BROKEN, 0)
    while len(data) - at >= HEADER_BYTES:
        try:
            header = parse_header(data[at : at + HEADER_BYTES], LIMITS)
        except WireError:
            return (native.BROKEN, -1), at
        end = at + HEADER_BYTES + header.body_bytes
        if header.frame == frame:
            shape = (header.kind, header.dtype, header.layer, header.rows, header.width)
            right = shape == (Kind.COMBINE, dtype_code(_DTYPE), _LAYER, _ROWS, _WIDTH)
            if not right and header.kind is not Kind.ERROR:
                return (native.BROKEN, -1), at
            if end > len(data):
                return gone, at
            return (native.ANSWERED if right else native.REFUSED, 0), end
        if end > len(data):
            return gone, at
        at = end
    return gone, at
