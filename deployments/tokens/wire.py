"""Outputs as bytes.

    message   size u32 | buffers u16 | size of each buffer u32 ... | the buffers

Sizes are big-endian; the first counts all that follows it. The buffers are vLLM's own encoding of a Batch (msgpack,
and large arrays beside it). No pickle is read. A message's size is checked before memory is taken.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import cast

import msgspec
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from expertmesh.errors import WireError

MAX_BYTES = 1 << 30
"""Of a message: log-probabilities of a long prompt are the largest."""
_SIZE = struct.Struct(">I")
_COUNT = struct.Struct(">H")


class Batch(msgspec.Struct, array_like=True, gc=False):
    """What a replica has to tell at one moment."""

    outputs: list[EngineCoreOutput] = []
    """Those of a request in their order."""
    alive: list[str] = []
    """Requests that were taken, or wait while the engine works for others."""
    ended: list[str] = []
    """Requests of which nothing more comes."""


def encoder() -> Callable[[Batch], list[bytes | memoryview]]:
    """Makes messages, in pieces to be written one after another. Raises WireError if one is too large."""
    packer = MsgpackEncoder()

    def encode(batch: Batch) -> list[bytes | memoryview]:
        buffers = [memoryview(cast("bytes", buffer)).cast("B") for buffer in packer.encode(batch)]  # or bytearrays
        sizes = struct.pack(f">{len(buffers)}I", *(buffer.nbytes for buffer in buffers))
        total = _COUNT.size + len(sizes) + sum(buffer.nbytes for buffer in buffers)
        if total > MAX_BYTES:
            raise WireError(f"{total} bytes of outputs at once; {MAX_BYTES} are allowed")
        return [_SIZE.pack(total) + _COUNT.pack(len(buffers)) + sizes, *buffers]

    return encode


def decoder() -> Callable[[bytearray], Batch]:
    """Reads what follows a message's size. Raises WireError for what is no batch."""
    unpacker = MsgpackDecoder(Batch)

    def decode(body: bytearray) -> Batch:
        view = memoryview(body)
        (count,) = _COUNT.unpack_from(view) if len(view) >= _COUNT.size else (0,)
        begin = _COUNT.size + _SIZE.size * count
        if count == 0 or len(view) < begin:
            raise WireError(f"a message of {len(view)} bytes with {count} buffers")
        sizes = struct.unpack_from(f">{count}I", view, _COUNT.size)
        if begin + sum(sizes) != len(view):
            raise WireError(f"a message of {len(view)} bytes whose buffers have {sum(sizes)}")
        buffers = []
        for size in sizes:
            buffers.append(view[begin : begin + size])
            begin += size
        try:
            batch: Batch = unpacker.decode(buffers)
        except Exception as error:  # msgspec's, and what vLLM's hooks for arrays raise
            raise WireError(f"outputs that are not understood: {error}") from error
        return batch

    return decode


async def read_body(reader: asyncio.StreamReader) -> bytearray:
    """The next message without its size. Raises WireError for a size that none has, EOFError at the end."""
    (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
    if not _COUNT.size < size <= MAX_BYTES:
        raise WireError(f"a message of {size} bytes; allowed: {_COUNT.size + 1} to {MAX_BYTES}")
    return bytearray(await reader.readexactly(size))
