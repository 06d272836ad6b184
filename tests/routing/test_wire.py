"""The frame format: what was packed comes back, and nothing but WireError comes out of what wasn't."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from expertmesh.errors import WireError
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
from expertmesh.routing.wire.frame import MAX_MESSAGE_BYTES, total_bytes

LIMITS = Limits(max_rows=64, max_bytes=1 << 16, max_pairs_per_row=8)
GOOD = Header(Kind.DISPATCH, 1, 3, 2, 4, 8, 5, 6, 7)


def join(parts: list[Any]) -> bytearray:
    return bytearray(b"".join(bytes(part) for part in parts))


def bits(tensor: torch.Tensor) -> bytes:
    """Raw bytes, so that NaNs compare too."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    rows=st.integers(1, 40),
    width=st.integers(1, 33),
    extra=st.integers(0, 60),
    layer=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 2**64 - 1),
    frame=st.integers(0, 2**64 - 1),
    budget=st.integers(0, 2**32 - 1),
    seed=st.integers(0, 1000),
)
def test_dispatch_round_trip(
    dtype: torch.dtype, rows: int, width: int, extra: int, layer: int, epoch: int, frame: int, budget: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, rows * width * dtype.itemsize, dtype=np.uint8)  # any bits, NaNs too
    x = torch.from_numpy(raw).view(dtype).view(rows, width)
    named = np.concatenate((np.arange(rows), random.integers(0, rows, extra))).astype(np.int32)
    experts = random.integers(0, 2**31, len(named)).astype(np.int32)
    weights = random.standard_normal(len(named)).astype(np.float32)

    parts = dispatch_parts(x, experts, named, weights, layer=layer, epoch=epoch, frame=frame, budget_ms=budget)
    sent = join(parts)

    header = parse_header(sent, Limits())
    pairs = len(named)
    assert header == Header(Kind.DISPATCH, dtype_code(dtype), layer, rows, pairs, width, epoch, frame, budget)
    assert len(sent) == total_bytes(parts) == HEADER_BYTES + header.body_bytes
    body = parse_dispatch(header, memoryview(sent)[HEADER_BYTES:])
    assert body.x.dtype is dtype
    assert bits(body.x) == bits(x)
    assert body.experts.tolist() == experts.tolist()
    assert body.rows.tolist() == named.tolist()
    assert bits(body.weights) == weights.tobytes()


@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    rows=st.integers(1, 40),
    width=st.integers(1, 33),
    computed_us=st.integers(0, 2**40),
    waited_us=st.integers(0, 2**40),
)
def test_combine_round_trip(dtype: torch.dtype, rows: int, width: int, computed_us: int, waited_us: int) -> None:
    request = Header(Kind.DISPATCH, dtype_code(dtype), 3, rows, rows, width, 1, 99)
    y = torch.arange(rows * width).view(rows, width).to(dtype)
    sent = join(combine_parts(request, y, 12, computed_us, waited_us))
    header = parse_header(sent, Limits())
    times = min(computed_us, 2**32 - 1), min(waited_us, 2**32 - 1)
    assert header == Header(Kind.COMBINE, request.dtype, 3, rows, 0, width, 12, 99, 0, *times)
    assert bits(parse_combine(header, memoryview(sent)[HEADER_BYTES:])) == bits(y)


@given(message=st.text(st.characters(codec=None), max_size=50), code=st.integers(0, 2**32 - 1))
@example(message="\ud800 is no character", code=1)
def test_error_round_trip(message: str, code: int) -> None:
    sent = join(error_parts(GOOD, code, message, epoch=2))
    header = parse_header(sent, LIMITS)
    assert (header.kind, header.layer, header.frame, header.epoch, header.pairs) == (Kind.ERROR, 3, 6, 2, code)
    said = parse_error(header, sent[HEADER_BYTES:])
    assert said == message.encode(errors="replace").decode()


def test_a_long_error_is_cut_even_inside_a_character() -> None:
    sent = join(error_parts(GOOD, 1, "x" + "é" * MAX_MESSAGE_BYTES, epoch=2))
    header = parse_header(sent, LIMITS)
    assert header.rows == MAX_MESSAGE_BYTES == len(sent) - HEADER_BYTES
    said = parse_error(header, sent[HEADER_BYTES:])
    assert said.startswith("xéé")
    assert said.endswith("\ufffd")


def test_tensors_are_sent_without_a_copy() -> None:
    x = torch.zeros(4, 8)
    one = np.zeros(4, dtype=np.int32)
    parts = dispatch_parts(x, one, np.arange(4, dtype=np.int32), one.astype(np.float32), layer=0, epoch=0, frame=0)
    x += 1
    assert bytes(parts[1]) == bits(torch.ones(4, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int32])
def test_dtypes_that_the_wire_does_not_carry(dtype: torch.dtype) -> None:
    with pytest.raises(WireError, match=rf"{dtype}.*float32.*bfloat16.*float16"):
        dtype_code(dtype)


