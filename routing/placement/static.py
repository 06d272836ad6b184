"""A static, even placement.

Glossary: a *logical expert* is (layer, expert id) of the checkpoint; a *physical expert* is one copy of it in a *slot*
of one shard; *redundancy* is how many shards hold each logical expert; *partners* are shards that hold a copy of the
same expert, and take over each other's tokens when one dies.

Worked number: 10 experts, 3 shards, redundancy 2 are 20 copies a layer, so 7 slots a shard. As many experts as shards
make a block in which every shard gets two copies: in the first block of layer 0 an expert is on a shard and the next
one, expert 0 on 0 and 1, expert 1 on 2 and 0, expert 2 on 1 and 2. In the second block it is on a shard and the one
after the next, and so on, so that a shard's partners are all others in turn and not always the same neighbour. Layer 1
is turned by one shard, so that no shard is the fullest in every layer.
"""

from __future__ import annotations

from math import gcd
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
    blocks = num_experts // shards
    rest = _rest(num_experts - blocks * shards, shards, redundancy)
    for layer in range(num_layers):
        numbers = range(layer * blocks, (layer + 1) * blocks)
        shards_of = np.concatenate([*(_block(number, shards, redundancy) for number in numbers), rest])
        shards_of = (shards_of + layer) % shards
        for shard in range(shards):
            held = (shards_of == shard).any(axis=1).nonzero()[0]
            slots[shard, layer, : len(held)] = held
    return slots


def _block(number: int, shards: int, redundancy: int) -> IntArray:
    """Shards of as many experts as there are shards: [shards, redundancy]; each shard comes `redundancy` times.

    The first copies are a permutation of the shards; the others are further on by distances that change with `number`.
    """
    expert = np.arange(shards)
    first = expert * redundancy + expert // (shards // gcd(shards, redundancy))
    further = np.arange(redundancy - 1) + number * (redundancy - 1)
    distance = np.append(0, 1 + further % max(1, shards - 1))
    placed: IntArray = ((first[:, None] + distance) % shards).astype(np.int32)
    return placed


def _rest(experts: int, shards: int, redundancy: int) -> IntArray:
    """Shards of the experts after the last whole block: [experts, redundancy], copy after copy to shard after shard.

    Where that would come round to the same groups of shards, every second round takes shards far apart instead.
    """
    copies = np.arange(experts * redundancy).reshape(experts, redundancy)
    if shards % redundancy == 0:
        groups = shards // redundancy
        expert = np.arange(experts)[:, None]
        apart = expert % groups + groups * np.arange(redundancy)
        copies = np.where(expert // groups % 2 == 1, apart, copies)
    placed: IntArray = (copies % shards).astype(np.int32)
    return placed
