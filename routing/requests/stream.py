"""A replica's KV events as bytes, as they travel to those that route requests to it.

    record   kind u8 | number of values u32 | values u64, all big-endian

The first record of a stream is an Opening; all others are events, whose values are block hashes cut to their low 64
bits: they choose replicas, they never vouch for what is in a block. A record's size is checked before memory is taken.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from expertmesh.errors import WireError
from expertmesh.routing.requests.events import BlockHash, Cleared, Event, Lapsed, Offloaded, Removed, Stored

MAX_VALUES = 8192
"""Of one record; longer events are sent as several."""
_HEAD = struct.Struct(">BI")
HEAD_BYTES = _HEAD.size
_VALUE_BYTES = 8
_OPENING, _STORED, _REMOVED, _CLEARED, _OFFLOADED, _LAPSED = range(6)
_OF_BLOCKS: dict[int, type[Stored] | type[Removed] | type[Offloaded] | type[Lapsed]] = {
    _STORED: Stored,
    _REMOVED: Removed,
    _OFFLOADED: Offloaded,
    _LAPSED: Lapsed,
}
_KINDS = {of_blocks: kind for kind, of_blocks in _OF_BLOCKS.items()}
_LOW_64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Opening:
    """What a reader must know before it can use the events."""

    block_tokens: int
    """Tokens of one block."""


Record = Opening | Event


def short_hash(block: BlockHash) -> int:
    """The low 64 bits of a block hash; of a hash that is an int already as of the bytes that it was made from."""
    return block & _LOW_64 if isinstance(block, int) else int.from_bytes(block[-_VALUE_BYTES:], "big")


def encode(records: Iterable[Record]) -> bytes:
    """The bytes of some records. Block hashes must be short ones."""
    return b"".join(_encoded(records))


def _encoded(records: Iterable[Record]) -> Iterator[bytes]:
    for record in records:
        match record:
            case Opening(block_tokens):
                yield _record(_OPENING, (block_tokens,))
            case Cleared():
                yield _record(_CLEARED, ())
            case Stored(blocks) | Removed(blocks) | Offloaded(blocks) | Lapsed(blocks):
                kind = _KINDS[type(record)]
                for begin in range(0, len(blocks), MAX_VALUES):
                    yield _record(kind, blocks[begin : begin + MAX_VALUES])


def _record(kind: int, values: tuple[BlockHash, ...]) -> bytes:
    return _HEAD.pack(kind, len(values)) + struct.pack(f">{len(values)}Q", *values)


def body_bytes(head: bytes) -> int:
    """Size of what follows a record's head [HEAD_BYTES]. Raises WireError for a head that no record has."""
    kind, count = _HEAD.unpack(head)
    allowed = {_OPENING: count == 1, _CLEARED: count == 0}.get(kind, kind in _OF_BLOCKS and 0 < count <= MAX_VALUES)
    if not allowed:
        raise WireError(f"record of kind {kind} with {count} values")
    return int(count) * _VALUE_BYTES


def decode(head: bytes, body: bytes) -> Record:
    """The record of a head that `body_bytes` has taken and as many bytes as it said. Raises WireError."""
    values = struct.unpack(f">{len(body) // _VALUE_BYTES}Q", body)
    kind = head[0]
    if kind == _OPENING:
        if not values[0]:
            raise WireError("blocks of no tokens")
        return Opening(values[0])
    if kind == _CLEARED:
        return Cleared()
    return _OF_BLOCKS[kind](values)
