"""Outputs as bytes and back, and bytes that are none."""

from __future__ import annotations

import asyncio
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from expertmesh.deployments.tokens.wire import MAX_BYTES, Batch, decoder, encoder, read_body
from expertmesh.errors import WireError


def message(batch: Batch) -> bytes:
    return b"".join(encoder()(batch))


def body_of(*pieces: bytes) -> bytearray:
    async def read() -> bytearray:
        reader = asyncio.StreamReader()
        for piece in pieces:
            reader.feed_data(piece)
        reader.feed_eof()
        return await read_body(reader)

    return asyncio.run(read())


def test_outputs_come_back_with_arrays_small_and_large() -> None:
    ids, values = np.arange(400, dtype=np.int32).reshape(20, 20), np.linspace(-9, 0, 400, dtype=np.float32)
    tensors = LogprobsTensors(torch.arange(6).reshape(2, 3), torch.full((2, 3), -0.5), torch.tensor([1, 2]))
    output = EngineCoreOutput(
        "a",
        [5, 6],
        new_logprobs=LogprobsLists(ids, values.reshape(20, 20), np.arange(20, dtype=np.int32)),
        new_prompt_logprobs_tensors=tensors,
        finish_reason=FinishReason.STOP,
        stop_reason="end",
    )
    batch = decoder()(body_of(message(Batch([output], ["b"], ["a"]))))
    (found,) = batch.outputs
    assert (found.request_id, found.new_token_ids, found.finish_reason, found.stop_reason) == (
        "a",
        [5, 6],
        FinishReason.STOP,
        "end",
    )
    assert found.new_logprobs is not None
    assert found.new_prompt_logprobs_tensors is not None
    np.testing.assert_array_equal(found.new_logprobs.logprob_token_ids, ids)
    np.testing.assert_array_equal(found.new_logprobs.logprobs, values.reshape(20, 20))
    assert all(map(torch.equal, found.new_prompt_logprobs_tensors[:3], tensors[:3]))
    assert (batch.alive, batch.ended) == (["b"], ["a"])


def test_a_message_may_come_in_pieces() -> None:
    whole = message(Batch([EngineCoreOutput("a", [1])]))
    assert body_of(*(bytes([byte]) for byte in whole)) == whole[4:]


@pytest.mark.parametrize("size", [0, 2, MAX_BYTES + 1])
def test_sizes_that_no_message_has_are_refused_before_memory_is_taken(size: int) -> None:
    with pytest.raises(WireError, match=f"a message of {size} bytes"):
        body_of(struct.pack(">I", size))


def test_a_message_that_breaks_off_is_an_end() -> None:
    with pytest.raises(EOFError):
        body_of(message(Batch([EngineCoreOutput("a", [1])]))[:-1])


WHOLE = message(Batch([EngineCoreOutput("a", [1, 2, 3])], ["b"], ["c"]))[4:]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decoder()(bytearray(data))


@settings(max_examples=500, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_another_message(position: int, value: int) -> None:
    data = bytearray(WHOLE)
    data[position] = value
    try:
        batch = decoder()(data)
    except WireError:
        return
    assert isinstance(batch, Batch)
