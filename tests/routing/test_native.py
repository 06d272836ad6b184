"""The extension against its specification, `wire/frame.py`: byte for byte, and bytes that are no frames."""

from __future__ import annotations

import errno
import itertools
import os
import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expertmesh.errors import WireError
from expertmesh.routing import native
from expertmesh.routing.wire import (
    DTYPES,
    HEADER_BYTES,
    Header,
    Kind,
    Limits,
    combine_parts,
    dispatch_parts,
    dtype_code,
    error_parts,
    parse_combine,
    parse_dispatch,
    parse_error,
    parse_header,
)
from expertmesh.routing.wire.frame import MAX_MESSAGE_BYTES

LIMITS = Limits(max_rows=64, max_bytes=1 << 16, max_pairs_per_row=8)
WIDTH = 8
U32, U64 = 2**32 - 1, 2**64 - 1


def of(limits: Limits) -> tuple[int, int, int]:
    """As the extension takes them."""
    return limits.max_rows, limits.max_bytes, limits.max_pairs_per_row


def join(parts: list[Any]) -> bytes:
    return b"".join(bytes(part) for part in parts)


def bits(tensor: torch.Tensor) -> bytes:
    """Raw bytes, so that NaNs compare too."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@contextmanager
def client(limits: Limits = LIMITS) -> Iterator[tuple[native.ClientStream, socket.socket]]:
    """A stream, and the shard's end of its connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(10)
        yield native.ClientStream(ours.fileno(), *of(limits)), theirs


