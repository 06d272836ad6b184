"""The frame format, version 1.

A frame is a header of 48 bytes and a body whose length follows from the header alone. All numbers are
little-endian; tensors are raw, row-major and unpadded.

| offset | type | field | meaning |
| --- | --- | --- | --- |
| 0 | 4 bytes | magic | `XMSH` |
| 4 | u8 | version | 1 |
| 5 | u8 | kind | 1 dispatch, 2 combine, 3 error |
| 6 | u8 | dtype | 1 float32, 2 bfloat16, 3 float16 |
| 7 | u8 | - | 0 |
| 8 | u32 | layer | the model's layer number |
| 12 | u32 | rows | R: token rows in the body (error: bytes of the message) |
| 16 | u32 | pairs | P: (token, expert) pairs (error: the code; combine: 0) |
| 20 | u32 | width | H: hidden size (error: 0) |
| 24 | u64 | epoch | placement epoch that the sender used, or that the shard holds |
| 32 | u64 | frame | id that the answer repeats |
| 40 | u32 | budget, computed | dispatch, error: ms that the sender will still wait, 0 = unknown; combine: us, below |
| 44 | u32 | waited | combine: us, below; otherwise 0 |

| kind | body |
| --- | --- |
| dispatch | x [R, H] dtype; expert ids [P] i32; row of each pair [P] i32; router weights [P] f32 |
| combine | y [R, H] dtype: for each row the weighted sum over the pairs that named it |
| error | R bytes of UTF-8 |

An answer says how many microseconds the shard computed for its frame, and how many the frame waited there before and
while others were computed: of a batch of several frames each is told its part, by pairs, as computed and the rest as
waited. Times beyond 32 bits become the largest.

This module is the specification, and what tests compare with; in production `routing/native` packs and parses.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch

from expertmesh.errors import WireError

MAGIC = b"XMSH"
VERSION = 1
_HEADER = struct.Struct("<4sBBBBIIIIQQII")
HEADER_BYTES = _HEADER.size

DTYPES: dict[int, torch.dtype] = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ITEM_BYTES = {1: 4, 2: 2, 3: 2}
PAIR_BYTES = 12
MAX_MESSAGE_BYTES = 4096
_MAX_U32 = 2**32 - 1

Buffer = bytes | bytearray | memoryview
"""What may be handed to `socket.sendmsg`."""


class Kind(IntEnum):
    """What a frame carries."""

    DISPATCH = 1
    COMBINE = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may ask us to allocate for one frame."""

    max_rows: int = 65_536
    """Token rows in a frame."""
    max_bytes: int = 512 << 20
    """Bytes of a body; less than 2**62, which no memory holds and no sum of lengths overflows."""
    max_pairs_per_row: int = 64
    """Experts that one token may be sent to: more than any model's top-k."""

    def __post_init__(self) -> None:
        """Raises ValueError for a body that no memory could hold."""
        if self.max_bytes >= 1 << 62:
            raise ValueError(f"max_bytes: {self.max_bytes}; allowed: less than 2**62")


class Header(NamedTuple):
    """A parsed header; fields as in the table above."""

    kind: Kind
    dtype: int
    layer: int
    rows: int
    pairs: int
    width: int
    epoch: int
    frame: int
    budget_ms: int = 0
    computed_us: int = 0
    waited_us: int = 0

    @property
    def body_bytes(self) -> int:
        """Length of the body that follows, in bytes."""
        if self.kind is Kind.ERROR:
            return self.rows
        tensor = self.rows * self.width * _ITEM_BYTES[self.dtype]
        return tensor + self.pairs * PAIR_BYTES if self.kind is Kind.DISPATCH else tensor

    def pack(self) -> bytes:
        """The 48 bytes of this header."""
        times = (self.computed_us, self.waited_us) if self.kind is Kind.COMBINE else (self.budget_ms, 0)
        return _HEADER.pack(
            MAGIC, VERSION, self.kind, self.dtype, 0,
            self.layer, self.rows, self.pairs, self.width, self.epoch, self.frame, *times,
        )  # fmt: skip


def dtype_code(dtype: torch.dtype) -> int:
    """The wire's code of a tensor dtype. Raises WireError for one that it does not carry."""
    try:
        return _CODES[dtype]
    except KeyError:
        names = ", ".join(str(d) for d in _CODES)
        raise WireError(f"dtype {dtype} can't be sent; the wire carries {names}") from None


