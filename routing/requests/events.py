"""What a replica says about its prefix cache: vLLM's KV events without what the router doesn't need.

A block's hash covers all tokens before it, as vLLM's does, so equal hashes mean equal prefixes. Only full blocks of
the replica's own KV cache belong here: of a hybrid model's groups those of full attention, of vLLM's media the device's
and, for what the KV store holds, the storage.
"""

from __future__ import annotations

from dataclasses import dataclass

BlockHash = bytes | int


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks that are in the cache from now on."""

    blocks: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks that are no longer in the cache."""

    blocks: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    """The cache is empty."""


@dataclass(frozen=True, slots=True)
class Offloaded:
    """Blocks that the KV store has, as the replica has just seen: every replica can fetch them."""

    blocks: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Lapsed:
    """Blocks that the KV store does not have, as the replica has just seen."""

    blocks: tuple[BlockHash, ...]


Event = Stored | Removed | Cleared | Offloaded | Lapsed


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events in the order in which they happened. `sequence` counts a replica's batches without a gap."""

    sequence: int
    events: tuple[Event, ...]