@contextmanager
def server(
    dtype: torch.dtype = torch.float32, width: int = WIDTH, limits: Limits = LIMITS
) -> Iterator[tuple[native.ServerStream, socket.socket]]:
    """A stream, and the client's end of its connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(10)
        yield native.ServerStream(ours.fileno(), dtype_code(dtype), width, *of(limits)), theirs


def read_all(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += sock.recv(count - len(data)) or pytest.fail(f"{len(data)} of {count} bytes")
    return data


# -- headers ------------------------------------------------------------------------------------------------------

BOUNDARY = st.sampled_from([0, 1, 2, 8, 63, 64, 65, 4096, 4097, 8192, 2**14 - 3, 2**14 - 2, 2**31, U32])
FIELDS = st.tuples(
    st.sampled_from([b"XMSH", b"XMSh"]),
    st.sampled_from([1, 1, 1, 0, 2]),
    st.integers(0, 5),
    st.integers(0, 4),
    st.sampled_from([0, 0, 0, 1]),
    st.integers(0, U32),
    st.one_of(BOUNDARY, st.integers(0, 70)),
    st.one_of(BOUNDARY, st.integers(0, 600)),
    st.one_of(BOUNDARY, st.integers(0, 20_000)),
    st.integers(0, U64),
    st.integers(0, U64),
    st.integers(0, U32),
    st.one_of(st.just(0), st.integers(0, U32)),
)


def same_as_specified(data: bytes, limits: Limits) -> bool:
    """Whether both accept the header; fails if they differ in anything."""
    parsed = native.parse_header(data, *of(limits))
    try:
        header = parse_header(data, limits)
    except WireError:
        assert parsed is None, f"taken: {data.hex()}"
        return False
    times = (header.computed_us, header.waited_us) if header.kind is Kind.COMBINE else (header.budget_ms, 0)
    assert parsed == (*header[:8], *times)
    return True


@settings(deadline=None)
@given(fields=FIELDS, data=st.data())
def test_headers_are_taken_and_refused_as_specified(fields: tuple[Any, ...], data: st.DataObject) -> None:
    limits = data.draw(st.sampled_from([LIMITS, Limits(), Limits(U32, 2**62 - 1, U64), Limits(2**40, 2**48, 2**33)]))
    packed = struct.pack("<4sBBBBIIIIQQII", *fields)
    same_as_specified(packed, limits)


@settings(deadline=None)
@given(data=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_random_bytes_are_no_header(data: bytes) -> None:
    assert not same_as_specified(data, LIMITS)


@settings(deadline=None)
@given(at=st.integers(0, HEADER_BYTES - 1), value=st.integers(0, 255), kind=st.sampled_from(list(Kind)))
def test_a_header_with_one_byte_changed_is_judged_as_specified(at: int, value: int, kind: Kind) -> None:
    good = {
        Kind.DISPATCH: Header(Kind.DISPATCH, 1, 3, 2, 4, 8, 5, 6, 7),
        Kind.COMBINE: Header(Kind.COMBINE, 2, 3, 2, 0, 8, 5, 6, 0, 7, 8),
        Kind.ERROR: Header(Kind.ERROR, 0, 3, 2, 4, 0, 5, 6, 7),
    }[kind]
    assert same_as_specified(good.pack(), LIMITS)
    data = bytearray(good.pack())
    data[at] = value
    same_as_specified(bytes(data), LIMITS)


@pytest.mark.parametrize("data", [b"", b"XMSH", Header(Kind.ERROR, 0, 1, 0, 0, 0, 0, 0).pack()[:-1]])
def test_too_few_bytes_are_no_header(data: bytes) -> None:
    assert native.parse_header(data, *of(LIMITS)) is None


# -- packing ------------------------------------------------------------------------------------------------------


class Step:
    """A step of random bits and its copies."""

    def __init__(self, dtype: torch.dtype, tokens: int, top_k: int, width: int, experts: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        raw = generator.integers(0, 256, tokens * width * dtype.itemsize, dtype=np.uint8)  # any bits, NaNs too
        self.x = torch.from_numpy(raw).view(dtype).view(tokens, width)
        self.ids = torch.from_numpy(generator.integers(0, experts, (tokens, top_k)).astype(np.int32))
        self.weights = torch.from_numpy(generator.standard_normal((tokens, top_k)).astype(np.float32))
        self.counts = np.bincount(self.ids.flatten().numpy(), minlength=experts)
        self.generator = generator

    def route(
        self,
        packer: native.StepPacker,
        copies: np.ndarray[Any, Any],
        shares: np.ndarray[Any, Any] | None = None,
        targets: int = 3,
        positions: np.ndarray[Any, Any] | None = None,
    ) -> list[int]:
        """Routes this step."""
        tokens, top_k = self.ids.shape
        return packer.route(
            self.x.data_ptr(), dtype_code(self.x.dtype), self.x.shape[1], self.ids.data_ptr(), self.weights.data_ptr(),
            tokens, top_k, copies, shares, targets, positions,
        )  # fmt: skip

    def expected(self, positions: list[int], **header: Any) -> bytes:
        """The specification's frame of some pairs."""
        top_k = self.ids.shape[1]
        tokens = sorted({position // top_k for position in positions})
        row = {token: np.int32(i) for i, token in enumerate(tokens)}
        return join(
            dispatch_parts(
                self.x[tokens],
                self.ids.flatten()[positions].numpy(),
                np.array([row[position // top_k] for position in positions], dtype=np.int32),
                self.weights.flatten()[positions].numpy(),
                **header,
            )
        )


def sent_by(packer: native.StepPacker, target: int, **header: Any) -> bytes:
    """What goes over the wire for a target; nobody answers."""
    with client(Limits()) as (stream, shard):
        packer.stage(target, stream, header["layer"], header["epoch"], header["frame"], header["budget_ms"])
        assert not native.exchange([(target, stream)], 0.0)
        assert stream.state == native.OVERDUE
        return shard.recv(1 << 24)


@settings(deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    tokens=st.integers(1, 40),
    top_k=st.integers(1, 6),
    width=st.integers(1, 33),
    seed=st.integers(0, 10_000),
    split=st.booleans(),
    some=st.booleans(),
    layer=st.integers(0, U32),
    epoch=st.integers(0, U64),
    frame=st.integers(0, U64),
    budget_ms=st.integers(0, U32),
)
def test_frames_are_packed_as_specified(
    dtype: torch.dtype, tokens: int, top_k: int, width: int, seed: int, split: bool, some: bool, **header: int
) -> None:
    experts, targets = 5, 3
    step = Step(dtype, tokens, top_k, width, experts, seed)
    copies = step.generator.integers(-1, targets, (experts, 2)).astype(np.int32)
    shares = None
    if split:
        first = (step.counts * step.generator.random(experts)).astype(np.int64)
        shares = np.stack((first, step.counts - first), axis=1)
    positions = None
    if some:
        kept = np.flatnonzero(step.generator.random(tokens * top_k) < 0.5)
        positions = kept if len(kept) else np.array([tokens * top_k - 1])

    wanted: dict[int, list[int]] = {}
    left = np.zeros((experts, 2), dtype=np.int64) if shares is None else shares.copy()
    for position in range(tokens * top_k) if positions is None else positions.tolist():
        expert = int(step.ids.flatten()[position])
        copy = 0 if shares is None or left[expert, 0] > 0 else 1
        left[expert, copy] -= 1
        wanted.setdefault(int(copies[expert, copy]), []).append(position)

    packer = native.StepPacker(*of(Limits()))
    assert step.route(packer, copies, shares, targets, positions) == sorted(wanted)
    for target, pairs in wanted.items():
        assert np.frombuffer(packer.positions(target), dtype=np.int64).tolist() == pairs
        if target >= 0:
            assert sent_by(packer, target, **header) == step.expected(pairs, **header)


def test_pairs_beyond_the_shares_have_no_target() -> None:
    step = Step(torch.float32, 4, 2, WIDTH, 1, 0)
    packer = native.StepPacker(*of(LIMITS))
    assert step.route(packer, np.array([[2]], dtype=np.int32), np.array([[5]])) == [-1, 2]
    assert np.frombuffer(packer.positions(-1), dtype=np.int64).tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"copies": np.array([[3]], dtype=np.int32)}, "target 3 of 3"),
        ({"copies": np.array([[-2]], dtype=np.int32)}, "target -2 of 3"),
        ({"copies": np.zeros((1, 1), dtype=np.int64)}, "items of 8 bytes where 4"),
        ({"copies": np.zeros((1, 0), dtype=np.int32)}, r"must be \[experts, copies\]"),
        ({"copies": np.zeros(1, dtype=np.int32)}, r"must be \[experts, copies\]"),
        ({"shares": np.zeros((1, 2), dtype=np.int64)}, r"must be \[experts, copies\]"),
        ({"positions": np.array([-1])}, "must ascend within the step"),
        ({"positions": np.array([8])}, "must ascend within the step"),
        ({"positions": np.array([1, 1])}, "must ascend within the step"),
        ({"positions": np.array([2, 1])}, "must ascend within the step"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused_and_nothing_can_be_staged(changes: dict[str, Any], error: str) -> None:
    step = Step(torch.float32, 4, 2, WIDTH, 1, 0)
    packer = native.StepPacker(*of(LIMITS))
    copies = np.zeros((1, 1), dtype=np.int32)
    assert step.route(packer, copies) == [0]
    with pytest.raises(ValueError, match=error):
        step.route(packer, **{"copies": copies, **changes})
    with client() as (stream, _), pytest.raises(ValueError, match="target 0 has no pairs"):
        packer.stage(0, stream, 0, 0, 0, 0)


@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1, -(2**31)])
def test_an_expert_out_of_range_is_refused(wrong: int) -> None:
    step = Step(torch.float32, 4, 2, WIDTH, 5, 0)
    step.ids[3, 1] = wrong
    with pytest.raises(ValueError, match=f"expert {wrong} of 5"):
        step.route(native.StepPacker(*of(LIMITS)), np.zeros((5, 1), dtype=np.int32))
    counts = np.zeros(5, dtype=np.int64)
    with pytest.raises(WireError, match=rf"layer 7: the router chose expert {wrong}; the placement has experts 0 to 4"):
        native.count_experts(step.ids.data_ptr(), 8, counts, 7)
    assert not counts.any()
    native.count_experts(step.ids.data_ptr(), 7, counts, 7)
    assert counts.tolist() == np.bincount(step.ids.flatten()[:7], minlength=5).tolist()


@pytest.mark.parametrize(
    ("tokens", "top_k", "limits", "says"),
    [
        (65, 1, LIMITS, r"65 rows for one shard; allowed: 1 to 64 \(routing.max_frame_rows\)"),
        (1, 9, LIMITS, "9 experts a token; allowed: 1 to 8"),
        (64, 8, Limits(64, 64 * 32 + 64 * 8 * 12 - 1), r"64 rows of width 8 .* 8191 bytes \(routing.max_frame_mib\)"),
    ],
)
def test_more_than_a_frame_may_hold_is_refused(tokens: int, top_k: int, limits: Limits, says: str) -> None:
    step = Step(torch.float32, tokens, top_k, WIDTH, 1, 0)
    with pytest.raises(WireError, match=says):
        step.route(native.StepPacker(*of(limits)), np.zeros((1, 1), dtype=np.int32))


# -- exchanging ---------------------------------------------------------------------------------------------------


class InFlight:
    """One frame of `rows` tokens on a stream, and how a shard may answer it."""

    def __init__(self, stream: native.ClientStream, shard: socket.socket, rows: int, frame: int = 77) -> None:
        self.stream, self.shard, self.rows = stream, shard, rows
        self.packer = native.StepPacker(*of(LIMITS))
        self.step = Step(torch.float32, rows, 1, WIDTH, 1, rows)
        self.step.route(self.packer, np.zeros((1, 1), dtype=np.int32))
        self.request = Header(Kind.DISPATCH, 1, 5, rows, rows, WIDTH, 2, frame, 1000)
        self.packer.stage(0, stream, 5, 2, frame, 1000)
        self.y = torch.arange(rows * WIDTH).view(rows, WIDTH).float() + frame

    def answer(self, epoch: int = 3) -> bytes:
        """The right one."""
        return join(combine_parts(self.request, self.y, epoch, 11, 22))

    def exchange(self, timeout_s: float = 10.0) -> bool:
        """Sends and receives."""
        return native.exchange([(0, self.stream)], timeout_s)

    def is_right(self) -> bool:
        """Whether the answer is what was sent."""
        out = torch.empty(self.rows, WIDTH)
        self.packer.combine(out.data_ptr(), [(0, self.stream)], True)
        return torch.equal(out, self.y) and (self.stream.computed_us, self.stream.waited_us) == (11, 22)


@st.composite
def strays(draw: st.DrawFn) -> bytes:
    """A frame that nobody waits for: an answer or an error, of any size, or even a question."""
    frame = draw(st.integers(0, 76))
    if draw(st.booleans()):
        return join(error_parts(Header(Kind.DISPATCH, 1, 5, 1, 1, 1, 0, frame), 1, draw(st.text(max_size=30)), 0))
    rows, width = draw(st.integers(1, 64)), draw(st.integers(1, 200))
    kind = draw(st.sampled_from([Kind.COMBINE, Kind.DISPATCH]))
    header = Header(kind, draw(st.integers(1, 3)), 5, rows, rows if kind is Kind.DISPATCH else 0, width, 0, frame)
    return header.pack() + bytes(header.body_bytes)


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    late=st.lists(st.lists(strays(), max_size=3), min_size=4, max_size=4),
    behind=st.lists(strays(), max_size=2),
    refused=st.integers(0, 15),
    seed=st.integers(0, 1000),
)
def test_late_answers_in_pieces_of_any_size_are_skipped(
    rows: list[int], late: list[list[bytes]], behind: list[bytes], refused: int, seed: int
) -> None:
    """Several frames one after the other on one stream, some refused, with strays before and behind the answers."""
    cut = random.Random(seed)
    with client() as (stream, shard):
        for i, count in enumerate(rows):
            flight = InFlight(stream, shard, count, frame=77 + i)
            is_refused = bool(refused >> i & 1)
            good = join(error_parts(flight.request, 1, "no such expert", 4)) if is_refused else flight.answer()
            data = b"".join([*late[i], good, *behind])

            def say(data: bytes = data) -> None:
                at = 0
                while at < len(data):
                    size = cut.choice([1, 7, 48, 500, len(data)])
                    shard.sendall(data[at : at + size])
                    at += size

            thread = threading.Thread(target=say)
            thread.start()
            assert flight.exchange() is not is_refused
            thread.join()
            if is_refused:
                assert stream.state == native.REFUSED
                assert stream.message == b"no such expert"
            else:
                assert stream.state == native.ANSWERED
                assert flight.is_right()


def test_a_late_answer_is_skipped_over_several_exchanges() -> None:
    with client() as (stream, shard):
        stray = Header(Kind.COMBINE, 1, 5, 60, 0, 200, 0, 3)
        data = stray.pack() + bytes(stray.body_bytes)
        shard.sendall(data[:30_000])
        assert not InFlight(stream, shard, 3).exchange(0.0)
        assert stream.state == native.OVERDUE
        read_all(shard, HEADER_BYTES + 3 * (WIDTH * 4 + 12))
        flight = InFlight(stream, shard, 5, frame=78)
        shard.sendall(data[30_000:] + flight.answer())
        assert flight.exchange()
        assert flight.is_right()


def wrong(flight: InFlight, **changes: Any) -> bytes:
    """A frame with the right id and some fields changed."""
    header = Header(Kind.COMBINE, 1, 5, flight.rows, 0, WIDTH, 2, flight.request.frame)._replace(**changes)
    return header.pack() + bytes(min(header.body_bytes, 1 << 12))


WRONG: dict[str, Callable[[InFlight], bytes]] = {
    "garbage": lambda f: b"HTTP/1.1 200 OK\r\n\r\n" * 10,
    "too few rows": lambda f: wrong(f, rows=f.rows - 1),
    "too many rows": lambda f: wrong(f, rows=f.rows + 1),
    "another width": lambda f: wrong(f, width=WIDTH // 2),
    "the same bytes in another shape": lambda f: wrong(f, rows=f.rows // 2, width=2 * WIDTH),
    "another dtype": lambda f: wrong(f, dtype=2, width=2 * WIDTH),
    "another layer": lambda f: wrong(f, layer=6),
    "a question": lambda f: wrong(f, kind=Kind.DISPATCH, pairs=f.rows),
    "beyond the limits": lambda f: wrong(f, rows=60_000, width=60_000),
    "a late answer beyond the limits": lambda f: wrong(f, frame=1, width=60_000),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_an_answer_that_does_not_fit_breaks_the_stream(kind: str) -> None:
    with client() as (stream, shard):
        flight = InFlight(stream, shard, 4)
        shard.sendall(WRONG[kind](flight))
        assert not flight.exchange()
        assert (stream.state, stream.error) == (native.BROKEN, -1)
        assert WRONG[kind](flight).startswith(stream.bad_header)
        before = out = torch.zeros(4, WIDTH)
        flight.packer.combine(out.data_ptr(), [(0, stream)], False)
        assert torch.equal(out, before)


def test_what_a_dispatch_moved_and_took_is_added_up() -> None:
    counters = np.ones(8, dtype=np.int64)
    with client() as (stream, shard), client() as (silent, _):
        flight, unanswered = InFlight(stream, shard, 4), InFlight(silent, shard, 2)
        answer = flight.answer()
        shard.sendall(answer)
        assert not native.exchange([(0, stream), (1, silent)], 0.05)
        sent = sum(HEADER_BYTES + f.rows * (WIDTH * 4 + 12) for f in (flight, unanswered))
        native.add_parts(counters, [(0, stream), (1, silent)], 100, 150, 450)
    frames, bytes_sent, bytes_received, route, exchange, queue, compute, combine = (counters - 1).tolist()
    assert (frames, bytes_sent, bytes_received) == (2, sent, len(answer))
    assert (route, exchange) == (50, 300)
    assert (queue, compute) == (22_000, 11_000), "those of the only answer"
    assert combine > 0, "it ends now"


@pytest.mark.parametrize("counters", [np.zeros(7, dtype=np.int64), np.zeros(16, dtype=np.int32), b"8" * 64])
def test_parts_go_into_eight_writable_numbers(counters: Any) -> None:
    with pytest.raises((ValueError, BufferError)):
        native.add_parts(counters, [], 0, 0, 0)
    with pytest.raises(TypeError):
        native.add_parts(np.zeros(8, dtype=np.int64), [None], 0, 0, 0)  # type: ignore[list-item]


@settings(deadline=None)
@given(data=st.binary(min_size=HEADER_BYTES, max_size=600), at=st.integers(0, 200))
@example(data=bytes(600), at=0)
def test_bytes_that_are_no_answer_break_the_stream(data: bytes, at: int) -> None:
    """Random bytes after the beginning of a right answer."""
    with client() as (stream, shard):
        flight = InFlight(stream, shard, 4)
        right = flight.answer()
        said = right[:at] + data
        shard.sendall(said)
        shard.shutdown(socket.SHUT_WR)
        if flight.exchange():
            assert at + len(data) >= len(right)
            assert said[:24] == right[:24]
        else:
            assert stream.state == native.BROKEN


@pytest.mark.parametrize("said", [b"", b"XMSH", "half"])
def test_a_shard_that_closes_breaks_the_stream(said: bytes | str) -> None:
    with client() as (stream, shard):
        flight = InFlight(stream, shard, 4)
        shard.sendall(flight.answer()[:60] if isinstance(said, str) else said)
        shard.shutdown(socket.SHUT_WR)
        assert not flight.exchange()
        assert (stream.state, stream.error) == (native.BROKEN, 0)
        assert not InFlight(stream, shard, 4).exchange()  # and once more
        assert stream.state == native.BROKEN


def test_a_shard_that_is_gone_or_closed_here_is_told_by_its_error() -> None:
    with client() as (stream, shard):
        shard.close()
        assert not InFlight(stream, shard, 4).exchange()
        assert (stream.state, stream.error) == (native.BROKEN, errno.EPIPE)
        stream.close()
        assert not InFlight(stream, shard, 4).exchange()
        assert stream.error == errno.EBADF


def test_an_answer_before_the_frame_was_sent_is_none() -> None:
    """More than the socket takes is to be sent; who answers meanwhile can't have read it."""
    limits = Limits()
    with client(limits) as (stream, shard):
        step = Step(torch.float32, 4000, 1, 2048, 1, 0)
        packer = native.StepPacker(*of(limits))
        step.route(packer, np.zeros((1, 1), dtype=np.int32))
        packer.stage(0, stream, 5, 2, 77, 0)
        request = Header(Kind.DISPATCH, 1, 5, 4000, 4000, 2048, 2, 77)
        shard.sendall(Header(Kind.COMBINE, 1, 5, 4000, 0, 2048, 2, 77).pack())
        assert not native.exchange([(0, stream)], 10.0)
        assert (stream.state, stream.error) == (native.BROKEN, -1)
        assert request.frame == 77


def test_frames_larger_than_any_buffer_both_ways_at_once() -> None:
    """Each side has more to send than sockets hold before it reads; neither may block the other."""
    limits, rows = Limits(), 2000
    frames: list[tuple[int, native.ClientStream]] = []
    with client(limits) as (one, first), client(limits) as (two, second), client(limits) as (three, third):
        shards = (first, second, third)
        step = Step(torch.float32, rows, 3, 2048, 3, 0)
        packer = native.StepPacker(*of(limits))
        step.ids.copy_(torch.arange(3, dtype=torch.int32).expand(rows, 3))
        step.route(packer, np.arange(3, dtype=np.int32)[:, None])
        for target, stream in enumerate((one, two, three)):
            packer.stage(target, stream, 5, 2, target, 0)
            frames.append((target, stream))

        def serve(target: int) -> None:
            header = parse_header(read_all(shards[target], HEADER_BYTES), limits)
            body = bytearray(read_all(shards[target], header.body_bytes))
            y = parse_dispatch(header, memoryview(body)).x
            shards[target].sendall(join(combine_parts(header, torch.full_like(y, target + 1.0), 0)))

        threads = [threading.Thread(target=serve, args=(target,)) for target in range(3)]
        for thread in threads:
            thread.start()
        assert native.exchange(frames, 60.0)
        for thread in threads:
            thread.join()
        out = torch.empty_like(step.x)
        packer.combine(out.data_ptr(), frames, True)
        assert torch.equal(out, torch.full_like(out, 6.0))


def test_what_is_answered_counts_although_others_are_not() -> None:
    with client() as (good, shard), client() as (silent, _), client() as (gone, other):
        flights = [InFlight(good, shard, 3), InFlight(silent, shard, 4), InFlight(gone, other, 5)]
        shard.sendall(flights[0].answer())
        other.close()
        assert not native.exchange([(0, f.stream) for f in flights], 0.05)
        assert [f.stream.state for f in flights] == [native.ANSWERED, native.OVERDUE, native.BROKEN]
        assert flights[0].is_right()


def test_streams_that_can_not_be_exchanged_are_refused() -> None:
    with client() as (stream, shard):
        flight = InFlight(stream, shard, 3)
        with pytest.raises(RuntimeError, match="twice in one"):
            native.exchange([(0, stream), (1, stream)], 1.0)
        for frames in ([stream], [(0, shard)], [(0, stream, 1)], 5):
            with pytest.raises(TypeError):
                native.exchange(frames, 1.0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="not a number"):
            native.exchange([(0, stream)], float("nan"))
        shard.sendall(flight.answer())
        assert flight.exchange(float("inf"))
        assert native.exchange([], 0.0)


def test_a_stream_in_an_exchange_can_be_neither_staged_nor_exchanged() -> None:
    with client() as (stream, shard):
        flight = InFlight(stream, shard, 3)
        thread = threading.Thread(target=flight.exchange)
        thread.start()
        read_all(shard, HEADER_BYTES + 3 * (WIDTH * 4 + 12))
        with pytest.raises(RuntimeError, match="in an exchange"):
            flight.packer.stage(0, stream, 0, 0, 0, 0)
        with pytest.raises(RuntimeError, match="in two exchanges"):
            flight.exchange()
        shard.sendall(flight.answer())
        thread.join()
        assert flight.is_right()


# -- adding up ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    tokens=st.integers(1, 20),
    top_k=st.integers(1, 4),
    width=st.integers(1, 20),
    fresh=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_answers_are_added_up_in_float32_and_rounded_once(
    dtype: torch.dtype, tokens: int, top_k: int, width: int, fresh: bool, seed: int
) -> None:
    step = Step(dtype, tokens, top_k, width, 4, seed)
    copies = np.array([[0], [1], [2], [-1]], dtype=np.int32)  # expert 3 is nowhere
    packer = native.StepPacker(*of(LIMITS))
    used = [target for target in step.route(packer, copies) if target >= 0]
    raw = step.generator.standard_normal((tokens, width)) * 10.0 ** step.generator.integers(-8, 5, (tokens, width))
    out = torch.from_numpy(raw).to(dtype)
    sums = dict(enumerate(out.float())) if not fresh else {}
    frames: list[tuple[int, native.ClientStream]] = []
    socks: list[socket.socket] = []
    for target in used:
        ours, theirs = socket.socketpair()
        socks += [ours, theirs]
        stream = native.ClientStream(ours.fileno(), *of(LIMITS))
        packer.stage(target, stream, 5, 2, target, 0)
        rows = sorted({p // top_k for p in np.frombuffer(packer.positions(target), dtype=np.int64).tolist()})
        numbers = step.generator.standard_normal((len(rows), width)) * 10.0 ** step.generator.integers(-8, 6)
        y = torch.from_numpy(numbers).to(dtype)
        request = Header(Kind.DISPATCH, dtype_code(dtype), 5, len(rows), 1, width, 2, target)
        theirs.sendall(join(combine_parts(request, y, 0)))
        for row, token in enumerate(rows):
            sums[token] = sums[token] + y[row].float() if token in sums else y[row].float()
        frames.append((target, stream))
    assert native.exchange(frames, 10.0)
    packer.combine(out.data_ptr(), frames, fresh)
    want = torch.stack([sums.get(token, torch.zeros(width)) for token in range(tokens)])
    assert bits(out) == bits(want.to(dtype))
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_comes_through_and_every_tie_is_rounded(dtype: torch.dtype) -> None:
    """All 65,536 of them, plus what lies a quarter, a half and three quarters of the way to the next."""
    every = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(dtype)
    limits = Limits()
    width = len(every)
    between = {torch.float16: 13, torch.bfloat16: 16}[dtype]
    summands = [torch.zeros(width, dtype=dtype), every]
    steps = every.float().view(torch.int32)
    halves = [
        ((steps + (quarter << (between - 2))).view(torch.float32) - every.float()).to(dtype) for quarter in (1, 2, 3)
    ]
    for other in (*summands, *halves):
        step = Step(dtype, 1, 2, width, 2, 0)
        packer = native.StepPacker(*of(limits))
        step.ids.copy_(torch.tensor([[0, 1]]))
        step.route(packer, np.array([[0], [1]], dtype=np.int32))
        with client(limits) as (one, first), client(limits) as (two, second):
            frames = [(0, one), (1, two)]
            for (target, stream), shard, y in zip(frames, (first, second), (every, other), strict=True):
                packer.stage(target, stream, 5, 2, target, 0)
                request = Header(Kind.DISPATCH, dtype_code(dtype), 5, 1, 1, width, 2, target)
                shard.sendall(join(combine_parts(request, y.view(1, width), 0)))
            assert native.exchange(frames, 10.0)
        out = torch.empty(1, width, dtype=dtype)
        packer.combine(out.data_ptr(), frames, True)
        want = (every.float() + other.float()).to(dtype)
        assert torch.equal(out[0].isnan(), want.isnan())
        same = ~want.isnan()
        assert torch.equal(out[0][same].view(torch.int16), want[same].view(torch.int16))


def test_answers_of_another_step_are_not_added() -> None:
    with client() as (stream, shard):
        flight = InFlight(stream, shard, 4)
        shard.sendall(flight.answer())
        assert flight.exchange()
        Step(torch.float32, 5, 1, WIDTH, 1, 0).route(flight.packer, np.zeros((1, 1), dtype=np.int32))
        out = torch.zeros(5, WIDTH)
        with pytest.raises(ValueError, match="not to a frame of the step at hand"):
            flight.packer.combine(out.data_ptr(), [(0, stream)], True)


# -- a shard's side -----------------------------------------------------------------------------------------------


def question(rows: int, pairs: int, frame: int, generator: np.random.Generator, dtype: torch.dtype) -> bytes:
    """A dispatch frame of random bits whose pairs name rows that are there."""
    raw = generator.integers(0, 256, rows * WIDTH * dtype.itemsize, dtype=np.uint8)
    x = torch.from_numpy(raw).view(dtype).view(rows, WIDTH)
    experts = generator.integers(0, 9, pairs).astype(np.int32)
    named = generator.integers(0, rows, pairs).astype(np.int32)
    weights = generator.standard_normal(pairs).astype(np.float32)
    return join(dispatch_parts(x, experts, named, weights, layer=frame % 5, epoch=0, frame=frame))


@settings(deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    shapes=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 60)), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_questions_in_pieces_of_any_size_are_taken_as_specified(
    dtype: torch.dtype, shapes: list[tuple[int, int]], seed: int
) -> None:
    generator, cut = np.random.default_rng(seed), random.Random(seed)
    data = b"".join(question(r, min(p, 8 * r), i, generator, dtype) for i, (r, p) in enumerate(shapes))
    taken: list[bytes] = []
    with server(dtype) as (stream, theirs):
        at = 0
        while at < len(data) or stream.has_input:
            size = cut.choice([1, 47, 48, 300, len(data)])
            theirs.sendall(data[at : at + size])
            at += size
            while (whole := stream.receive()) is not False:
                assert whole, "refused"
                header = parse_header(stream.buffer, LIMITS)
                assert (stream.layer, stream.rows, stream.pairs, stream.frame) == (
                    header.layer, header.rows, header.pairs, header.frame,
                )  # fmt: skip
                taken.append(bytes(stream.buffer[: HEADER_BYTES + header.body_bytes]))
                y = torch.full((header.rows, WIDTH), header.frame, dtype=dtype)
                stream.answer(y, y.data_ptr(), 9, 2**40, header.frame)
                want = combine_parts(header, y, 9, 2**40, header.frame)
                assert read_all(theirs, len(join(want))) == join(want)
    assert b"".join(taken) == data


@settings(deadline=None)
@given(data=st.binary(min_size=HEADER_BYTES, max_size=600), at=st.integers(0, 300))
def test_bytes_that_are_no_question_are_refused_as_specified(data: bytes, at: int) -> None:
    """Random bytes after the beginning of a right question."""
    said = bytearray(question(3, 5, 1, np.random.default_rng(at), torch.float32)[:at] + data)
    with server() as (stream, theirs):
        theirs.sendall(said)
        got = stream.receive()
        try:
            header = parse_header(said, LIMITS)
            takes = header.kind is Kind.DISPATCH and (header.width, header.dtype) == (WIDTH, 1)
            whole = takes and len(said) >= HEADER_BYTES + header.body_bytes
            if whole:
                parse_dispatch(header, memoryview(said)[HEADER_BYTES : HEADER_BYTES + header.body_bytes])
        except WireError:
            takes = whole = False
        assert got is (whole if takes else None)


@pytest.mark.parametrize("row", [-1, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_pair_that_names_a_row_outside_the_frame_is_refused(row: int, at: int) -> None:
    rows = np.array([0, 1, 2, 1, 0], dtype=np.int32)
    rows[at] = row
    five = np.zeros(5, dtype=np.int32)
    said = join(dispatch_parts(torch.zeros(3, WIDTH), five, rows, five.view(np.float32), layer=0, epoch=0, frame=0))
    with server() as (stream, theirs):
        theirs.sendall(said)
        assert stream.receive() is None
        assert stream.received == said


def test_memory_is_taken_only_for_a_frame_within_the_limits() -> None:
    limits = Limits(max_rows=1 << 20, max_bytes=64 << 20)
    with server(width=1 << 12, limits=limits) as (stream, theirs):
        first = len(stream.buffer)
        theirs.sendall(Header(Kind.DISPATCH, 1, 0, (64 << 20 >> 14) + 1, 1, 1 << 12, 0, 1).pack())
        assert stream.receive() is None
        assert len(stream.buffer) == first
    with server(width=1 << 12, limits=limits) as (stream, theirs):
        header = Header(Kind.DISPATCH, 1, 0, 2000, 2000, 1 << 12, 0, 1)
        theirs.sendall(header.pack())
        assert stream.receive() is False
        assert len(stream.buffer) == HEADER_BYTES + header.body_bytes


@settings(deadline=None)
@given(message=st.binary(max_size=MAX_MESSAGE_BYTES + 50), code=st.integers(0, U32), epoch=st.integers(0, U64))
@example(message=b"x" * (MAX_MESSAGE_BYTES + 1), code=1, epoch=0)
def test_a_refusal_is_packed_as_specified(message: bytes, code: int, epoch: int) -> None:
    with server() as (stream, theirs):
        theirs.sendall(question(3, 5, 12, np.random.default_rng(0), torch.float32))
        assert stream.receive()
        stream.refuse(code, message, epoch)
        header = parse_header(read_all(theirs, HEADER_BYTES), LIMITS)
        body = read_all(theirs, header.body_bytes)
        assert header == Header(Kind.ERROR, 0, 2, len(message[:MAX_MESSAGE_BYTES]), code, 0, epoch, 12)
        assert body == message[:MAX_MESSAGE_BYTES]
        assert parse_error(header, body) == body.decode(errors="replace")


def test_answers_that_do_not_fit_wait_in_order_and_keep_their_rows_alive() -> None:
    limits = Limits()
    with server(width=2048, limits=limits) as (stream, theirs):
        for frame in range(6):
            theirs.sendall(Header(Kind.DISPATCH, 1, 0, 2000, 1, 2048, 0, frame).pack())
            body = memoryview(bytes(2000 * 2048 * 4 + 12))
            while body:
                body = body[select_send(theirs, body) :]
                received = stream.receive()
            assert received
            if frame % 2:
                stream.refuse(1, b"odd", 0)
            else:
                y = torch.full((2000, 2048), float(frame))
                stream.answer(y, y.data_ptr(), 0, 1, 2)
                del y
        assert stream.unsent > 3 * 2000 * 2048 * 4 - (16 << 20)
        for frame in range(6):
            header = parse_header(drained(stream, theirs, HEADER_BYTES), limits)
            assert header.frame == frame
            said = drained(stream, theirs, header.body_bytes)
            if frame % 2:
                assert said == b"odd"
            else:
                assert bool((parse_combine(header, memoryview(bytearray(said))) == frame).all())
        assert stream.unsent == 0
        stream.flush()


def select_send(sock: socket.socket, data: memoryview) -> int:
    """Sends what fits now."""
    try:
        return sock.send(data, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return 0


def drained(stream: native.ServerStream, sock: socket.socket, count: int) -> bytes:
    """Reads so many bytes while the stream writes."""
    data = bytearray()
    while len(data) < count:
        stream.flush()
        assert select.select([sock], [], [], 10)[0], "nothing comes"
        data += sock.recv(min(count - len(data), 1 << 20))
    return bytes(data)


def test_a_client_that_is_gone_is_an_oserror() -> None:
    with server() as (stream, theirs):
        theirs.sendall(question(3, 5, 12, np.random.default_rng(0), torch.float32)[:-1])
        assert stream.receive() is False
        theirs.close()
        with pytest.raises(ConnectionResetError):
            stream.receive()
        y = torch.zeros(3, WIDTH)
        with pytest.raises(OSError, match="Broken pipe"):
            stream.refuse(1, b"", 0)
        stream.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            stream.refuse(1, b"", 0)
        assert y.data_ptr()


def test_objects_hold_their_arguments_no_longer_than_needed() -> None:
    """Many streams and packers made and dropped, with answers unsent: memory does not grow."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def once() -> None:
        with server(width=2048, limits=Limits()) as (stream, theirs):
            theirs.sendall(Header(Kind.DISPATCH, 1, 0, 1, 1, 2048, 0, 1).pack() + bytes(8204))
            assert stream.receive()
            y = torch.zeros(4 << 20)
            for _ in range(300):
                stream.answer(y, y.data_ptr(), 0, 0, 0)
            assert stream.unsent
        with client() as (other, shard):
            InFlight(other, shard, 60)

    for _ in range(10):
        once()
    before = resident()
    for _ in range(200):
        once()
    assert resident() - before < 64 << 20


def test_constructors_refuse_what_is_no_number() -> None:
    for make, good in (
        (native.StepPacker, [1, 1, 1]),
        (native.ClientStream, [0, 1, 1, 1]),
        (native.ServerStream, [0, 1, 1, 1, 1, 1]),
    ):
        for i in range(len(good)):
            with pytest.raises((TypeError, OverflowError)):
                make(*[*good[:i], "x", *good[i + 1 :]])  # type: ignore[operator]
        for i in itertools.islice(range(len(good)), len(good) - 3, None):
            with pytest.raises(OverflowError):
                make(*[*good[:i], -1, *good[i + 1 :]])  # type: ignore[operator]