def parse_header(data: Buffer, limits: Limits) -> Header:
    """The header at the start of `data` (at least HEADER_BYTES long).

    Raises WireError for anything but a version 1 frame within `limits`, so that no byte of the body needs
    to be allocated before it is known to be wanted.
    """
    magic, version, kind, dtype, pad, layer, rows, pairs, width, epoch, frame, first, second = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"not a frame: magic {bytes(magic)!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"frame version {version}; this side speaks {VERSION}")
    pad2 = 0 if kind == Kind.COMBINE else second
    if kind not in (1, 2, 3) or pad or pad2:
        raise WireError(f"frame kind {kind} with padding {pad}, {pad2}; allowed: 1, 2, 3 with 0, 0")
    if kind == Kind.ERROR:
        if rows > MAX_MESSAGE_BYTES or dtype or width:
            raise WireError(f"error frame of {rows} bytes; at most {MAX_MESSAGE_BYTES}")
        return Header(Kind.ERROR, 0, layer, rows, pairs, 0, epoch, frame, first)
    if dtype not in DTYPES:
        raise WireError(f"dtype code {dtype}; allowed: {sorted(DTYPES)}")
    if not 0 < rows <= limits.max_rows:
        raise WireError(f"{rows} rows in a frame; allowed: 1 to {limits.max_rows}")
    if kind == Kind.DISPATCH and not 0 < pairs <= rows * limits.max_pairs_per_row:
        raise WireError(f"{pairs} pairs for {rows} rows; allowed: 1 to {limits.max_pairs_per_row} a row")
    if kind == Kind.COMBINE and pairs:
        raise WireError(f"combine frame with {pairs} pairs; allowed: 0")
    times = (0, first, second) if kind == Kind.COMBINE else (first,)
    header = Header(Kind(kind), dtype, layer, rows, pairs, width, epoch, frame, *times)
    if width == 0 or header.body_bytes > limits.max_bytes:
        raise WireError(f"body of {rows} x {width} and {pairs} pairs; at most {limits.max_bytes} bytes")
    return header


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, without a copy."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def dispatch_parts(
    x: torch.Tensor,
    experts: np.ndarray[Any, np.dtype[np.int32]],
    rows: np.ndarray[Any, np.dtype[np.int32]],
    weights: np.ndarray[Any, np.dtype[np.float32]],
    *,
    layer: int,
    epoch: int,
    frame: int,
    budget_ms: int = 0,
) -> list[Buffer]:
    """A dispatch frame as buffers to send in order, without copying x.

    x: [R, H] contiguous; experts, rows, weights: [P], each row of x named at least once.
    """
    header = Header(
        Kind.DISPATCH, dtype_code(x.dtype), layer, x.shape[0], len(experts), x.shape[1], epoch, frame, budget_ms
    )
    pairs = np.concatenate((experts, rows, weights.view(np.int32)))
    return [header.pack(), tensor_bytes(x), pairs.data.cast("B")]


def combine_parts(
    request: Header, y: torch.Tensor, epoch: int, computed_us: int = 0, waited_us: int = 0
) -> list[Buffer]:
    """The answer to `request`: y [R, H] contiguous, in the request's dtype."""
    rows, width = y.shape
    times = (min(computed_us, _MAX_U32), min(waited_us, _MAX_U32))
    header = Header(Kind.COMBINE, request.dtype, request.layer, rows, 0, width, epoch, request.frame, 0, *times)
    return [header.pack(), tensor_bytes(y)]


def error_parts(request: Header, code: int, message: str, epoch: int) -> list[Buffer]:
    """The answer to a request that can't be computed: why, in words, cut to the wire's limit."""
    text = message.encode(errors="replace")[:MAX_MESSAGE_BYTES]
    return [Header(Kind.ERROR, 0, request.layer, len(text), code, 0, epoch, request.frame).pack(), text]


class DispatchBody(NamedTuple):
    """Views into a dispatch frame's body; valid as long as its buffer is not reused."""

    x: torch.Tensor
    """[R, H]"""
    experts: torch.Tensor
    """[P] int32, the model's expert ids"""
    rows: torch.Tensor
    """[P] int32, in [0, R)"""
    weights: torch.Tensor
    """[P] float32"""


def dispatch_views(
    buffer: Buffer, dtype: torch.dtype, rows: int, width: int, pairs: int, offset: int = 0
) -> DispatchBody:
    """Tensors over the body of a dispatch frame that begins `offset` bytes into `buffer` (writable)."""
    at = offset + rows * width * dtype.itemsize
    return DispatchBody(
        torch.frombuffer(buffer, dtype=dtype, count=rows * width, offset=offset).view(rows, width),
        torch.frombuffer(buffer, dtype=torch.int32, count=pairs, offset=at),
        torch.frombuffer(buffer, dtype=torch.int32, count=pairs, offset=at + 4 * pairs),
        torch.frombuffer(buffer, dtype=torch.float32, count=pairs, offset=at + 8 * pairs),
    )


def parse_dispatch(header: Header, body: memoryview) -> DispatchBody:
    """Tensors over `body` (header.body_bytes long, writable). Raises WireError if a pair names a row that isn't."""
    parsed = dispatch_views(body, DTYPES[header.dtype], header.rows, header.width, header.pairs)
    # As unsigned numbers, negative rows are the largest of all: one pass finds both kinds of wrong ones.
    largest = int(parsed.rows.numpy().view(np.uint32).max())
    if largest >= header.rows:
        raise WireError(f"a pair names row {np.uint32(largest).astype(np.int32)}; the frame has {header.rows} rows")
    return parsed


def parse_combine(header: Header, body: memoryview) -> torch.Tensor:
    """y [R, H] over `body`, without a copy."""
    return torch.frombuffer(body, dtype=DTYPES[header.dtype], count=header.rows * header.width).view(
        header.rows, header.width
    )


def parse_error(header: Header, body: Buffer) -> str:
    """The words of an error frame; bytes that aren't UTF-8 are replaced."""
    return bytes(body[: header.rows]).decode(errors="replace")


def total_bytes(parts: Sequence[Buffer]) -> int:
    """Bytes of all the buffers of a frame."""
    return sum(len(part) for part in parts)
