"""A static, even placement.

Glossary: a *logical expert* is (layer, expert id) of the checkpoint; a *physical expert* is one copy of it in a *slot*
of one shard; *redundancy* is how many shards hold each logical expert.

Worked number: 10 experts, 3 shards, redundancy 2 are 20 copies a layer, so 7 slots a shard. In layer 0 expert e has
copies 2e and 2e + 1, and copy p goes to shard p mod 3: expert 0 to shards 0 and 1, expert 1 to shards 2 and 0,
expert 2 to shards 1 and 2, ... Layer 1 is turned by one shard, so that no shard is the fullest in every layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int32]]


def slots_per_shard(num_experts: int, shards: int, redundancy: int) -> int:
    """Slots that one shard needs in each layer for an even placement: ceil(experts * redundancy / shards)."""
    return -(-num_experts * redundancy // shards)


def even_slots(num_layers: int, num_experts: int, shards: int, redundancy: int) -> IntArray:
    """Expert id in each slot: [shards, num_layers, slots], -1 where a slot stays empty.

    Every expert is on exactly `redundancy` distinct shards, and the shards of one layer differ by at most one expert.
    Raises ValueError unless 1 <= redundancy <= shards.
    """
    if not 1 <= redundancy <= shards:
        raise ValueError(f"redundancy {redundancy}; allowed: 1 to {shards}, the number of shards")
    slots = np.full((shards, num_layers, slots_per_shard(num_experts, shards, redundancy)), -1, dtype=np.int32)
    copies = np.arange(num_experts * redundancy)
    for layer in range(num_layers):
        shard_of = (copies + layer) % shards
        for shard in range(shards):
            held = copies[shard_of == shard] // redundancy
            slots[shard, layer, : len(held)] = held
    return slots
