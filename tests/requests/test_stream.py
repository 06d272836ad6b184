"""The bytes of KV events: what is written is read back, and nothing else is taken."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import WireError
from expertmesh.routing.requests import Cleared, Lapsed, Offloaded, Removed, Stored
from expertmesh.routing.requests.stream import (
    HEAD_BYTES,
    MAX_VALUES,
    Opening,
    Record,
    body_bytes,
    decode,
    encode,
    short_hash,
)

hashes = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20).map(tuple)
records = st.one_of(
    st.builds(Opening, st.integers(1, 2**32)),
    st.just(Cleared()),
    st.builds(Stored, hashes),
    *(st.builds(kind, hashes) for kind in (Removed, Offloaded, Lapsed)),
)


def read(data: bytes) -> list[Record]:
    found = []
    while data:
        head, data = data[:HEAD_BYTES], data[HEAD_BYTES:]
        size = body_bytes(head)
        found.append(decode(head, data[:size]))
        data = data[size:]
    return found


@settings(deadline=None)
@given(written=st.lists(records, max_size=5))
def test_what_is_written_is_read(written: list[Record]) -> None:
    assert read(encode(written)) == written


def test_a_long_event_is_several_records() -> None:
    blocks = tuple(range(MAX_VALUES + 3))
    assert read(encode([Stored(blocks)])) == [Stored(blocks[:MAX_VALUES]), Stored(blocks[MAX_VALUES:])]
    assert encode([Stored(())]) == b""


@settings(deadline=None)
@given(kind=st.integers(0, 255), count=st.integers(0, 2**32 - 1))
def test_no_head_asks_for_more_than_a_record(kind: int, count: int) -> None:
    head = struct.pack(">BI", kind, count)
    try:
        size = body_bytes(head)
    except WireError:
        return
    assert size <= 8 * MAX_VALUES
    assert size == 8 * count
    assert kind <= 5


@pytest.mark.parametrize(
    ("kind", "count"), [(0, 0), (0, 2), (1, 0), (1, MAX_VALUES + 1), (2, 0), (3, 1), (4, 0), (6, 1)]
)
def test_heads_of_no_record(kind: int, count: int) -> None:
    with pytest.raises(WireError, match=f"record of kind {kind} with {count} values"):
        body_bytes(struct.pack(">BI", kind, count))


def test_blocks_of_no_tokens() -> None:
    with pytest.raises(WireError, match="blocks of no tokens"):
        decode(struct.pack(">BI", 0, 1), bytes(8))


@settings(deadline=None)
@given(raw=st.binary(min_size=8, max_size=32))
def test_a_short_hash_is_the_same_of_bytes_and_of_vllms_int(raw: bytes) -> None:
    assert short_hash(raw) == short_hash(int.from_bytes(raw, "big") & (2**64 - 1))
    assert 0 <= short_hash(raw) < 2**64