def packed(**changes: int | bytes) -> bytes:
    """GOOD with some fields of the header's table replaced."""
    fields: dict[str, int | bytes] = {
        "magic": b"XMSH", "version": 1, "kind": 1, "dtype": 1, "pad": 0, "layer": 3, "rows": 2, "pairs": 4,
        "width": 8, "epoch": 5, "frame": 6, "budget": 7, "pad2": 0,
    }  # fmt: skip
    return struct.pack("<4sBBBBIIIIQQII", *(fields | changes).values())


def test_the_documented_layout_is_what_is_packed() -> None:
    assert GOOD.pack() == packed()
    assert parse_header(packed(), LIMITS) == GOOD


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"magic": b"HTTP"}, "magic b'HTTP'"),
        ({"version": 2}, "version 2; this side speaks 1"),
        ({"kind": 0}, "kind 0"),
        ({"kind": 4}, "kind 4"),
        ({"pad": 1}, "padding 1, 0"),
        ({"pad2": 9}, "padding 0, 9"),
        ({"kind": 3, "dtype": 0, "width": 0, "pad2": 9}, "padding 0, 9"),
        ({"dtype": 0}, r"dtype code 0; allowed: \[1, 2, 3\]"),
        ({"dtype": 4}, "dtype code 4"),
        ({"rows": 0}, "0 rows in a frame; allowed: 1 to 64"),
        ({"rows": 65, "pairs": 65}, "65 rows in a frame; allowed: 1 to 64"),
        ({"pairs": 0}, "0 pairs for 2 rows; allowed: 1 to 8 a row"),
        ({"pairs": 17}, "17 pairs for 2 rows"),
        ({"width": 0}, "2 x 0"),
        ({"width": 8192}, "at most 65536 bytes"),
        ({"width": 2**32 - 1, "rows": 64, "pairs": 512}, "at most 65536 bytes"),
        ({"kind": 2}, "combine frame with 4 pairs; allowed: 0"),
        ({"kind": 2, "pairs": 0, "rows": 0}, "0 rows"),
        ({"kind": 2, "pairs": 0, "width": 8193}, "at most 65536 bytes"),
        ({"kind": 3, "dtype": 0, "width": 0, "rows": 4097}, "error frame of 4097 bytes; at most 4096"),
        ({"kind": 3, "dtype": 1, "width": 0}, "error frame"),
        ({"kind": 3, "dtype": 0, "width": 8}, "error frame"),
    ],
)
def test_a_header_outside_the_format_or_the_limits_is_refused(changes: dict[str, int | bytes], says: str) -> None:
    with pytest.raises(WireError, match=says):
        parse_header(packed(**changes), LIMITS)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 64, "pairs": 512, "width": 1},
        {"rows": 1, "pairs": 1, "width": (1 << 14) - 3},  # 65,536 bytes to the last
        {"kind": 2, "pairs": 0, "width": 8192},
        {"kind": 3, "dtype": 0, "width": 0, "rows": 4096},
        {"kind": 3, "dtype": 0, "width": 0, "rows": 0},
    ],
)
def test_a_header_just_within_the_limits_is_taken(changes: dict[str, int]) -> None:
    assert parse_header(packed(**changes), LIMITS).body_bytes <= LIMITS.max_bytes


def test_nothing_is_allocated_for_a_frame_that_is_refused() -> None:
    huge = packed(rows=65_536, pairs=65_536, width=2**32 - 1)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            parse_header(huge, Limits())
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@given(data=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES + 40))
def test_random_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    with pytest.raises(WireError):
        parse_header(data, LIMITS)


@given(at=st.integers(0, HEADER_BYTES - 1), value=st.integers(0, 255), body=st.binary(min_size=1, max_size=64))
def test_a_frame_with_one_byte_changed_is_parsed_or_refused(at: int, value: int, body: bytes) -> None:
    data = bytearray(packed())
    data[at] = value
    try:
        header = parse_header(data, LIMITS)
        filled = bytearray((body * (header.body_bytes // len(body) + 1))[: header.body_bytes])
        if header.kind is Kind.DISPATCH:
            parsed = parse_dispatch(header, memoryview(filled))
            assert 0 <= int(parsed.rows.min()) <= int(parsed.rows.max()) < header.rows
    except WireError:
        pass


@pytest.mark.parametrize(("row", "named"), [(-1, "-1"), (3, "3"), (2**31 - 1, "2147483647"), (-(2**31), "-2147483648")])
def test_a_pair_that_names_a_row_outside_the_frame_is_refused(row: int, named: str) -> None:
    rows = np.array([0, 1, row, 2], dtype=np.int32)
    four = np.zeros(4, dtype=np.int32)
    sent = join(dispatch_parts(torch.zeros(3, 8), four, rows, four.astype(np.float32), layer=0, epoch=0, frame=0))
    with pytest.raises(WireError, match=rf"names row {named}; the frame has 3 rows"):
        parse_dispatch(parse_header(sent, LIMITS), memoryview(sent)[HEADER_BYTES:])


def test_limits_that_no_memory_could_hold_are_refused() -> None:
    assert Limits(max_bytes=2**62 - 1).max_bytes == 2**62 - 1
    with pytest.raises(ValueError, match=r"max_bytes: 4611686018427387904; allowed: less than 2\*\*62"):
        Limits(max_bytes=2**62)
